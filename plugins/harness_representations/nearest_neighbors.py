from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness import Arrays, ConfigError, Images, Metric, Paper, Param, Result, Table, Technique, Use
from harness.artifacts import Artifact
from harness.datasets import Dataset, evenly

from .search import nearest, vote

if TYPE_CHECKING:
    from harness import Context

SPACES = ("pixels", "features")


class NearestNeighbors(Technique):
    """Nearest pictures in L2 over pixels and over features, d(a, b) = ||phi(a) - phi(b)||_2 (Krizhevsky et al. 2012,
    fig. 4), with precision@k, recall@k and a majority vote for both.

    Every picture is a query against all others. Cost: one forward pass a picture and two distance matrices, in blocks.
    """

    name = "nearest_neighbors"
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
    queries: int = Param(6, ge=0, le=200, description="rows in the picture, spread evenly over the dataset; numbers use every picture")

    def uses(self) -> tuple[Use, ...]:
        return (Use("features", {"layer": self.layer}),)

    def run(self, ctx: Context) -> Result:
        dataset = ctx.dataset
        count = len(dataset)
        if count <= self.k:
            raise ConfigError(f"nearest_neighbors.k: {self.k} neighbours need more than {self.k} pictures; {dataset.name!r} has {count}")
        pixels = dataset.pictures(ctx.model.input).reshape(count, -1).astype(np.float32) / 255
        features = ctx.results["features"]["features"]
        assert isinstance(features, Arrays)
        self_ = np.arange(count)
        found = {
            "pixels": nearest(pixels, pixels, self.k, self_),
            "features": nearest(features.data["features"], features.data["features"], self.k, self_),
        }
        shown = evenly(self.queries, count)
        artifacts: list[Artifact] = [self._grid(ctx, dataset, space, shown, found[space]) for space in SPACES if shown]
        arrays = {f"{space}.{part}": value for space in SPACES for part, value in zip(("indices", "distances"), found[space], strict=True)}
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
            same = np.bincount(dataset.labels)[dataset.labels] - 1  # others of the query's class
            able = same > 0
            notes.append(f"{int(able.sum())} of {count} queries have another picture of their class")
            rows = []
            for space in SPACES:
                numbers = quality(found[space][0], dataset.labels, same)
                rows.append([space, *(float(v[able].mean()) if able.any() else None for v in numbers.values())])
                for name, values in numbers.items():
                    if able.any():
                        metrics.append(
                            Metric(
                                f"{name}.{space}", float(values[able].mean()), better="higher", per_image=values[able], about=ABOUT[name]
                            )
                        )
            artifacts.append(Table("quality", ["space", f"precision@{self.k}", f"recall@{self.k}", "vote accuracy"], rows))
        artifacts.append(Arrays("neighbours", arrays))
        return Result(artifacts, metrics, notes)

    def _grid(self, ctx: Context, dataset: Dataset, space: str, shown: list[int], found: tuple[np.ndarray, np.ndarray]) -> Images:
        tiles, captions = [], []
        names = [dataset.classes[label] for label in dataset.labels] if dataset.labels is not None else list(dataset.ids)
        for query in shown:
            for rank, i in enumerate([query, *found[0][query].tolist()]):
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


def quality(indices: np.ndarray, labels: np.ndarray, same: np.ndarray) -> dict[str, np.ndarray]:
    """Per query: precision@k, recall@k and whether the vote is right; `same` counts the others of its class."""
    hits = (labels[indices] == labels[:, None]).sum(1)
    right = vote(labels[indices], int(labels.max()) + 1) == labels
    return {"precision": hits / indices.shape[1], "recall": hits / np.maximum(same, 1), "vote_accuracy": right.astype(float)}
