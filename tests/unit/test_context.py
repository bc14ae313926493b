"""Random numbers that belong to their picture, batches, memory."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from harness.context import Context, Draws, out_of_memory, stable_seed
from harness.device import device_kind, device_settings
from harness.errors import ConfigError, NotApplicable

CPU = torch.device("cpu")


def draws(ids, seed=0, technique="t", stream=""):
    return Draws(ids, CPU, torch.float32, seed, technique, stream)


def test_an_item_gets_the_same_numbers_in_any_company():
    together = draws(["a", "b", "c"])
    alone = draws(["c"])
    for shape in [(3, 2), (5,)]:
        assert torch.equal(together.randn(shape)[2], alone.randn(shape)[0])
    assert together.integers(0, 100, 3)[2] == alone.integers(0, 100, 3)[0]


def test_seed_technique_and_stream_keep_numbers_apart():
    values = {tuple(draws(["a"], *key).rand((4,)).flatten().tolist()) for key in [(0, "t", ""), (1, "t", ""), (0, "u", ""), (0, "t", "s")]}
    assert len(values) == 4


def test_the_seed_is_the_same_everywhere():
    assert stable_seed(0, "saliency", "a") == 4519360094548230593


def test_randn_like_moves_on(digits_cnn):
    ctx = Context(digits_cnn, images=torch.zeros(2, 1, 8, 8), ids=["a", "b"])
    first, second = ctx.randn_like(ctx.images), ctx.randn_like(ctx.images)
    assert not torch.equal(first, second)


class Hungry:
    """Runs out of memory above a batch size."""

    def __init__(self, limit, error=torch.OutOfMemoryError):
        self.limit, self.error, self.sizes = limit, error, []

    def __call__(self, rows):
        size = rows.stop - rows.start
        if size > self.limit:
            raise self.error("CUDA out of memory")
        self.sizes.append(size)
        return torch.arange(rows.start, rows.stop)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_and_loses_nothing(digits_cnn, error):
    ctx = Context(digits_cnn, max_batch=16)
    work = Hungry(3, error)
    assert torch.cat(list(ctx.batched(20, work))).tolist() == list(range(20))
    assert ctx.max_batch == 2
    assert set(work.sizes) == {2}


def test_a_single_picture_that_does_not_fit_is_an_error(digits_cnn):
    with pytest.raises(torch.OutOfMemoryError):
        list(Context(digits_cnn, max_batch=4).batched(4, Hungry(0)))


def test_other_errors_pass(digits_cnn):
    def work(rows):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        list(Context(digits_cnn).batched(4, work))
    assert not out_of_memory(RuntimeError("shapes do not fit"))


def test_asking_for_what_is_not_there(digits_cnn):
    ctx = Context(digits_cnn)
    with pytest.raises(NotApplicable, match="needs images"):
        _ = ctx.images
    with pytest.raises(NotApplicable, match="needs a dataset"):
        _ = ctx.dataset
    with pytest.raises(NotApplicable, match="labelled"):
        _ = Context(digits_cnn, images=torch.zeros(1, 1, 8, 8), ids=["a"], target="labelled").target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("layer:none", "no layer 'none'"),
        ("channel:features.0:99", "has shape 16 x 8 x 8"),
        ("channel:features.0", "write channel:LAYER:C"),
        ("neuron:features.0:1", "has shape 16 x 8 x 8"),
        ("neuron:features.0:a,b,c", "whole numbers"),
        ("eleven", "index from 0 to 9"),
        ([1, 2], "2 targets for 1 pictures"),
    ],
)
def test_targets_that_do_not_exist(digits_cnn, target, message):
    with pytest.raises(ConfigError, match=message):
        _ = Context(digits_cnn, images=torch.zeros(1, 1, 8, 8), ids=["a"], target=target).target


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "message"), [("cuda", "not available here"), ("tpu", "choose auto, cpu"), ("cuda:3", "not available|there are")]
)
def test_devices_that_are_not_there(choice, message):
    if torch.cuda.is_available() and choice == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        device_kind(choice)


def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch):
    from harness import device

    monkeypatch.setattr(device, "_accelerator_possible", lambda: True)
    for cuda, mps, expected in [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=cuda: value)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda value=mps: value)
        assert device_kind("auto") == expected


def test_each_picture_may_have_its_own_unit(digits_cnn):
    """A list of neurons, or of channels, of one layer gives each picture what it would get alone, in any batch."""
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for specs in (
        ["neuron:features.3:5,2,3", "neuron:features.3:0,7,7", "neuron:features.3:31,0,1"],
        ["channel:features.3:4", "channel:features.3:0", "channel:features.3:9"],
        ["neuron:classifier.1:4", "neuron:classifier.1:0", "neuron:classifier.1:9"],
    ):
        together = Context(digits_cnn, images=images, ids=["a", "b", "c"], target=specs, max_batch=2)
        alone = [
            Context(digits_cnn, images=images[i, None], ids=[n], target=s).input_gradient()
            for i, (n, s) in enumerate(zip("abc", specs, strict=True))
        ]
        torch.testing.assert_close(together.input_gradient(), torch.cat(alone))
        assert together.target.labels[1] == specs[1].replace(":", " ", 1)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["neuron:features.3:5,2,3", 4], "a list names classes, or channels"),
        (["neuron:features.3:5,2,3", "channel:features.3:5"], "a list names classes, or channels"),
        (["channel:features.3:5", "channel:features.0:5"], r"lie in one layer, not in features\.0 and features\.3"),
        (["channel:features.3:5", "channel:features.3:99"], "counted from 0"),
        (["channel:features.3:5"], "1 targets for 2 pictures"),
    ],
)
def test_lists_of_units_that_make_no_sense(specs, message, digits_cnn):
    ctx = Context(digits_cnn, images=torch.zeros(2, 1, 8, 8), ids=["a", "b"], target=specs)
    with pytest.raises(ConfigError, match=message):
        _ = ctx.target


def test_switches_are_set_during_a_run_and_put_back():
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    with pytest.raises(KeyError), device_settings("cpu") as facts:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert facts.as_dict()["deterministic"] is True
        assert facts.kind == "cpu"
        raise KeyError
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_pages_are_cleared_once_and_not_for_every_pass():
    def faults():
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20)  # 64 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

    with device_settings("cpu"):
        found = [faults() for _ in range(30)]
    assert sum(found[-10:]) < 16 * 2**20 * 4 // resource.getpagesize() // 10, "else each would clear all its pages"


def test_random_numbers_are_the_same_from_one_thread_and_from_several(monkeypatch):
    found = {}
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        some = Draws(["a", "b", "c", "d", "e"], CPU, torch.float32, 0)
        found[threads] = [some.randn((3, 128, 128)), some.rand((3, 128, 128)), some.randint(0, 9, (3, 128, 128)), some.randn((2,))]
    alone = Draws(["d"], CPU, torch.float32, 0)
    for one, several in zip(found[1], found[3], strict=True):
        assert torch.equal(one, several)
    assert torch.equal(found[3][0][3:4], alone.randn((3, 128, 128)))


def test_lower_precision_is_autocast(digits_cnn):
    x = torch.rand((1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with device_settings("cpu", "bfloat16") as facts, torch.no_grad():
        assert digits_cnn(x).dtype == torch.bfloat16
    assert facts.precision == "bfloat16"


def test_a_network_that_is_trained_in_lower_precision_is_seen_as_it_is():
    """Autocast's cache would keep the weights of the first pass."""
    net, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with device_settings("cpu", "bfloat16"), torch.enable_grad():
        before = net(x).detach()
        with torch.no_grad():
            net.weight.add_(1.0)
        after = net(x).detach()
    assert before.dtype == torch.bfloat16
    torch.testing.assert_close((after - before).float(), torch.full((1, 4), 4.0), rtol=0.05, atol=0)


def scarce(monkeypatch, model, most):
    """The model runs out of memory above `most` pictures."""
    real = type(model).__call__

    def call(self, pixels):
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, pixels)

    monkeypatch.setattr(type(model), "__call__", call)


@pytest.mark.parametrize(
    "name",
    [
        "features", "predictions", "saliency", "class_visualization", "nearest_neighbors", "max_patches", "occlusion", "rise", "lime",
        "expected_gradients", "guided_patches", "faithfulness",
    ],
)  # fmt: skip
def test_running_out_of_memory_halves_the_batch(name, digits_cnn, monkeypatch):
    from harness.plugins import load_plugins
    from harness.testing import run_once, same, small_dataset

    _ = digits_cnn.calls
    small = {
        "class_visualization": {"steps": 2, "classes": [1, 2, 3, 4, 5]}, "rise": {"masks": 8}, "lime": {"samples": 8},
        "expected_gradients": {"samples": 4}, "faithfulness": {"techniques": ["saliency"], "cells": 2, "steps": 2, "oracle_rounds": 1},
    }  # fmt: skip
    technique = load_plugins().technique(name).build(small.get(name, {}))
    plenty = run_once(technique, digits_cnn, small_dataset(12), max_batch=32)
    scarce(monkeypatch, digits_cnn, 2)
    assert same(plenty, run_once(technique, digits_cnn, small_dataset(12), max_batch=32), rtol=1e-4, atol=1e-5)


def test_the_predicted_class_is_read_off_the_gradients_own_pass(digits_cnn, monkeypatch):
    from harness.plugins import load_plugins
    from harness.testing import run_once, small_dataset

    passes = []
    real = type(digits_cnn).__call__
    monkeypatch.setattr(type(digits_cnn), "__call__", lambda self, x: passes.append(len(x)) or real(self, x))
    for target in ("predicted", "labelled", 3):
        passes.clear()
        run_once(load_plugins().technique("saliency").build({"target": target}), digits_cnn, small_dataset(6), max_batch=32)
        assert sum(n for n in passes if n > 1) == 6, target  # single pictures: the model counts its classes once
