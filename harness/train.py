"""Train a small network by a recipe of the registry; the weights come with a card that says how they were made."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import yamlfile
from .builders import build_module
from .context import drawn, stable_seed, to_images
from .datasets import Dataset, because, class_names, evenly, load_dataset
from .device import device_kind, device_settings
from .errors import ConfigError
from .models import LoadedModel
from .paths import sha256_file, writing
from .record import write_json
from .registry import Adversary, ModelEntry, RecipeEntry, Registry
from .runner import versions


def train(
    name: str, registry: Registry, folder: Path, device: str = "auto", report: Callable[[str, int, int], None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """Follow recipe `name`; write `NAME.safetensors`, its card `NAME.json` and a registry `NAME.yaml` with its entry into `folder`.

    (weights file, card) is given back.

    A network is trained by SGD with momentum, cross-entropy and random shifts; on the worst pictures within a budget or on noisy ones
    where the recipe says so. Same recipe, versions and
    device: same bytes.
    """
    from safetensors.torch import save_file

    entry_file = folder / f"{name}.yaml"
    if entry_file.resolve() in {path.resolve() for path in registry.files}:
        raise ConfigError(
            f"{entry_file} is a registry in use, and what is trained would be written over it; choose another --name or --output"
        )
    if name in registry.generator_recipes:
        from .train_generator import train_generator

        return train_generator(name, registry.generator_recipes[name], registry, folder, device, report)
    if name in registry.styler_recipes:
        from .train_styler import train_styler

        return train_styler(name, registry.styler_recipes[name], registry, folder, device, report)
    recipe = registry.recipe(name)
    assert isinstance(recipe, RecipeEntry)
    entry = ModelEntry(
        builder=recipe.builder, args=recipe.args, weights=f"random:{recipe.seed}", input=recipe.input, classes=recipe.classes
    )
    entry._where, entry._folder = recipe.where, recipe.folder
    data, test = _datasets(name, recipe, registry)
    with device_settings(device):
        kind = device_kind(device)
        module = build_module(name, entry).to(kind)
        names = class_names(recipe.classes) or data.classes
        x, y = _pixels(data, recipe, names, kind)
        held = _pixels(test, recipe, names, kind)
        course: list[dict[str, float]] = []
        watched = evenly(WATCHED, len(test))

        def after(epoch: int) -> None:
            few = held[0][watched], held[1][watched]
            course.append({"epoch": epoch, "clean": _accuracy(module, recipe, *few), "attacked": robust_accuracy(module, recipe, *few)})

        losses = fit(module, recipe, x, y, report, after if recipe.adversary else None)
        accuracy = {"train": _accuracy(module, recipe, x, y)}
        x, y = held
        accuracy["test"] = _accuracy(module, recipe, x, y)
        if recipe.adversary is not None:
            accuracy["attacked"] = robust_accuracy(module, recipe, x, y)
    if not np.isfinite(losses[-1]):
        raise ConfigError(f"{recipe.where}: recipe {name!r}: the loss stopped being finite; use a smaller learning_rate")
    path = folder / f"{name}.safetensors"
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with writing(path) as temporary:
        save_file(state, temporary)
    sha = sha256_file(path)
    card = {
        "name": name,
        "recipe": recipe.model_dump(mode="json"),
        "data": {"name": recipe.dataset, "pictures": len(data), "fingerprint": data.fingerprint},
        "test_data": {"name": recipe.test_dataset, "pictures": len(test), "fingerprint": test.fingerprint},
        "accuracy": accuracy,
        "final_loss": losses[-1],
        "losses": losses,
        "course": course,
        "parameters": sum(p.numel() for p in module.parameters()),
        "seed": recipe.seed,
        "sha256": sha,
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "numpy", "vision-harness")},
    }
    with writing(folder / f"{name}.json") as temporary:
        write_json(temporary, json.loads(json.dumps(card)))
    module_file, _, attribute = recipe.builder.rpartition(":")
    if module_file.endswith(".py"):  # which starts at the recipe's registry, and the entry stands elsewhere
        module_file = str((recipe.folder / Path(module_file).expanduser()).absolute())
    written: dict[str, Any] = {
        "builder": f"{module_file}:{attribute}",
        "args": recipe.args,
        "weights": f"file:{path.name}",
        "sha256": sha,
        "classes": recipe.classes or list(data.classes),
        "input": recipe.input.model_dump(mode="json", exclude_none=True),
    }
    with writing(entry_file) as temporary:
        temporary.write_text(yamlfile.written({"models": {name: written}}))
    return path, card


def _datasets(name: str, recipe: RecipeEntry, registry: Registry) -> tuple[Dataset, Dataset]:
    """What is trained on and what is kept apart; of one dataset every fifth picture is."""
    data = load_dataset(recipe.dataset, registry).select(recipe.limit)
    if recipe.test_dataset:
        test = load_dataset(recipe.test_dataset, registry).select(recipe.limit)
    else:
        if len(data) < 5:
            raise ConfigError(f"{recipe.where}: {len(data)} pictures are too few to train on; give at least five")
        places = np.arange(len(data))
        data, test = (data.select(indices=places[kept].tolist()) for kept in (places % 5 != 4, places % 5 == 4))
    classes = class_names(recipe.classes) or data.classes
    for found in (data, test):
        if found.labels is None or found.labels_for(classes) is None:
            raise ConfigError(
                f"{recipe.where}: recipe {name!r} needs datasets with labels for its classes; {found.name} has none{because(found)}"
            )
    return data, test


def _pixels(data: Dataset, recipe: RecipeEntry, names: Sequence[str], device: str) -> tuple[Tensor, Tensor]:
    """Pixels (N, C, H, W) in [0, 1] and labels (N,), indices of the network's classes."""
    labels = data.labels_for(names)
    assert labels is not None
    return to_images(data.pictures(recipe.input), torch.device(device)), torch.from_numpy(labels).to(device)


def fit(
    module: nn.Module,
    recipe: RecipeEntry,
    x: Tensor,
    y: Tensor,
    report: Callable[[str, int, int], None] | None = None,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """Train a network on pixels x (N, C, H, W) in [0, 1] and labels y (N,), in place: the mean loss of each epoch.

    `after(epochs done)` is called after each. Random numbers come from the recipe's seed alone.
    """
    device = x.device
    normalise = _normaliser(recipe, device)
    generator = torch.Generator("cpu").manual_seed(stable_seed("recipe", recipe.seed))
    optimiser = torch.optim.SGD(
        module.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
    )
    total = recipe.epochs * -(-len(x) // recipe.batch_size)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if recipe.schedule == "cosine":
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - abs(2 * (step + 1) / (total + 1) - 1))
    losses = []
    for epoch in range(recipe.epochs):
        module.train()
        order = drawn(torch.randperm, len(x), generator, device)
        summed = torch.zeros((), device=device)
        for rows in torch.split(order, recipe.batch_size):
            images, labels = _shifted(x[rows], recipe.shift, generator), y[rows]
            if recipe.flip:
                turned = drawn(torch.rand, (len(images), 1, 1, 1), generator, device) < 0.5
                images = torch.where(turned, images.flip(3), images)
            if recipe.noise:  # not clipped: a smoothed network sees it so
                images = images + recipe.noise * drawn(torch.randn, images.shape, generator, device)
            if recipe.signs:
                images = (images + recipe.signs * drawn(torch.randn, images.shape, generator, device).sign()).clamp(0, 1)
            if recipe.adversary is not None:
                images = worst(lambda pixels: module(normalise(pixels)), images, labels, recipe.adversary, generator)
            loss = F.cross_entropy(module(normalise(images)), labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type for it
            optimiser.step()
            schedule.step()
            summed += loss.detach() * len(rows)
        losses.append(float(summed) / len(x))
        if report:
            report("epochs", epoch + 1, recipe.epochs)
        if after:
            after(epoch + 1)
    return losses


def worst(
    forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, adversary: Adversary, generator: torch.Generator | None = None
) -> Tensor:
    """Pictures within eps of `images` and in [0, 1] where the cross-entropy is high: signed gradient steps, projected."""
    eps = adversary.eps / 255
    low, high = (images - eps).clamp_min(0), (images + eps).clamp_max(1)
    x = images
    if adversary.random_start:
        random = drawn(torch.rand, images.shape, generator, images.device)
        x = torch.clamp(images + eps * (2 * random - 1), low, high)
    for _ in range(adversary.steps):
        leaf = x.detach().requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(forward(leaf), labels, reduction="sum"), leaf)[0]
        x = torch.clamp(x + adversary.step_size * eps * gradient.sign(), low, high)
    return x.detach()


WATCHED = 200  # pictures kept apart by which adversarial training is followed epoch by epoch
JUDGE = {"steps": 20, "step_size": 0.1}  # the attack by which a recipe's result is judged


def robust_accuracy(module: nn.Module, recipe: RecipeEntry, x: Tensor, y: Tensor, eps: float | None = None) -> float:
    """Accuracy (share) under 20 projected gradient steps within the recipe's own budget, or another (255ths)."""
    if eps is None:
        assert recipe.adversary is not None
        eps = recipe.adversary.eps
    model = LoadedModel(copy.deepcopy(module), recipe.input, device=x.device)
    attack = Adversary(eps=eps, **JUDGE)
    generator = torch.Generator("cpu").manual_seed(stable_seed("judge", recipe.seed))
    right = torch.zeros((), device=x.device)
    for rows in torch.split(torch.arange(len(x), device=x.device), recipe.batch_size):
        with torch.enable_grad():
            found = worst(model, x[rows], y[rows], attack, generator)
        with torch.no_grad():
            right += (model(found).argmax(1) == y[rows]).sum()
    return float(right) / len(x)


def _normaliser(recipe: RecipeEntry, device: torch.device) -> Callable[[Tensor], Tensor]:
    mean = torch.tensor(recipe.input.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(recipe.input.std, device=device).view(1, -1, 1, 1)
    return lambda pixels: (pixels - mean) / std


def _shifted(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to `pixels`, the border repeated."""
    if not pixels:
        return images
    shifts = torch.randint(0, 2 * pixels + 1, (len(images), 2), generator=generator, device="cpu").tolist()
    height, width = images.shape[2:]
    wide = F.pad(images, (pixels,) * 4, mode="replicate")
    return torch.stack([image[:, dy : dy + height, dx : dx + width] for image, (dy, dx) in zip(wide, shifts, strict=True)])


def _accuracy(module: nn.Module, recipe: RecipeEntry, x: Tensor, y: Tensor) -> float:
    model = LoadedModel(copy.deepcopy(module), recipe.input, device=x.device)
    right = torch.zeros((), device=x.device)
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(x), device=x.device), 256):
            right += (model(x[rows]).argmax(1) == y[rows]).sum()
    return float(right) / len(x)
