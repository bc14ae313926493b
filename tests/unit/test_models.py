"""LoadedModel, hooks and layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.layers import layer_table, receptive_fields
from harness.models import LoadedModel, load_model
from harness.registry import InputSpec, load_registry

PLAIN = InputSpec(channels=1, size=6, mean=(0.0,), std=(1.0,))


class Tricky(nn.Module):
    """In-place, functional and reused ReLU, and an addition in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        a = self.relu(self.conv(x))
        b = self.second(a)
        b += a
        c = F.relu(self.relu(b) * 2, inplace=True)
        return self.head(c.mean((2, 3)))


def tricky():
    torch.manual_seed(0)
    return LoadedModel(Tricky(), PLAIN, "tricky", ("a", "b", "c", "d"))


def pictures(n=2, size=6):
    return torch.rand((n, 1, size, size), generator=torch.Generator().manual_seed(1))


def test_a_layer_before_an_in_place_operation_shows_its_negatives():
    model, x = tricky(), pictures()
    found = model.activations(x, ["conv", "second"])
    m = model.module
    torch.testing.assert_close(found["conv"], m.conv(x))
    torch.testing.assert_close(found["second"], m.second(m.conv(x).relu()))
    assert found["conv"].min() < 0
    assert found["second"].min() < 0


def test_outputs_are_copied_where_the_model_writes_over_them():
    model, x = tricky(), pictures()
    m = model.module
    _ = model.calls
    passes, given = [], []
    m.conv.register_forward_hook(lambda *_: passes.append(1))
    m.relu.register_forward_hook(lambda _m, _a, output: given.append(output))

    def right(found):
        a = F.conv2d(x, m.conv.weight, m.conv.bias, padding=1)
        torch.testing.assert_close(found["conv"], a)
        torch.testing.assert_close(found["second"], m.second(a.relu()))
        torch.testing.assert_close(found["relu#1"], a.relu())

    for known in (False, True):
        passes.clear()
        given.clear()
        found = model.activations(x, ["conv", "relu#1", "second", "head"])
        assert len(passes) == 1
        assert (found["relu#1"].data_ptr() == given[0].data_ptr()) == known
        right(found)
    m.relu.inplace = False
    right(model.activations(x, ["conv", "relu#1", "second", "head"]))
    m.relu.inplace = True  # conv was left alone last time, and is not now
    passes.clear()
    right(model.activations(x, ["conv", "relu#1", "second", "head"]))
    assert len(passes) == 2
    with torch.inference_mode():
        right(model.activations(x, ["conv", "relu#1", "second", "head"]))


def test_slopes_flow_through_what_is_not_copied():
    model, x = tricky(), pictures().requires_grad_()
    m = model.module
    a = m.conv(x).relu()
    b = m.second(a) + a
    wanted = torch.autograd.grad((a.sin().sum() + b.relu().square().sum()), x)[0]
    for _ in range(2):
        found = model.activations(x, ["conv", "relu#1", "relu#2", "head"])
        slope = torch.autograd.grad(found["relu#1"].sin().sum() + found["relu#2"].square().sum(), x)[0]
        torch.testing.assert_close(slope, wanted)


def test_a_reused_module_has_one_output_a_call():
    model, x = tricky(), pictures()
    assert [n for n, _ in model.calls] == ["conv", "relu#1", "second", "relu#2", "head"]
    found = model.activations(x, ["relu#1", "relu#2", "relu"])
    torch.testing.assert_close(found["relu#1"], model.module.conv(x).relu())
    assert torch.equal(found["relu#2"], found["relu"])
    assert not torch.equal(found["relu#1"], found["relu#2"])


def test_equals_torchvisions_feature_extractor(squeezenet):
    from torchvision.models.feature_extraction import create_feature_extractor

    names = ["features.3.expand1x1", "features.5", "features.12.squeeze"]
    x = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    theirs = create_feature_extractor(squeezenet.module, names[1:])(squeezenet.normalise(x))
    ours = squeezenet.activations(x, names)
    for name in names[1:]:
        assert torch.equal(ours[name], theirs[name])
    assert ours[names[0]].min() < 0  # followed by an in-place ReLU


def test_the_pass_ends_at_the_deepest_layer():
    model = tricky()
    _ = model.calls
    reached = []
    handle = model.module.head.register_forward_hook(lambda *_: reached.append(1))
    model.activations(pictures(), ["conv", "second"])
    assert not reached
    model.activations(pictures(), ["head"])
    handle.remove()
    assert reached == [1]


def test_gradients_flow_through_activations():
    model = tricky()
    x = pictures().requires_grad_()
    model.activations(x, ["second"])["second"].sum().backward()
    assert x.grad.abs().sum() > 0


def test_nothing_remains_after_an_error():
    model = tricky()
    _ = model.as_loaded
    with pytest.raises(ConfigError, match="no layer 'convv'; did you mean 'conv'"):
        model.activations(pictures(), ["convv"])
    with pytest.raises(RuntimeError):
        model.activations(torch.rand(1, 7, 6, 6), ["conv"])
    assert model.changes() == []


def test_many_calls_leave_no_memory_behind():
    """The leak that hook libraries are known for: graphs kept alive by hooks that were never removed."""
    import gc

    model = tricky()

    def living():
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)

    def work():
        x = pictures().requires_grad_()
        torch.autograd.grad(model.activations(x, ["conv", "head"])["head"].sum(), x)

    work()
    before = living()
    for _ in range(200):
        work()
    assert living() <= before + 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.module.conv.register_forward_pre_hook(lambda *_: None), "hooks"),
        (lambda m: m.module.train(), "modules or training flags"),
        (lambda m: m.module.conv.weight.data.add_(1), "weights or buffers"),
        (lambda m: m.module.conv.requires_grad_(True), "weights or buffers"),
        (lambda m: setattr(m.module, "relu", nn.SiLU()), "modules or training flags"),
    ],
)
def test_changes_are_seen(change, what):
    model = tricky()
    _ = model.as_loaded
    change(model)
    assert what in model.changes()


def test_is_frozen_and_in_evaluation_mode(digits_cnn):
    assert not digits_cnn.module.training
    assert not any(p.requires_grad for p in digits_cnn.module.parameters())
    assert digits_cnn.modules["features.0"].weight.is_contiguous(memory_format=torch.channels_last)


def test_normalises_inside(digits_cnn):
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    mean, std = digits_cnn.input.mean[0], digits_cnn.input.std[0]
    torch.testing.assert_close(digits_cnn(x), digits_cnn.module((x - mean) / std))


def test_layer_names_and_shapes():
    model = tricky()
    assert model.layer_shape("conv") == (3, 6, 6)
    assert model.layer_shape("relu") == (3, 6, 6)
    with pytest.raises(ConfigError, match="calls 'relu' 2 times"):
        model.check_layer("relu#3")
    assert model.last_map == "head"
    assert [n for n, _ in model.convolutions()] == ["conv", "second"]


@pytest.mark.parametrize(("given", "expected"), [("a", 0), ("D", 3), (2, 2), ("2", 2)])
def test_classes_by_name_and_index(given, expected):
    assert tricky().class_index(given) == expected


@pytest.mark.parametrize(
    ("given", "message"), [("bb", "did you mean 'b'"), (4, "classes 0 to 3"), (-1, "classes 0 to 3"), ("zzzz", "index from 0 to 3")]
)
def test_classes_that_do_not_exist(given, message):
    with pytest.raises(ConfigError, match=message):
        tricky().class_index(given)


def test_a_class_name_that_is_a_number_is_the_name(digits_cnn):
    assert digits_cnn.class_index("7") == 7


def test_the_same_name_twice_needs_the_index():
    model = LoadedModel(Tricky(), PLAIN, "t", ("crane", "x", "crane", "y"))
    with pytest.raises(ConfigError, match="name of 0 and 2"):
        model.class_index("crane")


def test_a_model_without_scores_is_not_a_classifier():
    model = LoadedModel(nn.Sequential(nn.Conv2d(1, 2, 3)), PLAIN)
    with pytest.raises(NotApplicable, match="class scores"):
        _ = model.class_count


def test_embedding_is_what_the_last_layer_receives(squeezenet):
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    assert squeezenet.embedding(x).shape == (1, 512)
    torch.testing.assert_close(squeezenet.embedding(x), squeezenet.embedding(x, "features.12"))


# -- receptive fields ------------------------------------------------------------------------------------------------


def fields_of(name):
    from torchvision.models import get_model

    with torch.device("meta"):
        return receptive_fields(get_model(name, weights=None, **({"init_weights": False} if name in ("vgg16", "googlenet") else {})))


@pytest.mark.parametrize(
    ("name", "layer", "size", "stride"),
    [
        ("alexnet", "features.0", 11, 4),
        ("alexnet", "features.3", 51, 8),
        ("alexnet", "features.6", 99, 16),
        ("alexnet", "features.8", 131, 16),
        ("alexnet", "features.10", 163, 16),
        ("alexnet", "features.12", 195, 32),
        ("vgg16", "features.3", 5, 1),
        ("vgg16", "features.8", 14, 2),
        ("vgg16", "features.15", 40, 4),
        ("vgg16", "features.22", 92, 8),
        ("vgg16", "features.25", 132, 16),
        ("vgg16", "features.29", 196, 16),
        ("vgg16", "features.30", 212, 32),
    ],
)
def test_published_receptive_fields(name, layer, size, stride):
    field = fields_of(name)[layer]
    assert (field.size, field.stride) == (size, stride)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "googlenet", "squeezenet1_0", "mobilenet_v3_large", "convnext_tiny"])
def test_branches_and_shortcuts_are_followed(name):
    fields = fields_of(name)
    assert len(fields) > 20
    assert any(f.whole for f in fields.values())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_0", "googlenet"])
def test_the_gradient_of_a_unit_lies_in_its_field(name):
    """With all weights one, the gradient's support is the field: its border is reached, beyond it is nothing."""
    from torchvision.models import get_model

    module = get_model(name, weights=None, **({"init_weights": False, "aux_logits": False} if name == "googlenet" else {})).eval()
    for path, pool in list(module.named_modules()):
        if isinstance(pool, nn.MaxPool2d):  # the gradient of a maximum goes to one pixel only: average instead
            mean = nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
            parent, _, child = path.rpartition(".")
            setattr(module.get_submodule(parent), child, mean)
    for p in module.parameters():
        p.data.fill_(1e-2)
    layer = {"resnet18": "layer2.0.conv2", "squeezenet1_0": "features.5.expand3x3", "googlenet": "inception3a.branch4.1.conv"}[name]
    field = receptive_fields(module)[layer]
    model = LoadedModel(module, InputSpec(size=224))
    x = torch.full((1, 3, 224, 224), 0.9).requires_grad_()
    out = model.activations(x, [layer])[layer]
    at = out.shape[2] // 2
    out[0, 0, at, at].backward()
    rows = torch.nonzero(x.grad.abs().sum((0, 1, 3))).flatten()
    assert rows.min() == at * field.stride + field.left
    assert rows.max() == at * field.stride + field.right


def test_the_table_covers_every_call(squeezenet):
    rows = layer_table(squeezenet)
    assert [r.name for r in rows] == [n for n, _ in squeezenet.calls]
    by_name = {r.name: r for r in rows}
    assert (by_name["features.0"].receptive_field, by_name["features.0"].stride, by_name["features.0"].shape) == (3, 2, (64, 111, 111))
    assert by_name["features.3"].receptive_field == by_name["features.3.expand3x3"].receptive_field
    assert by_name["classifier.3"].receptive_field == 0
    assert sum(r.parameters for r in rows if r.kind == "Conv2d") == 1_235_496


def test_a_model_that_cannot_be_traced_has_no_fields():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    assert receptive_fields(Branches()) == {}


# -- building --------------------------------------------------------------------------------------------------------


def overlay(tmp_path, builder, args="{}"):
    (tmp_path / "r.yaml").write_text(f"models:\n  mine:\n    builder: {builder}\n    args: {args}\n    input: {{channels: 1, size: 6}}\n")
    return load_registry([tmp_path / "r.yaml"])


NET = "from torch import nn\nclass Net(nn.Sequential):\n    def __init__(self, width=2):\n        super().__init__(nn.Conv2d(1, width, 3), nn.Flatten(), nn.Linear(16 * width, 3))\nvalue = 3\n"


def test_a_users_own_network(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    model = load_model("mine", overlay(tmp_path, "net.py:Net", "{width: 4}"))
    assert model.layer_shape("0") == (4, 4, 4)


@pytest.mark.parametrize(
    ("builder", "args", "message"),
    [
        ("net.py:Nett", "{}", "has no 'Nett'; did you mean 'Net'"),
        ("none.py:Net", "{}", "there is no file"),
        ("no_such_module:Net", "{}", "no_such_module"),
        ("broken.py:Net", "{}", "ZeroDivisionError"),
        ("net.py:Net", "{wdth: 3}", "wdth"),
        ("net.py:value", "{}", "not callable"),
        ("torchvision:resnet81", "{}", "did you mean 'resnet18'"),
        ("collections:OrderedDict", "{}", "not a torch.nn.Module"),
    ],
)
def test_builders_that_fail_are_named(tmp_path, builder, args, message):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        load_model("mine", overlay(tmp_path, builder, args))


def test_random_weights_are_seeded_and_leave_the_generator_alone(registry):
    state = torch.get_rng_state()
    a, b, c = (load_model(n, registry) for n in ("digits_cnn@random", "digits_cnn@random:0", "digits_cnn@random:1"))
    assert torch.equal(torch.get_rng_state(), state)
    weight = [m.modules["features.0"].weight for m in (a, b, c)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


@pytest.mark.parametrize(
    "name", ["alexnet", "googlenet", "resnet18", "densenet121", "squeezenet1_0", "mobilenet_v3_large", "convnext_tiny"]
)
def test_torchvisions_models_run_with_random_weights(name, registry):
    model = load_model(f"{name}@random", registry)
    x = torch.rand((1, 3, 224, 224), generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = model(x)
    assert scores.shape == (1, 1000)
    assert torch.autograd.grad(scores[0, 3], x)[0].abs().sum() > 0
    assert model.embedding(x.detach()).ndim == 2


def test_layers_whose_field_is_not_known_stay_empty():
    from harness.layers import receptive_fields

    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(2, 2, 2, stride=2), nn.Conv2d(2, 2, 3))
    fields = receptive_fields(net)
    assert {name: field.size for name, field in fields.items()} == {"0": 3, "1": 3}
    assert set(receptive_fields(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2)))) == {"0"}


def test_a_channel_of_a_vector_is_refused(digits_cnn):
    from harness.context import Context

    with pytest.raises(ConfigError, match="is a vector; write neuron:classifier.3:C"):
        _ = Context(digits_cnn, target="channel:classifier.3:5").target
