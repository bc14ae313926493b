from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import Arrays, Images, Metric, NotApplicable, Param, Result, Table, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel


class LinearTemplates(Technique):
    """The rows of W of a linear classifier s = Wx + b as pictures, one template a class (CS231n, "Linear classification").

    x are the pixels in [0, 1], so that the normalisation is part of W and b. Any model whose scores are an affine function
    of the pixels will do, whatever its modules. Cost: one backward pass a class, and a few forward passes.
    """

    name = "linear_templates"
    family = "weights"
    needs = frozenset({"classifier"})
    reading = (
        "A template shows which pixels, in which colours, speak for a class (bright, in colour) and against it (dark). Blue in "
        "the templates of ships and planes is sea and sky; a horse with two heads is horses that face both ways."
    )
    caveats = (
        "One template must serve all pictures of a class: it is their mixture. Fine speckle is noise that a stronger penalty on "
        "the weights would remove."
    )
    audit = {"full": {}}

    shared_scale: bool = Param(True, description="draw all templates on one scale; else each on its own")

    def run(self, ctx: Context) -> Result:
        import torch

        model = ctx.model
        weight, bias, error = affine(model, ctx.draws(["probe"]).rand((8, *model.example().shape[1:]))[0])
        flat = weight.flatten(1)
        scale = flat.abs().max() if self.shared_scale else flat.abs().amax(1).view(-1, 1, 1, 1)
        pictures = 0.5 + weight / (2 * scale).clamp_min(torch.finfo(weight.dtype).tiny)
        names = [model.class_name(i) for i in range(len(weight))]
        norms = flat.norm(dim=1)
        cosine = (flat @ flat.T) / (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(weight.dtype).tiny)
        cosine.fill_diagonal_(-2)
        rows = [
            [
                n,
                float(b),
                float(length),
                names[int(cosine[i].argmax())] if len(names) > 1 else None,
                float(cosine[i].max()) if len(names) > 1 else None,
            ]
            for i, (n, b, length) in enumerate(zip(names, bias, norms, strict=True))
        ]
        artifacts: list[Any] = [
            Images("templates", pictures, captions=names, columns=5, exact=weight.shape[-1] < 64, caption="Grey is a weight of zero."),
            Table("classes", ["class", "b", "norm of the template", "most alike", "cosine"], rows),
            Arrays("linear", {"weight": weight, "bias": bias}),
        ]
        metrics = [
            Metric("classes", len(weight)),
            Metric(
                "linearity_error",
                error,
                better="lower",
                about="largest |<template, x> + b - score| over random pictures, of the largest score",
            ),
            Metric(
                "roughness", roughness(weight), better="lower", about="share of the templates' energy that is change from pixel to pixel"
            ),
        ]
        return Result(artifacts, metrics)


def affine(model: LoadedModel, probes: Tensor) -> tuple[Tensor, Tensor, float]:
    """W (K, C, H, W), b (K,) with scores = <W, x> + b for pixels x, and its largest relative error on the probes.

    NotApplicable when the scores are not such a function.
    """
    from harness.device import full_precision

    with full_precision(model.device):  # in a lower one rounding is more than what tells lines from curves
        return _affine(model, probes)


def _affine(model: LoadedModel, probes: Tensor) -> tuple[Tensor, Tensor, float]:
    import torch

    refusal = f"needs scores that are a linear function of the pixels; those of {model.name!r} are not"
    with torch.no_grad():  # three passes tell most models, before a thousand classes are asked
        one, other = model(probes[:1]), model(probes[1:2])
        between = model(0.3 * probes[:1] + 0.7 * probes[1:2])
        bend = (between - 0.3 * one - 0.7 * other).abs().max() / torch.cat([one, other]).abs().max()
    if not float(bend) < 1e-3:
        raise NotApplicable(refusal)
    grey = model.example()
    with torch.enable_grad():
        leaf = grey.clone().requires_grad_()
        scores = model(leaf)[0]
        weight = torch.cat([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in scores])
    with torch.no_grad():
        bias = scores - (weight.flatten(1) * grey.flatten()).sum(1)
        found = model(probes)
        expected = probes.flatten(1) @ weight.flatten(1).T + bias
        error = float((found - expected).abs().max() / found.abs().max().clamp_min(torch.finfo(found.dtype).tiny))
    if not error < 1e-3:
        raise NotApplicable(refusal)
    return weight.detach(), bias.detach(), error


def roughness(weight: Tensor) -> float:
    """Mean squared difference of neighbouring pixels over twice the mean square: 0 smooth, about 1 for noise."""
    down = (weight[:, :, 1:] - weight[:, :, :-1]).square().mean()
    across = (weight[:, :, :, 1:] - weight[:, :, :, :-1]).square().mean()
    return float((down + across) / 2 / (2 * weight.square().mean()).clamp_min(1e-30))
