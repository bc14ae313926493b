from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from harness import EveryMap, Heatmaps, Matrix, Metric, Paper, Param, Result, Table, TargetSpec, Technique, Use
from harness.datasets import evenly

from .faithfulness import PROFILE
from .saliency import TARGET
from .sanity_checks import rank_correlation

if TYPE_CHECKING:
    from harness import Context

COLUMNS = 5


class SaliencyComparison(Technique):
    """All maps of one picture side by side, each with its deletion and insertion area there, and how alike the maps are
    (areas as in Petsiuk et al. 2018, arXiv:1806.07421; agreement as in Krishna et al. 2022, arXiv:2202.01602).

    Every installed technique that gives maps, scored by `faithfulness`. Cost: theirs.
    """

    name = "saliency_comparison"
    family = "saliency"
    paper = Paper("Petsiuk, Das, Saenko", 2018, "RISE: Randomized Input Sampling for Explanation", arxiv="1806.07421")
    needs = frozenset({"images"})
    reading = (
        "A row is one picture, the best map by deletion and insertion first. `del` is the area under the deletion curve (small is "
        "good), `ins` under the insertion curve (large is good); compare within a row. The matrix shows which tell the same story."
    )
    caveats = (
        "Of signed maps only what speaks for the target is drawn. Each map has its own scale. That maps agree does not make them "
        "right: see sanity_checks."
    )
    audit = {"full": {"profile": "full"}}

    target: TargetSpec = Param("predicted", description=TARGET)
    techniques: tuple[str, ...] = Param((), description="techniques compared; none: every one installed that gives maps")
    profile: Literal["", "draft", "quick", "standard", "full"] = Param("", description=PROFILE)
    pictures: int = Param(4, ge=1, le=1000, description="pictures shown, spread evenly; all count for the agreement")

    def uses(self) -> list[Use | EveryMap]:
        rounds = {"oracle_rounds": 3} if self.profile == "full" else {}  # as an audit has them
        params: dict[str, Any] = {"target": self.target, "techniques": list(self.techniques), "profile": self.profile, **rounds}
        return [EveryMap(self.target, self.techniques, self.profile), Use("faithfulness", params)]

    def run(self, ctx: Context) -> Result:
        import torch

        maps = ctx.needed_attributions()
        areas: Any = ctx.results["faithfulness"]["areas"]
        deletion, insertion = ({n: areas.data[f"{way}.{n}"] for n in maps} for way in ("deletion", "insertion"))
        rows = evenly(self.pictures, len(ctx.ids))
        artifacts: list[Any] = []
        for i in rows:
            order = sorted(maps, key=lambda n: (float(deletion[n][i] - insertion[n][i]), n))
            artifacts.append(
                Heatmaps(
                    f"picture_{i + 1}",
                    torch.stack([maps[n][i].clamp(min=0) for n in order]),
                    captions=[f"{n.replace('_', ' ')}: del {deletion[n][i]:.2f}, ins {insertion[n][i]:.2f}" for n in order],
                    over=[i] * len(order),
                    columns=COLUMNS,
                    unit="evidence for the target",
                    caption=f"{ctx.ids[i]}, {ctx.target.labels[i]}.",
                )
            )
        names = list(maps)
        agreement = [[float(rank_correlation(maps[a].abs(), maps[b].abs()).mean()) if a != b else 1.0 for b in names] for a in names]
        artifacts.append(
            Matrix("agreement", agreement, names, names, "rank correlation of the maps' sizes, mean over pictures", signed=True)
        )
        first = [min(maps, key=lambda n: float(deletion[n][i] - insertion[n][i])) for i in range(len(ctx.ids))]
        table = [
            [n, float(deletion[n].mean()), float(insertion[n].mean()), first.count(n)]
            for n in sorted(maps, key=lambda n: (float((deletion[n] - insertion[n]).mean()), n))
        ]
        artifacts.append(Table("scores", ["map", "deletion", "insertion", "pictures on which it is best"], table))
        pairs = [agreement[i][j] for i in range(len(names)) for j in range(i)]
        metrics = [Metric("maps", len(names), about="techniques compared")]
        if pairs:
            about = "mean rank correlation between the maps of two techniques"
            metrics.append(Metric("agreement", sum(pairs) / len(pairs), about=about))
        return Result(artifacts, metrics, [f"{name} is left out: {why}" for name, why in ctx.missing.items()])
