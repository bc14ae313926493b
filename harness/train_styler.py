"""Train a network that makes pictures in a style, or in several, by the losses of style transfer (Johnson et al. 2016; Dumoulin et al.
2017). What is done is written down as it goes, and a training that was interrupted is taken up where it stood."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import yamlfile
from .context import stable_seed, to_images
from .datasets import Dataset, at_size, flat, load_dataset, named_picture, picture_place
from .device import device_kind, device_settings, placed, seeded
from .errors import ConfigError, DataError
from .models import LoadedModel, load_model
from .muon import Muon
from .optimise import content_error, evaluate, gram, style_error, total_variation
from .optimise.objectives import Objective
from .paths import sha256_file, writing
from .record import write_json
from .registry import Registry, StylerRecipe
from .runner import versions
from .stylers import ConditionalInstanceNorm, TransformNet, load_styler
from .weights import weight_source, weights_hash

Report = Callable[[str, int, int], None]
Optimisers = Mapping[str, torch.optim.Optimizer]
BUILDER = "harness.stylers:TransformNet"
RAMP = 0.2  # share of the steps over which the weight of the style rises
SAVED = 200  # steps between two states on disk
TRIES = 20  # pictures that are drawn in place of one that cannot be read
LONGEST = 16  # times as long as it is wide may be what a crop is taken of
WIDEST = 2.0  # times as wide as high, or as high as wide, is a crop of a picture's own shape
GRID = 16  # pixels of which its sides are multiples


@dataclass(frozen=True)
class Task:
    """What the network's pictures must be like."""

    encoder: LoadedModel
    content_layer: str
    targets: Mapping[str, Tensor]  # {layer: (styles, C, C)} Gram matrices
    weights: tuple[float, float, float]  # of content, style and variation
    shares: Tensor  # (styles,) how much of its weight each style gets
    styles: str = ""  # what identifies the styles' pictures

    def losses(self, made: Tensor, contents: Tensor, styles: Tensor) -> dict[str, Tensor]:
        """Mean relative errors of pictures made of `contents` in `styles` (N,), of styles by their shares, and 100 times the mean squared
        step between neighbours."""
        with torch.no_grad():
            features = self.encoder.activations(contents, [self.content_layer])[self.content_layer]
        targets = {layer: table[styles] for layer, table in self.targets.items()}
        content, style = content_error(self.content_layer, features), style_error(targets)
        layers = content.layers | style.layers
        # One pass of the encoder serves both.
        both = Objective(layers, lambda outputs, x: torch.stack([content.score(outputs, x), style.score(outputs, x)]))
        found = evaluate(self.encoder, both, made, made)
        variation = total_variation().score({}, made) * (100 / made[0].numel())
        return {"content": found[0].mean(), "style": (found[1] * self.shares[styles]).mean(), "variation": variation.mean()}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = sum(
            (w * v for w, v in zip(self.weights, losses.values(), strict=True)), torch.zeros((), device=self.encoder.device)
        )
        return found


def task_of(recipe: StylerRecipe, registry: Registry, device: str, encoder: LoadedModel | None = None) -> Task:
    """The losses of a recipe; with an encoder that is loaded already."""
    encoder = encoder or load_model(recipe.encoder, registry, device)
    layers = [encoder.full_name(n) for n in recipe.style_layers]
    tables: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    seen = hashlib.sha256()
    with torch.no_grad():
        for name in recipe.styles:
            picture = at_size(named_picture(name, registry, recipe.folder), recipe.style_size, encoder.input.channels)
            seen.update(np.ascontiguousarray(picture).tobytes())
            found = encoder.activations(to_images(picture[None], encoder.device), layers)
            for layer in layers:
                tables[layer].append(gram(found[layer])[0])
    targets = {layer: torch.stack(rows) for layer, rows in tables.items()}
    weights = recipe.content_weight, recipe.style_weight, recipe.tv_weight
    shares = torch.tensor(recipe.style_shares or [1.0] * len(recipe.styles), device=encoder.device, dtype=encoder.dtype)
    return Task(encoder, encoder.full_name(recipe.content_layer), targets, weights, shares, seen.hexdigest())


def crops(
    data: Dataset, count: int, size: int | tuple[int, int], channels: int, device: torch.device, seed: int = 0, start: int = 0,
    shown: float | None = None, lenient: bool = False,
) -> Iterator[Tensor]:  # fmt: skip
    """Batches (count, channels, H, W) of random crops of random pictures, mirrored by chance: the k-th is the same in any run.

    Without `shown` crops are `size` x `size`, of the picture made smaller by a factor from 0.3 to 1 first, whatever its size. With it a
    batch has about the shape of one of its pictures, an area of about the square of `size`, or of a number drawn between two, and each
    crop shows from that share of what has this shape in its picture to all of it. `lenient` takes another in place of a picture that
    cannot be read, with a warning.
    """

    def batch(step: int) -> np.ndarray:
        random = np.random.default_rng(stable_seed("crops", seed, step))
        found: list[np.ndarray] = []
        for i in random.integers(0, len(data), count).tolist():
            picture = _opened(data, i, random, lenient)
            if shown is None:
                assert isinstance(size, int)
                found.append(_crop(picture, size, channels, random))
            else:
                shape = found[0].shape[:2] if found else _shape(picture, size, random, shown)
                found.append(_view(picture, shape, channels, random, shown))
        return np.stack(found)

    with ThreadPoolExecutor(1) as pool:  # the next is opened while the caller works on this one
        step, waiting = start, pool.submit(batch, start)
        while True:
            found = waiting.result()
            step += 1
            waiting = pool.submit(batch, step)
            yield to_images(found, device)


def _opened(data: Dataset, place: int, random: np.random.Generator, lenient: bool) -> Image.Image:
    """The picture in a place, or where it cannot be read another: a day's training does not end at one broken file."""
    left = TRIES if lenient else 1
    while True:
        try:
            return data.get(place)
        except DataError as error:
            left -= 1
            if not left:
                raise
            warnings.warn(f"{error} (another is taken)", RuntimeWarning, stacklevel=2)
            place = int(random.integers(0, len(data)))


def _crop(picture: Image.Image, size: int, channels: int, random: np.random.Generator) -> np.ndarray:
    """uint8 (size, size, channels)."""
    part = float(random.uniform(0.3, 1.0))
    width, height = (min(n, LONGEST * min(picture.size)) for n in picture.size)
    if (width, height) != picture.size:  # which at the size wanted might take gigabytes
        x, y = (int(random.integers(0, n - kept + 1)) for n, kept in zip(picture.size, (width, height), strict=True))
        picture = picture.crop((x, y, x + width, y + height))
    side = max(size, round(min(picture.size) * part))
    pixels = at_size(picture, round(side * max(picture.size) / min(picture.size)), channels)
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        edge = [(0, max(0, size - n)) for n in (height, width)]
        pixels = np.pad(pixels, (*edge, (0, 0)), mode="symmetric")
        height, width = pixels.shape[:2]
    y, x = (int(random.integers(0, n - size + 1)) for n in (height, width))
    crop = pixels[y : y + size, x : x + size]
    return crop[:, ::-1] if random.uniform() < 0.5 else crop


def _shape(picture: Image.Image, size: int | tuple[int, int], random: np.random.Generator, shown: float) -> tuple[int, int]:
    """(height, width) of crops of about a picture's shape, in multiples of GRID: each new shape costs the libraries some preparation."""
    least, most = (size, size) if isinstance(size, int) else size
    ratio = picture.width / picture.height * float(random.uniform(shown, 1 / shown))
    ratio = min(max(ratio, 1 / WIDEST), WIDEST)
    side = float(random.uniform(least, most))
    height, width = (max(2 * GRID, GRID * round(n / GRID)) for n in (side / ratio**0.5, side * ratio**0.5))
    return height, width


def _view(picture: Image.Image, shape: tuple[int, int], channels: int, random: np.random.Generator, shown: float) -> np.ndarray:
    """uint8 (height, width, channels)."""
    height, width = shape
    scale = min(picture.width / width, picture.height / height) * float(random.uniform(shown, 1.0))
    wide, high = scale * width, scale * height
    x, y = (float(random.uniform(0, max(0.0, n - part))) for n, part in ((picture.width, wide), (picture.height, high)))
    box = x, y, min(x + wide, picture.width), min(y + high, picture.height)
    picture = picture.convert("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box)).reshape(height, width, channels)
    return pixels[:, ::-1] if random.uniform() < 0.5 else pixels


def train_styler(
    name: str, recipe: StylerRecipe, registry: Registry, folder: Path, device: str = "auto", report: Report | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write `NAME.safetensors`, its card `NAME.json` and a registry `NAME.yaml` with its entry into `folder`; (weights file, card)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = _names(recipe)
    data = load_dataset(recipe.dataset, registry)
    for style in recipe.styles:
        if flat(named_picture(style, registry, recipe.folder)):
            warnings.warn(
                f"style {style}: one colour everywhere; nothing but that colour can be learnt of it", RuntimeWarning, stacklevel=2
            )
    with device_settings(device):
        kind = device_kind(device)
        origin = _origin(recipe.start, registry) if recipe.start else {}  # before its file may be written over
        task = task_of(recipe, registry, kind)
        module, args, names, first = _network(recipe, registry, task.encoder.input.channels, names, kind)
        history = fit(module, task, recipe, data, first, folder / f"{name}.state.safetensors", report, lenient=True)
    path = folder / f"{name}.safetensors"
    with writing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}, temporary)
    sha = sha256_file(path)
    tail = max(1, recipe.steps // 20)
    card = {
        "name": name,
        "recipe": recipe.model_dump(mode="json"),
        "args": args,
        "styles": names,
        **({"start": origin} if origin else {}),
        "encoder": {"name": recipe.encoder, "weights": task.encoder.weights},
        "data": {"name": recipe.dataset, "pictures": len(data), "fingerprint": data.fingerprint},
        "losses": {k: [float(np.mean(v[i : i + tail])) for i in range(0, len(v), tail)] for k, v in history.items()},
        "parameters": sum(p.numel() for p in module.parameters()),
        "sha256": sha,
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "numpy", "vision-harness")},
    }
    with writing(folder / f"{name}.json") as temporary:
        write_json(temporary, card)
    entry = {"builder": BUILDER, "args": args, "weights": f"file:{path.name}", "sha256": sha, "styles": names}
    registry_file: dict[str, Any] = {"stylers": {name: entry}}
    if not recipe.base:  # by whose losses fast and slow are compared; it counts its styles as the network does
        entry["recipe"] = name
        own = recipe.model_dump(mode="json", exclude_defaults=True)
        own["styles"], own["style_names"] = _kept(recipe, folder, name), names
        registry_file["styler_recipes"] = {name: own}
    with writing(folder / f"{name}.yaml") as temporary:
        temporary.write_text(yamlfile.written(registry_file))
    (folder / f"{name}.state.safetensors").unlink(missing_ok=True)
    return path, card


def _origin(name: str, registry: Registry) -> dict[str, Any]:
    """What a network began as: the weights' hash, and the card that lies beside them if there is one."""
    entry = registry.styler(name)
    found: dict[str, Any] = {"name": name, "sha256": weights_hash(name, entry)}
    source, rest = weight_source(entry)
    path = source.path(rest, entry)
    card = path.with_suffix(".json") if path else None
    if card is not None and card.is_file():
        with suppress(ValueError, OSError):  # no card, and nothing that the training needs
            content = json.loads(card.read_text("utf-8"), parse_constant=lambda name: None)
            if isinstance(content, dict) and content.get("sha256") == found["sha256"]:
                found["card"] = content
    return found


def _kept(recipe: StylerRecipe, folder: Path, name: str) -> list[str]:
    """The names of the styles' pictures in a registry in `folder`: files are copied there, so that the folder can be moved."""
    files = {i: recipe.folder / Path(s).expanduser() for i, s in enumerate(recipe.styles) if not picture_place(s)}
    contents = {i: path.read_bytes() for i, path in files.items()}  # all before any is written: they may lie there in another order
    found = list(recipe.styles)
    for i, content in contents.items():
        found[i] = f"{name}-style-{i}{files[i].suffix.lower()}"
        with writing(folder / found[i]) as temporary:
            temporary.write_bytes(content)
    return found


def _names(recipe: StylerRecipe) -> list[str]:
    names = recipe.style_names or [Path(s.rpartition(":")[2]).stem for s in recipe.styles]
    if len(names) != len(recipe.styles):
        raise ConfigError(f"{recipe.where}: {len(names)} style_names for {len(recipe.styles)} styles")
    if not names:
        raise ConfigError(f"{recipe.where}: no styles; name pictures as DATASET:ID or by path")
    for style in recipe.styles:
        if any("\ud800" <= letter <= "\udfff" for letter in style):  # the card and the registry are UTF-8
            raise ConfigError(f"style {style!r}: the file's name is not UTF-8; rename it, or make a link to it")
    return names


def _network(
    recipe: StylerRecipe, registry: Registry, channels: int, names: list[str], device: str
) -> tuple[TransformNet, dict[str, Any], list[str], int]:
    """(network, its arguments, names of all its styles, the first that is learnt)."""
    with seeded(stable_seed("styler", recipe.seed)):
        args: dict[str, Any] = {
            "channels": channels, "width": recipe.width, "blocks": recipe.blocks, "styles": len(names), "norm": recipe.norm,
        }  # fmt: skip
        if recipe.start:
            start = registry.styler(recipe.start)
            if start.builder != BUILDER or start.args.get("channels", 3) != channels:
                raise ConfigError(
                    f"{recipe.where}: a network that learns by {recipe.encoder!r} begins as one of {BUILDER} with {channels} channels, "
                    f"and styler {recipe.start!r} ({start.where}) is another"
                )
            args = {**start.args, "styles": len(names)}
        if not recipe.base:
            module = TransformNet(**args)
            if recipe.start:
                begun(load_styler(recipe.start, registry).module, module)
            return placed(module, device), args, names, 0
    base = registry.styler(recipe.base)
    if base.args.get("norm", "instance") != "instance":
        raise ConfigError(f"{recipe.where}: styler {recipe.base!r} has batch norm; only conditional instance norm learns further styles")
    args = {**base.args, "styles": len(base.styles) + len(names)}
    module = TransformNet(**args)
    return placed(extended(load_styler(recipe.base, registry).module, module), device), args, [*base.styles, *names], len(base.styles)


def begun(start: nn.Module, module: TransformNet) -> None:
    """Begin as `start` does; of another number of styles all rows begin as the mean of its own."""
    old, new = start.state_dict(), module.state_dict()
    for key, value in new.items():
        value.copy_(old[key] if value.shape == old[key].shape else old[key].mean(0))


def extended(base: nn.Module, module: TransformNet) -> TransformNet:
    """A network with more styles that begins as `base` does; new rows begin as the mean of the old ones."""
    old, new = base.state_dict(), module.state_dict()
    for key, value in new.items():
        if value.shape == old[key].shape:
            value.copy_(old[key])
        else:
            value[: len(old[key])] = old[key]
            value[len(old[key]) :] = old[key].mean(0)
    return module


def fit(
    module: TransformNet,
    task: Task,
    recipe: StylerRecipe,
    data: Dataset,
    first: int = 0,
    state: Path | None = None,
    report: Report | None = None,
    lenient: bool = False,
) -> dict[str, list[float]]:
    """Train in place; {loss: (steps,)}. Of a network that knows `first` styles already only the rows of the others change.

    A state in the file `state` of the same training is taken up; it is written every 200 steps. Another's raises `ConfigError`.
    """
    training = _identity(module, task, recipe, data) if state is not None else ""
    device = task.encoder.device
    styles = next(iter(task.targets.values())).shape[0]
    module.train()
    norms = [m for m in module.modules() if isinstance(m, ConditionalInstanceNorm)]
    if first:
        module.requires_grad_(False)
        for norm in norms:
            norm.gamma.requires_grad_(True)
            norm.beta.requires_grad_(True)
    learnt = [p for p in module.parameters() if p.requires_grad]
    kernels = [p for p in learnt if p.ndim == 4 and recipe.optimiser == "muon"]
    others = [p for p in learnt if all(p is not k for k in kernels)]
    optimisers: dict[str, torch.optim.Optimizer] = {"adam": torch.optim.Adam(others, recipe.learning_rate)}
    if kernels:
        optimisers["muon"] = Muon(kernels, recipe.learning_rate)
    history: dict[str, list[float]] = {"content": [], "style": [], "variation": []}
    done = _taken_up(state, training, module, optimisers, history) if state is not None else 0
    recent: list[Tensor] = []
    batches = crops(data, recipe.batch_size, recipe.crop, task.encoder.input.channels, device, recipe.seed, done, recipe.shown, lenient)
    for step in range(done, recipe.steps):
        contents = next(batches)
        random = np.random.default_rng(stable_seed("styles", recipe.seed, step))
        which = torch.from_numpy(random.integers(0, styles, len(contents))).to(device)
        mix = torch.nn.functional.one_hot(which + first, first + styles).to(contents.dtype)
        losses = task.losses(module(contents, mix), contents, which)
        # Content is learnt first: a network that makes nothing but texture does not find its way back to the picture.
        share = 1.0 if first or recipe.start else min(1.0, (step + 1) / (RAMP * recipe.steps))
        loss = task.total({**losses, "style": share * losses["style"]})
        module.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if first:
            for norm in norms:
                for table in (norm.gamma, norm.beta):
                    assert table.grad is not None
                    table.grad[:first] = 0  # rows that others rely on; Adam leaves what never had a slope
        rate = recipe.learning_rate * min(1.0, max(0.1, 3 * (1 - step / recipe.steps)))  # falls to a tenth over the last third
        for optimiser in optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
        recent.append(torch.stack([value.detach() for value in losses.values()]))
        last = step + 1 == recipe.steps
        if (step + 1) % SAVED == 0 or last:  # the device is waited for now and then, and not at every step
            for key, values in zip(history, torch.stack(recent, 1).tolist(), strict=True):
                history[key] += values
            recent = []
            if not np.isfinite(history["style"][-1]):
                raise ConfigError(f"{recipe.where}: the loss stopped being finite before step {step + 1}; use a smaller learning_rate")
            if state is not None and not last:
                _written(state, training, module, optimisers, history, step + 1)
        if report:
            report("steps", step + 1, recipe.steps)
    module.requires_grad_(True).eval()
    return history


def _identity(module: TransformNet, task: Task, recipe: StylerRecipe, data: Dataset) -> str:
    """What a training goes from and goes by: its recipe's settings, and what stands behind the names there. The same on every device."""
    named = {"description", "license", "source_url", "styles", "style_names", "dataset"}
    behind = [recipe.model_dump(mode="json", exclude=named), task.encoder.weights, data.fingerprint, task.styles]
    found = hashlib.sha256(json.dumps(behind, sort_keys=True).encode())
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _written(path: Path, training: str, module: nn.Module, optimisers: Optimisers, history: Mapping[str, list[float]], done: int) -> None:
    from safetensors.torch import save_file

    tensors = {f"net.{k}": v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    for kind, optimiser in optimisers.items():
        for i, values in optimiser.state_dict()["state"].items():
            tensors |= {f"{kind}.{i}.{k}": torch.as_tensor(v).detach().cpu().contiguous() for k, v in values.items()}
    tensors |= {f"history.{k}": torch.tensor(v, dtype=torch.float64) for k, v in history.items()}
    with writing(path) as temporary:
        save_file(tensors, temporary, {"training": training, "done": str(done)})


def _taken_up(path: Path, training: str, module: nn.Module, optimisers: Optimisers, history: dict[str, list[float]]) -> int:
    """Steps that a state on disk has done already; another training's state is not written over."""
    from safetensors import safe_open

    if not path.is_file():
        return 0
    with safe_open(path, "pt") as stored:
        facts = stored.metadata() or {}
        if facts.get("training") != training:
            raise ConfigError(
                f"{path}: {facts.get('done', 'some')} steps of another training (other settings, pictures, weights or version); "
                "remove it, or choose another --name or --output"
            )
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # no mapping
    module.load_state_dict({k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")})
    for kind, optimiser in optimisers.items():
        memory: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"{kind}."):
                _, i, name = key.split(".")
                memory.setdefault(int(i), {})[name] = value
        optimiser.load_state_dict({"state": memory, "param_groups": optimiser.state_dict()["param_groups"]})
    for name in history:
        history[name] = tensors[f"history.{name}"].tolist()
    return int(facts["done"])
