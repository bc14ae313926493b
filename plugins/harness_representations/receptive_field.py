from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import Curve, Heatmaps, Metric, NotApplicable, Paper, Param, Result, Table, Technique
from harness.datasets import evenly

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel


class ReceptiveField(Technique):
    """How much of a picture a unit of each layer can see, r += (k - 1) j with j *= s (Araujo et al. 2019,
    doi:10.23915/distill.00021), and how much it does see: where the energy of its gradient lies (Luo et al. 2016).

    The effective field is the side of the smallest square that holds `energy` of the centre unit's squared input gradient,
    averaged over pictures, for a random sum (signs +-1) of the layer's channels. Branches count with their widest. Cost: one
    forward and one backward pass a picture and layer measured.
    """

    name = "receptive_field"
    family = "representations"
    version = 2
    paper = Paper(
        "Luo, Li, Urtasun, Zemel",
        2016,
        "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
        arxiv="1701.04128",
    )
    needs = frozenset({"images", "conv"})
    reading = (
        "The theoretical field grows with depth by arithmetic; the effective one, drawn as a map of gradient energy around the "
        "middle, is smaller and round. Layers whose field spans the picture can use all of it."
    )
    caveats = (
        "The effective field is measured at the centre, for these pictures and this training: it differs between networks of "
        "the same shape. Attention and global pooling see everything at once."
    )
    audit = {"full": {}}

    layers: tuple[str, ...] = Param((), description="layers measured; none: `count` of those with maps, evenly by depth")
    count: int = Param(6, ge=1, le=100, description="layers measured when none are named")
    energy: float = Param(0.95, gt=0, lt=1, description="share of the gradient's energy inside the effective field")

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.layers import layer_table

        model = ctx.model
        table = layer_table(model)
        maps = with_maps(model)
        if self.layers:
            for name in self.layers:
                model.maps_shape(name)
            chosen = [model.full_name(name) for name in self.layers]
        else:
            chosen = [maps[-1 - i] for i in reversed(evenly(self.count, len(maps)))]
        side = model.input.size
        fields = {row.name: row for row in table}
        energies, sides = [], []
        for name in ctx.track(chosen, len(chosen), "layers"):
            energy = self._energy(ctx, name)
            energies.append(energy / energy.sum().clamp_min(torch.finfo(energy.dtype).tiny))
            sides.append(effective_side(energies[-1], self.energy))
        rows = []
        for row in table:
            measured = sides[chosen.index(row.name)] if row.name in chosen else None
            rows.append([row.name, row.kind, " x ".join(map(str, row.shape)), theoretical(row.receptive_field, side), row.stride, measured])
        shown = [theoretical(fields[n].receptive_field, side) if n in fields else None for n in chosen]
        known = [s for s in shown if s is not None]
        artifacts: list[Any] = [
            # The root brings the tails to sight; the numbers rest on the energy itself.
            Heatmaps(
                "energy", torch.stack([e.sqrt() for e in energies]), over=(), unit="root of the gradient's energy",
                captions=[f"{n}: {s} of {t if t is not None else '?'} pixels" for n, s, t in zip(chosen, sides, shown, strict=True)],
                caption=f"Effective field (side holding {self.energy:.0%} of the energy) of the theoretical one.",
            ),
            Table("layers", ["layer", "kind", "output", "receptive field", "stride", f"effective ({self.energy:.0%})"], rows),
        ]  # fmt: skip
        if len(known) == len(chosen) and len(chosen) > 1:
            lines = {"theoretical": known, "effective": sides}
            artifacts.append(Curve("by_depth", range(1, len(chosen) + 1), lines, "layers measured, by depth", "pixels"))
        metrics = [Metric("effective_side", sides[-1], "px", about=f"effective field of {chosen[-1]}, the deepest measured")]
        notes = []
        if known and shown[-1] is not None:
            metrics.insert(0, Metric("theoretical_side", shown[-1], "px", about=f"theoretical field of {chosen[-1]}"))
            metrics.append(
                Metric(
                    "effective_share",
                    min(1.0, sides[-1] / min(shown[-1], side)),
                    about="effective of theoretical side, as far as the picture goes",
                )
            )
        unknown = [row.name for row in table if row.receptive_field is None]
        if unknown:
            notes.append(
                f"the theoretical field of {len(unknown)} of {len(table)} layers is not known (no torch.fx graph, or an unknown function)"
            )
        return Result(artifacts, metrics, notes)

    def _energy(self, ctx: Context, layer: str) -> Tensor:
        """(H, W) mean over pictures of the squared gradient of the centre unit's random channel sum."""
        import torch

        shape = ctx.model.layer_shape(layer)
        signs = ctx.draws([layer]).randint(0, 2, (shape[0],))[0].to(ctx.images.dtype) * 2 - 1

        def work(rows: slice) -> Tensor:
            with torch.enable_grad():
                leaf = ctx.images[rows].detach().requires_grad_()
                output = ctx.model.activations(leaf, [layer])[layer]
                centre = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
                gradient = torch.autograd.grad((centre * signs).sum(), leaf)[0]
            return gradient.square().sum((0, 1))

        return torch.stack(list(ctx.batched(len(ctx.images), work))).sum(0) / len(ctx.images)


def with_maps(model: LoadedModel) -> list[str]:
    """Leaf layers whose output is maps with more than one position, in the order of a forward pass, up to the class scores."""
    names = [name for name, _ in model.calls]
    end = names.index(model.last_map)
    found = []
    for name, shape in model.calls[:end]:
        module = model.modules[name.partition("#")[0]]
        if len(shape) == 4 and shape[2] * shape[3] > 1 and name not in model.channels_behind and not list(module.children()):
            found.append(name)
    if not found:
        raise NotApplicable(f"model {model.name!r} has no layer with maps (C, H, W)")
    return found


def theoretical(field: int | None, side: int) -> int | None:
    """Side in pixels; a layer that sees the whole picture counts with the picture's own."""
    return side if field == 0 else field


def effective_side(energy: Tensor, share: float) -> int:
    """Side of the smallest square that holds `share` of the energy (H, W), wherever it lies; 0 when there is none."""
    import numpy as np

    values = energy.detach().cpu().double().numpy()
    height, width = values.shape
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = values.cumsum(0).cumsum(1)
    if total[-1, -1] <= 0:
        return 0

    def held(side: int) -> float:
        rows, columns = min(side, height), min(side, width)
        sums = total[rows:, columns:] - total[:-rows, columns:] - total[rows:, :-columns] + total[:-rows, :-columns]
        return float(sums.max() / total[-1, -1])

    low, high = 1, max(height, width)
    while low < high:
        middle = (low + high) // 2
        if held(middle) >= share - 1e-12:
            high = middle
        else:
            low = middle + 1
    return low
