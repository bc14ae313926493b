from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import ConfigError, Matrix, Metric, NotApplicable, Paper, Param, Result, Table, Technique
from harness.technique import Further

from .attacks import Attack, in_255ths, perturbed, project
from .shared import check_alike, fitted, in_full_precision, interval

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel


class TransferMatrix(Technique):
    """Do pictures made to fool one model fool another? Each model's adversarial pictures, or its universal noise, tried on all of them
    (Szegedy et al. 2013, arXiv:1312.6199, sec. 4.2; Moosavi-Dezfooli et al. 2017, arXiv:1610.08401, sec. 4).

    A cell counts the pictures that the model of its column gets right as they are (or, without labels, all) and no longer after the
    change made on the model of its row; random changes of the same size stand below. Pictures are handed on as pixels, resized where
    another model takes another size. Cost: `steps` forward and backward passes a picture and model, and a forward pass a cell.
    """

    name = "transfer_matrix"
    family = "adversarial"
    paper = Paper("Szegedy, Zaremba, Sutskever, Bruna, Erhan, Goodfellow, Fergus", 2013, "Intriguing properties of neural networks",
                  arxiv="1312.6199")  # fmt: skip
    needs = frozenset({"images", "classifier"})
    reading = (
        "A row is the model that the changes were made on, a column the one they are tried on; the diagonal is an attack with the weights "
        "at hand. What stands well above the row of random changes transfers."
    )
    caveats = "A model that is easily upset by anything has a high column: compare with its random changes, and mind the counts."

    models: tuple[str, ...] = Param((), description="further models with the same classes, by their names in the registry")
    eps: float = Param(8.0, gt=0, description="largest change of a pixel, in 255ths")
    kind: Literal["pictures", "universal"] = Param("pictures", description="a change for each picture, or one noise for all")
    steps: int = Param(20, ge=1, le=100_000, description="gradient steps; of universal noise, passes over the pictures")
    step_size: float = Param(0.1, gt=0, le=2, description="length of a step as a share of eps")

    def further(self) -> Further:
        return Further(models=self.models)

    @in_full_precision
    def run(self, ctx: Context) -> Result:
        if self.eps > 255:
            raise ConfigError(f"transfer_matrix.eps: {self.eps:g} is more than 255 255ths, the whole range of a pixel")
        if not self.models:
            raise NotApplicable("needs further models to try the changes on; name them with -p 'models=[NAME, NAME]'")
        models = {ctx.model.name: ctx.model, **{name: ctx.further_model(name) for name in self.models}}
        for name in self.models:
            check_alike(ctx.model, models[name], "transfer_matrix.models")
        eps = self.eps / 255
        labels = ctx.labels
        before = {name: logits(ctx, model, ctx.images).argmax(1) for name, model in models.items()}
        # Whose answers count: pictures that the model gets right; without labels, all of them.
        truth = {name: before[name] if labels is None else labels for name in models}
        counted = {name: before[name] == truth[name] for name in models}
        made: dict[str, Tensor] = {}
        for done, (name, model) in enumerate(models.items()):
            made[name] = self._made(ctx, model, truth[name], eps)
            ctx.report("models", done + 1, len(models))
        signs = ctx.draws(stream="random").randn(ctx.images.shape[1:]).sign()
        made["random changes"] = project(ctx.images + eps * signs, ctx.images, eps, "linf")
        values, rows = [], []
        hits: dict[tuple[str, str], np.ndarray] = {}
        for source, pictures in made.items():
            line = []
            for name, model in models.items():
                lost = (logits(ctx, model, pictures).argmax(1) != truth[name])[counted[name]].cpu().numpy()
                hits[source, name] = lost
                share = float(lost.mean()) if len(lost) else 0.0
                low, high = interval(lost) if len(lost) else (0.0, 1.0)
                rows.append([source, name, share, low, high, int(lost.sum()), len(lost)])
                line.append(share)
            values.append(line)
        clean = {name: float(counted[name].float().mean()) for name in models}
        caption = f"Share of the pictures a model gets right that it no longer does after changes within {in_255ths(eps)}."
        artifacts: list[Any] = [
            Matrix("fooled", values, list(made), list(models), unit="share fooled", caption=caption),
            Table("cells", ["made on", "tried on", "fooled", "from", "to", "pictures fooled", "of"], rows),
        ]
        others = np.concatenate([hits[ctx.model.name, n] for n in models if n != ctx.model.name] or [np.zeros(0)])
        own = hits[ctx.model.name, ctx.model.name]
        metrics, notes = [], []
        if len(own):
            about = "share of pictures fooled by changes made on the model itself"
            metrics.append(Metric("own", float(own.mean()), better="lower", per_image=own.astype(float).tolist(), about=about))
        if len(others):
            about = "share of pictures of the other models that changes made on this one fool"
            metrics.append(Metric("transferred", float(others.mean()), about=about, detail=f"{int(others.sum())} of {len(others)}"))
        if labels is not None:
            shares = ", ".join(f"{name} {share:.3f}" for name, share in clean.items())
            notes.append(f"accuracy on the {len(ctx.images)} untouched pictures: {shares}")
        else:
            notes.append("the pictures have no labels of this model: what counts is whether the answer changes")
        notes += [f"{name} gets no picture right: its column says nothing" for name in models if not bool(counted[name].any())]
        return Result(artifacts, metrics, notes)

    def _made(self, ctx: Context, model: LoadedModel, labels: Tensor, eps: float) -> Tensor:
        import torch

        from .universal import universal_gradient

        pictures = fitted(ctx.images, model.input.size)
        if self.kind == "universal":
            noise = universal_gradient(model, pictures, eps, ctx.draws(["universal"]), passes=self.steps, chunk=ctx.max_batch)
            return fitted((pictures + noise).clamp(0, 1), ctx.images.shape[-1])
        settings = Attack("transfer", "linf", self.steps, self.step_size, random_start=True)

        def some(rows: slice) -> Tensor:
            return perturbed(model, pictures[rows], labels[rows], settings, eps, ctx.draws(ctx.ids[rows], stream=model.name))

        return fitted(torch.cat(list(ctx.batched(len(pictures), some))), ctx.images.shape[-1])


def logits(ctx: Context, model: LoadedModel, images: Tensor) -> Tensor:
    """Class scores of another model than the context's, in batches."""
    import torch

    with torch.no_grad():
        return torch.cat(list(ctx.batched(len(images), lambda rows: model(fitted(images[rows], model.input.size)))))
