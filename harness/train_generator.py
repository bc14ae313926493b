"""Train a generator that inverts a layer of a frozen encoder: pixel, feature and adversarial loss (Dosovitskiy & Brox 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import yamlfile
from .context import stable_seed, to_images
from .datasets import Dataset, load_dataset
from .device import device_kind, device_settings, seeded
from .errors import ConfigError
from .generators import UpconvGenerator
from .models import LoadedModel, load_model
from .paths import sha256_file, writing
from .record import write_json
from .registry import GeneratorRecipe, Registry
from .runner import versions

Report = Callable[[str, int, int], None]
BUILDER = "harness.generators:UpconvGenerator"


class Discriminator(nn.Module):
    """Real or made? Strided convolutions, one logit a picture."""

    def __init__(self, channels: int, size: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        into, side = channels, size
        while side > 4 and len(layers) < 12:
            out = min(4 * width, width * 2 ** (len(layers) // 2))
            layers += [nn.Conv2d(into, out, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            into, side = out, -(-side // 2)
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * into, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).squeeze(1)


@dataclass(frozen=True)
class Task:
    """What is inverted, and on which pictures."""

    encoder: LoadedModel
    layer: str
    compare: str
    train: Dataset
    test: Dataset

    def codes(self, images: Tensor) -> dict[str, Tensor]:
        """The layers' outputs, differentiable in the pictures."""
        found: dict[str, Tensor] = self.encoder.activations(images, sorted({self.layer, self.compare}))
        return found


def train_generator(
    name: str, recipe: GeneratorRecipe, registry: Registry, folder: Path, device: str = "auto", report: Report | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write `NAME.safetensors`, its card `NAME.json` and a registry `NAME.yaml` with its entry into `folder`; (weights file, card)."""
    from safetensors.torch import save_file

    with device_settings(device):
        kind = device_kind(device)
        task = _task(recipe, registry, kind)
        shape = list(task.encoder.layer_shape(task.layer))
        spec = task.encoder.input
        args: dict[str, Any] = {"code": shape, "channels": spec.channels, "size": spec.size, "width": recipe.width}
        with seeded(stable_seed("generator", recipe.seed)):
            generator, discriminator = UpconvGenerator(**args), Discriminator(spec.channels, spec.size)
        generator.to(kind)
        discriminator.to(kind)
        losses = _fit(generator, discriminator, task, recipe, report)
        measured = _measured(generator, task, recipe.batch_size)
    path = folder / f"{name}.safetensors"
    state = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    with writing(path) as temporary:
        save_file(state, temporary)
    sha = sha256_file(path)
    card = {
        "name": name,
        "recipe": recipe.model_dump(mode="json"),
        "args": args,
        "encoder": {"name": recipe.encoder, "weights": task.encoder.weights},
        "data": {"name": recipe.dataset, "pictures": len(task.train), "fingerprint": task.train.fingerprint},
        "test_data": {"pictures": len(task.test), "fingerprint": task.test.fingerprint},
        "losses": losses,
        "test": measured,
        "parameters": sum(p.numel() for p in generator.parameters()),
        "sha256": sha,
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "numpy", "vision-harness")},
    }
    with writing(folder / f"{name}.json") as temporary:
        write_json(temporary, card)
    entry = {
        "builder": BUILDER,
        "args": args,
        "weights": f"file:{path.name}",
        "sha256": sha,
        "encoder": recipe.encoder,
        "layer": task.layer,
    }
    with writing(folder / f"{name}.yaml") as temporary:
        temporary.write_text(yamlfile.written({"generators": {name: entry}}))
    return path, card


def _task(recipe: GeneratorRecipe, registry: Registry, device: str) -> Task:
    encoder = load_model(recipe.encoder, registry, device)
    layer = encoder.full_name(recipe.layer)
    compare = encoder.full_name(recipe.compare) if recipe.compare else layer
    if len(encoder.layer_shape(layer)) not in (1, 3):
        raise ConfigError(f"{recipe.where}: layer {layer!r} gives neither a vector nor maps (C, H, W)")
    data = load_dataset(recipe.dataset, registry)
    if recipe.test_dataset:
        return Task(encoder, layer, compare, data, load_dataset(recipe.test_dataset, registry))
    if len(data) < 5:
        raise ConfigError(f"{recipe.where}: {len(data)} pictures are too few to train on; give at least five")
    every = np.arange(len(data))
    return Task(
        encoder, layer, compare, data.select(indices=every[every % 5 != 4].tolist()), data.select(indices=every[every % 5 == 4].tolist())
    )


def _fit(
    generator: UpconvGenerator, discriminator: Discriminator, task: Task, recipe: GeneratorRecipe, report: Report | None
) -> dict[str, list[float]]:
    """Mean losses of each epoch. A discriminator that is well ahead waits, as in the paper."""
    device = task.encoder.device
    makers = torch.optim.Adam(generator.parameters(), recipe.learning_rate, betas=(0.9, 0.999))
    judges = torch.optim.Adam(discriminator.parameters(), recipe.learning_rate / 4, betas=(0.5, 0.999))
    random = np.random.default_rng(stable_seed("generator order", recipe.seed))
    batches = -(-len(task.train) // recipe.batch_size)
    total = recipe.epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(makers, lambda step: max(0.02, 1 - step / total))
    highest = torch.zeros_like(generator.high) - float("inf")
    lowest = -highest
    history: dict[str, list[float]] = {"pixel": [], "feature": [], "adversarial": [], "discriminator": []}
    judged = True
    for epoch in range(recipe.epochs):
        order = task.train.select(indices=random.permutation(len(task.train)).tolist())
        sums = {name: torch.zeros((), device=device) for name in history}
        for _, pixels in order.batches(task.encoder.input, recipe.batch_size):
            real = to_images(pixels, device)
            with torch.no_grad():
                found = task.codes(real)
            code, features = found[task.layer], found[task.compare]
            if epoch == 0:
                by_unit = code.amax(0), code.amin(0)
                if code.dim() == 4:
                    by_unit = by_unit[0].amax((1, 2), keepdim=True), by_unit[1].amin((1, 2), keepdim=True)
                highest, lowest = torch.maximum(highest, by_unit[0]), torch.minimum(lowest, by_unit[1])
                generator.high.copy_(highest)
                generator.low.copy_(lowest)
            made = generator(code)
            losses = {"pixel": F.mse_loss(made, real), "feature": relative(task.codes(made)[task.compare], features)}
            if recipe.adversarial:
                losses["adversarial"] = F.softplus(-discriminator(made)).mean()
            loss = sum((getattr(recipe, name) * value for name, value in losses.items()), torch.zeros((), device=device))
            makers.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(generator.parameters(), 1.0)
            makers.step()
            schedule.step()
            if recipe.adversarial:
                judge = (F.softplus(-discriminator(real)) + F.softplus(discriminator(made.detach()))).mean()
                if judged:
                    judges.zero_grad(set_to_none=True)
                    judge.backward()  # type: ignore[no-untyped-call]
                    judges.step()
                losses["discriminator"] = judge
            for name, value in losses.items():
                sums[name] += value.detach() / batches
        for name, value in sums.items():
            history[name].append(float(value))
        judged = history["discriminator"][-1] > 0.1 * history["adversarial"][-1]
        if not np.isfinite(history["pixel"][-1]):
            raise ConfigError(f"{recipe.where}: the loss stopped being finite in epoch {epoch + 1}; use a smaller learning_rate")
        if report:
            report("epochs", epoch + 1, recipe.epochs)
    return history


def relative(features: Tensor, wanted: Tensor) -> Tensor:
    """||features - wanted||^2 / ||wanted||^2 over the batch."""
    return (features - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


@torch.no_grad()
def _measured(generator: UpconvGenerator, task: Task, batch: int) -> dict[str, float]:
    """On the pictures kept apart: PSNR of the inversions, and how often the encoder answers as it does for the picture itself."""
    generator.eval()
    errors, same = [], []
    for _, pixels in task.test.batches(task.encoder.input, batch):
        real = to_images(pixels, task.encoder.device)
        made = generator(task.codes(real)[task.layer])
        errors.append((made - real).square().flatten(1).mean(1))
        same.append(task.encoder(made).argmax(1) == task.encoder(real).argmax(1))
    error = torch.cat(errors).clamp_min(1e-10)
    return {"psnr": float((-10 * error.log10()).mean()), "same_answer": float(torch.cat(same).float().mean())}
