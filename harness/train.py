"""Train a small network by a recipe of the registry; the weights come with a card that says how they were made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .builders import build_module
from .context import stable_seed, to_images
from .datasets import Dataset, load_dataset
from .device import device_kind, device_settings
from .errors import ConfigError
from .models import LoadedModel
from .paths import sha256_file, writing
from .record import write_json
from .registry import ModelEntry, RecipeEntry, Registry
from .runner import versions


def train(
    name: str, registry: Registry, folder: Path, device: str = "auto", report: Callable[[str, int, int], None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Follow recipe `name`, of a network or a generator; write `NAME.safetensors` and its card `NAME.json` into `folder`.

    (weights file, card) is given back.

    A network is trained by SGD with momentum and a cosine schedule, cross-entropy and random shifts. Same recipe, versions and
    device: same bytes.
    """
    from safetensors.torch import save_file

    if name in registry.generator_recipes:
        from .train_generator import train_generator

        return train_generator(name, registry.generator_recipes[name], registry, folder, device, report)
    recipe = registry.recipe(name)
    assert isinstance(recipe, RecipeEntry)
    entry = ModelEntry(
        builder=recipe.builder, args=recipe.args, weights=f"random:{recipe.seed}", input=recipe.input, classes=recipe.classes
    )
    entry._where, entry._folder = recipe.where, recipe.folder
    data, test = load_dataset(recipe.dataset, registry), load_dataset(recipe.test_dataset, registry)
    if data.labels is None or test.labels is None:
        raise ConfigError(f"{recipe.where}: recipe {name!r} needs labelled datasets")
    with device_settings(device):
        kind = device_kind(device)
        module = build_module(name, entry).to(kind)
        losses = _fit(module, recipe, data, kind, report)
        accuracy = {"train": _accuracy(module, recipe, data, kind), "test": _accuracy(module, recipe, test, kind)}
    path = folder / f"{name}.safetensors"
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with writing(path) as temporary:
        save_file(state, temporary)
    card = {
        "name": name,
        "recipe": recipe.model_dump(mode="json"),
        "data": {"name": recipe.dataset, "pictures": len(data), "fingerprint": data.fingerprint},
        "test_data": {"name": recipe.test_dataset, "pictures": len(test), "fingerprint": test.fingerprint},
        "accuracy": accuracy,
        "final_loss": losses[-1],
        "parameters": sum(p.numel() for p in module.parameters()),
        "seed": recipe.seed,
        "sha256": sha256_file(path),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "numpy", "vision-harness")},
    }
    with writing(folder / f"{name}.json") as temporary:
        write_json(temporary, json.loads(json.dumps(card)))
    return path, card


def _pixels(data: Dataset, recipe: RecipeEntry, device: str) -> Tensor:
    return to_images(data.pictures(recipe.input), torch.device(device))


def _fit(module: nn.Module, recipe: RecipeEntry, data: Dataset, device: str, report: Callable[[str, int, int], None] | None) -> list[float]:
    x = _pixels(data, recipe, device)
    y = torch.from_numpy(data.labels).to(device)
    mean = torch.tensor(recipe.input.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(recipe.input.std, device=device).view(1, -1, 1, 1)
    generator = torch.Generator("cpu").manual_seed(stable_seed("recipe", recipe.seed))
    optimiser = torch.optim.SGD(
        module.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
    )
    batches = -(-len(x) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * batches)
    losses = []
    for epoch in range(recipe.epochs):
        module.train()
        order = torch.randperm(len(x), generator=generator, device="cpu").to(device)
        total = torch.zeros((), device=device)
        for rows in torch.split(order, recipe.batch_size):
            images = _shifted((x[rows] - mean) / std, recipe.shift, generator)
            loss = F.cross_entropy(module(images), y[rows])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimiser.step()
            schedule.step()
            total += loss.detach() * len(rows)
        losses.append(float(total) / len(x))
        if report:
            report("epochs", epoch + 1, recipe.epochs)
    return losses


def _shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to `pixels`, the border repeated."""
    if not pixels:
        return images
    shifts = torch.randint(0, 2 * pixels + 1, (len(images), 2), generator=generator, device="cpu").tolist()
    height, width = images.shape[2:]
    wide = F.pad(images, (pixels,) * 4, mode="replicate")
    return torch.stack([image[:, dy : dy + height, dx : dx + width] for image, (dy, dx) in zip(wide, shifts, strict=True)])


def _accuracy(module: nn.Module, recipe: RecipeEntry, data: Dataset, device: str) -> float:
    model = LoadedModel(module, recipe.input, device=device)
    with torch.no_grad():
        answers = model(_pixels(data, recipe, device)).argmax(1).cpu()
    assert data.labels is not None
    return float((answers == torch.from_numpy(data.labels)).float().mean())
