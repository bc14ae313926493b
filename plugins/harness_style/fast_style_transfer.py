from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique
from harness.technique import Further

from .pictures import contents, eight_bits, small_ones
from .style_transfer import padded

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from harness import Context
    from harness.datasets import Dataset
    from harness.registry import StylerRecipe
    from harness.train_styler import Task

DEFAULT = "ihc_style"


class FastStyleTransfer(Technique):
    """A style in one pass of a network that was trained for it (Johnson et al. 2016, arXiv:1603.08155), beside the slow descent with the
    same losses, and the time that each takes.

    Networks are stylers of the registry; `harness train` makes them of any picture. With `compare=norm` two small networks are trained
    here, one with instance norm (Ulyanov et al. 2016, arXiv:1607.08022) and one with batch norm; with `compare=loss`, on a few
    crops, one by the features' losses and one by the mean squared distance of pixels to what the slow descent makes of them. Pictures are
    worked on whole: instance norm needs all of a picture at once. Cost: one pass a picture, and `steps` forward and backward passes of the
    model for the slow one.
    """

    name = "fast_style_transfer"
    family = "style"
    version = 5
    paper = Paper(
        "Johnson, Alahi, Fei-Fei", 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", arxiv="1603.08155"
    )
    needs = frozenset({"dataset", "conv"})
    per_picture = True
    reading = (
        "Content, the picture in one pass, and the slow one after its steps. The table gives the same loss for both, and the time of one "
        "picture: where the losses are alike the network has learnt what the descent does."
    )
    caveats = "A network knows its style alone, and pictures like those it was trained on. Times are of this machine, one picture at once."

    styler: str = Param(DEFAULT, description="a styler of the registry")
    style: int = Param(0, ge=0, description="which of its styles, where it has several")
    steps: int = Param(200, ge=0, le=100_000, description="steps of the slow descent; 0: none")
    start: Literal["content", "noise"] = Param("content", description="where the slow descent begins; the paper's: noise")
    size: int = Param(256, ge=16, le=8192, description="longer side of the pictures")
    compare: Literal["none", "norm", "loss"] = Param("none", description="also train two small networks: norm, or loss")
    train_steps: int = Param(300, ge=1, le=1_000_000, description="compare: training steps of each")

    def further(self) -> Further:
        return Further(stylers=[self.styler])

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.device import synchronise

        if ctx.model.input.channels != 3:
            raise NotApplicable("needs a model of colour pictures; stylers are trained on those")
        styler = ctx.styler(self.styler)
        if self.style >= len(styler.styles):
            from harness import ConfigError

            raise ConfigError(f"fast_style_transfer.style: {self.styler!r} has {len(styler.styles)} styles, counted from 0")
        recipe = ctx.styler_recipe(self.styler)
        reason = "it has no recipe in the registry"
        if recipe is not None and len(recipe.styles) <= self.style:
            reason, recipe = f"its recipe has {len(recipe.styles)} styles", None
        if recipe is not None and recipe.encoder != ctx.model.name:
            reason, recipe = f"it was trained with {recipe.encoder}, and this is {ctx.model.name}", None
        task, picture = style_task(ctx, recipe, self.style) if recipe else (None, None)
        mix = np.eye(len(styler.styles))[self.style].tolist()
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        ratios: list[float] = []
        finals: dict[str, list[float]] = {"fast": [], "slow": []}
        refused = small_ones(ctx, self.size, [task.content_layer, *task.targets] if task else ())
        notes = [] if task else [f"nothing is made slowly, as the losses of styler {self.styler!r} are not known here: {reason}"]
        for number, (name, content) in enumerate(contents(ctx, self.size), 1):
            if name in refused:
                continue
            styler(content, mix)  # what is first is slow
            synchronise(ctx.device)
            begun = time.perf_counter()
            fast = styler(content, mix)
            synchronise(ctx.device)
            seconds = time.perf_counter() - begun
            sheet, captions = [content, fast], [name, "one pass"]
            if task is not None and recipe is not None:
                loss = float(task.total(task.losses(fast, content, torch.zeros(1, dtype=torch.int64, device=ctx.device))))
                rows.append([name, "one pass", loss])
                captions[1] = f"one pass: {seconds:.3g} s, loss {loss:.3g}"
                finals["fast"].append(loss)
                if self.steps:
                    begun = time.perf_counter()
                    slow = descend(ctx, task, content, self.steps, name, self.start == "noise").clamp(0, 1)
                    synchronise(ctx.device)
                    took = time.perf_counter() - begun
                    final = float(task.total(task.losses(slow, content, torch.zeros(1, dtype=torch.int64, device=ctx.device))))
                    rows.append([name, f"{self.steps} steps", final])
                    finals["slow"].append(final)
                    ratios.append(took / seconds)
                    sheet.append(slow)
                    captions.append(f"{self.steps} steps: {took:.3g} s, loss {final:.3g}")
                assert picture is not None
                sheet.insert(1, padded(picture, content.shape[2], content.shape[3], content))
                captions.insert(1, styler.styles[self.style])
            artifacts.append(Images(f"transfer-{number}", eight_bits(torch.cat(sheet)), captions=captions, columns=len(sheet)))
            ctx.report("pictures", number, len(ctx.ids))
        metrics = []
        if rows:
            artifacts.append(Table("slow_and_fast", ["picture", "made by", "loss"], rows))
            about = "weighted loss of the picture made in one pass"
            metrics.append(Metric("loss", float(np.mean(finals["fast"])), better="lower", per_image=finals["fast"], about=about))
        if ratios:
            about = "weighted loss after the slow descent"
            metrics.append(Metric("loss_slow", float(np.mean(finals["slow"])), better="lower", per_image=finals["slow"], about=about))
            about = f"time of {self.steps} slow steps over that of one pass"
            notes.append(f"{about}: {', '.join(f'{r:.0f}' for r in ratios)} on {ctx.device.type}, {torch.get_num_threads()} threads")
        if self.compare != "none":
            if task is None or recipe is None:
                raise NotApplicable(f"compare needs the losses of styler {self.styler!r}: {reason}")
            found, last = self._compared(ctx, task, recipe)
            artifacts += found
            metrics += last
        return Result(artifacts, metrics, [*notes, *refused.values()])

    def _compared(self, ctx: Context, task: Task, recipe: StylerRecipe) -> tuple[list[Any], list[Metric]]:
        """Two networks trained alike but for their norm, or their loss."""
        import torch

        from harness.context import stable_seed
        from harness.device import placed, seeded
        from harness.stylers import TransformNet
        from harness.train_styler import crops, fit

        small = recipe.one(self.style).model_copy(
            update={
                "width": 8,
                "blocks": 3,
                "crop": 96,
                "shown": None,
                "batch_size": 4,
                "optimiser": "adam",
                "learning_rate": 0.002,
                "start": "",
                "steps": self.train_steps,
                "seed": ctx.seed,
            }
        )
        lines: dict[str, Any] = {}
        every = range(len(ctx.dataset))
        apart = len(every) >= 5
        train, judge = ctx.dataset, ctx.dataset
        if apart:
            train, judge = (ctx.dataset.select(indices=[i for i in every if (i % 5 == 4) == last]) for last in (False, True))
        held = next(crops(judge, 4, small.crop, 3, ctx.device, small.seed + 1))
        zero = torch.zeros(len(held), dtype=torch.int64, device=ctx.device)
        pictures, metrics = [held], []
        few = Few(ctx, task, small, train) if self.compare == "loss" else None
        with torch.enable_grad():
            for label in ("instance", "batch") if self.compare == "norm" else ("features", "pixels"):
                norm: Any = label if self.compare == "norm" else "instance"
                with seeded(stable_seed("compare", small.seed)):
                    module = TransformNet(3, small.width, small.blocks, 1, norm)
                module = placed(module, ctx.device)
                if few is not None:
                    lines[label] = few.fit(module, label == "pixels")
                else:
                    history = fit(module, task, small, train)
                    lines[label] = sum(w * np.asarray(v) for w, v in zip(task.weights, history.values(), strict=True))
                with torch.no_grad():
                    made = module.eval()(held)
                    final = float(task.total(task.losses(made, held, zero)))
                pictures.append(made)
                what = "norm" if self.compare == "norm" else "loss"
                where = "pictures apart" if apart else "other crops of the pictures"
                about = f"weighted loss on {where} after {self.train_steps} steps, {label} {what}"
                metrics.append(Metric(f"loss_{label}", final, better="lower", about=about))
        sheet = torch.stack([p[:2] for p in pictures], 1).flatten(0, 1)
        names = ["content", *lines] * 2
        title = "norm" if self.compare == "norm" else "losses"
        smooth = {k: np.convolve(v, np.ones(w) / w, "valid") for k, v in lines.items() for w in [max(1, min(20, len(v) // 5))]}
        x = range(1, len(next(iter(smooth.values()))) + 1)
        caption = "Training loss, a running mean. " + (
            "Both by the same loss." if self.compare == "norm" else "Each its own loss over its first value."
        )
        if self.compare == "loss":
            smooth = {k: v / v[0] for k, v in smooth.items()}
        return [
            Curve(f"training_{title}", x, smooth, "step", "loss", log_y=True, caption=caption),
            Images(f"trained_{title}", eight_bits(sheet), captions=names, columns=3),
        ], metrics


def style_task(ctx: Context, recipe: StylerRecipe, style: int) -> tuple[Task, Image.Image]:
    """The loss of a styler's recipe for one of its styles, with the context's model as encoder, and the style's picture."""
    from harness.train_styler import task_of

    return task_of(recipe.one(style), ctx.registry, ctx.device.type, ctx.model), ctx.named_picture(recipe.styles[style], recipe.folder)


def descend(ctx: Context, task: Task, content: Tensor, steps: int, name: str, noise: bool = False) -> Tensor:
    """The slow way with a styler's own loss, from the content picture or from noise, by L-BFGS."""
    import torch

    from harness import optimise as o

    with torch.no_grad():
        features = ctx.model.activations(content, [task.content_layer])[task.content_layer]
    targets = {layer: table[:1] for layer, table in task.targets.items()}
    alpha, beta, gamma = task.weights
    objective = -alpha * o.content_error(task.content_layer, features) - beta * o.style_error(targets)
    objective = objective - (100 * gamma / content[0].numel()) * o.total_variation()
    draws = ctx.draws([name])
    made = o.ascend(
        ctx.model, objective, draws.rand(content.shape[1:]) if noise else content, steps=steps, step_size=5 / 255, rule="lbfgs",
        draws=draws, operators=[o.Clamp()], progress=ctx.report,
    )  # fmt: skip
    return made.images


class Few:
    """A few crops of pictures and what the slow descent makes of them: networks trained on these differ in their loss alone."""

    BATCHES = 4

    def __init__(self, ctx: Context, task: Task, recipe: StylerRecipe, data: Dataset) -> None:
        import torch

        from harness.train_styler import crops

        self.ctx, self.task, self.recipe = ctx, task, recipe
        batches = crops(data, recipe.batch_size, recipe.crop, 3, ctx.device, recipe.seed)
        self.contents = torch.cat([next(batches) for _ in range(self.BATCHES)])
        with torch.no_grad():
            self.wanted = torch.cat([descend(ctx, task, c[None], 60, f"crop {i}").clamp(0, 1) for i, c in enumerate(self.contents)])

    def fit(self, module: nn.Module, pixels: bool) -> np.ndarray:
        """Train by the mean squared distance of pixels to what the slow descent made, or by the features' losses: (steps,) of that loss."""
        import torch

        optimiser = torch.optim.Adam(module.parameters(), self.recipe.learning_rate)
        random = np.random.default_rng(self.recipe.seed)
        losses = []
        module.train()
        zero = torch.zeros(self.recipe.batch_size, dtype=torch.int64, device=self.ctx.device)
        for step in range(self.recipe.steps):
            rows = torch.from_numpy(random.integers(0, len(self.wanted), self.recipe.batch_size)).to(self.ctx.device)
            content = self.contents[rows]
            made = module(content)
            loss = (made - self.wanted[rows]).square().mean() if pixels else self.task.total(self.task.losses(made, content, zero))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
            self.ctx.report("steps", step + 1, self.recipe.steps)
        return torch.stack(losses).cpu().numpy()
