from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from harness import ConfigError, Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique, Use
from harness.datasets import evenly

from .blocks import in_a_name, refuses, spread_layers
from .climb import CONVERGED, GO_ON, PROGRESS, check_go_on, earlier, go_on, mean_picture, state_of, strip

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.optimise import Ascent, Objective

REDIRECTED = 16  # first steps in which gradients pass silent ReLUs, as in Olah, Mordvintsev & Schubert's library
Unit = Literal["channel", "neuron", "direction"]


class ChannelVisualization(Technique):
    """Pictures that units inside a network like best, by gradient ascent on a channel's mean activation, layer by layer
    (Yosinski et al. 2015, arXiv:1506.06579, sec. 3; Olah, Mordvintsev & Schubert 2017, doi:10.23915/distill.00007).

    A unit is a channel, the neuron in the middle of its map, or a random direction of the layer's channel space. Steps follow
    natural colours and favour low frequencies, as in class_visualization. What the unit answers to its picture stands beside
    the most that any picture of the dataset gets from it. Cost: one forward and one backward pass to the layer a step and unit,
    and one forward pass a picture of the dataset.
    """

    name = "channel_visualization"
    family = "synthesis"
    version = 2
    paper = Paper("Olah, Mordvintsev, Schubert", 2017, "Feature Visualization", doi="10.23915/distill.00007")
    needs = frozenset({"dataset", "conv"})
    reading = (
        "A row is one layer, from the first to the last: edges and colours, then textures, then parts and objects. What a picture "
        "repeats is what the unit looks for. The table says how its answer compares with the dataset's strongest picture."
    )
    caveats = (
        "An optimum, not a typical example: see max_patches for what excites the unit in real pictures. Many units answer to several "
        "things, and one picture shows one of them. Random directions often look as meaningful as channels."
    )
    audit = {"full": {}}

    layers: tuple[str, ...] = Param((), description="layers with maps, a row each; none: `rows` of them, spread over the depth")
    rows: int = Param(5, ge=1, le=50, description="how many layers when none are named")
    unit: Unit = Param("channel", description="what is shown: channels, the neuron in the middle of their maps, random directions")
    channels: tuple[int, ...] = Param((), description="channels shown of each layer; none: `count`, spread evenly")
    count: int = Param(6, ge=1, le=200, description="units a layer when none are named")
    size: int = Param(0, ge=0, le=4096, description="side of the pictures in pixels; 0: the model's own, at most 160")
    steps: int = Param(160, ge=0, le=100_000, description="gradient steps")
    step_size: float = Param(8.0, gt=0, description="RMS change of a pixel in a step, in 255ths")
    jitter: float = Param(8, ge=0, description="largest random shift before each step, in pixels of a picture of 224")
    decay: float = Param(0.005, ge=0, lt=1, description="share by which pixels return to the training mean after each step")
    blur: float = Param(0.4, ge=0, le=20, description="sigma in pixels of the blur after every fourth step")
    natural_colours: float = Param(1.0, ge=0, le=1, description="how far steps follow the colours of natural pictures")
    low_frequencies: float = Param(0.5, ge=0, le=3, description="power by which steps favour low spatial frequencies")
    noise: float = Param(0.05, ge=0, le=0.5, description="standard deviation of the noise around the mean at the start")
    converged: float = CONVERGED
    go_on: int = GO_ON

    @model_validator(mode="after")
    def _consistent(self) -> ChannelVisualization:
        check_go_on(self)
        return self

    def uses(self) -> list[Use]:
        return earlier(self)

    def run(self, ctx: Context) -> Result:
        import torch

        model = ctx.model
        layers = list(dict.fromkeys(model.full_name(n) for n in self.layers)) or spread_layers(ctx, self.rows)
        side = self.size or min(model.input.size, 160)
        if side != model.input.size:
            problem = refuses(model, side, layers[-1])
            if problem and self.size:
                raise NotApplicable(f"needs a model that takes pictures of {side} pixels; leave out `size` ({problem})")
            side = model.input.size if problem else side
        shown = {layer: self._channels(layer, model.maps_shape(layer)[0]) for layer in layers}
        strongest = self._dataset(ctx, layers)
        rows: list[list[Any]] = []
        pictures, captions, lines, notes = [], [], {}, []
        strips: list[Any] = []
        states: list[Any] = []
        for layer, channels in shown.items():
            made, weights = self._climb(ctx, layer, channels, side)
            with torch.no_grad():
                answer = torch.cat(
                    list(ctx.batched(len(channels), lambda r: model.activations(made.images[r], [layer])[layer]))  # noqa: B023
                )
            own = torch.einsum("nchw,nc->nhw", answer, weights)  # each unit's map on its own picture
            score = self._score(own[:, None])[:, 0].tolist()
            peak, best = own.flatten(1).amax(1).tolist(), strongest[layer]
            names = [f"{self.unit} {c}" for c in channels]
            for i, c in enumerate(channels):
                high = None if best is None else float(np.percentile(best[:, c], 99))
                rows.append([layer, names[i], score[i], peak[i], high, None if high is None else bool(score[i] > high)])
            pictures.append(made.images)
            captions += [f"{layer}: {n}" if i == 0 else n for i, n in enumerate(names)]
            if len(made.scores) and bool(torch.isfinite(made.scores).all()):
                lines[layer] = made.scores.mean(1)
            strips += strip(f"progress-{in_a_name(layer)}", made, None, [f"{layer}, {names[0]}"], exact=side < 64)
            states += state_of(made, f"state-{in_a_name(layer)}")
            notes += [f"{layer}, {names[i]}: the score stopped being finite; the last good picture is shown" for i in made.stopped]
        longest = max((len(line) for line in lines.values()), default=0)
        lines = {layer: torch.cat([line, line[-1:].expand(longest - len(line))]) for layer, line in lines.items()}
        return self._result(torch.cat(pictures), captions, rows, lines, notes, side, strips, states)

    def _channels(self, layer: str, total: int) -> list[int]:
        wrong = [c for c in self.channels if not 0 <= c < total]
        if wrong and self.unit != "direction":
            raise ConfigError(f"channel_visualization.channels: {layer!r} has channels 0 to {total - 1}; there is no channel {wrong[0]}")
        return list(self.channels) or (list(range(self.count)) if self.unit == "direction" else evenly(self.count, total))

    def _climb(self, ctx: Context, layer: str, channels: list[int], side: int) -> tuple[Ascent, Tensor]:
        """Pictures of a layer's units, and each unit's weights over its channels (n, C)."""
        import torch

        from harness import optimise as o
        from harness.hooks import relu_backward

        model = ctx.model
        total = model.maps_shape(layer)[0]
        centre = mean_picture(model, side, side)
        if self.unit == "direction":
            drawn = ctx.draws([f"{layer} direction {c}" for c in channels]).randn((total,))
            weights = drawn / drawn.norm(dim=1, keepdim=True)
        else:
            weights = torch.nn.functional.one_hot(torch.tensor(channels, device=ctx.device), total).to(model.dtype)
        begin = go_on(ctx, f"state-{in_a_name(layer)}")

        def some(rows: slice) -> Ascent:
            draws = ctx.draws([f"{layer} {self.unit} {c}" for c in channels[rows]], stream="start")
            return o.ascend(
                model,
                unit_score(layer, weights[rows], middle=self.unit == "neuron"),
                (centre + self.noise * draws.randn((model.input.channels, side, side))).clamp(0, 1),
                steps=self.steps,
                step_size=self.step_size / 255,
                draws=draws,
                transforms=[o.Jitter(share=self.jitter / 224)] if self.jitter else [],
                conditioners=[o.NaturalColours(self.natural_colours), o.LowFrequencies(self.low_frequencies)],
                operators=[o.Decay(self.decay, centre), o.Blur(self.blur, 4), o.Clamp()],
                snapshots=PROGRESS,
                converged=self.converged,
                begin=begin.rows(rows) if begin else None,
                # A unit that is silent at the start would stay so.
                during=lambda step: relu_backward("redirected") if step < REDIRECTED else nullcontext(),
                progress=ctx.report,
            )

        return o.join(list(ctx.batched(len(channels), some))), weights

    def _score(self, maps: Tensor) -> Tensor:
        """(N, C) of maps (N, C, H, W): what ascent raises, the mean over positions or the middle."""
        return maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2] if self.unit == "neuron" else maps.mean((2, 3))

    def _dataset(self, ctx: Context, layers: list[str]) -> dict[str, np.ndarray | None]:
        """{layer: (pictures, C)} each channel's score in each picture; None for directions."""
        if self.unit == "direction":
            return dict.fromkeys(layers)
        model = ctx.model
        parts = [p for _, p in ctx.stream(lambda images: model.activations(images, layers, reduce=lambda _, t: self._score(t)))]
        return {layer: np.concatenate([p[layer].float().cpu().numpy() for p in parts]) for layer in layers}

    def _result(
        self,
        pictures: Tensor,
        captions: list[str],
        rows: list[list[Any]],
        lines: dict[str, Tensor],
        notes: list[str],
        side: int,
        strips: list[Any],
        states: list[Any],
    ) -> Result:
        sizes = [sum(row[0] == layer for row in rows) for layer in dict.fromkeys(row[0] for row in rows)]
        artifacts: list[Any] = []
        if len(set(sizes)) == 1:
            artifacts.append(Images("pictures", pictures, captions=captions, columns=sizes[0], exact=side < 64, caption="A row a layer."))
        else:  # a row a layer is not to be had on one page
            begun = 0
            for size in sizes:
                some, words = pictures[begun : begun + size], captions[begun : begun + size]
                artifacts.append(
                    Images(f"pictures-{in_a_name(rows[begun][0])}", some, captions=words, columns=min(size, 8), exact=side < 64)
                )
                begun += size
        artifacts += strips
        if lines:
            artifacts.append(Curve("objective", range(1, len(next(iter(lines.values()))) + 1), lines, "step", "activation"))
        what = "activation in the middle" if self.unit == "neuron" else "mean activation"
        columns = ["layer", "unit", what, "largest activation", "99th percentile of the dataset's pictures", "above it"]
        artifacts += [Table("units", columns, rows), *states]
        above = [float(row[5]) for row in rows if row[5] is not None]
        metrics = [Metric("units", len(rows))]
        if above:
            about = "share of units that answer more strongly to their picture than to 99 % of the dataset's"
            metrics.append(Metric("above_dataset", float(np.mean(above)), better="higher", per_image=above, about=about))
        return Result(artifacts, metrics, notes)


def unit_score(layer: str, weights: Tensor, middle: bool = False) -> Objective:
    """(N,) the mean over positions of each unit's activation, weights (N, C) making it from the channels; or in the middle alone."""
    from harness.optimise import Objective, positions

    def score(outputs: dict[str, Tensor], _: Tensor) -> Tensor:
        height, width = outputs[layer].shape[2:]
        found: Tensor = (positions(outputs[layer]) @ weights[:, :, None].to(outputs[layer].dtype)).squeeze(2)
        return found[:, height // 2 * width + width // 2] if middle else found.mean(1)

    return Objective(frozenset({layer}), score)
