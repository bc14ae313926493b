from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import EveryMap, Heatmaps, Images, Metric, NotApplicable, Paper, Param, Result, Table, TargetSpec, Technique

from .faithfulness import PROFILE
from .integrated_gradients import Baseline, baseline
from .saliency import TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

COLUMNS = 5
ROOM = 0.8  # of the cue's size, that the region elsewhere must have


class BiasProbe(Technique):
    """Does a model lean on a cue that should not matter? Three measurements on pictures in which a suspected cue is marked: the
    share of each technique's map that lies on it, how often the answer changes when the cue alone is changed, and the accuracy
    where the cue misleads (after the husky in the snow of Ribeiro et al. 2016, arXiv:1602.04938, sec. 6.4).

    The cue is swapped where the dataset knows how (`planted:`); otherwise it is covered. The same is done to a region of equal
    shape elsewhere, so that harm done by covering as such is told apart. Cost: three forward passes a picture, and the maps'.
    """

    name = "bias_probe"
    family = "saliency"
    paper = Paper(
        "Ribeiro, Singh, Guestrin", 2016, '"Why Should I Trust You?": Explaining the Predictions of Any Classifier', arxiv="1602.04938"
    )
    needs = frozenset({"images", "classifier", "marks"})
    reading = (
        "The verdict compares how often the answer changes when the cue is changed with how often it does when as much is changed "
        "elsewhere. A model that leans on the cue has most of its maps' mass there as well: `lift` is the share of the map on the "
        "cue over the cue's share of the picture, 1 meaning no more than any place."
    )
    caveats = (
        "It finds the cues that somebody suspected and marked, no others. Maps are coarse: mass beside a small cue counts as off it. "
        "Covering takes away what lies behind the cue, too."
    )
    audit = {"full": {"profile": "full"}}

    target: TargetSpec = Param("predicted", description=TARGET)
    techniques: tuple[str, ...] = Param((), description="techniques whose maps are measured; none: every one installed that gives maps")
    profile: Literal["", "draft", "quick", "standard", "full"] = Param("", description=PROFILE)
    cover: Baseline = Param("mean", description="what a cue that cannot be swapped is covered with; mean is the training mean")
    pictures: int = Param(6, ge=1, le=1000, description="pictures shown; all are measured")

    def uses(self) -> list[EveryMap]:
        return [EveryMap(self.target, self.techniques, self.profile)]

    def run(self, ctx: Context) -> Result:
        import torch

        from harness_representations.predictions import wilson

        masks, marks = ctx.masks, ctx.dataset.marks
        if masks is None or marks is None or not bool(masks.any()):
            raise NotApplicable("needs pictures in which a suspected cue is marked; in these none is")
        x = ctx.images
        cover = baseline(ctx, self.cover)
        marked = masks.flatten(1).any(1)
        covered = torch.where(masks[:, None], cover, x)
        elsewhere = torch.where(moved(masks)[:, None], cover, x)
        before = ctx.predicted
        flips = {"covered": self._changed(ctx, before, covered), "elsewhere": self._changed(ctx, before, elsewhere)}
        changed, verb = covered, "covered"
        if marks.swapped is not None:
            from harness.context import to_images

            pictures = replace(ctx.dataset, get=marks.swapped).pictures(ctx.model.input)
            changed, verb = to_images(pictures, ctx.device, ctx.model.dtype), "swapped"
            flips["swapped"] = self._changed(ctx, before, changed)
        measured = torch.ones_like(marked) if verb == "swapped" else marked  # a cue that is not there can still be added
        moved_by = flips[verb][measured].float()
        # A cue that fills most of a picture leaves no room for as much elsewhere.
        sizes = [m.flatten(1).sum(1) for m in (masks, moved(masks))]
        room = marked & (sizes[1] >= ROOM * sizes[0])
        chance = flips["elsewhere"][room].float()
        low, high = wilson(int(moved_by.sum()), len(moved_by))
        leans = low > 0.5 and (not len(chance) or low > float(chance.mean()))
        shares = {name: on_cue(m[marked], masks[marked]) for name, m in ctx.attributions().items()}
        area = masks[marked].flatten(1).float().mean(1)
        return self._result(ctx, marks.shows, verb, changed, flips, measured, marked, chance, shares, area, (low, high), leans)

    def _changed(self, ctx: Context, before: Tensor, pictures: Tensor) -> Tensor:
        """(N,) whether the answer is another one."""
        return ctx.logits(pictures).argmax(1) != before

    def _result(
        self, ctx: Context, cue: str, verb: str, changed: Tensor, flips: dict[str, Tensor], measured: Tensor, marked: Tensor,
        chance: Tensor, shares: dict[str, Tensor], area: Tensor, interval: tuple[float, float], leans: bool,
    ) -> Result:  # fmt: skip
        moved_by = flips[verb][measured].float()
        rate = float(moved_by.mean())
        about = {
            "swapped": "share of pictures whose answer changes when the cue alone is taken away or put in",
            "covered": "share of the pictures with the cue whose answer changes when it is covered",
            "elsewhere": "the same for a region of equal shape elsewhere in the picture",
        }
        metrics = [
            Metric("leans", float(leans), about=f"1 when the model leans on {cue}: the answer follows it on most pictures"),
            Metric(
                f"{verb}_flips", rate, better="lower", per_image=moved_by.tolist(), about=about[verb],
                detail=f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}, n = {len(moved_by)}",
            ),
        ]  # fmt: skip
        if len(chance):
            metrics.append(Metric("elsewhere_flips", float(chance.mean()), per_image=chance.tolist(), about=about["elsewhere"]))
        if verb == "swapped":
            covered = flips["covered"][marked].float()
            metrics.append(
                Metric("covered_flips", float(covered.mean()), better="lower", per_image=covered.tolist(), about=about["covered"])
            )
        order = sorted(shares, key=lambda n: (-float(shares[n].mean()), n))
        table = [[n, float(shares[n].mean()), float(area.mean()), float((shares[n] / area).mean())] for n in order]
        for n in order:
            values = shares[n].tolist()
            metrics.append(
                Metric(f"share.{n}", float(np.mean(values)), per_image=values, about="share of the map's mass that lies on the cue")
            )
        artifacts: list[Any] = [Table("attribution", ["map", "share on the cue", "cue's share of the picture", "lift"], table)]
        groups = self._groups(ctx, marked)
        if groups:
            artifacts.append(Table("accuracy", ["class", "cue", "pictures", "accuracy"], groups))
            accuracy = [row[3] for row in groups]
            metrics.insert(
                1, Metric("worst_group", min(accuracy), better="higher", about="lowest accuracy among classes with and without the cue")
            )
        artifacts += self._pictures(ctx, changed, verb, marked, order, shares)
        told = f"{cue}: when it alone is {verb}, the answer changes on {100 * rate:.0f} % of {len(moved_by)} pictures"
        told += f" (95 % interval {100 * interval[0]:.0f} to {100 * interval[1]:.0f} %), "
        if len(chance):
            told += f"when as much is covered elsewhere on {100 * float(chance.mean()):.0f} %"
        else:
            told += "and the cue leaves no room to cover as much elsewhere"
        if order:
            told += f"; {100 * float(shares[order[0]].mean()):.0f} % of the map of {order[0]} lies there, on "
            told += f"{100 * float(area.mean()):.0f} % of the picture"
        notes = [f"this model {'leans' if leans else 'does not lean'} on {told}"]
        notes += [f"{name} is left out: {why}" for name, why in ctx.missing.items()]
        return Result(artifacts, metrics, notes)

    def _groups(self, ctx: Context, marked: Tensor) -> list[list[Any]]:
        """Accuracy by class and presence of the cue."""
        if ctx.labels is None:
            return []
        right, labels = (ctx.predicted == ctx.labels).cpu().numpy(), ctx.labels.cpu().numpy()
        there = marked.cpu().numpy()
        rows = []
        for c in np.unique(labels).tolist():
            for present in (True, False):
                mine = (labels == c) & (there == present)
                if mine.any():
                    rows.append([ctx.model.class_name(c), "there" if present else "absent", int(mine.sum()), float(right[mine].mean())])
        return rows

    def _pictures(
        self, ctx: Context, changed: Tensor, verb: str, marked: Tensor, order: list[str], shares: dict[str, Tensor]
    ) -> list[Images | Heatmaps]:
        """Pictures before and after, and the maps of the first one with the cue."""
        import torch

        rows = marked.nonzero().flatten().tolist()[: self.pictures]
        texts = []
        for logits in (ctx.own_logits[rows], ctx.logits(changed[rows])):
            chance, best = logits.softmax(1).max(1)
            texts.append([f"{ctx.model.class_name(c)}, p = {p:.2f}" for c, p in zip(best.tolist(), chance.tolist(), strict=True)])
        both = torch.stack([ctx.images[rows], changed[rows]], 1).flatten(0, 1)
        captions = [text for a, b in zip(*texts, strict=True) for text in (a, f"cue {verb}: {b}")]
        found: list[Images | Heatmaps] = [Images("cue_changed", both, captions=captions, columns=4, exact=both.shape[-1] < 64)]
        maps = ctx.attributions()
        if order:
            i = rows[0]
            names = [f"{n.replace('_', ' ')}: {100 * float(shares[n][0]):.0f} % on the cue" for n in order]
            data = torch.stack([maps[n][i].clamp(min=0) for n in order])
            found.append(Heatmaps("maps", data, over=[i] * len(order), columns=COLUMNS, captions=names, unit="evidence for the target"))
        return found


def on_cue(maps: Tensor, masks: Tensor) -> Tensor:
    """(N,) share of the positive mass of maps (N, H, W) inside masks (N, H, W); 0 for a map without any."""
    positive = maps.clamp(min=0)
    total = positive.flatten(1).sum(1)
    return (positive * masks).flatten(1).sum(1) / total.clamp_min(1e-30)


def moved(masks: Tensor) -> Tensor:
    """Masks (N, H, W) moved by half the picture both ways, round the edges: regions of equal shape elsewhere."""
    import torch

    return torch.roll(masks, (masks.shape[1] // 2, masks.shape[2] // 2), (1, 2)) & ~masks
