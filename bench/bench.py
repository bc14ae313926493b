"""`make bench`: what the harness costs, as ratios to raw passes and to captum in the same run.

Machines differ and are noisy: contenders take turns, and the shortest of several rounds counts, since what else runs on a machine can
only add to a time. Of long loops the time between two passes is taken, and the median counts. All are ratios, but for the tracking of a
run, which is in milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from style_peers import HISTORY, PACES, own_layout, peers

from harness.context import Context, Draws
from harness.device import keep_freed_memory
from harness.models import LoadedModel, load_model
from harness.plugins import load_plugins
from harness.registry import load_registry

Work = Callable[[], object]


def turns(contenders: dict[str, Work], rounds: int) -> dict[str, float]:
    """Least seconds of each, run in turn `rounds` times after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            gc.collect()
            begun = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - begun)
    return {name: min(t) for name, t in times.items()}


def paces(model: LoadedModel, pairs: dict[str, tuple[Work, Work]], rounds: int) -> dict[str, float]:
    """Of each pair, how long a step of the one takes as a share of a step of the other: medians of the times between the beginnings of
    forward passes of the model, of which a step has one, and four steps apart, as some things are done every fourth. The two of a pair
    follow one another, and the median of the rounds counts: what a run does once has no part in it, and a machine that is slow for a
    while is so for both."""
    ratios: dict[str, list[float]] = {name: [] for name in pairs}
    for _ in range(rounds):
        for name, pair in pairs.items():
            gc.collect()
            one, other = (_pace(model, work) for work in pair)
            ratios[name].append(one / other)
    return {name: statistics.median(found) for name, found in ratios.items()}


STEPS = 12  # at the end of a run, of which the median counts: the first may go by another rule
APART = 4


def _pace(model: LoadedModel, work: Work) -> float:
    begun = PACES  # of networks that are no part of the model, which write down themselves when a pass begins
    begun.clear()
    handle = model.module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    try:
        work()
    finally:
        handle.remove()
    return statistics.median([after - before for before, after in zip(begun, begun[APART:], strict=False)][-STEPS:]) / APART


def pictures(model: LoadedModel, count: int) -> torch.Tensor:
    shape = (count, model.input.channels, model.input.size, model.input.size)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def context(model: LoadedModel, images: torch.Tensor, name: str, batch: int) -> Context:
    return Context(model, images=images, ids=[str(i) for i in range(len(images))], technique=name, target=0, max_batch=batch)


def normalised(model: LoadedModel, inner: torch.nn.Module) -> torch.nn.Module:
    """A module that takes pictures in [0, 1], as captum's methods with hooks want one: `inner` behind the model's normalisation."""

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(model.normalise(x))

    return Whole()


def saliency(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    from captum.attr import Saliency as Peer

    from harness_saliency.saliency import reduce_channels

    batch = 8
    images = pictures(model, batch)
    target = torch.zeros(batch, dtype=torch.int64)
    technique = load_plugins().technique("saliency").build({})

    def raw() -> None:
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

    def ours() -> None:
        ctx = Context(model, images=images, ids=[str(i) for i in range(batch)], technique="saliency", max_batch=batch)
        technique.run(ctx)

    def peer() -> None:
        Peer(model).attribute(images.clone().requires_grad_(), target=target).amax(1)

    plain = own_layout(model)

    def as_it_comes() -> None:
        Peer(plain).attribute(images.contiguous().requires_grad_(), target=target).amax(1)

    def maps() -> None:
        reduce_channels(context(model, images, "saliency", batch).input_gradient(), "absolute", "max")

    t = turns({"raw": raw, "ours": ours, "maps": maps, "captum": peer, "as it comes": as_it_comes}, rounds)
    return [
        ("saliency, captions and measures included / raw forward and backward", t["ours"] / t["raw"], "<= 1.15"),
        ("saliency, maps alone / captum given our model (channels last)", t["maps"] / t["captum"], "about 1: the same passes"),
        ("saliency, maps alone / captum given the network in torch's own layout", t["maps"] / t["as it comes"], "< 1"),
    ]


def occlusion(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    from captum.attr import Occlusion as Peer

    images = pictures(model, 1)
    technique = load_plugins().technique("occlusion").build({"window": 32, "stride": 32, "target": 0})
    batches, windows = (8, 16, 49), 49

    def raw(batch: int) -> Work:
        def work() -> None:
            with torch.no_grad():
                model(images)
                for start in range(0, windows, batch):
                    model(images.expand(min(batch, windows - start), -1, -1, -1).contiguous(memory_format=torch.channels_last))

        return work

    def ours(batch: int) -> Work:
        return lambda: technique.measure(context(model, images, "occlusion", batch))

    def peer(at_once: int) -> Work:
        def work() -> None:
            Peer(model).attribute(
                images, sliding_window_shapes=(3, 32, 32), strides=(3, 32, 32), target=0, baselines=0.5, perturbations_per_eval=at_once
            )

        return work

    contenders: dict[str, Work] = {"captum 1": peer(1)}
    for b in batches:
        contenders |= {f"raw {b}": raw(b), f"ours {b}": ours(b), f"captum {b}": peer(b)}
    t = turns(contenders, rounds)
    best = {who: min((v, k.split()[1]) for k, v in t.items() if k.startswith(who)) for who in ("ours", "captum")}
    rows = [(f"occlusion / raw forward passes, batch {b}", t[f"ours {b}"] / t[f"raw {b}"], "<= 1.10") for b in batches]
    return [
        *rows,
        (
            f"occlusion (batch {best['ours'][1]}) / captum at its best batch ({best['captum'][1]})",
            best["ours"][0] / best["captum"][0],
            "< 1",
        ),
        ("occlusion / captum at its default batch (1)", best["ours"][0] / t["captum 1"], ""),
    ]


def gradients(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    """Gradient methods on eight pictures against their own number of passes and captum; eight steps or samples each."""
    from captum import attr as peers
    from captum.attr._core.gradient_shap import InputBaselineXGradient

    from harness_saliency import guided_backprop as guided

    batch, steps = 8, 8
    images = pictures(model, batch)
    target = torch.zeros(batch, dtype=torch.int64)
    build = {n: load_plugins().technique(n).build for n in ("integrated_gradients", "smoothgrad", "expected_gradients", "grad_cam")}
    integrated, smooth = build["integrated_gradients"]({"steps": steps}), build["smoothgrad"]({"samples": steps})
    expected, cam = build["expected_gradients"]({"samples": steps}), build["grad_cam"]({})
    maps = model.last_maps

    def ctx() -> Context:
        return context(model, images, "bench", batch)

    def raw(times: int) -> Work:
        def work() -> None:
            for _ in range(times):
                leaf = images.clone().requires_grad_()
                torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

        return work

    def forward() -> None:
        with torch.no_grad():
            model(images)

    whole = normalised(model, model.module)
    contenders: dict[str, Work] = {
        "raw": raw(1),
        "raw steps": raw(steps),
        "forward": forward,
        "guided_backprop": lambda: guided.rule_gradient(ctx(), "guided"),
        "deconvnet": lambda: guided.rule_gradient(ctx(), "deconvnet"),
        "integrated_gradients": lambda: integrated.attribute(ctx(), torch.zeros_like(images)),
        "smoothgrad": lambda: smooth.attribute(ctx()),
        "expected_gradients": lambda: expected.attribute(ctx(), images[:4]),
        "grad_cam": lambda: cam.attribute(ctx(), maps),
        # Which ask for a network that uses no ReLU twice; on resnet18, which does, their time stands for what they would take.
        "captum guided_backprop": lambda: peers.GuidedBackprop(whole).attribute(images.clone().requires_grad_(), target=target),
        "captum deconvnet": lambda: peers.Deconvolution(whole).attribute(images.clone().requires_grad_(), target=target),
        "captum integrated_gradients": lambda: peers.IntegratedGradients(model).attribute(
            images, target=target, n_steps=steps, internal_batch_size=batch
        ),
        "captum smoothgrad": lambda: peers.NoiseTunnel(peers.Saliency(model)).attribute(
            images, nt_type="smoothgrad", nt_samples=steps, nt_samples_batch_size=1, stdevs=0.15, target=target
        ),
        # What its GradientShap is made of, with eight pictures at once as the others have; by itself it takes all 64.
        "captum expected_gradients": lambda: peers.NoiseTunnel(InputBaselineXGradient(model)).attribute(
            images,
            nt_type="smoothgrad",
            nt_samples=steps,
            nt_samples_batch_size=1,
            stdevs=0.0,
            draw_baseline_from_distrib=True,
            baselines=images[:4],
            target=target,
        ),
        "captum grad_cam": lambda: peers.LayerGradCam(whole, whole.get_submodule(f"inner.{maps.partition('#')[0]}")).attribute(
            images.clone().requires_grad_(), target=target
        ),
    }
    t = turns(contenders, rounds)
    rows = []
    for name in ("guided_backprop", "deconvnet", "integrated_gradients", "smoothgrad", "expected_gradients", "grad_cam"):
        if name == "grad_cam":
            rows.append(("grad_cam / raw forward pass", t[name] / t["forward"], ""))
        else:
            alone = t["raw"] if name in ("guided_backprop", "deconvnet") else t["raw steps"]
            rows.append((f"{name} / raw forward and backward", t[name] / alone, "<= 1.15"))
        if f"captum {name}" in t:
            rows.append((f"{name} / captum", t[name] / t[f"captum {name}"], "< 1"))
    return rows


def perturbation(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    """Masked copies of one picture against as many forward passes; LIME also against captum at its best batch."""
    from captum.attr import Lime as Peer

    count, batch = 64, 16
    from skimage import data

    photo = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    images = torch.nn.functional.interpolate(photo, size=(model.input.size, model.input.size), mode="bilinear", antialias=True)
    lime = load_plugins().technique("lime").build({"samples": count, "target": 0})
    rise = load_plugins().technique("rise").build({"masks": count, "target": 0})
    segments = [lime.superpixels(image) for image in images]
    places = torch.from_numpy(segments[0])[None, None]

    def raw() -> None:
        with torch.no_grad():
            for _ in range(count // batch):
                model(images.expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last))

    def peer(at_once: int) -> Work:
        return lambda: Peer(model).attribute(images, target=0, feature_mask=places, n_samples=count, perturbations_per_eval=at_once)

    contenders: dict[str, Work] = {
        "raw": raw,
        "lime": lambda: lime.explain(context(model, images, "lime", batch), segments),
        "rise": lambda: rise.attribute(context(model, images, "rise", batch)),
        **{f"captum {b}": peer(b) for b in (8, 16, 64)},
    }
    t = turns(contenders, rounds)
    best, at = min((v, k.split()[1]) for k, v in t.items() if k.startswith("captum"))
    return [
        ("lime / raw forward passes, batch 16", t["lime"] / t["raw"], "<= 1.10"),
        (f"lime / captum at its best batch ({at})", t["lime"] / best, "< 1"),
        ("rise / raw forward passes, batch 16", t["rise"] / t["raw"], "<= 1.10"),
    ]


def incremental(name: str, rounds: int) -> list[tuple[str, float, str]]:
    """Occlusion that computes anew only what a window reaches, against the same windows by whole passes; and how far they differ."""
    model = load_model(name, load_registry())
    images = pictures(model, 1)
    quick, full = (
        load_plugins().technique("occlusion").build({"window": 32, "stride": 32, "target": 0, "inference": way}) for way in ("auto", "full")
    )
    t = turns(
        {
            "quick": lambda: quick.measure(context(model, images, "occlusion", 16)),
            "full": lambda: full.measure(context(model, images, "occlusion", 16)),
        },
        rounds,
    )
    a, b = (technique.measure(context(model, images, "occlusion", 16)).drops for technique in (quick, full))
    return [
        (f"{name} occlusion, incremental / whole passes", t["quick"] / t["full"], "< 0.5"),
        (f"{name} largest difference of the drops, in 1e-4", float((a - b).abs().max()) / 1e-4, "< 1"),
    ]


def ascent(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    """A step of each technique that ascends against one forward and backward pass to its layer; many classes against one."""
    from harness import optimise as o
    from harness.generators import LoadedGenerator, UpconvGenerator
    from harness.registry import GeneratorEntry
    from harness_synthesis.blocks import blocks
    from harness_synthesis.channel_visualization import REDIRECTED
    from harness_synthesis.class_visualization import prior_widths

    names = blocks(model)
    layer = names[round(0.75 * (len(names) - 1))]
    photo = pictures(model, 2)
    build = load_plugins().technique

    def ctx(name: str, count: int = 2, batch: int = 2) -> Context:
        return context(model, photo[:count], name, batch)

    def passes(steps: int, to: str = "", count: int = 2) -> None:
        for _ in range(steps):
            leaf = photo[:1].expand(count, -1, -1, -1).clone(memory_format=torch.channels_last).requires_grad_()
            answer = model.activations(leaf, [to])[to].sum() if to else model(leaf)[:, 0].sum()
            torch.autograd.grad(answer, leaf)

    def plain(steps: int) -> None:
        """What a user writes first: Adam on the pixels."""
        leaf = photo.clone().requires_grad_()
        adam = torch.optim.Adam([leaf], lr=0.05)
        for _ in range(steps):
            adam.zero_grad()
            (-model(leaf)[:, 1].sum()).backward()
            adam.step()

    def loop(steps: int, rule: str) -> None:
        draws = Draws(["a", "b"], model.device, model.dtype, 0)
        classes = torch.ones(2, dtype=torch.int64)
        o.ascend(model, o.class_score(classes), photo, steps=steps, step_size=0.05, draws=draws, rule=rule)

    def classes(steps: int, count: int) -> None:
        build("class_visualization").build({"classes": list(range(count)), "steps": steps}).run(context(model, photo, "c", count))

    def channels(steps: int) -> None:
        settings = {"layers": [layer], "channels": [0, 1], "steps": REDIRECTED + steps, "size": model.input.size}
        technique = build("channel_visualization").build(settings)
        technique._climb(ctx("channel_visualization"), layer, [0, 1], model.input.size)

    def dream(steps: int) -> None:
        from harness_synthesis.deep_dream import dream

        technique = build("deep_dream").build({"octaves": 1, "steps": steps})
        dream(ctx("deep_dream"), o.layer_norm(layer), photo, technique, ctx("deep_dream").draws())

    def inversion(steps: int) -> None:
        build("feature_inversion").build({"steps": steps})._invert(ctx("feature_inversion"), layer)

    def facets(steps: int) -> None:
        """The second phase of the schedule, whose pictures are the largest; the crop the model sees is of its own size."""
        from harness_synthesis.multifaceted import PHASES, climb

        climb(ctx("multifaceted"), 1, photo, ["a", "b"], PHASES[1:2], steps, 0.0, None)

    code = (512,)
    module = UpconvGenerator(code, model.input.channels, model.input.size)
    entry = GeneratorEntry(encoder=model.name, layer="penultimate", builder="harness.generators:UpconvGenerator", args={"code": list(code)})
    generator = LoadedGenerator(module, entry, "untrained", model.device)
    prior = o.DeepPrior(model.input.size, model.input.size, model.input.channels, prior_widths(model.input.size))
    codes = torch.rand((2, *code), generator=torch.Generator().manual_seed(0))
    networks = prior.start(Draws(["a", "b"], model.device, model.dtype, 0))

    def codes_of(steps: int, of: LoadedGenerator | None) -> None:
        technique = build("deep_generator").build({"classes": [0, 1], "steps": steps})
        technique._climb(ctx("deep_generator"), technique._units(ctx("deep_generator")), of)

    def through(steps: int, made_of: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor) -> None:
        """Passes through what makes the pictures and the model."""
        for _ in range(steps):
            leaf = start.clone().requires_grad_()
            torch.autograd.grad(model(made_of(leaf))[:, 0].sum(), leaf)

    work: dict[str, tuple[Callable[[int], object], str]] = {
        "class_visualization": (lambda n: classes(n, 2), ""),
        f"channel_visualization, {layer}": (channels, layer),
        f"deep_dream, {layer}": (dream, layer),
        f"feature_inversion, {layer}": (inversion, layer),
        "multifaceted": (facets, ""),
        "deep_generator, an untrained one": (partial(codes_of, of=None), "untrained"),
        "deep_generator, codes": (partial(codes_of, of=generator), "codes"),
        "the loop with Adam": (lambda n: loop(n, "adam"), ""),
        "a loop written by hand with torch's Adam": (plain, ""),
    }
    if find_spec("lucent"):
        work["torch-lucent's render_vis (2 pictures, its own defaults)"] = (lambda n: lucent(model, n), "")

    steps = 16
    bare: dict[str, Work] = {to: partial(passes, steps, to) for to in ("", layer)}
    bare |= {"untrained": partial(through, steps, prior.images, networks), "codes": partial(through, steps, generator, codes)}
    pairs = {name: (partial(go, steps), bare[to]) for name, (go, to) in work.items()}
    pairs["8 classes"] = partial(classes, steps, 8), partial(classes, steps, 1)
    pairs["8 bare"] = partial(passes, steps, count=8), partial(passes, steps, count=1)
    t = paces(model, pairs, rounds)
    return [
        *((f"a step of {name} / forward and backward", t[name], "<= 1.20") for name in work),
        ("a step for 8 classes / for one", t["8 classes"], "< 6"),
        ("bare passes of 8 pictures / of one", t["8 bare"], ""),
    ]


def lucent(model: LoadedModel, steps: int) -> None:
    """torch-lucent 0.1.8, for comparison where it is installed. The hooks that it leaves on every layer are taken off again."""
    from lucent.optvis import objectives, param, render

    inner = normalised(model, model.module)
    batch = objectives.channel("labels", 1)
    inner.add_module("labels", torch.nn.Identity())
    inner.register_forward_hook(lambda module, args, output: module.labels(output[:, :, None, None]))
    made = partial(param.image, model.input.size, batch=2)
    before = [(module, module._forward_hooks.copy()) for module in model.module.modules()]
    try:
        render.render_vis(
            inner, batch, made, thresholds=(steps,), preprocess=False, show_image=False, progress=False, fixed_image_size=model.input.size
        )
    finally:
        for module, hooks in before:
            module._forward_hooks = hooks


def adversarial(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    """Ten projected gradient steps on a batch of 8 against their bare passes, foolbox and (where it can be imported) torchattacks;
    64 noisy copies of eight pictures, which share their noise, against as many forward passes."""
    import warnings

    from harness_adversarial.attacks import Attack, attack, perturbed
    from harness_adversarial.certified_radius import counts

    images, steps, copies, batch = pictures(model, 8), 10, 64, 16
    with torch.no_grad():
        labels = model(images).argmax(1)

    class Ours(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x)

    given: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {
        "given our model (channels last)": (Ours().eval(), images),
        "given the network in torch's own layout": (own_layout(model), images.contiguous()),
    }

    def raw() -> None:
        for _ in range(steps):
            leaf = images.detach().requires_grad_()
            torch.autograd.grad(torch.nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
        with torch.no_grad():
            model(images)

    eps = 8 / 255
    contenders: dict[str, Work] = {"raw": raw, "ours": lambda: attack(model, images, labels, Attack("pgd", "linf", steps, 0.1), eps)}
    contenders["pictures"] = lambda: perturbed(model, images, labels, Attack("pgd", "linf", steps, 0.1), eps)
    contenders["dropping"] = lambda: attack(model, images, labels, Attack("pgd", "linf", steps, 0.1), eps, drop=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox

        pgd = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=steps, random_start=False)
        for how, (network, x) in given.items():
            theirs = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
            contenders[f"foolbox, {how}"] = partial(pgd, theirs, x, labels, epsilons=eps)
    try:
        import torchattacks
    except ImportError:
        pass
    else:
        for how, (network, x) in given.items():
            second = torchattacks.PGD(network, eps=eps, alpha=eps / 10, steps=steps, random_start=False)
            contenders[f"torchattacks, {how}"] = partial(second, x, labels)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(len(images) * copies // batch):
                model(images[:1].expand(batch, -1, -1, -1).contiguous(memory_format=torch.channels_last))

    contenders["forward"] = forward
    contenders["smoothing"] = lambda: counts(context(model, images, "smoothing", batch), 0.25, 0, copies, model.class_count)
    t = turns(contenders, rounds)
    rows = [
        ("PGD / raw passes", t["ours"] / t["raw"], "<= 1.15"),
        ("PGD, dropping what is fooled / raw passes", t["dropping"] / t["raw"], "<= 1.15"),
        *((f"PGD / {name}", t["ours"] / seconds, "< 1") for name, seconds in t.items() if name.startswith("foolbox")),
        *(
            (f"PGD's pictures alone / {name}", t["pictures"] / seconds, "< 1")
            for name, seconds in t.items()
            if name.startswith("torchattacks")
        ),
    ]
    return [*rows, ("smoothing / raw forward passes", t["smoothing"] / t["forward"], "<= 1.10")]


def style(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    """A step of style transfer (content, five style layers, matches of single places) against one forward and backward pass to the deepest
    layer, and against a plain loop with torch's L-BFGS and the same losses; finding the places, which no median step does. One picture of
    512 x 384."""
    from harness import optimise as o
    from harness_style.gram import Style, content_layer, descent, falling, features_of, maps_of, moments_of, pooled, sparse, style_layers

    images = torch.rand((1, 3, 384, 512), generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    ctx = context(model, images, "style_transfer", 1)
    layers, content = style_layers(ctx, ()), content_layer(ctx, "")
    fine = style_layers(ctx, (), fine=True)
    weights = falling(len(layers))
    features = features_of(model, images.flip(2), content, "average")
    targets, grain = (moments_of(model, images.flip(3), some, "average") for some in (layers, fine))
    size = features.square().sum()

    def passes(steps: int) -> None:
        with pooled("average", model.module):
            for _ in range(steps):
                leaf = images.detach().requires_grad_()
                torch.autograd.grad(model.activations(leaf, [layers[-1]])[layers[-1]].sum(), leaf)

    whole, papers = (-o.content_error(content, features) - 25 * Style(targets, form).error(weights) for form in ("covariance", "relative"))
    places = {name: o.feature_places([found]) for name, found in maps_of(model, images.flip(3), sparse(ctx, layers), "average").items()}

    def own() -> o.Objective:
        """With places found anew, as once in each part."""
        found = maps_of(model, images, list(places), "average")
        wanted = {name: o.nearest_places(maps, places[name]) for name, maps in found.items()}
        return whole - o.match_error(wanted, {name: p.spread for name, p in places.items()})

    def ours(steps: int, objective: o.Objective | Callable[[], o.Objective], rule: Literal["adam"] | o.LBFGS, colours: float) -> None:
        objective = objective if isinstance(objective, o.Objective) else objective()
        draws = Draws(["a"], torch.device("cpu"), torch.float32, 0)
        o.ascend(
            model, objective, images, steps=steps, step_size=0.02, rule=rule, draws=draws, operators=[o.Clamp()],
            conditioners=[o.NaturalColours(colours)], during=lambda _: pooled("average", model.module),
        )  # fmt: skip

    def plain(steps: int) -> None:
        """As it is commonly written: squared errors of Gram matrices, torch's own L-BFGS, one evaluation a step."""
        x = images.clone(memory_format=torch.contiguous_format).requires_grad_()
        optimiser = torch.optim.LBFGS([x], max_iter=1, max_eval=2, history_size=HISTORY)

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            found = model.activations(x.clamp(0, 1), [*layers, content])
            total = (found[content] - features).square().sum() / size
            for layer, weight in zip(layers, weights, strict=True):
                flat = found[layer].flatten(2)
                made = flat @ flat.transpose(1, 2) / flat.shape[2]
                total = total + 25 * weight * (made - targets[layer].gram).square().sum() / targets[layer].gram.square().sum()
            total.backward()
            return total

        with pooled("average", model.module):
            for _ in range(steps):
                optimiser.step(loss)

    others = peers(model, images, images.flip(3), layers, content)
    steps = 25  # as in each part of style_transfer
    lbfgs, adam = (partial(ours, steps, own, descent(name), 1.0) for name in ("lbfgs", "adam"))
    same = partial(ours, steps, papers, descent("lbfgs"), 1.0)  # as the loops that it is compared with
    texture, bare = partial(ours, steps, -Style(grain).error(), descent("lbfgs"), 1.0), partial(passes, steps)
    pairs: dict[str, tuple[Work, Work]] = {
        "a step of style transfer, L-BFGS / forward and backward to the deepest layer": (lbfgs, bare),
        "a step of style transfer, Adam / forward and backward to the deepest layer": (adam, bare),
        "a step of neural_texture, L-BFGS / forward and backward to the deepest layer": (texture, bare),
        "a step of style transfer / a plain loop with torch's L-BFGS": (same, partial(plain, steps)),
        **{f"a step of style transfer / {name}": (same, partial(go, steps)) for name, go in others.items()},
    }
    found = turns({"places": own, "passes": partial(passes, 1)}, rounds)
    return [
        *((name, ratio, "<= 1.25" if "deepest" in name else "< 1") for name, ratio in paces(model, pairs, rounds).items()),
        ("finding places anew, once in 25 steps of style transfer / forward and backward", found["places"] / found["passes"], "< 2"),
    ]


def textures() -> list[tuple[str, float, str]]:
    """A texture of 128 x 128 pixel by pixel: comparing each neighbourhood with all of the sample's against the tree of centroids."""
    import numpy as np
    from PIL import Image
    from skimage import data

    from harness_style.wei_levoy import synthesise

    rows = []
    for name, picture in (("brick, grey", data.brick()), ("tissue, colours", data.immunohistochemistry())):
        pixels = np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.LANCZOS), np.float32) / 255
        sample = pixels.reshape(128, 128, -1)
        tree, whole = (
            synthesise(sample, 128, 128, size=9, levels=3, search=search, leaves=2, random=np.random.default_rng(0))
            for search in ("tsvq", "exhaustive")
        )
        rows.append((f"texture of {name}: exhaustive search / tree", whole.seconds / tree.seconds, ">= 10"))
        rows.append((f"texture of {name}: exhaustive search / tree and its building", whole.seconds / (tree.seconds + tree.building), ""))
    return rows


def made_pictures(folder: Path, count: int) -> str:
    """A folder of photographs: crops of scikit-image's, as JPEG of 320 x 256."""
    from PIL import Image
    from skimage import data

    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    for i in range(count):
        source = sources[i % len(sources)].resize((512, 384))
        left, top = (37 * i) % (512 - 320), (53 * i) % (384 - 256)
        source.crop((left, top, left + 320, top + 256)).save(folder / f"{i:05d}.jpg", quality=90)
    return str(folder)


def streaming(model: LoadedModel, rounds: int) -> list[tuple[str, float, str]]:
    """Whole-dataset techniques, opening the pictures included, against forward passes over pictures that are open already."""
    from harness.datasets import load_dataset

    batch, count = 32, 128
    with tempfile.TemporaryDirectory() as folder:
        data = load_dataset(made_pictures(Path(folder) / "set", count), load_registry())
        opened = torch.from_numpy(data.pictures(model.input)).permute(0, 3, 1, 2).float().div_(255)

        def raw() -> None:
            with torch.no_grad():
                for start in range(0, count, batch):
                    model(opened[start : start + batch])

        def ours(name: str, **params: object) -> Work:
            technique = load_plugins().technique(name).build(params)
            return lambda: technique.run(Context(model, ids=data.ids, dataset=data, technique=name, max_batch=batch))

        contenders = {
            "raw": raw,
            "features": ours("features"),
            "max_patches": ours("max_patches", count=0),
            "maps": ours("activation_maps"),
        }
        t = turns(contenders, rounds)
    return [
        ("features of 128 JPEGs / raw forward passes", t["features"] / t["raw"], "<= 1.10"),
        ("max_patches of 128 JPEGs / raw forward passes", t["max_patches"] / t["raw"], "<= 1.30"),
        ("activation_maps, all layers counted / raw forward passes", t["maps"] / t["raw"], ""),
    ]


def neighbours(rounds: int) -> list[tuple[str, float, str]]:
    """Exact search of 1,000 queries among 50,000 x 512 against scikit-learn's brute force."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors

    from harness_representations.search import nearest

    database = np.maximum(np.random.default_rng(0).standard_normal((50_000, 512)), 0).astype(np.float32)
    queries, rows = database[:1000], np.arange(1000)
    peer = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(database)
    contenders: dict[str, Work] = {
        "peer": lambda: peer.kneighbors(queries),
        "blocks": lambda: nearest(queries, database, 5, rows, engine="blocks"),
    }
    if find_spec("faiss"):
        contenders["faiss"] = lambda: nearest(queries, database, 5, rows, engine="faiss")
    t = turns(contenders, min(rounds, 5))
    return [(f"nearest neighbours, 50,000 x 512, {who} / scikit-learn", t[who] / t["peer"], "<= 1") for who in t if who != "peer"]


_PEAK = """
import resource, sys, torch
from harness.context import Context
from harness.datasets import load_dataset
from harness.models import load_model
from harness.plugins import load_plugins
from harness.registry import load_registry
registry = load_registry()
model, data = load_model("squeezenet1_1", registry), load_dataset(sys.argv[1], registry)
many = data.select(indices=[i % len(data) for i in range(int(sys.argv[2]))])
technique = load_plugins().technique(sys.argv[3]).build({})
technique.run(Context(model, ids=many.ids, dataset=many, technique=sys.argv[3], max_batch=32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory() -> list[tuple[str, float, str]]:
    """Peak memory of techniques that stream a dataset, for 5,000 pictures against 500."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pictures = made_pictures(Path(folder) / "set", 50)
        for name in ("max_patches", "activation_maps"):
            few, many = (
                int(
                    subprocess.run([sys.executable, "-c", _PEAK, pictures, str(n), name], check=True, capture_output=True, text=True).stdout
                )
                for n in (500, 5000)
            )
            rows.append((f"peak memory of {name}, 5,000 pictures / 500", many / few, "about 1"))
    return rows


def command_line() -> list[tuple[str, float, str]]:
    """Seconds of whole commands, against an interpreter that imports torch."""

    def seconds(*words: str) -> float:
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
        return min(times)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HARNESS_RUNS"] = folder
        run = ["-m", "harness", "run", "-m", "squeezenet1_1", "-d", "imagenet_samples", "-t", "saliency", "--limit", "2"]
        subprocess.run([sys.executable, *run], check=True, capture_output=True)
        bare = seconds("-c", "import torch")
        return [
            ("harness --help / import torch", seconds("-m", "harness", "--help") / bare, ""),
            ("cached harness run / import torch", seconds(*run) / bare, ""),
        ]


def tracking() -> list[tuple[str, float, str]]:
    """Milliseconds that one run spends besides itself: spool, MLflow, hashing."""
    from harness.experiment import Experiment, expand
    from harness.runner import Runner, Session

    plugins, registry = load_plugins(), load_registry()
    with tempfile.TemporaryDirectory() as folder:

        def go(name: str, seeds: range) -> float:
            runs = expand(plugins, ["digits_cnn"], ["digits"], [("saliency", {})], list(seeds), limit=20)
            session = Session(Experiment(name, runs), Path(folder))
            begun = time.perf_counter()
            outcomes = Runner(registry, plugins, session).run(session.experiment)
            return time.perf_counter() - begun - sum(o.run.record.seconds for o in outcomes)

        go("warm", range(2))
        few, many = go("few", range(10, 12)), go("many", range(20, 62))
        return [("tracking, milliseconds a run", (many - few) / 40 * 1000, "< 50")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", default=["squeezenet1_1", "resnet18@random"])
    parser.add_argument("--memory", action="store_true", help="also the peak memory of streaming techniques; takes minutes")
    parser.add_argument(
        "--only", nargs="*", default=[], help="saliency, gradients, occlusion, perturbation, ascent, adversarial, style, streaming, rest"
    )
    options = parser.parse_args()
    keep_freed_memory()  # as around a run
    registry = load_registry()
    rows: list[tuple[str, str, float, str]] = []
    for name in options.models:
        model = load_model(name, registry)
        for measure in (saliency, gradients, occlusion, perturbation, ascent, adversarial, style):
            if options.only and measure.__name__ not in options.only:
                continue
            rows += [(name, *row) for row in measure(model, options.rounds)]
        if not options.only or "streaming" in options.only:
            rows += [(name, *row) for row in streaming(model, min(options.rounds, 5))]
    for name in () if options.only and "occlusion" not in options.only else ("vgg16@random", "squeezenet1_1", "resnet18@random"):
        rows += [("", *row) for row in incremental(name, min(options.rounds, 3))]
    if not options.only or "rest" in options.only:
        rows += [("", *row) for row in neighbours(options.rounds) + textures() + command_line() + tracking()]
    if options.memory:
        rows += [("", *row) for row in memory()]
    width = max(len(f"{r[0]} {r[1]}") for r in rows)
    print(f"{'measured':{width}}  ratio  wanted")
    for model_name, what, value, wanted in rows:
        print(f"{f'{model_name} {what}'.strip():{width}}  {value:5.2f}  {wanted}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
