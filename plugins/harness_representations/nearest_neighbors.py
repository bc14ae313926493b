from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import model_validator

from harness import Arrays, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique, Use
from harness.artifacts import Artifact
from harness.datasets import Dataset, evenly

from .max_patches import picture_names
from .search import Engine, nearest, vote

if TYPE_CHECKING:
    from harness import Context

SPACES = ("pixels", "features")


class NearestNeighbors(Technique):
    """Nearest pictures in L2 over pixels and over features, d(a, b) = ||phi(a) - phi(b)||_2 (Krizhevsky et al. 2012,
    fig. 4), with precision@k, recall@k and a majority vote for both.

    Each of `measured` pictures is a query against all others; the search is exact. Cost: one forward pass a picture and
    two distance matrices, in blocks.
    """

    name = "nearest_neighbors"
    version = 2
    family = "representations"
    paper = Paper(
        "Krizhevsky, Sutskever, Hinton", 2012, "ImageNet Classification with Deep Convolutional Neural Networks", doi="10.1145/3065386"
    )
    needs = frozenset({"dataset"})
    reading = (
        "Each row starts with a query; its neighbours follow, nearest first. Pixel neighbours share colours and layout, feature "
        "neighbours should share what the picture shows. Precision@k is the share of neighbours of the query's own class."
    )
    caveats = (
        "Precision counts only queries with another picture of their class in the dataset; with few pictures a class it says "
        "little. Neighbours come from this dataset alone: the nearest may still be far."
    )
    audit = {"quick": {"k": 3, "queries": 4}, "standard": {"k": 5, "queries": 6}}

    k: int = Param(5, ge=1, le=100, description="neighbours a query")
    layer: str = Param("penultimate", description="the features' layer: a layer's name or 'penultimate'")
    queries: int = Param(6, ge=0, le=200, description="rows in the picture, spread evenly over the queries measured")
    measured: int = Param(1000, ge=1, description="queries that the numbers rest on, spread evenly over the dataset; at most all pictures")
    pixel_size: int = Param(64, ge=1, le=512, description="side in pixels to which larger pictures are averaged before pixel distances")
    engine: Engine = Param(
        "auto", description="what searches: faiss, blocks of matrix products, or faiss when it is installed; same answer"
    )

    @model_validator(mode="after")
    def _consistent(self) -> NearestNeighbors:
        from importlib.util import find_spec

        if self.engine == "faiss" and not find_spec("faiss"):
            raise ValueError("engine=faiss is not installed; install the extra 'faiss', or leave it to `auto`")
        return self

    def uses(self) -> tuple[Use, ...]:
        return (Use("features", {"layer": self.layer}),)

    def run(self, ctx: Context) -> Result:
        dataset = ctx.dataset
        count = len(dataset)
        if count < 2:
            raise NotApplicable(f"needs at least two pictures; {dataset.name!r} has {count}")
        if count <= self.k:
            fewer = self.model_copy(update={"k": count - 1}).run(ctx)
            return Result(
                fewer.artifacts, fewer.metrics, [f"{count - 1} neighbours and not {self.k}, as there are {count} pictures", *fewer.notes]
            )
        features = ctx.results["features"]["features"]
        assert isinstance(features, Arrays)
        vectors = {"pixels": self._pixels(ctx), "features": features.data["features"]}
        rows = np.asarray(evenly(self.measured, count))
        found = {s: nearest(v[rows], v, self.k, rows, ctx.device, self.engine) for s, v in vectors.items()}
        shown = evenly(self.queries, len(rows))
        artifacts: list[Artifact] = [self._grid(ctx, dataset, space, rows, shown, found[space]) for space in SPACES if shown]
        arrays = {f"{space}.{part}": value for space in SPACES for part, value in zip(("indices", "distances"), found[space], strict=True)}
        arrays["queries"] = rows
        differ = [
            1 - len(set(a) & set(b)) / self.k for a, b in zip(found["pixels"][0].tolist(), found["features"][0].tolist(), strict=True)
        ]
        metrics = [
            Metric(
                "neighbours_differ",
                float(np.mean(differ)),
                per_image=differ,
                about="share of a query's feature neighbours that are not among its pixel neighbours",
            )
        ]
        notes = []
        if dataset.labels is None:
            notes.append("the dataset has no labels: precision, recall and votes cannot be given")
        else:
            same = np.bincount(dataset.labels)[dataset.labels[rows]] - 1  # others of the query's class
            able = same > 0
            notes.append(f"{int(able.sum())} of {len(rows)} queries have another picture of their class")
            table = []
            for space in SPACES:
                numbers = quality(found[space][0], dataset.labels, rows, same)
                table.append([space, *(float(v[able].mean()) if able.any() else None for v in numbers.values())])
                for name, values in numbers.items():
                    if able.any():
                        metrics.append(
                            Metric(
                                f"{name}.{space}", float(values[able].mean()), better="higher", per_image=values[able], about=ABOUT[name]
                            )
                        )
            artifacts.append(Table("quality", ["space", f"precision@{self.k}", f"recall@{self.k}", "vote accuracy"], table))
        artifacts.append(Arrays("neighbours", arrays))
        return Result(artifacts, metrics, notes)

    def _pixels(self, ctx: Context) -> np.ndarray:
        """(N, D) pixels in [0, 1] of every picture, averaged down to at most `pixel_size` a side."""
        from torch.nn.functional import adaptive_avg_pool2d

        side = min(self.pixel_size, ctx.model.input.size)
        return np.concatenate([p.float().cpu().numpy() for _, p in ctx.stream(lambda images: adaptive_avg_pool2d(images, side).flatten(1))])

    def _grid(
        self, ctx: Context, dataset: Dataset, space: str, rows: np.ndarray, shown: list[int], found: tuple[np.ndarray, np.ndarray]
    ) -> Images:
        tiles, captions = [], []
        names = picture_names(ctx)
        for query in shown:
            for rank, i in enumerate([int(rows[query]), *found[0][query].tolist()]):
                tiles.append(dataset.pictures(ctx.model.input, i, i + 1)[0])
                captions.append(f"query: {names[i]}" if rank == 0 else f"{names[i]}, {found[1][query][rank - 1]:.3g}")
        data = np.stack(tiles).transpose(0, 3, 1, 2).astype(np.float32) / 255
        return Images(
            f"{space}_neighbours",
            data,
            captions=captions,
            columns=self.k + 1,
            exact=data.shape[-1] < 64,
            caption=f"Nearest in {space}: class and distance.",
        )


ABOUT = {
    "precision": "share of a query's k neighbours that have its class",
    "recall": "share of the other pictures of a query's class that are among its k neighbours",
    "vote_accuracy": "share of queries whose class most of their k neighbours have",
}


def quality(indices: np.ndarray, labels: np.ndarray, rows: np.ndarray, same: np.ndarray) -> dict[str, np.ndarray]:
    """Per query (picture `rows[i]`): precision@k, recall@k and whether the vote is right; `same` counts the others of its class."""
    own = labels[rows]
    hits = (labels[indices] == own[:, None]).sum(1)
    right = vote(labels[indices], int(labels.max()) + 1) == own
    return {"precision": hits / indices.shape[1], "recall": hits / np.maximum(same, 1), "vote_accuracy": right.astype(float)}
