from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from harness import Arrays, ConfigError, Images, Metric, Paper, Param, Result, Table, Technique
from harness.datasets import evenly

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.layers import Field

BORDER = 0.5  # grey outside the picture


class MaxPatches(Technique):
    """The pictures that excite each channel of a layer most, cut out to the part the unit sees
    (Girshick et al. 2014, arXiv:1311.2524, fig. 3; Yosinski et al. 2015, arXiv:1506.06579).

    For every channel the k largest activations over a dataset, one a picture, with their places; the crop is the unit's
    theoretical receptive field. Memory does not grow with the dataset. Cost: one forward pass a picture, to the layer.
    """

    name = "max_patches"
    family = "representations"
    version = 2
    paper = Paper("Girshick, Donahue, Darrell, Malik", 2014, "Rich feature hierarchies", arxiv="1311.2524")
    needs = frozenset({"dataset", "conv"})
    reading = (
        "A row is one channel: the parts of pictures that made it fire most, strongest first. When a row's patches have "
        "something in common, that is what the channel may detect."
    )
    caveats = (
        "The strongest patches are not the typical ones, and a common theme is easily read into nine pictures. The box is what "
        "a unit can see; what it does see is usually a smaller part in the middle. Grey beyond a picture's edge is padding."
    )
    audit = {"full": {}}

    layer: str = Param("", description="a layer with maps; none: the deepest before the class scores")
    k: int = Param(9, ge=1, le=100, description="patches a channel, from different pictures")
    channels: tuple[int, ...] = Param((), description="channels shown; none: `count` of them")
    count: int = Param(8, ge=0, le=200, description="channels shown when none are named")
    choose: Literal["selective", "even"] = Param(
        "selective", description="which are shown: those whose best pictures stand out most from the rest, or evenly spread over all"
    )

    def run(self, ctx: Context) -> Result:
        from harness.layers import receptive_fields

        model, dataset = ctx.model, ctx.dataset
        layer = model.full_name(self.layer or model.last_maps)
        shape = model.maps_shape(layer)
        wrong = [c for c in self.channels if not 0 <= c < shape[0]]
        if wrong:
            raise ConfigError(f"max_patches.channels: {layer!r} has channels 0 to {shape[0] - 1}; there is no channel {wrong[0]}")
        top = Top(min(self.k, len(dataset)))
        for rows, maps in ctx.stream(lambda images: model.activations(images, [layer])[layer]):
            top.add(maps, rows.start)
        values, places, spots = top.numpy()  # (k, C), (k, C), (k, C, 2)
        k = len(values)
        field = receptive_fields(model.module, dict(model.calls)).get(layer)
        side = model.input.size
        selectivity = top.selectivity()
        if self.channels:
            shown = list(self.channels)
        elif self.choose == "even":
            shown = evenly(self.count, shape[0])
        else:
            shown = np.argsort(-selectivity, kind="stable")[: self.count].tolist()
        names = picture_names(ctx)
        artifacts: list[Images | Table | Arrays] = []
        if shown:
            tiles = cut(ctx, field, places[:, shown].T.reshape(-1), spots[:, shown].transpose(1, 0, 2).reshape(-1, 2))
            captions = [f"channel {c}: {values[0, c]:.3g}" if rank == 0 else f"{values[rank, c]:.3g}" for c in shown for rank in range(k)]
            size = "the whole picture" if field is None or field.whole or field.size >= side else f"{field.size} x {field.size} pixels"
            artifacts.append(
                Images(
                    "patches", tiles, captions=captions, columns=k, exact=tiles.shape[-1] < 64,
                    caption=f"{layer}: a row a channel, each patch {size}, with the activation.",
                )
            )  # fmt: skip
        rows_ = [
            [c, float(values[0, c]), float(selectivity[c]), ", ".join(dict.fromkeys(names[i] for i in places[:, c].tolist()))]
            for c in np.argsort(-selectivity, kind="stable").tolist()
        ]
        artifacts.append(Table("channels", ["channel", "largest activation", "selectivity", "pictures"], rows_))
        artifacts.append(Arrays("top", {"values": values.T, "pictures": places.T, "positions": spots.transpose(1, 0, 2)}))
        metrics = [
            Metric("channels", shape[0]),
            Metric(
                "selectivity", float(np.median(selectivity)),
                about="median over channels: standard deviations by which the best patches lie above all pictures' maxima",
            ),
        ]  # fmt: skip
        notes = []
        if k < self.k:
            notes.append(f"the dataset has {k} pictures: {k} patches a channel instead of {self.k}")
        if field is None:
            notes.append(f"the receptive field of {layer!r} is not known (no torch.fx graph): whole pictures are shown")
        if dataset.labels is not None and len(dataset.classes) > 1 and k > 1:
            share = np.array([np.bincount(dataset.labels[places[:, c]]).max() / k for c in range(shape[0])])
            metrics.append(
                Metric(
                    "purity", float(share.mean()), about="mean share of a channel's patches that come from its commonest class",
                    detail=f"{k} patches a channel, {len(np.unique(dataset.labels))} classes",
                )
            )  # fmt: skip
        return Result(artifacts, metrics, notes)


def picture_names(ctx: Context) -> list[str]:
    """What each picture is called: its class by the model's name, by the dataset's, or its id."""
    if ctx.labels is not None:
        return [ctx.model.class_name(i) for i in ctx.labels.tolist()]
    dataset = ctx.dataset
    return list(dataset.ids) if dataset.labels is None else [dataset.classes[i] for i in dataset.labels]


class Top:
    """The k largest values of every channel so far, one a picture, with picture and place; equals go to the earlier picture.

    `add` takes maps (n, C, H, W) of pictures `first`, `first + 1`, ...; what is kept is (k, C) on the maps' device.
    """

    def __init__(self, k: int) -> None:
        self.k, self.count, self.width = k, 0, 1
        self._values: Tensor | None = None

    def add(self, maps: Tensor, first: int) -> None:
        import torch

        best, place = maps.flatten(2).max(2)  # (n, C)
        picture = torch.arange(first, first + len(maps), device=maps.device)[:, None].expand_as(place)
        self.width = maps.shape[3]
        # Mean and squared deviations of all maxima, batch by batch (Chan et al. 1979).
        wide = best.float()
        mean = wide.mean(0)
        deviations = (wide - mean).square().sum(0)
        if self._values is None:
            self._values, self._pictures, self._places = best, picture, place
            self._mean, self._deviations = mean, deviations
        else:
            self._values = torch.cat([self._values, best])
            self._pictures, self._places = torch.cat([self._pictures, picture]), torch.cat([self._places, place])
            total, step = self.count + len(maps), mean - self._mean
            self._deviations = self._deviations + deviations + step.square() * (self.count * len(maps) / total)
            self._mean = self._mean + step * (len(maps) / total)
        self.count += len(maps)
        order = torch.sort(self._values, dim=0, descending=True, stable=True).indices[: self.k]
        self._values = self._values.gather(0, order)
        self._pictures, self._places = self._pictures.gather(0, order), self._places.gather(0, order)

    def numpy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values (k, C), pictures (k, C), places (k, C, 2) as row and column of the map."""
        import torch

        assert self._values is not None
        spots = torch.stack([self._places // self.width, self._places % self.width], 2)
        return self._values.float().cpu().numpy(), self._pictures.cpu().numpy(), spots.cpu().numpy()

    def selectivity(self) -> np.ndarray:
        """(C,) z-score of the mean of the k best among all pictures' maxima; 0 for a channel that never changes."""
        assert self._values is not None
        spread = (self._deviations / self.count).sqrt()
        z = (self._values.float().mean(0) - self._mean) / spread
        return z.where(spread > 1e-6 * self._mean.abs(), z.new_zeros(())).cpu().numpy()


def box(field: Field | None, side: int, y: int, x: int) -> tuple[int, int, int]:
    """(top, left, size) in pixels of what a unit at (y, x) sees; it may reach beyond the picture. Unknown: all of it."""
    if field is None or field.whole or field.size >= side:
        return 0, 0, side
    return math.floor(y * field.stride + field.left), math.floor(x * field.stride + field.left), field.size


def cut(ctx: Context, field: Field | None, pictures: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """(n, C, s, s) in [0, 1]: the receptive fields of the units at `spots` (n, 2) of `pictures` (n,), grey beyond the edges."""
    spec = ctx.model.input
    _, _, size = box(field, spec.size, 0, 0)
    tiles = np.full((len(pictures), spec.channels, size, size), BORDER, np.float32)
    for i in np.unique(pictures).tolist():
        pixels = ctx.dataset.pictures(spec, i, i + 1)[0].transpose(2, 0, 1).astype(np.float32) / 255
        for n in np.flatnonzero(pictures == i).tolist():
            top, left, _ = box(field, spec.size, *spots[n].tolist())
            rows, columns = (slice(max(0, t), min(spec.size, t + size)) for t in (top, left))
            if rows.start < rows.stop and columns.start < columns.stop:
                tiles[n, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = pixels[:, rows, columns]
    return tiles
