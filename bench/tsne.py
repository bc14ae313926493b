"""`python bench/tsne.py 1000 10000`: t-SNE by scikit-learn and by openTSNE at these sizes, times as ratios to scikit-learn's.

The data are mixtures of two digits with noise, on their first 50 principal axes. Fifty thousand points take ten minutes.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from openTSNE import TSNE as Open
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE

from harness_representations.maps import principal


def points(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    digits = load_digits().data
    one, other = (digits[rng.integers(0, len(digits), count)] for _ in range(2))
    return principal(one + 0.15 * (other - one) + rng.standard_normal((count, 64)), 50)[0].astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[1000, 10_000])
    for count in parser.parse_args().sizes:
        x = points(count)
        begun = time.perf_counter()
        own = TSNE(perplexity=30, init="pca", learning_rate="auto", random_state=0, max_iter=1000, n_jobs=2).fit(x)
        base = time.perf_counter() - begun
        print(f"{count} points: scikit-learn 1 ({base:.1f} s), KL {own.kl_divergence_:.3f}", flush=True)
        for method in ("bh", "fft"):
            if method == "bh" and count > 20_000:
                continue
            begun = time.perf_counter()
            found = Open(
                perplexity=30, random_state=0, n_jobs=2, negative_gradient_method=method, early_exaggeration_iter=250, n_iter=750
            ).fit(x)  # fmt: skip
            print(f"  openTSNE {method} {(time.perf_counter() - begun) / base:.2f}, KL {float(found.kl_divergence):.3f}", flush=True)


if __name__ == "__main__":
    main()
