from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Heatmaps, Paper, Param, Result, TargetSpec, Technique
from harness.device import full_precision

from .integrated_gradients import Baseline, baseline
from .measures import SCORED, Scored, answer, captions, concentration, unit_of, zero_notes
from .saliency import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context


class Rise(Technique):
    """The mean answer to randomly masked copies of a picture in which a pixel was left to be seen,
    S(p) = 1 / (E[M] N) sum_i f(I * M_i) M_i(p) (Petsiuk et al. 2018, arXiv:1806.07421, eq. 6).

    Masks are coarse random grids, enlarged bilinearly and shifted. Unless `centred` is off, f is counted from its mean over all
    masks: the map becomes the covariance of answer and mask, zero means "no influence", and the noise of the masks' own mean is
    gone. Cost: `masks` forward passes a picture.
    """

    name = "rise"
    family = "saliency"
    paper = Paper("Petsiuk, Das, Saenko", 2018, "RISE: Randomized Input Sampling for Explanation", arxiv="1806.07421")
    needs = frozenset({"images"})
    attribution = "rise"
    reading = (
        "Red regions raise the answer when they can be seen, blue ones lower it. Smooth blobs are the masks' doing: nothing finer "
        "than a cell of the grid is resolved."
    )
    caveats = (
        "A mean over random masks is itself noisy: more masks, less speckle. Half-hidden pictures are unlike what the model was "
        "trained on, and what they are hidden with matters."
    )
    audit = {"full": {"masks": 1000}}
    draft = {"masks": 250}

    target: TargetSpec = Param("predicted", description=TARGET)
    masks: int = Param(2000, ge=1, le=1_000_000, description="masked copies a picture")
    grid: int = Param(7, ge=1, le=64, description="cells of a mask a side, before it is enlarged")
    keep: float = Param(0.5, gt=0, lt=1, description="chance that a cell is left to be seen")
    baseline: Baseline = Param("mean", description="what is seen where the mask hides; mean is the training mean, as in the paper")
    scored: Scored = Param("probability", description=SCORED)
    centred: bool = Param(True, description="count answers from their mean, so that zero means no influence")

    def run(self, ctx: Context) -> Result:
        maps = self.attribute(ctx)
        unit = f"mean {unit_of(self.scored, ctx)} where the pixel is seen" + (", less the mean of all" if self.centred else "")
        signed = self.centred or bool((maps < 0).any())
        found = Heatmaps("rise", maps, captions=captions(ctx), signed=signed, unit=unit)
        return Result([found], [concentration(maps)], zero_notes(maps, ctx.ids))

    def attribute(self, ctx: Context) -> Tensor:
        """(N, H, W) the map of each picture."""
        import torch

        x, target, model = ctx.images, ctx.target, ctx.model
        hidden = baseline(ctx, self.baseline)
        grids, shifts = self.draw(ctx)
        total = x.new_zeros((len(x), *x.shape[2:]))
        area = torch.zeros_like(total)  # sum of the masks
        sums = x.new_zeros(len(x))
        first = x.new_zeros(len(x))  # each picture's first answer: what never changes is then zero without rounding
        ways = [_enlarging(self.grid, size, x) for size in x.shape[2:]]
        count = len(x) * self.masks

        def work(rows: slice) -> tuple[slice, Tensor, Tensor]:
            picture = torch.arange(rows.start, rows.stop, device=x.device) // self.masks
            with full_precision(x.device):
                masks = enlarge(grids[rows], shifts[rows], ways, x.shape[2:])  # (n, H, W)
            copies = torch.lerp(hidden[picture], x[picture], masks.unsqueeze(1))
            with torch.no_grad():
                value = answer(target, target.output(model, copies), picture, self.scored)
            return rows, masks, value.to(x.dtype)

        for rows, masks, value in ctx.batched(count, work):
            for i in range(rows.start // self.masks, (rows.stop - 1) // self.masks + 1):
                mine = slice(max(rows.start, i * self.masks) - rows.start, min(rows.stop, (i + 1) * self.masks) - rows.start)
                if rows.start <= i * self.masks:
                    first[i] = value[mine][0] if self.centred else 0
                above = value[mine] - first[i]
                with full_precision(x.device):
                    total[i] += torch.tensordot(above, masks[mine], 1)
                area[i] += masks[mine].sum(0)
                sums[i] += above.sum()
            ctx.report("masks", rows.stop, count)
        if self.centred:
            total = total - (sums / self.masks).view(-1, 1, 1) * area
        return total / (self.keep * self.masks)

    def draw(self, ctx: Context) -> tuple[Tensor, Tensor]:
        """Grids of zeros and ones (N * masks, grid, grid) and shifts in pixels (N * masks, 2)."""
        import torch

        draws = ctx.draws(stream="masks")
        grids = (draws.rand((self.masks, self.grid, self.grid)) < self.keep).to(ctx.images.dtype)
        cells = [-(-size // self.grid) for size in ctx.images.shape[2:]]
        shifts = torch.stack([draws.randint(0, cell, (self.masks,)) for cell in cells], 2)
        return grids.flatten(0, 1), shifts.flatten(0, 1)


def _enlarging(grid: int, size: int, like: Tensor) -> Tensor:
    """((grid + 1) cells, grid): the linear map that enlarges a row of a grid bilinearly to one cell more than the picture."""
    import torch

    up = (grid + 1) * -(-size // grid)
    identity = torch.eye(grid, device=like.device, dtype=like.dtype)
    return torch.nn.functional.interpolate(identity[None], size=up, mode="linear", align_corners=False)[0].T


def enlarge(grids: Tensor, shifts: Tensor, ways: list[Tensor], size: tuple[int, ...]) -> Tensor:
    """(n, H, W): grids (n, g, g) enlarged bilinearly and cut out at `shifts` (n, 2). Enlarging goes by rows and columns."""
    import torch

    down, across = (
        way[shift[:, None] + torch.arange(pixels, device=grids.device)]
        for way, shift, pixels in zip(ways, shifts.unbind(1), size, strict=True)
    )
    return down @ grids @ across.transpose(1, 2)
