from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import Curve, Images, Metric, NotApplicable, Paper, Param, Result, Table, Technique

from .pictures import eight_bits, tensor_of, unseen

if TYPE_CHECKING:
    from torch import Tensor

    from harness import Context
    from harness.stylers import SuperResolutionNet

FACTOR = 4
JUDGED = 20  # pictures kept apart, spread evenly
LEAST = 16  # pixels of a side of what is judged
BETTER: dict[str, Literal["higher", "lower"]] = {"psnr": "higher", "ssim": "higher", "distance": "lower"}
WAYS = ("bicubic", "pixels", "features")
WORDS = {"bicubic": "bicubic", "pixels": "trained on pixels", "features": "trained on features"}


class SuperResolution(Technique):
    """Pictures of four times the size, by networks trained on the squared distance of pixels, or on that of a layer's features, beside
    bicubic enlargement (Johnson et al. 2016, arXiv:1603.08155, sec. 4.2).

    Small pictures are the large ones blurred by a Gaussian of sigma 1 and reduced by bicubic interpolation, as in the paper. Both networks
    are trained here alike, on crops of four fifths of the pictures, and judged on the others, at most 20 of them: they add what they
    have learnt to the bicubic enlargement. PSNR and SSIM are scikit-image's. Large pictures are worked on in tiles that overlap by all
    that a pixel can depend on, which changes nothing. Cost: `steps` passes of a small network, and of the model's first layers for one
    of the two.
    """

    name = "super_resolution"
    family = "style"
    version = 3
    paper = Paper(
        "Johnson, Alahi, Fei-Fei", 2016, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", arxiv="1603.08155"
    )
    needs = frozenset({"dataset", "conv"})
    reading = (
        "The small picture, three enlargements, the original. The one trained on pixels has the highest PSNR and is smooth; the one "
        "trained on features comes nearest in the layer and has sharper edges, with a pattern of its own."
    )
    caveats = "Small networks, trained for minutes on few pictures: the order of the losses shows, not what such networks can reach."

    layer: str = Param("", description="the layer whose features are compared; none: the second block")
    steps: int = Param(400, ge=1, le=1_000_000, description="training steps of each network")
    batch: int = Param(8, ge=1, description="crops a step")
    crop: int = Param(96, ge=16, description="side of the crops of the large pictures; made a multiple of four")
    learning_rate: float = Param(1e-3, gt=0, le=1, description="Adam's; falls to a tenth over the last third")
    width: int = Param(24, ge=1, description="channels of the networks")
    blocks: int = Param(4, ge=1, description="their residual blocks")
    size: int = Param(256, ge=16, le=8192, description="longer side of the pictures that are judged")
    tile: int = Param(128, ge=16, description="side of the tiles of the small picture that are worked on at once")

    def run(self, ctx: Context) -> Result:
        import torch

        from harness import ConfigError
        from harness.datasets import evenly
        from harness_synthesis.blocks import blocks

        if len(ctx.dataset) < 5:
            raise NotApplicable(f"needs at least five pictures, four to train on and one to judge; there are {len(ctx.dataset)}")
        every = blocks(ctx.model)
        layer = ctx.model.full_name(self.layer) if self.layer else every[min(1, len(every) - 1)]
        places = np.arange(len(ctx.dataset))
        train = ctx.dataset.select(indices=places[places % 5 != 4].tolist())
        apart = places[places % 5 == 4]
        judged, refused = [], []
        for i in apart[evenly(JUDGED, len(apart))].tolist():  # before the training: a broken or thin picture is told at once
            large = self._large(ctx, i)
            height, width = large.shape[2:]
            reason = f"{width} x {height} pixels are too few" if min(height, width) < LEAST else unseen(ctx, large, [layer])
            if reason:
                refused.append(f"{ctx.dataset.ids[i]}: {reason}")
            else:
                judged.append(i)
        side = self.crop - self.crop % FACTOR
        reason = unseen(ctx, torch.zeros((1, ctx.model.input.channels, side, side), device=ctx.device, dtype=ctx.model.dtype), [layer])
        if reason or not judged:
            raise NotApplicable(f"crops: {reason}" if reason else "; ".join(refused))
        nets, losses = {}, {}
        with torch.enable_grad():
            for loss in ("pixels", "features"):
                nets[loss], losses[loss] = self._trained(ctx, train, layer, loss)
                if not np.isfinite(losses[loss]).all():
                    raise ConfigError(
                        f"super_resolution.learning_rate: at {self.learning_rate:g} the loss stops being finite; use a smaller one"
                    )
        artifacts: list[Any] = []
        rows: list[list[Any]] = []
        found: dict[str, dict[str, list[float]]] = {way: {"psnr": [], "ssim": [], "distance": []} for way in WAYS}
        for number, i in enumerate(judged, 1):
            name = ctx.dataset.ids[i]
            large = self._large(ctx, i)
            height, width = large.shape[2:]
            small = degraded(large)
            made = {"bicubic": enlarged(small), **{k: tiled(net, small, self.tile) for k, net in nets.items()}}
            for way, picture in made.items():
                picture = picture.clamp(0, 1)
                made[way] = picture
                psnr, ssim, distance = self._judged(ctx, picture, large, layer)
                for key, value in (("psnr", psnr), ("ssim", ssim), ("distance", distance)):
                    found[way][key].append(value)
                rows.append([name, WORDS[way], psnr, ssim, distance])
            coarse = small.repeat_interleave(FACTOR, 2).repeat_interleave(FACTOR, 3)
            sheet = torch.cat([coarse, *made.values(), large])
            captions = [f"{name}, small"] + [f"{WORDS[w]}: {found[w]['psnr'][-1]:.2f} dB" for w in WAYS] + ["original"]
            artifacts.append(Images(f"enlarged-{number}", eight_bits(sheet), captions=captions, columns=5, exact=min(height, width) < 64))
        rows += [["mean", WORDS[w], *(float(np.mean(v)) for v in found[w].values())] for w in WAYS]
        lines = {f"trained on {k}": np.asarray(v) / v[0] for k, v in losses.items()}
        artifacts.append(Curve("training", range(1, self.steps + 1), lines, "step", "loss over its first value", log_y=True))
        artifacts.append(Table("quality", ["picture", "enlarged by", "PSNR (dB)", "SSIM", f"relative distance at {layer}"], rows))
        metrics = []
        for way in WAYS:
            about = {
                "psnr": "peak signal-to-noise ratio",
                "ssim": "structural similarity",
                "distance": "relative squared distance of features",
            }
            for key, better in BETTER.items():
                values = found[way][key]
                text = f"{about[key]}, {WORDS[way]}"
                unit = "dB" if key == "psnr" else ""
                metrics.append(Metric(f"{key}_{way}", float(np.mean(values)), unit, better, per_image=values, about=text))
        notes = [f"trained on {len(train)} pictures, judged on {len(found['bicubic']['psnr'])} others; features of {layer}", *refused]
        return Result(artifacts, metrics, notes)

    def _large(self, ctx: Context, i: int) -> Tensor:
        """A picture at the size that is judged, its sides multiples of four."""
        large = tensor_of(ctx, ctx.dataset.get(i), self.size)
        height, width = (n - n % FACTOR for n in large.shape[2:])
        return large[..., :height, :width]

    def _trained(self, ctx: Context, data: Any, layer: str, loss: str) -> tuple[SuperResolutionNet, list[float]]:
        import torch

        from harness.context import stable_seed
        from harness.device import seeded
        from harness.optimise import content_error
        from harness.stylers import SuperResolutionNet
        from harness.train_styler import crops

        with seeded(stable_seed("super_resolution", ctx.seed)):
            net = SuperResolutionNet(ctx.model.input.channels, self.width, self.blocks)
        net.to(ctx.device)
        optimiser = torch.optim.Adam(net.parameters(), self.learning_rate)
        side = self.crop - self.crop % FACTOR
        losses: list[Tensor] = []
        for step, large in zip(
            range(self.steps), crops(data, self.batch, side, ctx.model.input.channels, ctx.device, ctx.seed), strict=False
        ):
            made = net(degraded(large))
            if loss == "pixels":
                error = (made - large).square().mean()
            else:
                with torch.no_grad():
                    features = ctx.model.activations(large, [layer])
                error = content_error(layer, features[layer]).score(ctx.model.activations(made, [layer]), made).mean()
            optimiser.zero_grad(set_to_none=True)
            error.backward()
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate * min(1.0, max(0.1, 3 * (1 - step / self.steps)))
            optimiser.step()
            losses.append(error.detach())
            ctx.report(f"steps on {loss}", step + 1, self.steps)
        return net.eval(), torch.stack(losses).tolist()

    def _judged(self, ctx: Context, picture: Tensor, large: Tensor, layer: str) -> tuple[float, float, float]:
        """(PSNR, SSIM, relative squared distance of a layer's features)."""
        import torch

        from harness.optimise import content_error
        from harness_synthesis.feature_inversion import signal_to_noise, similarity

        with torch.no_grad():
            features = ctx.model.activations(large, [layer])[layer]
            distance = content_error(layer, features).score(ctx.model.activations(picture, [layer]), picture)
        return float(signal_to_noise(picture, large)[0]), float(similarity(picture, large)[0]), float(distance)


def degraded(large: Tensor) -> Tensor:
    """A quarter of each side: a Gaussian of sigma 1, then bicubic interpolation (Johnson et al. 2016, sec. 4.2)."""
    import torch.nn.functional as F

    from harness.optimise import gaussian_blur

    return F.interpolate(gaussian_blur(large, 1.0), scale_factor=1 / FACTOR, mode="bicubic", align_corners=False).clamp(0, 1)


def enlarged(small: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.interpolate(small, scale_factor=float(FACTOR), mode="bicubic", align_corners=False)


def tiled(net: SuperResolutionNet, small: Tensor, tile: int) -> Tensor:
    """What the network makes of a whole picture (1, C, h, w), a tile at a time: each is given all around it that its pixels depend on."""
    import torch

    reach = net.reach
    height, width = small.shape[2:]
    made = small.new_zeros((*small.shape[:2], FACTOR * height, FACTOR * width))
    with torch.no_grad():
        for y in range(0, height, tile):
            for x in range(0, width, tile):
                top, left = max(0, y - reach), max(0, x - reach)
                part = net(small[..., top : y + tile + reach, left : x + tile + reach])
                rows, columns = min(tile, height - y), min(tile, width - x)
                dy, dx = FACTOR * (y - top), FACTOR * (x - left)
                made[..., FACTOR * y : FACTOR * (y + rows), FACTOR * x : FACTOR * (x + columns)] = part[
                    ..., dy : dy + FACTOR * rows, dx : dx + FACTOR * columns
                ]
    return made
