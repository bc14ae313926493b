"""What the techniques claim, on the real model and real pictures."""

from __future__ import annotations

import pytest
import torch

from harness.context import Context, to_images
from harness.datasets import load_dataset
from harness_saliency import Occlusion, Saliency
from harness_synthesis import ClassVisualization


def real(squeezenet, registry, count, **more):
    data = load_dataset("imagenet_samples", registry).select(count)
    images = to_images(data.pictures(squeezenet.input), squeezenet.device)
    return Context(squeezenet, images=images, ids=data.ids, **more)


@pytest.mark.slow
def test_class_pictures_are_of_their_class(squeezenet):
    """Flamingo, tarantula, dalmatian and ostrich in 256 steps, each with a probability above 0.99."""
    technique = ClassVisualization(classes=(130, "tarantula", 251, "ostrich"))
    result = technique.run(Context(squeezenet, technique="class_visualization"))
    found = {m.name: m for m in result.metrics}
    assert found["lowest_probability"].value > 0.99
    assert found["first_share"].value == 1
    assert found["high_frequency"].value < 0.1
    curve = next(a for a in result.artifacts if a.name == "objective")
    assert all(line[-20:].mean() > 3 * line[:20].mean() for line in curve.lines.values())


@pytest.mark.slow
def test_the_better_regulariser_has_less_high_frequency(squeezenet):
    """Yosinski's third setting against the same with its L2 decay alone: equal steps, equal rates, both sure of the class.

    The plain one scores higher by patterns of single pixels, which a blur of two pixels undoes and the other survives.
    """
    from harness import optimise as o

    def run(**params):
        result = ClassVisualization(classes=(130,), steps=120, gain=4.0, preset="yosinski_3", **params).run(
            Context(squeezenet, technique="class_visualization")
        )
        picture = torch.tensor(result.artifacts[0].data)
        return {m.name: m.value for m in result.metrics}, squeezenet(o.gaussian_blur(picture, 2.0)).detach()[0, 130].item()

    (plain, plain_blurred), (better, better_blurred) = run(blur=0.0, blur_every=0), run()
    assert min(plain["probability"], better["probability"]) > 0.9
    assert better["high_frequency"] < plain["high_frequency"] / 10
    assert better_blurred > plain_blurred


@pytest.mark.parametrize("technique", [Saliency(), Occlusion(window=48, stride=24)])
def test_deleting_what_the_map_marks_costs_more_than_deleting_at_random(technique, squeezenet, registry):
    ctx = real(squeezenet, registry, 5, technique=technique.name)
    maps = torch.tensor(technique.run(ctx).artifacts[0].data).flatten(1)
    noise = ctx.draws(stream="random map").rand(maps.shape[1:])

    def left(order: torch.Tensor) -> torch.Tensor:
        chances = []
        for share in (0.02, 0.05, 0.1, 0.2):
            top = order.topk(int(share * order.shape[1]), dim=1).indices
            covered = ctx.images.flatten(2).clone()
            covered.scatter_(2, top.unsqueeze(1).expand(-1, 3, -1), 0.5)
            logits = squeezenet(covered.view_as(ctx.images)).detach()
            chances.append(logits.gather(1, ctx.predicted[:, None]).squeeze(1))
        return torch.stack(chances).mean()

    assert left(maps) < left(noise) - 1


def test_the_saliency_of_another_class_is_another_map(squeezenet, registry):
    first = Saliency(target=130).run(real(squeezenet, registry, 2, target=130)).artifacts[0].data
    other = Saliency(target=9).run(real(squeezenet, registry, 2, target=9)).artifacts[0].data
    assert abs(first - other).max() > 0.1 * first.max()
