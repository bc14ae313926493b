from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import ConfigError, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .pictures import eight_bits
from .wei_levoy import Search, memory, synthesise

if TYPE_CHECKING:
    from harness import Context

LEAST = 8  # pixels a side of the coarsest sample beyond the window


class WeiLevoyTexture(Technique):
    """A texture made anew without a network: pixel by pixel the colour of the sample's pixel whose surroundings are most like those made
    so far, from a coarse picture to a fine one (Wei & Levoy 2000, SIGGRAPH, doi:10.1145/344779.345009).

    Surroundings are the L of pixels that raster order has passed, around the border as if the picture were tiled, and the finished coarser
    level about the same place. They are found by tree-structured vector quantisation, or exactly by comparing with all; what continues
    the matches of the four pixels beside it is looked at as well, if it is more alike than what the tree finds (candidates of
    Ashikhmin 2001, doi:10.1145/364338.364405). Pictures are made in their own colours; the model is not
    used. Cost: a search for each pixel, four thirds of them for all levels, and of those near two borders a second one.
    """

    name = "wei_levoy_texture"
    family = "style"
    version = 3
    paper = Paper("Wei, Levoy", 2000, "Fast Texture Synthesis using Tree-structured Vector Quantization", doi="10.1145/344779.345009")
    needs = frozenset({"dataset"})
    per_picture = True
    reading = (
        "First the sample, then what was made of it. Textures of small things look right from afar; where things have a size or a "
        "meaning, as bricks and letters have, it shows that the window knows nothing of them: bricks of all lengths, no word to read."
    )
    caveats = "Every pixel is copied from the sample, so a large piece of it may come back. The window must hold what repeats."

    window: int = Param(9, ge=3, le=41, description="side of the neighbourhood; made odd")
    levels: int = Param(3, ge=1, le=8, description="levels of the pyramid; fewer where the sample is too small")
    search: Literal["tsvq", "exhaustive"] = Param("tsvq", description="how the most alike is found: by a tree, or by comparing with all")
    leaves: int = Param(2, ge=1, le=1000, description="tsvq: leaves of the tree that are looked at; one is fastest, and coarser")
    compare: bool = Param(False, description="make it by both searches, and compare their time and how well they match")
    sample_size: int = Param(128, ge=8, le=2048, description="longer side of the sample; larger ones are made smaller")
    size: int = Param(128, ge=8, le=2048, description="side of the texture that is made")

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.datasets import at_size
        from harness.device import physical_memory

        searches: tuple[Search, ...] = ("tsvq", "exhaustive") if self.compare else (self.search,)
        window = self.window + 1 - self.window % 2
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        costs: list[float] = []
        notes: list[str] = []
        refused: list[str] = []
        there = physical_memory()
        for number, name in enumerate(ctx.ids):  # of all, before work is put into one
            picture = ctx.dataset.get(number)
            scale = min(1.0, self.sample_size / max(picture.size))
            width, height = (max(1, round(n * scale)) for n in picture.size)
            needed = memory((height, width, 3 if picture.mode == "RGB" else 1), self.size, self.size, window, self.levels)
            if needed > there:
                raise ConfigError(
                    f"wei_levoy_texture.sample_size: windows of {window} of {name}, {width} x {height}, need about "
                    f"{needed / 2**30:.0f} GB of memory, and there are {there / 2**30:.0f}; use a smaller sample_size, window or size"
                )
        for number, name in enumerate(ctx.ids, 1):
            picture = ctx.dataset.get(number - 1)
            pixels = at_size(picture, min(self.sample_size, max(picture.size)), 3 if picture.mode == "RGB" else 1)
            sample = pixels.astype(np.float32) / 255
            levels = self.levels
            while levels > 1 and min(sample.shape[:2]) / 2 ** (levels - 1) < window + LEAST:
                levels -= 1
            if min(sample.shape[:2]) < window + 1:
                size = f"{sample.shape[1]} x {sample.shape[0]}"
                refused.append(f"{name}: a sample of {size} pixels holds too few windows of {window}; use a smaller window")
                continue
            if levels < self.levels:
                notes.append(f"{name}: {levels} levels, as the sample is small")
            sheet = [eight_bits(torch.from_numpy(sample).permute(2, 0, 1)[None])]
            captions, searched = [name], []
            for search in searches:
                # The same noise for both searches, whatever came before.
                seed = ctx.draws([name]).integers(0, 2**31 - 1, 1)[0][0]
                made = synthesise(
                    sample, self.size, self.size, size=window, levels=levels, search=search, leaves=self.leaves,
                    random=np.random.default_rng(seed), progress=ctx.report,
                )  # fmt: skip
                image = torch.from_numpy(made.image).permute(2, 0, 1)[None]
                rows.append([name, search, levels, made.cost, seam(made.image)])
                sheet.append(eight_bits(image))
                captions.append({"tsvq": "by the tree", "exhaustive": "by comparing with all"}[search])
                if search == searches[0]:
                    costs.append(made.cost)
                searched.append(made)
            if self.compare:
                tree, whole = (made.seconds for made in searched)
                built = tree + searched[0].building
                times = f"{whole / tree:.1f} times as long as the tree, {whole / built:.1f} times with its building"
                notes.append(f"{name}: the exhaustive search took {times}")
            artifacts += [Images(f"texture-{number}", torch.cat(fitted(sheet)), captions=captions, columns=len(sheet), exact=True)]
            ctx.report("pictures", number, len(ctx.ids))
        if not rows:
            raise NotApplicable("; ".join(refused))
        columns = ["picture", "search", "levels", "mean squared difference to the match", "steepness across the border / inside"]
        artifacts.append(Table("textures", columns, rows))
        about = "mean squared difference of a neighbourhood and its match in the sample, a value in [0, 1]"
        return Result(
            artifacts, [Metric("match_cost", float(np.mean(costs)), better="lower", per_image=costs, about=about)], [*notes, *refused]
        )


def seam(image: np.ndarray) -> float:
    """Mean step from the last row and column to the first, as a share of the mean step inside: 1 where the picture tiles."""
    inside = np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean()
    across = np.abs(image[0] - image[-1]).mean() + np.abs(image[:, 0] - image[:, -1]).mean()
    return float(across / max(inside, 1e-12))


def fitted(pictures: list[Any]) -> list[Any]:
    """Pictures (1, C, H, W) on white grounds of one size, so that they stand in one row."""
    import torch.nn.functional as F

    height, width = (max(p.shape[k] for p in pictures) for k in (2, 3))
    return [F.pad(p, (0, width - p.shape[3], 0, height - p.shape[2]), value=1.0) for p in pictures]
