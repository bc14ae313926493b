from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import ConfigError, Curve, Heatmaps, Images, Metric, Paper, Param, Result, Table, Technique

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.models import LoadedModel


class ActivationMaps(Technique):
    """The channels of a layer for one picture as tiles (Yosinski et al. 2015, arXiv:1506.06579, fig. 2), and how much of each
    layer is active over a dataset.

    A value counts as inactive when it is not above zero; a channel is dead when it is inactive at every position of every
    picture. Values are taken as a layer gives them, also when an in-place ReLU follows. Cost: one forward pass a picture.
    """

    name = "activation_maps"
    family = "representations"
    paper = Paper(
        "Yosinski, Clune, Nguyen, Fuchs, Lipson", 2015, "Understanding Neural Networks Through Deep Visualization", arxiv="1506.06579"
    )
    needs = frozenset({"dataset", "conv"})
    reading = (
        "Each tile is one channel's map of the picture, all on one scale: bright where it fires. Most tiles are dark most of the "
        "time; each picture wakes a few. The curve shows, layer by layer, the share of values and of channels that stay silent."
    )
    caveats = (
        "A channel is dead for this dataset only; other pictures may wake it. A bright map says where, not what: look at the "
        "same channel in max_patches."
    )
    audit = {"standard": {}, "full": {}}

    layer: str = Param("", description="the layer whose channels are shown; none: the deepest with maps before the class scores")
    picture: int = Param(0, ge=0, description="place of the picture in the dataset's selection")
    channels: int = Param(256, ge=1, le=4096, description="channels shown at most, the first ones")
    layers: tuple[str, ...] = Param((), description="layers counted; none: every convolution, linear layer and activation function")

    def run(self, ctx: Context) -> Result:
        import torch

        from harness.context import to_images

        model, dataset = ctx.model, ctx.dataset
        layer = model.full_name(self.layer or model.last_maps)
        shape = model.maps_shape(layer)
        if self.picture >= len(dataset):
            raise ConfigError(f"activation_maps.picture: there is no picture {self.picture}; {dataset.name!r} has {len(dataset)}")
        wanted = {*(model.full_name(n) for n in self.layers), layer} if self.layers else {*countable(model), layer}
        counted = [name for name, _ in model.calls if name in wanted]
        behind = model.channels_behind

        def count(name: str, output: Tensor) -> tuple[Tensor, Tensor, int]:
            return silence(output, name in behind)

        inactive: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for _, parts in ctx.stream(lambda images: model.activations(images, counted, reduce=count)):
            for name, (silent, high, size) in parts.items():
                inactive[name] = inactive[name] + silent if name in inactive else silent
                largest[name] = torch.maximum(largest[name], high) if name in largest else high
                sizes[name] = sizes.get(name, 0) + size
        raw = dataset.pictures(model.input, self.picture, self.picture + 1)
        with torch.no_grad():
            shown: Tensor = model.activations(to_images(raw, ctx.device, model.dtype), [layer])[layer][0]
        share = {n: float(inactive[n]) / sizes[n] for n in counted}
        dead = {n: float((largest[n] <= 0).float().mean()) for n in counted}
        kinds = {n: type(model.modules[n.partition("#")[0]]).__name__ for n in counted}
        maps = shown[: self.channels].float()
        signed = bool((maps < 0).any())
        name = dataset.ids[self.picture]
        pixels = raw.transpose(0, 3, 1, 2).astype("float32") / 255
        columns = 16 if len(maps) > 32 else 8
        artifacts: list[Any] = [
            Images("picture", pixels, captions=[name], columns=3, exact=pixels.shape[-1] < 64),
            Heatmaps(
                "maps", maps, signed=signed, shared_scale=True, columns=columns, over=(), unit="activation",
                caption=f"{layer}: {len(maps)} of {shape[0]} channels of {shape[1]} x {shape[2]}, row by row.",
            ),
            Table(
                "layers", ["layer", "kind", "channels", "inactive share", "dead channels"],
                [[n, kinds[n], len(largest[n]), share[n], dead[n]] for n in counted],
            ),
        ]  # fmt: skip
        if len(counted) > 1:
            lines = {"inactive values": [share[n] for n in counted], "dead channels": [dead[n] for n in counted]}
            artifacts.append(Curve("by_depth", range(1, len(counted) + 1), lines, "layer, in the order of a forward pass", "share"))
        metrics = [
            Metric("inactive_share", share[layer], about=f"share of the values of {layer} that are not above zero"),
            Metric("dead_share", dead[layer], better="lower", about=f"share of the channels of {layer} that no picture wakes"),
            Metric(
                "silent_here", float((shown.flatten(1).amax(1) <= 0).float().mean()),
                about="share of these channels silent in the picture shown"
            ),
        ]  # fmt: skip
        notes = [f"{layer} gives negative values: the maps are drawn around zero"] if signed else []
        return Result(artifacts, metrics, notes)


def silence(output: Tensor, behind: bool = False) -> tuple[Tensor, Tensor, int]:
    """(values not above zero, each channel's maximum (C,), values in all) of an output (N, C, ...) or (N, positions, C);
    `behind` says that channels come last in (N, H, W, C) as well."""
    import torch

    # Of five and more dimensions, as windows of attention have, channels come last.
    others = (0, 2, 3) if output.ndim == 4 and not behind else tuple(range(output.ndim - 1))
    return torch.count_nonzero(output <= 0), output.amax(others), output.numel()


def countable(model: LoadedModel) -> list[str]:
    """Convolutions, linear layers and activation functions, in the order of a forward pass."""
    from torch import nn

    def counts(module: nn.Module) -> bool:
        activation = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)
        return activation or isinstance(module, nn.Conv2d | nn.Linear)

    return [name for name, _ in model.calls if counts(model.modules[name.partition("#")[0]])]
