from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import ConfigError, Curve, Images, Metric, Paper, Param, Result, Table, Technique, Use

from .attacks import FLOOR
from .minimal import deepfool
from .shared import in_full_precision

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Axis = Literal["gradient", "random", "second_random", "adversarial", "universal"]
# Colours of Okabe & Ito 2008 for up to seven classes, told apart by people who are colour blind; grey for the rest.
PALETTE = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
REST = "#b0b0b0"
DARKER = 0.55  # of the lines between classes


class DecisionSlice(Technique):
    """Which class the model names on a plane through a picture, and how boundaries lie in the space of pictures (Fawzi et al. 2017,
    arXiv:1705.09552; Moosavi-Dezfooli et al. 2017, arXiv:1610.08401, sec. 5).

    The first axis leads along the gradient by which the predicted class loses most against the second (or another direction), the other
    is made orthogonal to it. Axes have length 1 in the L2 norm of pictures in [0, 1]; pixels that leave the range are cut off, since
    the model is never given others. The singular values of the pictures' boundary normals, against those of as many random directions,
    say whether few directions are shared by many boundaries, which is why universal perturbations exist. Cost: side^2 forward passes
    a picture, and DeepFool for the normals.
    """

    name = "decision_slice"
    family = "adversarial"
    version = 2
    paper = Paper("Moosavi-Dezfooli, Fawzi, Fawzi, Frossard", 2017, "Universal adversarial perturbations", arxiv="1610.08401")
    needs = frozenset({"images", "classifier"})
    reading = (
        "The picture lies in the middle; a colour is a class, darker lines are the boundaries. Along the gradient the next class is "
        "near; in a random direction it is mostly far. Where singular values of the normals fall much faster than those of random "
        "directions, boundaries of many pictures share directions."
    )
    caveats = "A plane shows two of many thousand dimensions: another random direction gives another picture."
    audit = {"full": {"side": 31}}

    axes: tuple[Axis, Axis] = Param(
        ("gradient", "random"), description="the two directions; universal takes universal_perturbation's noise"
    )
    reach: float = Param(0.0, ge=0, description="how far the plane goes from the middle, in L2; 0: three times the way to the next class")
    side: int = Param(41, ge=3, le=501, description="points along each axis; made odd, so that the picture is one")
    normals: bool = Param(True, description="singular values of the boundary normals")

    @model_validator(mode="after")
    def _consistent(self) -> DecisionSlice:
        if self.axes[0] == self.axes[1]:
            raise ValueError(f"axes: both are {self.axes[0]!r}; name two different directions")
        return self

    def uses(self) -> list[Use]:
        return [Use("universal_perturbation")] if "universal" in self.axes else []

    @in_full_precision
    def run(self, ctx: Context) -> Result:
        import torch

        images, model = ctx.images, ctx.model
        clean = ctx.predicted
        near = deepfool_all(ctx)
        step = (near.images - images).flatten(1)
        length = step.norm(dim=1)
        first, second = self._plane(ctx, step)
        side = self.side + 1 - self.side % 2
        place = torch.linspace(-1, 1, side, device=ctx.device, dtype=images.dtype)
        sheets, captions, rows, own = [], [], [], []
        distances: dict[str, list[float]] = {"first": [], "second": []}
        for i in range(len(images)):
            reach = self.reach or 3 * max(float(length[i]), 1e-3)
            plane = self._classes(ctx, images[i], first[i], second[i], reach * place)
            names, counts = np.unique(plane, return_counts=True)
            order = [int(clean[i]), *(int(n) for n in names[counts.argsort()[::-1]] if n != int(clean[i]))]
            sheets.append(painted(plane, order))
            own.append(float((plane == plane[side // 2, side // 2]).mean()))
            captions.append(f"{ctx.ids[i]}: {model.class_name(int(clean[i]))}, half a side is {reach:.3g} in L2")
            middle = side // 2
            for axis, line in (("first", plane[middle]), ("second", plane[:, middle])):
                away = np.flatnonzero(line != plane[middle, middle])
                distances[axis].append(float(np.abs(away - middle).min() / middle * reach) if len(away) else np.inf)
            for k, c in enumerate(order[: len(PALETTE)]):
                rows.append([ctx.ids[i], PALETTE[k], model.class_name(c), float((plane == c).mean())])
            ctx.report("planes", i + 1, len(images))
        caption = f"Along: {self.axes[0]}; upwards: {self.axes[1]}."
        scale = max(1, -(-260 // side))
        shown = torch.from_numpy(np.stack(sheets)).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        artifacts: list[Any] = [
            Images("planes", shown, captions=captions, columns=min(4, len(sheets)), exact=True, caption=caption),
            Table("classes", ["picture", "colour", "class", "share of the plane"], rows),
        ]
        about = "share of a picture's plane where the model names its own class"
        metrics = [
            Metric("own_share", float(np.mean(own)), per_image=own, about=about, detail=f"plane of {self.axes[0]} and {self.axes[1]}")
        ]
        each = [float(v) for v, hit in zip(length.tolist(), near.fooled.tolist(), strict=True) if hit]
        if each:
            about = "distance to the nearest boundary that DeepFool finds, L2 of pictures in [0, 1]"
            metrics.append(Metric("boundary_distance", float(np.mean(each)), better="higher", per_image=each, about=about))
        notes = [
            f"along {axis} no other class within reach for {n} of {len(images)} pictures; a larger `reach` looks further"
            for axis, n in zip(self.axes, (int(np.isinf(distances[a]).sum()) for a in ("first", "second")), strict=True)
            if n
        ]
        if self.normals and int((length > FLOOR).sum()) > 1:
            artifacts.append(spectrum(ctx, step[length > FLOOR]))
        return Result(artifacts, metrics, notes)

    def _plane(self, ctx: Context, step: Tensor) -> tuple[Tensor, Tensor]:
        """Two orthonormal directions (N, D) for each picture."""
        first, second = (self._direction(ctx, axis, step) for axis in self.axes)
        first = first / first.norm(dim=1, keepdim=True).clamp_min(FLOOR)
        second = second - (second * first).sum(1, keepdim=True) * first
        size = second.norm(dim=1, keepdim=True)
        if bool((size < 1e-6 * len(second[0]) ** 0.5 * 1e-3).any()):
            raise ConfigError(f"decision_slice.axes: {self.axes[0]} and {self.axes[1]} are one direction for this picture; name others")
        return first, second / size

    def _direction(self, ctx: Context, axis: Axis, step: Tensor) -> Tensor:
        """(N, D) not yet of length 1."""
        import torch

        from .shared import second

        if axis == "adversarial":
            return step
        if axis == "gradient":
            rival = second(ctx.own_logits, ctx.predicted)

            def slope(rows: slice) -> Tensor:
                with torch.enable_grad():
                    leaf = ctx.images[rows].detach().requires_grad_()
                    logits = ctx.model(leaf)
                    margin = logits.gather(1, rival[rows, None]) - logits.gather(1, ctx.predicted[rows, None])
                    found: Tensor = torch.autograd.grad(margin.sum(), leaf)[0].flatten(1)
                    return found

            return torch.cat(list(ctx.batched(len(ctx.images), slope)))
        if axis == "universal":
            noise: Any = ctx.results["universal_perturbation"]["noise"]
            found = torch.from_numpy(noise.data["noise"]).to(ctx.device, ctx.images.dtype)
            return found.flatten()[None].expand(len(ctx.images), -1)
        return ctx.draws(stream=axis).randn(ctx.images.shape[1:]).flatten(1)

    def _classes(self, ctx: Context, image: Tensor, first: Tensor, second: Tensor, place: Tensor) -> np.ndarray:
        """(side, side) the class named at each point; rows go from the largest second coordinate down, as a plot does."""
        import torch

        count = len(place)

        def some(rows: slice) -> Tensor:
            k = torch.arange(rows.start, rows.stop, device=ctx.device)
            a, b = place[k % count], -place[k // count]
            moved = image + (a[:, None] * first + b[:, None] * second).view(-1, *image.shape)
            with torch.no_grad():
                return ctx.model(moved.clamp(0, 1)).argmax(1)

        return torch.cat(list(ctx.batched(count * count, some))).view(count, count).cpu().numpy()


def deepfool_all(ctx: Context) -> Any:
    """DeepFool's pictures of all the context's, without the range of pixels: the normals of the boundaries themselves."""
    import torch

    from .attacks import Attacked

    parts = list(ctx.batched(len(ctx.images), lambda rows: deepfool(ctx.model, ctx.images[rows], clip=False)))
    return Attacked(torch.cat([p.images for p in parts]), torch.cat([p.fooled for p in parts]))


def spectrum(ctx: Context, steps: Tensor) -> Curve:
    """Singular values of the normals (N, D), each of length 1, beside those of N random directions."""
    import torch

    unit = steps / steps.norm(dim=1, keepdim=True)
    random = torch.cat([ctx.draws([f"normal {i}"]).randn((steps.shape[1],)) for i in range(len(steps))])
    random = random / random.norm(dim=1, keepdim=True)
    # The singular values of (N, D) from its Gram matrix (N, N): D may be large.
    lines = {
        name: torch.linalg.eigvalsh((m @ m.T).cpu().double()).flip(0).clamp_min(0).sqrt()
        for name, m in (("boundary normals", unit), ("random directions", random))
    }
    caption = "Singular values of the pictures' boundary normals: a fast fall means that boundaries share directions."
    return Curve("normals", range(1, len(unit) + 1), lines, "index", "singular value", caption=caption)


def painted(plane: np.ndarray, order: list[int]) -> np.ndarray:
    """(3, side, side) in [0, 1]: the classes in the palette's colours, in order, with darker lines between them."""
    rgb = [np.array([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)], np.float32) for c in (*PALETTE, REST)]
    out = np.empty((*plane.shape, 3), np.float32)
    out[:] = rgb[-1]
    for k, c in enumerate(order[: len(PALETTE)]):
        out[plane == c] = rgb[k]
    edge = np.zeros(plane.shape, bool)
    edge[:, 1:] |= plane[:, 1:] != plane[:, :-1]
    edge[1:] |= plane[1:] != plane[:-1]
    out[edge] *= DARKER
    return out.transpose(2, 0, 1)
