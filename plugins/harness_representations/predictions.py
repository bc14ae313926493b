from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from harness import Images, Metric, NotApplicable, Param, Result, Table, Technique
from harness.datasets import evenly

if TYPE_CHECKING:
    from harness import Context


class Predictions(Technique):
    """What the model says about each picture, and how often it is right: top-1 and top-5 accuracy with a 95 %
    interval (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Cost: one forward pass a picture.
    """

    name = "predictions"
    family = "overview"
    needs = frozenset({"dataset", "classifier"})
    reading = "Under each picture stands the class the model prefers with its probability, and the label where it is another."
    caveats = "Accuracy on few pictures is a rough number: mind the interval. A softmax probability is not a calibrated confidence."
    audit = {"quick": {"pictures": 10}, "standard": {"pictures": 20}}

    pictures: int = Param(20, ge=0, le=200, description="pictures shown, spread evenly over the dataset; numbers use every picture")

    def run(self, ctx: Context) -> Result:
        import torch

        dataset, model = ctx.dataset, ctx.model
        if model.class_count < 2:
            raise NotApplicable("needs at least two classes: of one score no probability can be told")
        width = min(5, model.class_count)
        tops, chances = [], []
        for _, best in ctx.stream(lambda images: model(images).softmax(1).topk(width, dim=1)):
            tops.append(best.indices.cpu())
            chances.append(best.values.cpu())
        top: np.ndarray = torch.cat(tops).numpy()
        chance: np.ndarray = torch.cat(chances).float().numpy()
        labels = None if ctx.labels is None else ctx.labels.cpu().numpy()
        count = len(dataset)
        metrics = [
            Metric(
                "confidence", float(chance[:, 0].mean()), per_image=chance[:, 0].tolist(), about="mean probability of the preferred class"
            )
        ]
        notes = []
        if labels is None:
            notes.append("the pictures have no labels that are classes of this model: accuracy cannot be given")
        else:
            for name, places in (("top1", 1), ("top5", width)):
                right = (top[:, :places] == labels[:, None]).any(1)
                low, high = wilson(int(right.sum()), count)
                about = f"share of pictures whose label is among the first {places}, with its 95 % interval"
                detail = f"{int(right.sum())} of {count}, {low:.3f} to {high:.3f}"
                metrics.append(
                    Metric(name, float(right.mean()), better="higher", per_image=right.astype(float).tolist(), about=about, detail=detail)
                )
        shown = evenly(self.pictures, count)
        rows = []
        for i in shown:
            label = None if labels is None else model.class_name(int(labels[i]))
            second = model.class_name(int(top[i, 1])) if width > 1 else None
            rows.append([dataset.ids[i], label, model.class_name(int(top[i, 0])), float(chance[i, 0]), second])
        artifacts: list[Images | Table] = []
        if shown:
            data = np.concatenate([dataset.pictures(model.input, i, i + 1) for i in shown]).transpose(0, 3, 1, 2).astype(np.float32) / 255
            captions = [f"{r[2]} {r[3]:.2f}" + ("" if r[1] in (None, r[2]) else f" (label: {r[1]})") for r in rows]
            artifacts.append(Images("pictures", data, captions=captions, columns=5, exact=data.shape[-1] < 64))
            artifacts.append(Table("answers", ["picture", "label", "prediction", "probability", "second choice"], rows))
        return Result(artifacts, metrics, notes)


def wilson(hits: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % confidence interval of a share: `hits` of `count`."""
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
