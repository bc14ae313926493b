from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Arrays, ConfigError, Matrix, Metric, NotApplicable, Paper, Param, Result, Table, Technique, Use
from harness.datasets import class_names

from .maps import features_of

if TYPE_CHECKING:
    from harness import Context


class EmbeddingGeometry(Technique):
    """How the classes lie to one another in a layer: distances of their mean features, clustered (average linkage), and whether
    what is near there is near in meaning: rank correlation with distances in WordNet (Miller 1995; Frome et al. 2013).

    Distances in WordNet are edges on the shortest way through a common hypernym, for ImageNet's classes, whose hierarchy
    comes with this package. Cost: the features, and all pairs of classes.
    """

    name = "embedding_geometry"
    family = "representations"
    paper = Paper("Frome, Corrado, Shlens et al.", 2013, "DeViSE: A Deep Visual-Semantic Embedding Model, NeurIPS 26")
    needs = frozenset({"dataset"})
    reading = (
        "Dark cells are classes whose pictures the layer holds for alike; the tree joins the nearest first. A correlation above "
        "zero means that classes near in meaning are near in the layer: wolves beside dogs."
    )
    caveats = (
        "A mean over few pictures is a rough place for a class. The layer knows looks: things that look alike and mean different "
        "things (a ball and a balloon) are rightly near."
    )
    audit = {"full": {}}

    layer: str = Param("penultimate", description="the features' layer: a layer's name or 'penultimate'")
    distance: Literal["correlation", "cosine", "euclidean"] = Param(
        "correlation", description="distance of two class means; correlation: the angle seen from the mean of all classes"
    )
    shown: int = Param(60, ge=2, le=500, description="classes in the picture at most, evenly; numbers use all")

    def uses(self) -> tuple[Use, ...]:
        return (Use("features", {"layer": self.layer}),)

    def run(self, ctx: Context) -> Result:
        from scipy.cluster.hierarchy import leaves_list, linkage
        from scipy.spatial.distance import squareform
        from scipy.stats import spearmanr

        labels = ctx.dataset.labels
        if labels is None:
            raise NotApplicable("needs a labelled dataset")
        features = features_of(ctx, least=2)
        present, group = np.unique(labels, return_inverse=True)
        if len(present) < 2:
            raise NotApplicable(f"needs pictures of two classes; {ctx.dataset.name!r} has those of one only")
        names = class_labels(ctx, present)
        means = np.stack([features[group == i].mean(0, dtype=np.float64) for i in range(len(present))])
        distances = between(means, self.distance)
        nearest = np.where(np.eye(len(present), dtype=bool), np.inf, distances).argmin(1)
        some = np.linspace(0, len(present) - 1, min(self.shown, len(present))).round().astype(int)
        part = distances[np.ix_(some, some)]
        artifacts: list[Any] = []
        if len(some) > 2:
            tree = linkage(squareform(part, checks=False), "average", optimal_ordering=True)
            order = leaves_list(tree)
            shown = [names[some[i]] for i in order]
            artifacts.append(
                Matrix("distances", part[np.ix_(order, order)], shown, shown, f"{self.distance} distance", tree=relabel(tree, order))
            )
        else:
            shown = [names[i] for i in some]
            artifacts.append(Matrix("distances", part, shown, shown, f"{self.distance} distance"))
        count = np.bincount(group)
        rows = [[names[i], int(count[i]), names[nearest[i]], float(distances[i, nearest[i]])] for i in range(len(present))]
        artifacts.append(Table("nearest_classes", ["class", "pictures", "nearest class", "distance"], rows))
        artifacts.append(Arrays("geometry", {"means": means, "distances": distances, "classes": present}))
        metrics, notes = [Metric("classes", len(present))], []
        if (count > 1).any():
            apart = separation(features, group, means)
            if apart is None:
                notes.append("the pictures of each class have the same features: there is no spread to compare distances with")
            else:
                metrics.append(Metric("separation", apart, better="higher", about=SEPARATION))
        known = imagenet_indices(ctx)
        if known is None:
            notes.append("the labels are not ImageNet's: there is no hierarchy of meanings to compare with")
        elif len(present) > 2:
            meaning = wordnet_distances([known[i] for i in present])
            pairs = np.triu_indices(len(present), 1)
            if np.ptp(meaning[pairs]) > 0 and np.ptp(distances[pairs]) > 0:
                rank = float(spearmanr(distances[pairs], meaning[pairs]).statistic)
                metrics.append(Metric("wordnet_correlation", rank, better="higher", about=CORRELATION))
            else:
                notes.append("all classes are equally far from one another: there is no order to correlate")
            kin = float(np.mean([meaning[i, nearest[i]] for i in range(len(present))]))
            metrics.append(
                Metric(
                    "wordnet_of_nearest",
                    kin,
                    better="lower",
                    about="mean WordNet distance of a class and its nearest",
                    detail=f"{meaning[pairs].mean():.1f} for any two",
                )
            )
        return Result(artifacts, metrics, notes)


SEPARATION = "mean distance of two class means over the mean distance of a picture from its own"
CORRELATION = "Spearman's rank correlation of the distances with those in WordNet, over all pairs of classes"


def between(means: np.ndarray, distance: str) -> np.ndarray:
    """(K, K) distances, zero on the diagonal."""
    from scipy.spatial.distance import pdist, squareform

    if distance == "euclidean":
        return squareform(pdist(means))
    seen = means - means.mean(0) if distance == "correlation" else means
    if not np.linalg.norm(seen, axis=1).all():
        raise ConfigError(f"embedding_geometry.distance: a class mean has no direction for {distance}; use euclidean")
    return squareform(pdist(seen, "cosine"))


def separation(features: np.ndarray, group: np.ndarray, means: np.ndarray) -> float | None:
    """None where no class has any spread."""
    from scipy.spatial.distance import pdist

    own = np.linalg.norm(features.astype(np.float64) - means[group], axis=1)[np.bincount(group)[group] > 1].mean()
    return float(pdist(means).mean() / own) if own > 0 else None


def relabel(tree: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A linkage matrix whose leaves are numbered as they stand after `order`."""
    place = np.argsort(order)
    renamed = tree.copy()
    leaves = renamed[:, :2] < len(order)
    renamed[:, :2] = np.where(leaves, place[np.where(leaves, renamed[:, :2], 0).astype(int)], renamed[:, :2])
    return renamed


def imagenet_indices(ctx: Context) -> dict[int, int] | None:
    """{the dataset's label: ImageNet class} where the labels are ImageNet's, by the model's names or the dataset's own."""
    labels, names = ctx.dataset.labels, class_names("imagenet")
    assert labels is not None
    if ctx.labels is not None and ctx.model.classes == names:
        return dict(zip(labels.tolist(), ctx.labels.tolist(), strict=True))
    if tuple(ctx.dataset.classes) == names:
        return {int(i): int(i) for i in labels}
    return None


def class_labels(ctx: Context, present: np.ndarray) -> list[str]:
    """Names of the classes that occur: the model's where they are its own."""
    labels = ctx.dataset.labels
    assert labels is not None
    if ctx.labels is not None:
        own = dict(zip(labels.tolist(), ctx.labels.tolist(), strict=True))
        return [ctx.model.class_name(own[int(i)]) for i in present]
    return [ctx.dataset.classes[i] for i in present]


@cache
def hierarchy() -> tuple[dict[str, tuple[str, ...]], dict[int, str]]:
    """({synset: hypernyms}, {ImageNet class: synset}) of WordNet 3.0, as far up as ImageNet's classes reach."""
    above: dict[str, tuple[str, ...]] = {}
    classes: dict[int, str] = {}
    for line in (Path(__file__).parent / "data" / "imagenet_hierarchy.tsv").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        synset, parents, _, index = line.split("\t")
        above[synset] = tuple(p for p in parents.split(",") if p)
        if index:
            classes[int(index)] = synset
    return above, classes


@cache
def ancestors(synset: str) -> dict[str, int]:
    """{synset above, itself included: fewest steps up to it}."""
    above, _ = hierarchy()
    found, edge = {synset: 0}, [synset]
    while edge:
        step = []
        for name in edge:
            for parent in above[name]:
                if parent not in found:
                    found[parent] = found[name] + 1
                    step.append(parent)
        edge = step
    return found


def wordnet_distances(classes: list[int]) -> np.ndarray:
    """(K, K) edges on the shortest way between two ImageNet classes through a common hypernym."""
    _, synsets = hierarchy()
    above = [ancestors(synsets[c]) for c in classes]
    found = np.zeros((len(classes), len(classes)))
    for i, one in enumerate(above):
        for j in range(i):
            other = above[j]
            found[i, j] = found[j, i] = min(steps + other[name] for name, steps in one.items() if name in other)
    return found
