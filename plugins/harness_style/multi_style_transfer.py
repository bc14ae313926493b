from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from harness import ConfigError, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .pictures import contents, eight_bits, small_ones

if TYPE_CHECKING:
    from harness import Context
    from harness.technique import Further

DEFAULT = "four_styles"


class MultiStyleTransfer(Technique):
    """One network, several styles: z = gamma_s (x - mean) / deviation + beta_s, where only gamma and beta are a style's own (Dumoulin et
    al. 2017, arXiv:1610.07629), and what lies between two styles, by weights of their rows.

    Networks are stylers of the registry; `harness train RECIPE --base STYLER --style PICTURE` teaches one a further style by its rows
    alone.
    Pictures are worked on whole. Cost: one pass a picture and style.
    """

    name = "multi_style_transfer"
    family = "style"
    version = 3
    paper = Paper("Dumoulin, Shlens, Kudlur", 2017, "A Learned Representation For Artistic Style", arxiv="1610.07629")
    needs = frozenset({"dataset", "conv"})
    per_picture = True
    reading = "First the picture in each style; then the way from one style to the next, of which only gamma and beta change."
    caveats = "What lies between two styles was never trained; it is smooth, but need not be a style."

    styler: str = Param(DEFAULT, description="a styler of the registry with several styles")
    between: tuple[int, int] = Param((0, 1), description="the styles whose mixtures are shown, counted from 0")
    stages: int = Param(5, ge=2, le=50, description="mixtures from the one to the other, both included")
    size: int = Param(256, ge=16, le=8192, description="longer side of the pictures")

    def further(self) -> Further:
        from harness.technique import Further

        return Further(stylers=[self.styler])

    def run(self, ctx: Context) -> Result:
        import torch

        if ctx.model.input.channels != 3:
            raise NotApplicable("needs a model of colour pictures; stylers are trained on those")
        styler = ctx.styler(self.styler)
        count = len(styler.styles)
        if max(self.between) >= count or min(self.between) < 0:
            raise ConfigError(
                f"multi_style_transfer.between: {self.styler!r} has {count} styles, counted from 0: {', '.join(styler.styles)}"
            )
        rows_of = np.eye(count)
        refused = small_ones(ctx, self.size)
        artifacts: list[Any] = []
        apart: list[float] = []
        rows: list[list[Any]] = []
        for number, (name, content) in enumerate(contents(ctx, self.size), 1):
            if name in refused:
                continue
            made = [styler(content, rows_of[s].tolist()) for s in range(count)]
            sheet = torch.cat([content, *made])
            captions = [name, *styler.styles]
            artifacts.append(Images(f"styles-{number}", eight_bits(sheet), captions=captions, columns=min(5, len(sheet))))
            one, two = self.between
            shares = np.linspace(0, 1, self.stages)
            mixed = torch.cat([styler(content, ((1 - t) * rows_of[one] + t * rows_of[two]).tolist()) for t in shares])
            names = [f"{1 - t:.2g} {styler.styles[one]}, {t:.2g} {styler.styles[two]}" for t in shares]
            artifacts.append(Images(f"between-{number}", eight_bits(mixed), captions=names, columns=self.stages))
            pairs = [float((made[a] - made[b]).abs().mean()) for a in range(count) for b in range(a)]
            apart.append(float(np.mean(pairs)) if pairs else 0.0)
            rows += [[name, styler.styles[s], float((made[s] - content).abs().mean())] for s in range(count)]
            ctx.report("pictures", number, len(ctx.ids))
        module: Any = styler.module
        own = sum(row.numel() for row in module.row(0))
        total = sum(p.numel() for p in module.parameters())
        artifacts.append(Table("styles", ["picture", "style", "mean change of a pixel"], rows))
        about = "mean absolute difference of the same picture in two styles"
        notes = [f"{own} of {total} parameters ({own / total:.2%}) are a style's own", *refused.values()]
        return Result(artifacts, [Metric("apart", float(np.mean(apart)), per_image=apart, about=about)], notes)
