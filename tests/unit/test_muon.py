import pytest
import torch

from harness.muon import Muon, orthogonal


def kernel(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8, 72), (40, 6), (5, 5)])
def test_orthogonal_keeps_the_directions_and_levels_the_values(shape):
    x = kernel(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found = u.T @ orthogonal(x) @ v.T
    values = found.diagonal()
    assert s.max() / s.min() > 1.5
    assert ((values > 0.68) & (values < 1.21)).all()
    assert (found - torch.diag(values)).abs().max() < 1e-9
    assert torch.allclose(orthogonal(1e-6 * x), orthogonal(x), atol=1e-9)  # the size of a slope plays no part


def test_nothing_to_learn_changes_nothing():
    w = torch.nn.Parameter(kernel(4, 3, 3, 3))
    before = w.detach().clone()
    optimiser = Muon([w])
    w.grad = torch.zeros_like(w)
    optimiser.step()
    assert torch.equal(w, before)


def test_entries_change_by_the_rate_whatever_the_shape():
    for shape in ((16, 16, 3, 3), (64, 8, 3, 3), (96, 8, 1, 1)):
        w = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        w.grad = kernel(*shape)
        Muon([w], lr=0.01).step()
        assert 0.7 * 0.004 < w.detach().square().mean().sqrt() < 1.15 * 0.004, shape
        assert (w * w.grad).sum() < 0  # downhill


def test_steps_are_those_of_torch():
    peer = getattr(torch.optim, "Muon", None)
    if peer is None:
        pytest.skip("this torch has no Muon")
    ours, theirs = (torch.nn.Parameter(kernel(12, 45).float()) for _ in range(2))
    before = ours.detach().clone()
    a, b = Muon([ours], lr=0.01), peer([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for optimiser, w in ((a, ours), (b, theirs)):
            w.grad = kernel(12, 45, seed=step).float() + w.detach()
            optimiser.step()
    # theirs in bfloat16, eight bits
    assert (ours - theirs).norm() < 0.03 * (ours - before).norm()


def test_layouts_make_no_difference():
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = torch.nn.Parameter(kernel(6, 4, 3, 3).contiguous(memory_format=layout))
        optimiser = Muon([w])
        for step in range(3):
            w.grad = kernel(6, 4, 3, 3, seed=step).contiguous(memory_format=layout)
            optimiser.step()
        found.append(w.detach().clone())
    assert torch.allclose(*found, atol=1e-12)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"\(5,\)"):
        Muon([torch.nn.Parameter(torch.zeros(5))])
