from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Arrays, Curve, EveryMap, Metric, Paper, Param, Result, Table, TargetSpec, Technique
from harness.device import full_precision

from .integrated_gradients import Baseline, baseline
from .measures import SCORED, Scored, answer, unit_of
from .saliency import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Way = Literal["deletion", "insertion"]
RANDOM, ORACLE = "random", "oracle"
PROFILE = "parameters of the techniques judged: their cheap ones (draft), those of an audit profile, or their defaults"


class Faithfulness(Technique):
    """Does hiding what a map marks cost the answer, and does showing it bring the answer back? The areas under the deletion and
    insertion curves (Petsiuk et al. 2018, arXiv:1806.07421, sec. 4.3) of every installed technique that gives maps.

    Maps are compared at one resolution: a picture has `cells` x `cells` cells, hidden or shown in the order of the map's mean in
    each; ties are broken at random. The ends of the scale are random orders and a greedy oracle that tries every cell in every
    round; it is optimal for additive models. Cost: 2 `steps` forward passes a picture and technique, and for the oracle about
    `cells`^2 `oracle_rounds`.
    """

    name = "faithfulness"
    family = "saliency"
    paper = Paper("Petsiuk, Das, Saenko", 2018, "RISE: Randomized Input Sampling for Explanation", arxiv="1806.07421")
    needs = frozenset({"images"})
    reading = (
        "Deletion: the sooner the curve falls, the better the map found what matters (small area). Insertion: the sooner it rises, "
        "the better (large area). `placed` puts both on one scale, 0 as good as chance, 1 as good as an oracle that asks the network "
        "itself; below 0 is worse than chance. `unexplained` is the share of the effects of hiding random rectangles that the map's "
        "sums do not predict."
    )
    caveats = (
        "Hidden pictures are unlike what the network was trained on, so it answers in part to the hiding itself; deletion and "
        "insertion may disagree for this reason. Fine maps are judged at the resolution of the cells."
    )
    audit = {"full": {"profile": "full", "oracle_rounds": 3}}

    target: TargetSpec = Param("predicted", description=TARGET)
    techniques: tuple[str, ...] = Param((), description="techniques judged; none: every one installed that gives maps")
    profile: Literal["", "draft", "quick", "standard", "full"] = Param("", description=PROFILE)
    cells: int = Param(14, ge=2, le=224, description="cells a side of a picture, at most its pixels")
    steps: int = Param(14, ge=2, le=10_000, description="points of a curve, at most the number of cells")
    deleted: Baseline = Param("mean", description="what is seen where a cell is deleted; mean is the training mean")
    inserted: Baseline = Param("blur", description="what is seen before a cell is inserted")
    scored: Scored = Param("probability", description=SCORED)
    random_orders: int = Param(5, ge=1, le=1000, description="random orders averaged a picture")
    oracle_rounds: int = Param(7, ge=0, le=10_000, description="times that the oracle tries all cells that are left; 0 leaves it out")
    rectangles: int = Param(64, ge=0, le=100_000, description="random rectangles hidden to measure what a map leaves unexplained")

    def uses(self) -> list[EveryMap]:
        return [EveryMap(self.target, self.techniques, self.profile)]

    def run(self, ctx: Context) -> Result:
        import torch

        maps = ctx.needed_attributions()
        game = Game(ctx, self.cells, self.steps, {"deletion": self.deleted, "insertion": self.inserted}, self.scored)
        means = {name: game.pool(m) for name, m in maps.items()}
        orders = {name: game.order(m) for name, m in means.items()}
        curves: dict[str, dict[str, Tensor]] = {}
        for way in ("deletion", "insertion"):
            found = {name: game.curve(way, order) for name, order in orders.items()}
            found[RANDOM] = torch.stack([game.curve(way, game.random(i)) for i in range(self.random_orders)]).mean(0)
            if self.oracle_rounds:
                found[ORACLE] = game.curve(way, game.oracle(way, self.oracle_rounds))
            curves[way] = found
        area = {way: {name: areas(c) for name, c in found.items()} for way, found in curves.items()}  # (N,) each
        missed = unexplained(ctx, game, means, self.rectangles) if self.rectangles else {}
        return self._result(ctx, curves, area, missed, list(maps))

    def _result(self, ctx: Context, curves: Any, area: Any, missed: dict[str, Tensor], names: list[str]) -> Result:
        unit = unit_of(self.scored, ctx)
        share = np.linspace(0, 1, next(iter(curves["deletion"].values())).shape[1])
        artifacts: list[Any] = []
        for way, verb in (("deletion", "hidden, most important first"), ("insertion", "shown, most important first")):
            lines = {name: c.mean(0).cpu() for name, c in curves[way].items()}
            artifacts.append(Curve(way, share, lines, f"share of the picture {verb}", f"mean {unit}"))
        placed = {name: [placement(area[way], name, way) for way in ("deletion", "insertion")] for name in names}
        order = sorted(names, key=lambda n: (-sum(p or 0 for p in placed[n]), n))
        rows: list[list[Any]] = []
        for name in [*order, RANDOM, *([ORACLE] if ORACLE in area["deletion"] else [])]:
            better = beats(area, name) if name in names else [None, None]
            rows.append(
                [
                    name,
                    float(area["deletion"][name].mean()), float(area["insertion"][name].mean()),
                    *(placed.get(name) or ([0.0, 0.0] if name == RANDOM else [1.0, 1.0])),
                    *better,
                    float(missed[name].nanmean()) if name in missed else None,
                ]
            )  # fmt: skip
        columns = ["map", "deletion", "insertion", "deletion placed", "insertion placed", "deletion beats random", "insertion beats random"]
        artifacts.insert(0, Table("faithfulness", [*columns, "unexplained"], rows))
        per_picture = {f"{way}.{name}": values.cpu() for way, found in area.items() for name, values in found.items()}
        artifacts.append(Arrays("areas", per_picture))
        metrics = [Metric("maps", len(names), about="techniques whose maps are judged")]
        ways: tuple[tuple[Way, Literal["lower", "higher"]], ...] = (("deletion", "lower"), ("insertion", "higher"))
        for way, better_when in ways:
            for name in [*order, RANDOM, *([ORACLE] if ORACLE in area[way] else [])]:
                values = area[way][name].tolist()
                about = f"area under the {way} curve, mean {unit}"
                metrics.append(Metric(f"{way}.{name}", float(np.mean(values)), better=better_when, per_image=values, about=about))
        notes = [f"{name} is left out: {why}" for name, why in ctx.missing.items()]
        return Result(artifacts, metrics, notes)


class Game:
    """Pictures whose cells are hidden or shown in some order, and what the network answers.

    An order is (N, cells^2): the cells of each picture, most important first.
    """

    def __init__(self, ctx: Context, cells: int, steps: int, bases: dict[Way, Baseline], scored: Scored) -> None:
        import torch

        self.ctx, self.scored = ctx, scored
        x = ctx.images
        height, width = x.shape[2:]
        self.side = min(cells, height, width)
        self.count = self.side**2
        self.steps = min(steps, self.count)
        self.bases = {way: baseline(ctx, name) for way, name in bases.items()}
        rows, columns = (torch.arange(n, device=x.device) * self.side // n for n in (height, width))
        self.cell = rows[:, None] * self.side + columns  # (H, W) number of each pixel's cell
        self.pixels = torch.outer(torch.bincount(rows), torch.bincount(columns)).flatten().to(x.dtype)  # of each cell
        self._rows, self._columns = (torch.nn.functional.one_hot(p, self.side).to(x.dtype) for p in (rows, columns))

    def pool(self, maps: Tensor) -> Tensor:
        """(N, cells^2) mean of each cell of maps (N, H, W)."""
        with full_precision(maps.device):
            total = self._rows.T @ maps.to(self._rows.dtype) @ self._columns
        return total.flatten(1) / self.pixels

    def order(self, values: Tensor) -> Tensor:
        """Cells by falling value (N, cells^2); equals in a random order, the same for every map."""
        mixed = self.random(-1)
        return mixed.gather(1, values.gather(1, mixed).argsort(dim=1, descending=True, stable=True))

    def random(self, number: int) -> Tensor:
        return self.ctx.draws(stream=f"order {number}").rand((self.count,)).argsort(dim=1)

    def answers(self, way: Way, changed: Tensor | Callable[[slice], Tensor], picture: Tensor) -> Tensor:
        """(n,) answers to copies of the pictures (n,) whose `changed` cells (n, cells^2), bool, are deleted or inserted.

        `changed` may make them for some rows at a time, where all at once would be many.
        """
        import torch

        ctx, base, target = self.ctx, self.bases[way], self.ctx.target

        def work(rows: slice) -> Tensor:
            mine = picture[rows]
            cells = changed[rows] if isinstance(changed, torch.Tensor) else changed(rows)
            mask = cells[:, self.cell].unsqueeze(1)  # (n, 1, H, W)
            clean, hidden = ctx.images[mine], base[mine]
            copies = torch.where(mask, hidden, clean) if way == "deletion" else torch.where(mask, clean, hidden)
            with torch.no_grad():
                return answer(target, target.output(ctx.model, copies), mine, self.scored)

        return torch.cat(list(ctx.batched(len(picture), work)))

    def curve(self, way: Way, order: Tensor) -> Tensor:
        """(N, steps + 1) answers with 0, 1/steps, ... of the cells changed, most important first."""
        import torch

        place = order.argsort(dim=1)  # (N, cells^2): when each cell's turn comes
        counts = torch.linspace(0, self.count, self.steps + 1, device=order.device).round()
        changed = place[:, None] < counts[None, :, None]  # (N, steps + 1, cells^2)
        picture = torch.arange(len(order), device=order.device).repeat_interleave(self.steps + 1)
        return self.answers(way, changed.flatten(0, 1), picture).view(len(order), -1)

    def oracle(self, way: Way, rounds: int) -> Tensor:
        """(N, cells^2): from the whole picture on, every cell that is left is hidden alone in each round, and the best go next.

        For deletion those whose loss lowers the answer most; for insertion those whose loss lowers it least, in reverse: cells
        that are inserted last are those that could best be done without. With as many rounds as cells one goes at a time.
        """
        import torch

        n, rounds = len(self.ctx.images), min(rounds, self.count)
        device = self.ctx.device
        gone = torch.zeros((n, self.count), dtype=torch.bool, device=device)
        order = torch.zeros((n, 0), dtype=torch.int64, device=device)
        ends = [round(self.count * (i + 1) / rounds) for i in range(rounds)]
        for start, end in zip([0, *ends], ends, strict=False):
            left = (~gone).nonzero()[:, 1].view(n, -1)  # every picture has as many left
            picture = torch.arange(n, device=device).repeat_interleave(left.shape[1])
            alone = left.flatten()

            def tried(rows: slice, gone: Tensor = gone, picture: Tensor = picture, alone: Tensor = alone) -> Tensor:
                cells = gone[picture[rows]].scatter(1, alone[rows, None], True)
                return cells if way == "deletion" else ~cells

            value = self.answers(way, tried, picture).view(n, -1)
            next_ = left.gather(1, value.argsort(dim=1, descending=way == "insertion", stable=True)[:, : end - start])
            order = torch.cat([order, next_], 1)
            gone = gone.scatter(1, next_, True)
            self.ctx.report(f"oracle, {way}", end, self.count)
        return order if way == "deletion" else order.flip(1)


def areas(curves: Tensor) -> Tensor:
    """(N,) area under each curve (N, T) over [0, 1], by trapezoids."""
    return (curves[:, 1:] + curves[:, :-1]).mean(1) / 2


def placement(area: dict[str, Tensor], name: str, way: Way) -> float | None:
    """Where a map's mean area lies between random orders (0) and the oracle (1); None without an oracle or a difference."""
    if ORACLE not in area:
        return None
    chance, best, own = (float(area[n].mean()) for n in (RANDOM, ORACLE, name))
    apart = chance - best if way == "deletion" else best - chance
    return (chance - own if way == "deletion" else own - chance) / apart if apart > 1e-12 else None


def beats(area: dict[str, dict[str, Tensor]], name: str) -> list[str]:
    """'17 of 20 pictures' on which a map does better than random orders, by deletion and by insertion."""
    lower = area["deletion"][name] < area["deletion"][RANDOM]
    higher = area["insertion"][name] > area["insertion"][RANDOM]
    return [f"{int(won.sum())} of {len(won)}" for won in (lower, higher)]


def unexplained(ctx: Context, game: Game, means: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """{map: (N,)} share of the squared effects of hiding random rectangles of cells that the map's sums do not predict.

    Infidelity with square removal (Yeh et al. 2019, arXiv:1901.09392, eq. 1) at the best scale of the map, over the mean
    squared effect: 0 all predicted, 1 nothing.
    """
    import torch

    n, side = len(ctx.images), game.side
    ends = ctx.draws(stream="rectangles").randint(0, side, (count, 4))  # (N, count, 4)
    low, high = torch.minimum(ends[..., :2], ends[..., 2:]), torch.maximum(ends[..., :2], ends[..., 2:])
    line = torch.arange(side, device=ctx.device)
    inside = (line >= low.unsqueeze(3)) & (line <= high.unsqueeze(3))  # (N, count, 2, side)
    hidden = (inside[:, :, 0, :, None] & inside[:, :, 1, None, :]).flatten(2)  # (N, count, cells^2)
    pictures = torch.arange(n, device=ctx.device)
    clean = game.answers("deletion", torch.zeros_like(hidden[:, 0]), pictures)
    after = game.answers("deletion", hidden.flatten(0, 1), pictures.repeat_interleave(count)).view(n, count)
    effect = clean[:, None] - after
    return {name: infidelity((hidden * (values * game.pixels)[:, None]).sum(2), effect) for name, values in means.items()}


def infidelity(predicted: Tensor, effect: Tensor) -> Tensor:
    """(N,) mean of (b predicted - effect)^2 over that of effect^2, b >= 0 being the best scale; (N, P) each.

    1 for a map that is zero or the wrong way round, NaN where nothing has an effect.
    """
    squared = predicted.square().sum(1)
    scale = ((predicted * effect).sum(1) / squared.clamp_min(1e-30)).clamp(min=0)
    rest = (scale[:, None] * predicted - effect).square().sum(1)
    return rest / effect.square().sum(1)
