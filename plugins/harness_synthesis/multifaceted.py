from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import Arrays, ConfigError, Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique, Use

from .blocks import refuses
from .climb import CONVERGED, GO_ON, check_go_on, earlier, go_on

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.optimise import State


@dataclass(frozen=True)
class Phase:
    """A stretch of the released schedule: pictures grow by `scale`; steps and denoising weights count pixels in 255ths."""

    steps: int
    step: tuple[float, float]
    denoise: tuple[float, float]  # weights of the fidelity term: the smaller, the smoother
    spread: float
    scale: float = 1.0
    released: int = 0  # steps in the release
    margin: float = 0.0  # as a share of the side: the release has 50 of 227 pixels


# https://github.com/Evolving-AI-Lab/mfv, act_max.tvd.mean.py. There the first phase's step is written as going from 1 to 2; run by
# the Python of its day, whose division of whole numbers rounds down, it stays at 1.
PHASES = (
    Phase(190, (1, 2), (0.4, 0.4), 0.3, released=190),
    Phase(150, (1, 1), (0.01, 2), 0.3, released=150, scale=1.2),
    Phase(20, (2, 2), (0.1, 2), 0.2, released=20, margin=50 / 227),
    Phase(10, (2, 2), (0.4, 2), 0.3, released=10),
)
RELEASED_SIDE = 227
MINIMUM = 50  # steps of a schedule for small pictures: in as many, random starts reach their class on the digit networks
TOTAL = sum(phase.steps for phase in PHASES)
START_COLOUR, START_NOISE = 175 / 255, 8 / 255  # of the random starts, as in the release


class Multifaceted(Technique):
    """The several kinds of pictures one class stands for: its own pictures are grouped by their features, and ascent on the class
    score starts from the mean picture of each group (Nguyen, Yosinski & Clune 2016, arXiv:1602.03616).

    Features go through PCA (50 axes) and t-SNE into the plane, where k-means finds the facets; a facet's start is the mean of the
    pictures nearest to its centre. The schedule is the authors' release: 190, 150, 20 and 10 steps of mean size 1 to 2 in 255ths,
    on random crops of a picture enlarged by 1.2, each followed by total-variation denoising (here of the whole picture, by
    Chambolle's projection, which goes on from the step before); smaller pictures take fewer steps and less denoising, in proportion
    to their side. As many random starts are climbed for comparison. Cost: two forward passes a picture of the dataset, two forward and
    backward passes a step and facet.
    """

    name = "multifaceted"
    family = "synthesis"
    version = 2
    paper = Paper("Nguyen, Yosinski, Clune", 2016, "Multifaceted Feature Visualization", arxiv="1602.03616")
    needs = frozenset({"dataset", "classifier"})
    reading = (
        "A column is one facet of the class: the pictures nearest to its centre, their mean, and what the class score makes of that "
        "mean. Columns that differ show that the class has several faces for the model; the last row shows what chance starts give."
    )
    caveats = (
        "Facets are groups of the pictures at hand, found by clustering: other pictures or another number of facets give others. A mean "
        "picture already shows the facet, so colours and layout are its own; what ascent adds is what the class score asks for."
    )
    audit = {"full": {"count": 1, "facets": 4}}

    classes: tuple[int | str, ...] = Param((), description="classes by index or name; none: `count` of those the pictures show, evenly")
    count: int = Param(1, ge=1, le=1000, description="how many classes when none are named")
    members: Literal["auto", "labelled", "predicted", "all"] = Param(
        "auto",
        description="which pictures are a class's own: those labelled so; those the model gives it; all, for a folder of one class. "
        "auto: labelled where labels are classes of the model, else all where one class is named, else predicted",
    )
    facets: int = Param(10, ge=1, le=100, description="groups of a class's pictures (k of k-means), at most as many as pictures")
    nearest: int = Param(15, ge=1, le=1000, description="pictures nearest to a facet's centre whose mean is the start")
    plane: Literal["tsne", "pca", "none"] = Param(
        "tsne", description="where the groups are sought: t-SNE of the principal axes, the first two of these, or all 50"
    )
    layer: str = Param("penultimate", description="whose features: 'penultimate', or a layer's name (averaged over positions)")
    schedule: int | None = Param(
        None,
        ge=4,
        le=100_000,
        description="length of the schedule in steps; none: the released 370 at 227 pixels, in proportion to the side",
    )
    steps: int | None = Param(None, ge=0, le=100_000, description="how many of these steps are made; none: all")
    size: int = Param(0, ge=0, le=4096, description="side of the pictures in pixels; 0: the model's own")
    converged: float = CONVERGED
    go_on: int = GO_ON

    @model_validator(mode="after")
    def _consistent(self) -> Multifaceted:
        check_go_on(self)
        return self

    def uses(self) -> list[Use]:
        return earlier(self)

    def run(self, ctx: Context) -> Result:
        features, groups = self._classes(ctx)
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        apart: dict[str, list[float]] = {"facets": [], "random": []}
        chances: list[float] = []
        by_chance: list[float] = []
        notes: list[str] = []
        lines: dict[str, Any] = {}
        for number, (c, members) in enumerate(groups.items()):
            name = ctx.model.class_name(c)
            facets = self._facets(ctx, features[members], c)
            made = self._class(ctx, c, members, facets)
            notes += [f"{name}: {note}" for note in made.notes]
            artifacts.append(made.sheet)
            if number == 0 and made.progress is not None:
                artifacts.append(made.progress)
            rows += [[name, k + 1, len(f), *values] for k, (f, values) in enumerate(zip(facets, made.facts, strict=True))]
            chances += [values[1] for values in made.facts]
            by_chance += made.random
            for which, value in made.apart.items():
                apart[which].append(value)
            if made.scores is not None:
                lines[f"{name} ({c})" if name in lines else name] = made.scores
            artifacts.append(made.state)
        if lines:
            longest = max(map(len, lines.values()))
            artifacts.append(
                Curve(
                    "objective",
                    range(1, longest + 1),
                    {n: [*v, *[v[-1]] * (longest - len(v))] for n, v in lines.items()},
                    "step",
                    "class score, mean of the facets",
                )
            )
        columns = ["class", "facet", "pictures", "score", "probability", "probability of the mean picture"]
        artifacts.append(Table("facets", columns, rows))
        return Result(artifacts, self._metrics(apart, chances, by_chance), list(dict.fromkeys(notes)))

    def _metrics(self, apart: dict[str, list[float]], chances: list[float], by_chance: list[float]) -> list[Metric]:
        apart_ = "mean distance between the {} pictures of one class, of penultimate features"
        found = [
            Metric(
                "probability", float(np.mean(chances)), better="higher", per_image=chances, about="of the class, for its facets' pictures"
            )
        ]
        about = "the same for the pictures from random starts; low where these have not got there, and then lie close together for that"
        found.append(Metric("random_probability", float(np.mean(by_chance)), per_image=by_chance, about=about))
        for which, words in (("facets", "facets'"), ("random", "random starts'")):
            if apart[which]:
                about = apart_.format(words)
                found.append(Metric(f"{which}_apart", float(np.mean(apart[which])), per_image=apart[which], about=about))
        if apart["facets"] and apart["random"]:
            more = [float(a > b) for a, b in zip(apart["facets"], apart["random"], strict=True)]
            about = "share of classes whose facets' pictures differ more than those of random starts"
            found.append(Metric("facets_differ_more", float(np.mean(more)), better="higher", per_image=more, about=about))
        return found

    # -- grouping ------------------------------------------------------------------------------------------------------

    def _classes(self, ctx: Context) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Features (pictures, D) of the dataset, and {class: indices of its pictures}."""
        model = ctx.model
        if self.layer != "penultimate":
            model.check_layer(self.layer)
        wanted = [model.class_index(c) for c in self.classes]
        way: str = self.members
        if way == "auto":
            way = "labelled" if ctx.labels is not None else "all" if len(wanted) == 1 else "predicted"
        if way == "labelled" and ctx.labels is None:
            raise NotApplicable("needs pictures whose labels are classes of this model, or members 'predicted' or 'all'")
        if self.size and self.size != model.input.size:
            reason = refuses(model, self.size)
            if reason:
                raise NotApplicable(f"needs a model that takes pictures of {self.size} pixels; leave out `size` ({reason})")
        if way == "labelled" and ctx.labels is not None:  # known before the dataset is looked at
            held = set(ctx.labels.tolist())
            lacking = [c for c in wanted if c not in held]
            if lacking:
                raise ConfigError(f"multifaceted.classes: no picture of the dataset is labelled {model.class_name(lacking[0])!r}")
        if way == "all" and len(wanted) != 1:
            raise ConfigError("multifaceted.members: 'all' takes every picture for one class's; name that class in `classes`")
        features, predicted = self._features(ctx)
        if way == "all":
            return features, {wanted[0]: np.arange(len(features))}
        own = ctx.labels.cpu().numpy() if way == "labelled" and ctx.labels is not None else predicted
        present = np.unique(own).tolist()
        missing = [c for c in wanted if c not in present]
        if missing:
            raise ConfigError(f"multifaceted.classes: no picture of the dataset is {way} {model.class_name(missing[0])!r}")
        if not wanted:
            count = min(self.count, len(present))
            wanted = [present[i * len(present) // count] for i in range(count)]
        return features, {c: np.flatnonzero(own == c) for c in wanted}

    def _features(self, ctx: Context) -> tuple[np.ndarray, np.ndarray]:
        import torch

        def work(images: Tensor) -> tuple[Tensor, Tensor]:
            return ctx.model.embedding(images, self.layer), ctx.model(images).argmax(1)

        parts = [p for _, p in ctx.stream(work)]
        features, best = torch.cat([f for f, _ in parts]), torch.cat([b for _, b in parts])
        return features.float().cpu().numpy(), best.cpu().numpy()

    def _facets(self, ctx: Context, features: np.ndarray, c: int) -> list[np.ndarray]:
        """Of one class, each facet's members, nearest to its centre first; larger facets first."""
        count = min(self.facets, len(features))
        seed = ctx.draws([f"facets of {c}"]).integers(0, 2**31 - 1, 1)[0][0]
        return facets(plane(features, self.plane, seed), count, seed)

    # -- ascent --------------------------------------------------------------------------------------------------------

    def _class(self, ctx: Context, c: int, members: np.ndarray, facets: Sequence[np.ndarray]) -> Made:
        import torch

        model = ctx.model
        side = self.size or model.input.size
        ids = [f"{c} facet {k}" for k in range(len(facets))] + [f"{c} random {k}" for k in range(len(facets))]
        nearest, means = self._means(ctx, members, facets, side)
        noise = ctx.draws(ids[len(facets) :], stream="start").randn((model.input.channels, side, side))
        start = torch.cat([means, (START_COLOUR + START_NOISE * noise).clamp(0, 1)])
        begin = go_on(ctx, f"state-{c}")
        phases = scheduled(self.schedule or max(MINIMUM, round(TOTAL * side / RELEASED_SIDE)))
        steps = sum(phase.steps for phase in phases) if self.steps is None else self.steps
        if self.go_on >= max(1, steps):
            raise ConfigError(f"multifaceted.go_on: {self.go_on} must be fewer than the {steps} steps that are made in all")

        def some(rows: slice) -> Climbed:
            return climb(ctx, c, start[rows], ids[rows], phases, steps, self.converged, begin.rows(rows) if begin else None)

        parts = list(ctx.batched(len(start), some))
        whole = torch.cat([p.images for p in parts])
        shown = resized(whole, side)
        fitted = resized(whole, model.input.size)
        logits = torch.cat([ctx.logits(fitted), ctx.logits(resized(means, model.input.size))])
        chance, score = logits.softmax(1)[:, c].tolist(), logits[:, c].tolist()
        k = len(facets)
        with torch.no_grad():
            found = torch.cat(list(ctx.batched(len(fitted), lambda rows: model.embedding(fitted[rows]))))
        apart = {"facets": spread_apart(found[:k]), "random": spread_apart(found[k:])} if k > 1 else {}
        sheet = torch.cat([nearest, means, shown[:k], shown[k:]])
        labels = [f"facet {i + 1}, nearest of {len(f)}" for i, f in enumerate(facets)]
        labels += ["mean"] * k + [f"p = {p:.2f}" for p in chance[:k]] + [f"random start, p = {p:.2f}" for p in chance[k : 2 * k]]
        caption = f"{model.class_name(c)}: a column a facet."
        small = side < 64
        shots = [(number, torch.cat([p.shots[i][1] for p in parts])) for i, (number, _) in enumerate(parts[0].shots)]
        strip = None
        if shots:
            few = min(k, 4)
            stages = torch.stack([means[:few], *(resized(s[:few], side) for _, s in shots)], 1).flatten(0, 1)
            words = ["mean", *(f"phase {number + 1}" for number, _ in shots)]
            strip = Images("progress", rounded(stages), captions=words * few, columns=len(words), exact=small)
        scores = torch.cat([p.scores for p in parts], 1)[:, :k]
        stopped = sorted({i for p, first in zip(parts, firsts(parts), strict=True) for i in (first + j for j in p.stopped)})
        return Made(
            Images(f"class-{c}", rounded(sheet), captions=labels, columns=k, exact=small, caption=caption),
            strip,
            [[score[i], chance[i], chance[2 * k + i]] for i in range(k)],
            chance[k : 2 * k],
            apart,
            scores.mean(1).tolist() if len(scores) and bool(torch.isfinite(scores).all()) else None,
            Arrays(f"state-{c}", joined(parts).arrays()),
            [f"{ids[i].partition(' ')[2]}: the score stopped being finite; the last good picture is shown" for i in stopped],
        )

    def _means(self, ctx: Context, members: np.ndarray, facets: Sequence[np.ndarray], side: int) -> tuple[Tensor, Tensor]:
        """(k, C, side, side) each facet's nearest picture, and the mean of its `nearest` ones."""
        import torch

        from harness.context import to_images

        first, means = [], []
        for facet in facets:
            chosen = ctx.dataset.select(indices=[int(i) for i in members[facet[: self.nearest]]])
            images = to_images(chosen.pictures(ctx.model.input), ctx.device, ctx.model.dtype)
            first.append(images[0])
            means.append(images.mean(0))
        return resized(torch.stack(first), side), resized(torch.stack(means), side)


@dataclass(frozen=True)
class Made:
    """What comes of one class."""

    sheet: Images
    progress: Images | None
    facts: list[list[float]]  # score, probability, probability of the mean picture, a facet each
    random: list[float]  # probabilities of the pictures from random starts
    apart: dict[str, float]
    scores: list[float] | None
    state: Arrays
    notes: list[str]


@dataclass(frozen=True)
class Climbed:
    """Where pictures stand after some steps of the schedule."""

    images: Tensor
    scores: Tensor  # (T, N)
    shots: list[tuple[int, Tensor]]  # at the end of each phase, counted from 0
    state: State
    stopped: list[int]


def scheduled(steps: int) -> tuple[Phase, ...]:
    """The released phases, drawn out or shortened to `steps` in all."""
    ends = [round(steps * sum(p.steps for p in PHASES[: k + 1]) / TOTAL) for k in range(len(PHASES))]
    return tuple(replace(p, steps=end - begun) for p, begun, end in zip(PHASES, [0, *ends], ends, strict=False))


def climb(
    ctx: Context, c: int, start: Tensor, ids: Sequence[str], phases: Sequence[Phase], steps: int, converged: float, begin: State | None
) -> Climbed:
    """A schedule's first `steps` steps on a class score, from pictures (N, C, H, W); beyond its end the last phase goes on."""
    import torch

    from harness import optimise as o

    side = start.shape[-1]
    draws = ctx.draws(ids)
    done, x = 0, start
    if begin is not None:
        done, x = begin.step, begin.memory["variables"]
        draws.restore(begin.draws)
    classes = torch.full((len(start),), c, device=ctx.device)
    alive = torch.ones(len(start), dtype=torch.bool, device=ctx.device) if begin is None else begin.memory["alive"]
    memory = {} if begin is None else kept(begin.memory)
    scores, shots, offset = [start.new_zeros((0, len(start)))], [], 0
    for number, phase in enumerate(phases):
        count = min(steps - offset, phase.steps if number < len(phases) - 1 else steps)
        if count <= 0:
            continue
        if offset + count > done:
            inside = max(0, done - offset)
            if inside == 0:
                memory = {}
            if inside == 0 and phase.scale != 1:
                x = resized(x, round(x.shape[-1] * phase.scale))
            # Denoising reaches a number of pixels: fewer in a smaller picture, for the same look.
            smooth = side / RELEASED_SIDE / 255
            # The release steps by the mean over the crop; the loop's runs over the whole picture, where all else is zero.
            share = (side / x.shape[-1]) ** 2
            part = o.ascend(
                ctx.model,
                o.class_score(classes),
                x,
                steps=count,
                step_size=lambda t, phase=phase, share=share: share * between(phase.step, t, phase.steps) / 255,  # type: ignore[misc]
                draws=draws,
                rule="mean_abs",
                transforms=[o.Crop(side, phase.spread), o.Focus(phase.margin)],
                operators=[o.Clamp(), o.Denoise(lambda t, phase=phase, smooth=smooth: smooth / fidelity(phase, t))],  # type: ignore[misc]
                converged=converged,
                begin=o.State(inside, {"variables": x, "alive": alive, **memory}, draws.state()),
                progress=lambda what, d, _, offset=offset: ctx.report(what, offset + d, steps),  # type: ignore[misc]
            )
            assert part.variables is not None
            assert part.state is not None
            x, alive = part.variables, part.state.memory["alive"]
            # What rests within a phase goes on resting there, and begins anew with the next.
            memory = kept(part.state.memory) if offset + count == steps else {}
            made = len(part.scores)
            left = part.scores[-1:].expand(count - inside - made, -1) if made else part.scores
            scores.append(torch.cat([part.scores, left]))  # of an early end the last score stands for the rest
            shots.append((number, x))
        offset += phase.steps
    stopped = torch.nonzero(~alive).flatten().tolist()
    return Climbed(
        x, torch.cat(scores), shots, o.State(max(steps, done), {"variables": x, "alive": alive, **memory}, draws.state()), stopped
    )


def kept(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a phase remembers beside its pictures: who rests, and where denoising stands."""
    return {name: value for name, value in memory.items() if name not in ("variables", "alive")}


def joined(parts: Sequence[Climbed]) -> State:
    """The batches' states as one."""
    import torch

    from harness.optimise import State

    memory = {name: torch.cat([p.state.memory[name] for p in parts]) for name in parts[0].state.memory}
    return State(parts[0].state.step, memory, torch.cat([p.state.draws for p in parts]))


def firsts(parts: Sequence[Climbed]) -> list[int]:
    """The place of each batch's first picture."""
    return [sum(len(p.images) for p in parts[:n]) for n in range(len(parts))]


def between(ends: tuple[float, float], step: int, steps: int) -> float:
    return ends[0] + (ends[1] - ends[0]) * min(step, steps) / max(1, steps)


def fidelity(phase: Phase, step: int) -> float:
    """The released weight of a step, start - (start - end step) / steps, which ends above `end` by nearly `start`; a phase of
    another length runs through the same weights."""
    (low, high), steps = phase.denoise, phase.released
    return low - (low - high * steps * min(1.0, step / max(1, phase.steps))) / steps


def plane(features: np.ndarray, way: str, seed: int) -> np.ndarray:
    """Features (n, D) on at most 50 principal axes, and from there in the plane by t-SNE or by the first two."""
    from sklearn.decomposition import PCA

    count = min(50, len(features) - 1, features.shape[1])
    if count < 1:
        return np.zeros((len(features), 1), features.dtype)
    axes = PCA(count, random_state=seed).fit_transform(features)
    if way == "none":
        return axes
    # t-SNE wants three times as many neighbours as its perplexity; of fewer pictures the principal axes do as well.
    if way == "pca" or len(features) < 10:
        return axes[:, :2]
    from harness_representations.tsne_map import embed

    return embed(axes, min(30.0, (len(features) - 1) / 3), 1000, seed)[0]


def facets(points: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """k-means groups of points (n, d), the largest first; each group's indices, the nearest to its centre first."""
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(points, axis=0)))
    means = KMeans(count, n_init=10, random_state=seed).fit(points)
    far = np.linalg.norm(points - means.cluster_centers_[means.labels_], axis=1)
    found = [np.flatnonzero(means.labels_ == k) for k in range(count)]
    found = [members[np.argsort(far[members], kind="stable")] for members in found]
    return sorted(found, key=lambda members: (-len(members), int(members[0])))


def spread_apart(vectors: Tensor) -> float:
    """Mean Euclidean distance between vectors (k, D)."""
    import torch

    return float(torch.pdist(vectors.float()).mean())


def resized(images: Tensor, side: int) -> Tensor:
    from torch.nn.functional import interpolate

    return (
        images if images.shape[-1] == side else interpolate(images, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    )


def rounded(images: Tensor) -> Tensor:
    """Whole 255ths, which are stored in a quarter of the space."""
    import torch

    return torch.round(images.clamp(0, 1) * 255) / 255
