from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import Arrays, Metric, Paper, Param, Result, Table, Technique, Use

from .maps import features_of, groups_of, one_nn_accuracy, principal, stamps, trust
from .pca_map import accuracies, scatter

if TYPE_CHECKING:
    from harness import Context

EXAGGERATED = 250  # iterations at the start with attraction multiplied by twelve


class TsneMap(Technique):
    """The dataset in two dimensions so that neighbours stay neighbours: t-SNE (van der Maaten & Hinton 2008), on the first 50
    principal axes, beside the PCA map.

    p_{j|i} ~ exp(-||x_i - x_j||^2 / 2 s_i^2) with s_i from the perplexity; q_ij ~ 1 / (1 + ||y_i - y_j||^2); KL(P || Q) is
    minimised from the PCA map as start (Kobak & Berens 2019). Several perplexities and seeds show what is stable.
    """

    name = "tsne_map"
    family = "representations"
    paper = Paper("van der Maaten, Hinton", 2008, "Visualizing Data using t-SNE, JMLR 9", doi="10.5555/1390681.1442799")
    needs = frozenset({"dataset"})
    reading = (
        "Pictures that the layer holds for alike lie together; colours are classes. Read who neighbours whom. The table says how "
        "far each setting can be believed; what changes with the perplexity or the seed is the method's, not the data's."
    )
    caveats = (
        "Sizes of clusters and distances between them mean little (Wattenberg et al. 2016, doi:10.23915/distill.00002). A low "
        "perplexity breaks one group into many."
    )
    audit = {"full": {}}

    layer: str = Param("penultimate", description="the features' layer: a layer's name or 'penultimate'")
    perplexity: tuple[float, ...] = Param(
        (30.0, 5.0, 50.0), min_length=1, description="effective number of neighbours; the first is the main map, all are compared"
    )
    seeds: int = Param(2, ge=1, le=20, description="maps of the first perplexity: the first starts from PCA, the others from noise")
    iterations: int = Param(1000, ge=250, le=10_000, description="iterations in all, the first 250 with early exaggeration")
    axes: int = Param(50, ge=2, le=1000, description="principal axes kept before the map is made")
    engine: Literal["auto", "sklearn", "openTSNE"] = Param(
        "auto", description="what makes the map; auto: scikit-learn, and openTSNE from 20,000 pictures on when it is installed"
    )
    pictures: int = Param(60, ge=0, le=500, description="pictures drawn on the map at most, where they fit")

    @model_validator(mode="after")
    def _consistent(self) -> TsneMap:
        from importlib.util import find_spec

        if min(self.perplexity) <= 0:
            raise ValueError("perplexity must be above zero")
        if self.engine == "openTSNE" and not find_spec("openTSNE"):
            raise ValueError("engine=openTSNE is not installed; install the extra 'tsne', or leave it to `auto`")
        return self

    def uses(self) -> tuple[Use, ...]:
        return (Use("features", {"layer": self.layer}),)

    def run(self, ctx: Context) -> Result:
        features = features_of(ctx, least=5)
        count = len(features)
        points, _ = principal(features, self.axes)
        if points.shape[1] == 1:  # a single feature: a line in the plane
            points = np.hstack([points, np.zeros_like(points)])
        highest = (count - 1) / 3
        notes = []
        perplexities = list(dict.fromkeys(min(p, highest) for p in self.perplexity))
        if perplexities != list(self.perplexity):
            notes.append(
                f"{count} pictures allow a perplexity of at most {highest:.3g}: {count - 1} neighbours, three times as many as count"
            )
        flat = np.hstack([points, np.zeros((count, 1))])[:, :2]
        engine = self._engine(count)
        plans = [(p, 0) for p in perplexities] + [(perplexities[0], s) for s in range(1, self.seeds)]
        made = []
        for perplexity, start in ctx.track(plans, len(plans), "maps"):
            seed = ctx.draws([f"map {start}"]).integers(0, 2**31 - 1, 1)[0][0]
            made.append(embed(points, perplexity, self.iterations, seed, noise=start > 0, engine=engine))
        group, _ = groups_of(ctx)
        rows: list[list[Any]] = []
        artifacts: list[Any] = [
            scatter(ctx, "tsne", made[0][0], stamps(made[0][0], self.pictures), caption=f"t-SNE, perplexity {perplexities[0]:g}."),
            scatter(ctx, "pca", flat, [], "first axis", "second axis", caption="The first two principal axes of the same features."),
        ]
        for (perplexity, start), (found, kl) in zip(plans, made, strict=True):
            rows.append(
                [
                    perplexity,
                    "noise" if start else "PCA",
                    start,
                    kl,
                    trust(features, found),
                    one_nn_accuracy(found, group) if group is not None else None,
                ]
            )
        for (perplexity, start), (found, _) in list(zip(plans, made, strict=True))[1:]:
            name = f"perplexity_{perplexity:g}" if not start else f"seed_{start}"
            artifacts.append(
                scatter(ctx, name, found, [], caption=f"Perplexity {perplexity:g}" + (f", start from noise {start}." if start else "."))
            )
        columns = ["perplexity", "start", "seed", "KL divergence", "trustworthiness", "1-NN accuracy"]
        artifacts += [Table("settings", columns, rows), Arrays("maps", {"points": made[0][0], "pca": flat})]
        metrics = [
            Metric(
                "trustworthiness.tsne", rows[0][4], better="higher", about="whether near points are near in the features too, 1 at best"
            ),
            Metric("trustworthiness.pca", trust(features, flat), better="higher", about="the same of the first two principal axes"),
            Metric("kl", made[0][1], better="lower", about="KL divergence of the main map; comparable at equal perplexity and data only"),
        ]
        metrics += accuracies({"features": features, "pca": flat, "tsne": made[0][0]}, group)
        return Result(artifacts, metrics, notes)

    def _engine(self, count: int) -> str:
        from importlib.util import find_spec

        if self.engine != "auto":
            return self.engine
        return "openTSNE" if count >= 20_000 and find_spec("openTSNE") else "sklearn"


def embed(
    points: np.ndarray, perplexity: float, iterations: int, seed: int, noise: bool = False, engine: str = "sklearn"
) -> tuple[np.ndarray, float]:
    """((N, 2) map, KL divergence); one thread count and seed give the same bits again on one machine."""
    if engine == "openTSNE":
        from openTSNE import TSNE as Open

        found = Open(
            perplexity=perplexity, random_state=seed, initialization="random" if noise else "pca", n_jobs=-1,
            early_exaggeration_iter=EXAGGERATED, n_iter=max(0, iterations - EXAGGERATED), negative_gradient_method="auto",
        ).fit(points)  # fmt: skip
        return np.asarray(found, np.float64), float(found.kl_divergence)
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_info, threadpool_limits

    tsne = TSNE(
        perplexity=perplexity, init="random" if noise else "pca", learning_rate="auto", max_iter=iterations, random_state=seed, n_jobs=-1
    )
    # Threads' partial sums are added in the order they arrive: with two the sum is the same, with more it is not.
    allowed = min([2, *(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp")])
    with threadpool_limits(allowed, "openmp"):
        found = tsne.fit_transform(points.astype(np.float32))
    return found.astype(np.float64), float(tsne.kl_divergence_)
