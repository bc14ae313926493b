"""How well a Gabor function describes a small filter."""

from __future__ import annotations

import numpy as np

SMALLEST = 5  # a 3 x 3 filter has as many values as the model has parameters: a fit would say nothing


def leading_component(filters: np.ndarray) -> np.ndarray:
    """(N, C, k, k) -> (N, k, k): each filter's strongest spatial pattern over its colours (first singular vector)."""
    n, channels, height, width = filters.shape
    _, scale, patterns = np.linalg.svd(filters.reshape(n, channels, -1).astype(np.float64), full_matrices=False)
    return (scale[:, :1] * patterns[:, 0]).reshape(n, height, width)


def _basis(parameters: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Even and odd Gabor and a constant, (pixels, 3), for (x0, y0, log sx, log sy, angle, frequency)."""
    x0, y0, log_sx, log_sy, angle, frequency = parameters
    u = (x - x0) * np.cos(angle) + (y - y0) * np.sin(angle)
    v = -(x - x0) * np.sin(angle) + (y - y0) * np.cos(angle)
    envelope = np.exp(-0.5 * ((u / np.exp(log_sx)) ** 2 + (v / np.exp(log_sy)) ** 2))
    wave = 2 * np.pi * frequency * u
    return np.stack([envelope * np.cos(wave), envelope * np.sin(wave), np.ones_like(x)], 1)


def gabor_fit(pattern: np.ndarray) -> float:
    """Adjusted R2 in (-inf, 1] of the best Gabor function for a (k, k) pattern; amplitude and phase are solved linearly."""
    from scipy.optimize import least_squares

    size = pattern.shape[0]
    y, x = (axis.ravel() - (size - 1) / 2 for axis in np.mgrid[:size, :size].astype(np.float64))
    target = pattern.ravel().astype(np.float64)
    total = float(((target - target.mean()) ** 2).sum())
    if total < 1e-20:
        return 0.0

    def residual(parameters: np.ndarray) -> np.ndarray:
        basis = _basis(parameters, y, x)
        return basis @ np.linalg.lstsq(basis, target, rcond=None)[0] - target

    spectrum = np.abs(np.fft.fftshift(np.fft.fft2(pattern - pattern.mean(), s=(32, 32))))
    row, column = np.unravel_index(int(spectrum.argmax()), spectrum.shape)
    fy, fx = (int(row) - 16) / 32, (int(column) - 16) / 32
    half = size / 2
    low = [-half, -half, np.log(0.4), np.log(0.4), -2 * np.pi, 0.0]
    high = [half, half, np.log(2 * size), np.log(2 * size), 2 * np.pi, 0.7]
    start = [0.0, 0.0, np.log(size / 4), np.log(size / 4), float(np.arctan2(fy, fx)), float(np.clip(np.hypot(fx, fy), 0.02, 0.6))]
    found = least_squares(residual, start, bounds=(low, high), max_nfev=100)
    r2 = 1 - 2 * float(found.cost) / total
    values, parameters = size * size, 8
    return 1 - (1 - r2) * (values - 1) / (values - parameters - 1)


def coherence(patterns: np.ndarray) -> np.ndarray:
    """(..., k, k) -> (...,): how much one direction prevails in a pattern's spectrum: 0 none, 1 all energy along one line."""
    size = 4 * max(patterns.shape[-2:]) + 1  # odd: the frequencies are symmetric about zero
    f = np.fft.fftfreq(size)
    flat = patterns.reshape(-1, *patterns.shape[-2:])
    found = np.zeros(len(flat))
    for start in range(0, len(flat), 256):
        spectrum = np.abs(np.fft.fft2(flat[start : start + 256].astype(np.float64), s=(size, size))) ** 2
        across, down = spectrum.sum(1) @ f**2, spectrum.sum(2) @ f**2
        mixed = np.einsum("nyx,y,x->n", spectrum, f, f)
        total = across + down
        found[start : start + 256] = np.hypot(across - down, 2 * mixed) / np.where(total > 0, total, 1)
    return found.reshape(patterns.shape[:-2])
