from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness import Arrays, Matrix, Metric, NotApplicable, Paper, Param, Result, Table, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context

Halves = tuple[np.ndarray, np.ndarray]


class ChannelProbe(Technique):
    """Is a channel a detector? The AUC of each channel's maximum as a score for each label, over all channels of a layer
    (the claim of Yosinski et al. 2015, arXiv:1506.06579, sec. 2, that single channels detect faces or text; AUC as in
    Hanley & McNeil 1982, doi:10.1148/radiology.143.1.7063747).

    The best channel of a class is chosen on one half of the pictures and its AUC measured on the other half: the best of
    hundreds of channels looks good by chance. Cost: one forward pass a picture, to the layer.
    """

    name = "channel_probe"
    family = "representations"
    paper = Paper(
        "Yosinski, Clune, Nguyen, Fuchs, Lipson", 2015, "Understanding Neural Networks Through Deep Visualization", arxiv="1506.06579"
    )
    needs = frozenset({"dataset"})
    reading = (
        "AUC is the chance that a picture of the class excites the channel more than a picture of another class: 0.5 is chance, 1 "
        "a perfect detector. The matrix shows, for each class's best channel, how it answers to every class: a detector's row has "
        "one bright cell."
    )
    caveats = (
        "A channel may follow what comes with the class (grass, water) rather than the class. `by chance` is what the same search "
        "finds with shuffled labels; only what lies clearly above it counts."
    )
    audit = {"full": {}}

    layer: str = Param("", description="a layer; none: the deepest with maps before the class scores")
    shuffles: int = Param(20, ge=1, le=1000, description="shufflings of the labels that `by chance` is averaged over")

    def run(self, ctx: Context) -> Result:
        dataset, model = ctx.dataset, ctx.model
        if dataset.labels is None:
            raise NotApplicable("needs a labelled dataset")
        if len(np.unique(dataset.labels)) < 2:
            raise NotApplicable(f"needs pictures of two classes; {dataset.name!r} has those of one only")
        layer = model.full_name(self.layer or model.last_maps)
        behind = layer in model.channels_behind
        parts = [high for _, high in ctx.stream(lambda images: channel_maximum(model.activations(images, [layer])[layer], behind))]
        scores = np.concatenate([high.float().cpu().numpy() for high in parts])  # (N, C)
        labels = dataset.labels
        count = np.bincount(labels, minlength=len(dataset.classes))
        auc = areas(ranks(scores), labels, len(count))  # (K, C); NaN where a class has no picture
        halves = halve(labels)
        ranked = ranks(scores[halves[0]]), ranks(scores[halves[1]])
        # A class needs pictures of its own and of others in both halves.
        own = [np.bincount(labels[h], minlength=len(count)) for h in halves]
        measured = np.flatnonzero(np.min([np.minimum(n, len(h) - n) for n, h in zip(own, halves, strict=True)], axis=0) > 0)
        present = np.flatnonzero(count)
        best_all = {int(c): int(np.argmax(auc[c])) for c in present}
        rows, held = [], []
        choice, test = (areas(r, labels[h], len(count)) for r, h in zip(ranked, halves, strict=True))
        for c in present.tolist():
            honest = None
            if c in measured:
                honest = float(test[c, int(np.argmax(choice[c]))])
                held.append(honest)
            rows.append([dataset.classes[c], int(count[c]), best_all[c], float(auc[c, best_all[c]]), honest])
        metrics, notes = [Metric("channels", scores.shape[1])], []
        if held:
            chance = self._chance(ctx, ranked, labels, halves, measured, len(count))
            metrics += [
                Metric(
                    "held_out_auc", float(np.mean(held)), better="higher", per_image=held,
                    about="mean over classes: AUC, on one half of the pictures, of the channel that is best on the other",
                ),
                Metric("by_chance", chance, about="the same with shuffled labels"),
            ]  # fmt: skip
        if len(measured) < len(present):
            notes.append(
                f"{len(present) - len(measured)} of {len(present)} classes have too few pictures for two halves: their AUC is not held out"
            )
        table = Table("detectors", ["class", "pictures", "best channel", "AUC", "held-out AUC"], rows)
        artifacts: list[Table | Matrix | Arrays] = [table, Arrays("auc", {"auc": np.nan_to_num(auc, nan=0.5), "pictures": count})]
        if len(present) <= 60:
            channels = [best_all[int(c)] for c in present]
            names = [dataset.classes[c] for c in present]
            labelled = [f"{n}: channel {k}" for n, k in zip(names, channels, strict=True)]
            answers = auc[present][:, channels].T
            artifacts.insert(0, Matrix("answers", answers, labelled, names, unit="AUC of the row's channel for the column's class"))
        return Result(artifacts, metrics, notes)

    def _chance(self, ctx: Context, ranked: Halves, labels: np.ndarray, halves: Halves, measured: np.ndarray, classes: int) -> float:
        # One item a shuffle: numbers do not depend on how many there are.
        order = ctx.draws([f"shuffle-{i}" for i in range(self.shuffles)]).rand((len(labels),)).cpu().numpy().argsort(1)
        found = []
        for shuffle in order:
            mixed = labels[shuffle]
            first, second = (areas(r, mixed[h], classes) for r, h in zip(ranked, halves, strict=True))
            known = [c for c in measured if not (np.isnan(first[c]).any() or np.isnan(second[c]).any())]
            found += [second[c, int(np.argmax(first[c]))] for c in known]
        return float(np.mean(found)) if found else 0.5


def channel_maximum(output: Tensor, behind: bool = False) -> Tensor:
    """(N, C): the largest value of each channel of (N, C, H, W), (N, positions, C) or (N, C)."""
    if output.ndim == 4:
        return output.amax((1, 2) if behind else (2, 3))
    return output.amax(1) if output.ndim == 3 else output.flatten(1)


def ranks(scores: np.ndarray) -> np.ndarray:
    """(N, C) place of each value in its column, from 1; equals share their mean place."""
    from scipy.stats import rankdata

    return rankdata(scores, axis=0)


def areas(ranks: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(K, C) area under the ROC curve of each channel's score, given by its ranks (N, C), for class k against the rest,
    ties counting half (Mann & Whitney 1947); NaN for a class without pictures or without others."""
    own = np.eye(classes, dtype=np.float64)[labels]  # (N, K)
    positives = own.sum(0)
    negatives = len(labels) - positives
    with np.errstate(divide="ignore", invalid="ignore"):
        return (own.T @ ranks - (positives * (positives + 1) / 2)[:, None]) / (positives * negatives)[:, None]


def halve(labels: np.ndarray) -> Halves:
    """Two halves of the pictures with every class's pictures shared out in turn."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for c in np.unique(labels):
        mine = np.flatnonzero(labels == c)
        turn[mine] = np.arange(len(mine)) % 2
    return np.flatnonzero(turn == 0), np.flatnonzero(turn == 1)
