"""guided_patches: the gradients are those of the units that max_patches names, each in its own picture."""

from __future__ import annotations

import numpy as np
import torch

from harness.context import Context, to_images
from harness.testing import run_once, small_dataset
from harness_representations import MaxPatches
from harness_saliency import GuidedPatches
from harness_saliency.guided_backprop import coloured, rule_gradient


def test_each_patch_has_the_gradient_of_its_own_unit(digits_cnn):
    data, layer, channels, k = small_dataset(12), "features.3", [5, 17], 3
    result = run_once(GuidedPatches(layer=layer, channels=channels, k=k), digits_cnn, data)
    tiles = result.artifacts[0].data.reshape(2, 2, k, 1, *result.artifacts[0].data.shape[2:])  # channel, patch or gradient, rank
    patches = run_once(MaxPatches(layer=layer, channels=channels, k=k), digits_cnn, data)
    top = next(a for a in patches.artifacts if a.name == "top").data
    np.testing.assert_allclose(tiles[:, 0].reshape(-1), patches.artifacts[0].data.reshape(-1))
    size = tiles.shape[-1]
    for i, c in enumerate(channels):
        for rank in range(k):
            picture, (y, x) = int(top["pictures"][c, rank]), top["positions"][c, rank].tolist()
            image = to_images(data.pictures(digits_cnn.input, picture, picture + 1), digits_cnn.device)
            ctx = Context(digits_cnn, images=image, ids=["p"], target=f"neuron:{layer}:{c},{y},{x}")
            gradient = rule_gradient(ctx, "guided")
            expected = np.full((8 + 2 * size, 8 + 2 * size), 0.5, np.float32)
            expected[size : size + 8, size : size + 8] = coloured(gradient)[0, 0].numpy()
            corner = size + y - size // 2, size + x - size // 2  # stride 1, a field of `size`
            crop = expected[corner[0] : corner[0] + size, corner[1] : corner[1] + size]
            np.testing.assert_allclose(tiles[i, 1, rank, 0], crop, atol=1e-5)
            # nothing of the unit's gradient lies outside of what it can see
            outside = gradient[0, 0].clone()
            outside[max(0, y - size // 2) : y + size // 2 + 1, max(0, x - size // 2) : x + size // 2 + 1] = 0
            assert not outside.any()
    assert all(0 < f <= 1 for f in result.metrics[0].per_image)


def test_the_most_selective_channels_are_shown_when_none_are_named(digits_cnn):
    result = run_once(GuidedPatches(count=2, k=2), digits_cnn, small_dataset(8))
    rows = next(a for a in run_once(MaxPatches(count=2, k=2), digits_cnn, small_dataset(8)).artifacts if a.name == "channels").rows
    assert [t.split(":")[0] for t in result.artifacts[0].captions if t.startswith("channel")] == [f"channel {r[0]}" for r in rows[:2]]


def test_units_that_do_not_fire_are_told(digits_cnn):
    data = small_dataset(4)
    data = data.select(indices=[0, 0])  # twice the same picture; the weakest channel may be silent
    result = run_once(GuidedPatches(layer="features.6", count=32, k=1), digits_cnn, data)
    silent = int((torch.tensor(result.metrics[0].per_image) == 0).sum())
    assert (silent > 0) == bool(result.notes)
