from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Curve, EveryMap, HarnessError, Heatmaps, Metric, NotApplicable, Paper, Param, Result, Table, TargetSpec, Technique
from harness.datasets import evenly

from .faithfulness import PROFILE
from .saliency import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel

How = Literal["normal", "shuffle"]
KEEPS = 0.6  # above this mean correlation over the stages a map says little about what was learnt


class SanityChecks(Technique):
    """Does a map depend on what the network has learnt? Its weights are replaced by random ones layer by layer, from the last to
    the first, and each technique's map is compared with the one of the trained network
    (cascading randomisation; Adebayo et al. 2018, arXiv:1810.03292, sec. 3).

    Random weights are normal with each tensor's own mean and spread, so that signals neither fade nor explode, or the trained
    ones shuffled; statistics of batch norm stay. What is explained stays what the trained network answered. Cost: `stages` times
    the techniques' own.
    """

    name = "sanity_checks"
    family = "saliency"
    paper = Paper("Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim", 2018, "Sanity Checks for Saliency Maps", arxiv="1810.03292")
    needs = frozenset({"images"})
    reading = (
        "Each line shows how alike the map stays to that of the trained network while its layers are made random, the last first. A "
        "line that falls to zero at once belongs to a map that shows what was learnt; one that stays high belongs to a map of edges, "
        "whatever the network knows."
    )
    caveats = (
        "The rank correlation looks at the size of the values, not at their sign. To fall is necessary, not sufficient: a map of "
        "noise falls as well; see faithfulness. Some likeness remains for every map that is multiplied with the picture or shaped "
        "by its convolutions."
    )
    audit = {"full": {}}

    target: TargetSpec = Param("predicted", description=TARGET)
    techniques: tuple[str, ...] = Param((), description="techniques judged; none: every one installed that gives maps")
    profile: Literal["", "draft", "quick", "standard", "full"] = Param("draft", description=PROFILE)
    pictures: int = Param(4, ge=1, le=10_000, description="pictures looked at, spread evenly")
    stages: int = Param(6, ge=1, le=1000, description="points at which maps are compared, at most one a layer with weights")
    how: How = Param(
        "normal", description="normal: drawn with the mean and spread of each weight tensor; shuffle: its values in random order"
    )

    def uses(self) -> list[EveryMap]:
        return [EveryMap(self.target, self.techniques, self.profile)]

    def run(self, ctx: Context) -> Result:
        from harness.context import out_of_memory

        rows = evenly(self.pictures, len(ctx.ids))
        original = {name: m[rows] for name, m in ctx.needed_attributions().items()}
        layers = weighted(ctx.model)
        if not layers:
            raise NotApplicable(f"needs a model with weights; {ctx.model.name!r} has none")
        ends = [round(len(layers) * (i + 1) / min(self.stages, len(layers))) for i in range(min(self.stages, len(layers)))]
        target: Any = self.target
        if ctx.target.classes is not None:
            target = ctx.target.classes[rows].tolist()
        alike: dict[str, list[Tensor]] = {name: [] for name in original}
        structure: dict[str, list[float]] = {name: [] for name in original}
        last: dict[str, Tensor] = {}
        lost: dict[str, str] = {}
        mixed = copied(ctx.model)
        draws = {name: ctx.draws([name], stream="weights") for name in layers}
        for done, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            for name in layers[start:end]:
                randomise(mixed.module.get_submodule(name), draws[name], self.how)
            for name in [n for n in original if n not in lost]:
                try:
                    found: Any = ctx.again(name, model=mixed, target=target, rows=rows)
                    values: Any = found[ctx.used[name].technique.attribution]
                except (HarnessError, ValueError, RuntimeError) as reason:  # a random network gives numbers that no other does
                    if out_of_memory(reason):
                        raise
                    lost[name] = str(reason) or type(reason).__name__
                    continue
                last[name] = original[name].new_tensor(values.data)
                alike[name].append(rank_correlation(original[name].abs(), last[name].abs()))
                structure[name].append(likeness(original[name].abs(), last[name].abs()))
            ctx.report("stages", done, len(ends))
        if len(lost) == len(original):
            raise NotApplicable("no map can be had of a random network: " + "; ".join(f"{name}: {why}" for name, why in lost.items()))
        return self._result(ctx, layers, ends, original, alike, structure, last, lost, rows)

    def _result(
        self, ctx: Context, layers: list[str], ends: list[int], original: dict[str, Tensor], alike: dict[str, list[Tensor]],
        structure: dict[str, list[float]], last: dict[str, Tensor], lost: dict[str, str], rows: list[int],
    ) -> Result:  # fmt: skip
        import torch

        names = [n for n in original if n not in lost]
        final = {n: alike[n][-1] for n in names}
        mean = {n: torch.stack(alike[n]).mean(0) for n in names}  # over the stages
        order = sorted(names, key=lambda n: (float(mean[n].mean()), n))
        x = [0, *ends]
        lines = {n: [1.0, *(float(v.mean()) for v in alike[n])] for n in order}
        table = [
            [
                n, float(mean[n].mean()), float(alike[n][0].mean()), float(final[n].mean()), structure[n][-1],
                "keeps its map" if float(mean[n].mean()) > KEEPS else "depends on the weights",
            ]
            for n in order
        ]  # fmt: skip
        first = f"last {ends[0]} random" if ends[0] > 1 else "last random"
        columns = ["map", "correlation, mean of stages", f"correlation, {first}", "correlation, all random", "SSIM, all random", "verdict"]
        artifacts: list[Any] = [
            Table("verdicts", columns, table),
            Curve("cascade", x, lines, f"layers made random, from {layers[0]} back to {layers[-1]}", "rank correlation"),
        ]  # fmt: skip
        if order:
            # The most stubborn map, and the least that is no empty one.
            least = next((n for n in order if bool(last[n].any())), order[0])
            shown = list(dict.fromkeys([order[-1], least]))
            places = [(name, i) for name in shown for i in range(min(len(rows), 2))]
            data = torch.stack([maps[name][i].abs() for name, i in places for maps in (original, last)])
            texts = [f"{name}, {when}" for name, _ in places for when in ("trained", "all layers random")]
            over = [rows[i] for _, i in places for _ in (0, 1)]
            artifacts.append(Heatmaps("before_and_after", data, captions=texts, over=over, columns=4, unit="size of the map's values"))
        metrics = [
            Metric(
                f"kept.{n}", float(mean[n].mean()), better="lower", per_image=mean[n].tolist(),
                about="rank correlation of the map with those of the network with more and more random layers, mean over stages",
            )
            for n in order
        ]  # fmt: skip
        stubborn = [n for n in order if float(mean[n].mean()) > KEEPS]
        notes = [
            f"{n} hardly depends on what the network has learnt: with {first} layers its map still correlates "
            f"{float(alike[n][0].mean()):.2f} with the trained network's, {float(mean[n].mean()):.2f} over all stages"
            for n in stubborn
        ]
        notes += [f"{name} is left out: {why}" for name, why in {**ctx.missing, **lost}.items()]
        return Result(artifacts, metrics, notes)


def weighted(model: LoadedModel) -> list[str]:
    """Modules with weights of their own, in reverse order of a forward pass.

    One that no call shows (attention multiplies by some weights without calling their modules) stands with the nearest module
    around it that is called; what belongs to the network as a whole comes last.
    """
    from harness.hooks import split_call

    place = {split_call(name)[0]: i for i, (name, _) in enumerate(model.calls)}

    def when(name: str) -> int:
        while name and name not in place:
            name = name.rpartition(".")[0]
        return place.get(name, -1)

    own = [n for n, m in model.module.named_modules() if any(True for _ in m.parameters(recurse=False))]
    return sorted(own, key=lambda n: (-when(n), n))


def copied(model: LoadedModel) -> LoadedModel:
    """A copy whose weights may be changed."""
    from harness.models import LoadedModel as Loaded

    return Loaded(copy.deepcopy(model.module), model.input, model.name, model.classes, model.device)


def randomise(module: Any, draws: Any, how: How) -> None:
    """Replace a module's own parameters, buffers apart, by random ones."""
    for parameter in module.parameters(recurse=False):
        values = parameter.data
        if how == "shuffle":
            order = draws.rand((values.numel(),))[0].argsort()
            parameter.data = values.flatten()[order].view_as(values).contiguous()
        else:
            spread = values.float().std(correction=0) if values.numel() > 1 else values.float().abs().sum()
            noise = draws.randn(tuple(values.shape))[0]
            parameter.data = (values.float().mean() + spread * noise).to(values.dtype)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """(N,) Spearman's rank correlation of maps (N, H, W); equals share their mean rank, a constant map gives 0.

    What differs by less than a hundred-thousandth of a map's largest value counts as equal: that is rounding.
    """
    from scipy.stats import rankdata

    def ranks(maps: Tensor) -> np.ndarray:
        values = maps.detach().cpu().double().flatten(1).numpy()
        unit = np.abs(values).max(1, keepdims=True) * 1e-5
        return rankdata(np.rint(np.divide(values, unit, out=np.zeros_like(values), where=unit > 0)), axis=1)

    x, y = ranks(a), ranks(b)
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    size = np.sqrt(np.square(x).sum(1) * np.square(y).sum(1))
    return a.new_tensor(np.divide((x * y).sum(1), size, out=np.zeros(len(x)), where=size > 0))


def likeness(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004) of maps (N, H, W) >= 0, each scaled to [0, 1]."""
    from skimage.metrics import structural_similarity

    values = []
    for x, y in zip(*(v.detach().cpu().double().numpy() for v in (a, b)), strict=True):
        x, y = (v / v.max() if v.max() > 0 else v for v in (x, y))
        window = min(7, *x.shape)
        values.append(structural_similarity(x, y, data_range=1.0, win_size=window - 1 + window % 2))
    return float(np.mean(values))
