from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import Arrays, Curve, Metric, Paper, Param, Result, Scatter, Technique, Use

from .maps import features_of, groups_of, one_nn_accuracy, principal, stamps, thumbnails, trust

if TYPE_CHECKING:
    from harness import Context

AXES = 50


class PcaMap(Technique):
    """The dataset along the two axes of largest variance of a layer's features: eigenvectors of the covariance matrix
    (Pearson 1901; Hotelling 1933).

    Cost: the features, and one decomposition of their covariance.
    """

    name = "pca_map"
    family = "representations"
    paper = Paper("Hotelling", 1933, "Analysis of a complex of statistical variables into principal components", doi="10.1037/h0071325")
    needs = frozenset({"dataset"})
    reading = (
        "Each point is a picture. Groups that lie apart differ in what varies most. The curve says how much of all variance the "
        "first axes hold: a map that holds little of it hides most of what the layer knows."
    )
    caveats = (
        "Axes are uncorrelated, not independent, and have no names. Two points that lie together here may be far apart along "
        "the axes that are left out."
    )
    audit = {"full": {}}

    layer: str = Param("penultimate", description="the features' layer: a layer's name or 'penultimate'")
    pictures: int = Param(60, ge=0, le=500, description="pictures drawn on the map at most, where they fit")

    def uses(self) -> tuple[Use, ...]:
        return (Use("features", {"layer": self.layer}),)

    def run(self, ctx: Context) -> Result:
        features = features_of(ctx)
        points, pca = principal(features, AXES)
        flat = np.hstack([points, np.zeros((len(points), 1))])[:, :2]
        share = pca.explained_variance_ratio_
        group, _ = groups_of(ctx)
        shown = stamps(flat, self.pictures)
        artifacts: list[Any] = [scatter(ctx, "map", flat, shown, "first axis", "second axis")]
        if len(share) > 1:
            artifacts.append(
                Curve("explained", range(1, len(share) + 1), {"share of all variance": share.cumsum()}, "first axes", "held together")
            )
        artifacts.append(Arrays("pca", {"points": flat, "variances": pca.explained_variance_}))
        metrics = [
            Metric("explained_2d", float(share[:2].sum()), about="share of the features' variance that the map holds"),
            Metric(
                "trustworthiness",
                trust(features, flat),
                better="higher",
                about="whether near points are near in the features too, 1 at best",
            ),
        ]
        metrics += accuracies({"map": flat, "features": features}, group)
        return Result(artifacts, metrics)


def accuracies(spaces: Mapping[str, np.ndarray], group: np.ndarray | None) -> list[Metric]:
    """1-NN accuracy in each space, where there are classes with more than one picture."""
    found = {name: one_nn_accuracy(points, group) if group is not None else None for name, points in spaces.items()}
    about = "share of pictures whose nearest other has their class"
    return [Metric(f"nearest_accuracy.{name}", value, better="higher", about=about) for name, value in found.items() if value is not None]


def scatter(
    ctx: Context, name: str, points: np.ndarray, shown: list[int], x_label: str = "", y_label: str = "", caption: str = ""
) -> Scatter:
    """A map coloured by class, with pictures at the points `shown`."""
    group, groups = groups_of(ctx)
    pictures = thumbnails(ctx, shown, 40) if shown else None
    return Scatter(
        name,
        points,
        group=group,
        groups=groups,
        x_label=x_label,
        y_label=y_label,
        pictures=pictures,
        pictured=shown if shown else None,
        caption=caption,
    )
