"""The compiled passes of L-BFGS against torch's operations and numpy's, in the rule and in the loop."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from harness import optimise as o
from harness.context import Draws
from harness.optimise import lbfgs_compiled, rules
from harness.optimise.conditioners import Conditions

KERNELS = ("_changes", "_mixed", "_onward")


@pytest.fixture
def ran(monkeypatch):
    """Pictures of any size go through the compiled passes; which of them ran."""
    found = []
    run = lbfgs_compiled._run

    def noted(kernel, *arguments):
        found.append(kernel)
        run(kernel, *arguments)

    monkeypatch.setattr(rules, "LARGE", 1)
    monkeypatch.setattr(lbfgs_compiled, "_run", noted)
    return lambda: {name for name in KERNELS if getattr(lbfgs_compiled, name) in found}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Sharper:
    """A conditioner from elsewhere, which says nothing about pixels and gives what is its own."""

    mean = 0.0

    def __call__(self, gradient):
        self.mean = 0.5 * self.mean + gradient + 0.5 * gradient.flip(3)
        return self.mean


@dataclass(frozen=True)
class Turned:
    """Mixes colours by a matrix that does not commute with others."""

    seed: int

    def colour_matrix(self, channels):
        matrix = normal(channels, channels, seed=self.seed).numpy()
        return matrix @ matrix.T / channels + np.eye(channels, dtype=np.float32)

    def __call__(self, gradient):
        return torch.einsum("ij,njhw->nihw", torch.from_numpy(self.colour_matrix(gradient.shape[1])), gradient)


@pytest.mark.parametrize(
    ("conditioners", "passes"),
    [
        ([], set(KERNELS)),
        ([Turned(1), Turned(2)], set(KERNELS)),
        ([o.NaturalColours(0.6)], set(KERNELS)),
        ([o.ClipSmallGradients(0), o.NaturalColours(1.0), o.NaturalColours(0.3), o.LowFrequencies(0)], set(KERNELS)),
        ([o.NaturalColours(1.0), o.LowFrequencies(1.0)], {"_changes", "_onward"}),
        ([o.ClipSmallGradients(30)], {"_changes", "_onward"}),
        ([Sharper], {"_changes", "_onward"}),
    ],
)
@pytest.mark.parametrize("shape", [(2, 3, 33, 47), (2, 3, 190, 191)])  # blocks and a part; two blocks a share, and not all shares
def test_compiled_steps_are_those_of_torch(conditioners, passes, shape, ran, monkeypatch):
    """Two pictures whose steps are kept and taken back at different times, of one more often than six times in a row."""
    ways = [(10**9, o.LBFGS(history=3), {}), (1, o.LBFGS(history=3), {})]
    conditions = [Conditions([c() if isinstance(c, type) else c for c in conditioners]) for _ in ways]
    stretch = normal(*shape).exp()
    z, gradient = normal(*shape, seed=1), normal(*shape, seed=2)
    for step in range(19):
        steps = []
        for (large, rule, memory), condition in zip(ways, conditions, strict=True):
            monkeypatch.setattr(rules, "LARGE", large)
            steps.append(rule(memory, gradient, condition, 0.1, step, False))
        assert float((steps[1] - steps[0]).norm() / steps[0].norm()) < 1e-3
        rose = torch.tensor([step != 4, step not in (5, 7, *range(9, 17))])
        moved = normal(*shape, seed=10 + step)
        new, slope = z + moved, gradient - stretch * moved
        slope[~rose] = torch.nan
        for large, rule, memory in ways:
            monkeypatch.setattr(rules, "LARGE", large)
            rule.judged(memory, rose, (new, z), (slope, gradient), step + 1)
        kept = rose.view(-1, 1, 1, 1)
        z, gradient = torch.where(kept, new, z), torch.where(kept, slope, gradient)
    assert ran() == passes
    for name, value in ways[0][2].items():
        torch.testing.assert_close(ways[1][2][name], value, rtol=1e-4, atol=1e-4 * float(value.double().abs().max()))


@pytest.mark.parametrize("colours", [1, 2, 3, 4])
@pytest.mark.parametrize("pixels", [5, lbfgs_compiled.BLOCK, 100_000])
def test_colours_are_mixed_pixel_by_pixel(colours, pixels):
    gradient, bends, shares = normal(pixels * colours), normal(5, pixels * colours, seed=1), normal(5, seed=2)
    mixing = normal(colours, colours, seed=3).numpy()  # what is turned over or moved is another matrix
    found = torch.empty_like(gradient)
    sums = lbfgs_compiled.mixed(gradient, bends, shares, found, mixing)
    q = gradient.double().numpy() + shares.double().numpy() @ bends.double().numpy()
    wanted = (q.reshape(pixels, colours) @ mixing.T.astype(np.float64)).ravel()
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)
    products = [*(bends.double().numpy() @ wanted), q @ wanted, q @ q]
    np.testing.assert_allclose(sums.numpy(), products, rtol=1e-4, atol=1e-5 * (q @ q))


def test_changes_are_stored_and_their_products_are_numpys():
    size = 250_000
    z, before, gradient, earlier = (normal(size, seed=i) for i in range(4))
    moves, bends = normal(3, size, seed=4), normal(3, size, seed=5)
    others = moves[[0, 2]].clone(), bends[[0, 2]].clone()
    sums = lbfgs_compiled.changes(z, before, gradient, earlier, moves, bends, 1)
    assert torch.equal(moves[1], z - before) and torch.equal(bends[1], gradient - earlier)
    assert torch.equal(moves[[0, 2]], others[0]) and torch.equal(bends[[0, 2]], others[1])
    s, y = moves.double(), bends[1].double()
    torch.testing.assert_close(sums.double(), torch.stack([*(s @ gradient.double()), s[1] @ y, y @ y]), rtol=1e-4, atol=0.5)


@pytest.mark.parametrize(
    ("shape", "conditioners", "kernel"),
    [
        ((1, 5, 20, 21), [Turned(1)], False),  # a block would end within a pixel
        ((1, 5, 20, 21), [o.NaturalColours(1.0)], True),  # which mixes three colours alone
        ((1, 4, 20, 21), [Turned(1)], True),
        ((1, 3, 420), [Turned(1)], False),  # not pictures
        ((1, 3, 420), [], True),
    ],
)
def test_only_whole_pixels_are_mixed(shape, conditioners, kernel, ran):
    rules._conditioned(torch.zeros(1, 2, normal(*shape).numel()), normal(*shape), torch.zeros(1, 1, 2), Condition(conditioners))
    assert ran() == ({"_mixed"} if kernel else set())


class Condition(Conditions):
    def __call__(self, gradient):
        return gradient.clone()


def test_steps_in_double_precision_and_of_small_pictures_are_torchs(monkeypatch):
    monkeypatch.setattr(lbfgs_compiled, "_run", None)
    for x in (normal(1, 3, 300, 300).double(), normal(1, 3, 200, 200)):
        rule, memory = o.LBFGS(), {}
        rule(memory, x, Conditions([]), 0.1, 0, False)
        rule.judged(memory, torch.tensor([True]), (x, 0 * x), (-x, x), 1)
        assert rule(memory, -x, Conditions([]), 0.1, 1, False).dtype == x.dtype


@pytest.mark.parametrize("large", [1, 10**9])
@pytest.mark.parametrize("factor", [1e-16, 1e-8, 1.0, 1e16])
def test_the_scale_of_a_score_does_not_matter(factor, large, monkeypatch):
    """Products of the smallest gradients are no numbers of single precision; what they are divided by are none either."""
    monkeypatch.setattr(rules, "LARGE", large)
    stretch, z = factor * normal(1, 1, 50, 60).square().add(0.5), normal(1, 1, 50, 60, seed=1)
    rule, memory, before = o.LBFGS(), {}, None
    for step in range(40):
        gradient = -stretch * z
        score = -(stretch.double() * z.double().square()).sum().view(1) / 2
        if before is not None:
            rose = score >= before[2]
            rule.judged(memory, rose, (z, before[0]), (gradient, before[1]), step)
            if not rose:
                z, gradient, score = before
        before = z, gradient, score
        z = z + rule(memory, gradient, Conditions([]), 0.1, step, False)
    assert float(before[1].norm() / factor) < 1e-2


@pytest.mark.parametrize("large", [1, 10**9])
def test_changes_whose_square_is_no_number_are_no_pairs(large, monkeypatch):
    """s . y is above zero in single precision, y . y is not."""
    monkeypatch.setattr(rules, "LARGE", large)
    rule, memory, z, y = o.LBFGS(history=3), {}, normal(1, 1, 50, 60), 1e-24 * normal(1, 1, 50, 60)
    rule(memory, 1e-24 * z, Conditions([]), 0.1, 0, False)
    rule.judged(memory, torch.tensor([True]), (z + y * 1e24, z), (1e-24 * z - y, 1e-24 * z), 1)
    assert not memory["good"].any()
    assert memory["kept"].tolist() == [0]
    assert torch.isfinite(rule(memory, 1e-24 * z - y, Conditions([]), 0.1, 1, False)).all()


ALONE = """
import numba, torch
from harness.optimise import lbfgs_compiled

seen = []
kernel = lbfgs_compiled._changes
lbfgs_compiled._changes = lambda *arguments: (seen.append(numba.get_num_threads()), kernel(*arguments))
torch.set_num_threads(1)
parts = [torch.rand(5000, generator=torch.Generator().manual_seed(i)) for i in range(4)]
one = lbfgs_compiled.changes(*parts, torch.ones(2, 5000), torch.ones(2, 5000), 0)
assert torch.get_num_threads() == 1 and seen == [1], (torch.get_num_threads(), seen)
numba.set_num_threads(1)
torch.set_num_threads(4)
two = lbfgs_compiled.changes(*parts, torch.ones(2, 5000), torch.ones(2, 5000), 0)
assert torch.get_num_threads() == 4 and seen[1] == min(4, numba.config.NUMBA_NUM_THREADS), seen
assert numba.get_num_threads() == 1
assert torch.equal(one, two)
"""


def test_torch_says_how_many_threads_and_neither_library_changes_the_others(tmp_path):
    """In a process where numba has not begun; sums do not depend on it."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


BROKEN = """
from harness import compiled
from harness.optimise import lbfgs_compiled
import torch

class Cache:
    def __getattr__(self, name):
        def full(*_):
            raise OSError(28, "No space left on device")
        return full

lbfgs_compiled._changes._cache = Cache()
for _ in range(2):
    moves = torch.zeros(2, 5000)
    lbfgs_compiled.changes(torch.ones(5000), torch.zeros(5000), torch.ones(5000), torch.zeros(5000), moves, torch.zeros(2, 5000), 0)
    assert moves[0].tolist() == [1.0] * 5000
"""


def test_a_full_disk_costs_time_alone():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_is_not_a_number_stays_so():
    gradient = normal(5000)
    gradient[3000] = torch.nan
    sums = lbfgs_compiled.changes(normal(5000), normal(5000), gradient, normal(5000), torch.zeros(2, 5000), torch.zeros(2, 5000), 0)
    assert torch.isnan(sums).all()
    to = torch.empty(5000)
    assert torch.isnan(lbfgs_compiled.mixed(gradient, torch.ones(2, 5000), normal(2), to, np.ones((1, 1), np.float32))).all()
    assert torch.isnan(to).nonzero().flatten().tolist() == [3000]
    for name in KERNELS:  # compilers need not make use of it
        assert not getattr(lbfgs_compiled, name).targetoptions["fastmath"] & {"fast", "nnan", "ninf"}


def ascent(model, start, steps, begin=None, **settings):
    random = Draws([str(i) for i in range(len(start))], torch.device("cpu"), torch.float32, 0)
    classes = torch.tensor([3, 8])[: len(start)]
    objective = o.class_score(classes) - 0.1 * o.squared_norm(0.5)
    return o.ascend(model, objective, start, steps=steps, step_size=0.02, draws=random, rule="lbfgs", begin=begin, **settings)


def test_the_loop_climbs_as_high_by_either(ran, digits_cnn, monkeypatch):
    start = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    made = ascent(digits_cnn, start, 40)
    assert ran() == set(KERNELS)
    assert (made.scores.diff(dim=0) >= 0).all()
    assert "ahead" not in made.state.memory
    monkeypatch.setattr(rules, "LARGE", 10**9)
    peer = ascent(digits_cnn, start, 40)
    torch.testing.assert_close(made.scores[:6], peer.scores[:6], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.scores[-1], peer.scores[-1], rtol=0.02, atol=0)


def test_going_on_is_as_if_it_had_not_stopped(ran, digits_cnn):
    start = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    whole = ascent(digits_cnn, start, 31, operators=[o.Clamp()])
    for stop in (1, 13):
        first = ascent(digits_cnn, start, stop, operators=[o.Clamp()])
        begin = o.State.of({k: np.asarray(v).copy("C") for k, v in first.state.arrays().items()}, torch.device("cpu"))
        rest = ascent(digits_cnn, start, 31, begin=begin, operators=[o.Clamp()])
        assert torch.equal(rest.images, whole.images)
    assert ran() == set(KERNELS)


def test_one_form_of_every_pass_is_compiled(ran, digits_cnn):
    """Arrays that lie otherwise would be compiled for anew, which takes seconds."""
    start = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    first = ascent(digits_cnn, start, 5)
    begin = o.State.of({k: np.asarray(v).copy("C") for k, v in first.state.arrays().items()}, torch.device("cpu"))
    ascent(digits_cnn, start, 10, begin=begin)
    ascent(digits_cnn, start[:1], 5)
    assert all(len(getattr(lbfgs_compiled, name).signatures) == 1 for name in KERNELS)
