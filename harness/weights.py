"""Where weights come from, read without running code from them, and checked against their pinned sha256."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import ConfigError, WeightsError
from .hookspecs import hookimpl
from .paths import cache_folder, inside, package_folder, sha256_file, with_extra

if TYPE_CHECKING:
    import torch

    from .registry import ModelEntry

State = Mapping[str, "torch.Tensor"]


class WeightSource(Protocol):
    """A place that weights come from. `rest` is what stands after 'scheme:' in the registry."""

    def path(self, rest: str, entry: ModelEntry) -> Path | None:
        """The file they are read from, present or not; None when there is no file."""

    def obtain(self, rest: str, entry: ModelEntry) -> str:
        """How to get them when the file is missing, in one sentence."""

    def fetch(self, rest: str, entry: ModelEntry) -> None:
        """Try to put the missing file there; raise or do nothing when that is not possible."""

    def load(self, rest: str, entry: ModelEntry) -> Any:
        """The weights: a state dict, or what `convert` makes one of."""


class SafetensorsFile:
    """`file:PATH`, relative to the registry file that names it."""

    def path(self, rest: str, entry: ModelEntry) -> Path | None:
        return entry.folder / Path(rest).expanduser()

    def obtain(self, rest: str, entry: ModelEntry) -> str:
        return f"put the file at {self.path(rest, entry)}, or correct the path at {entry.where}"

    def fetch(self, rest: str, entry: ModelEntry) -> None:
        pass

    def load(self, rest: str, entry: ModelEntry) -> Any:
        return read_weights(self.path(rest, entry) or Path(rest))


class PackageFile:
    """`package:PACKAGE/PATH`, a file inside an installed package."""

    def path(self, rest: str, entry: ModelEntry) -> Path | None:
        package, _, file = rest.partition("/")
        folder = package_folder(package)
        return inside(folder, file) if folder else Path(package) / file

    def obtain(self, rest: str, entry: ModelEntry) -> str:
        package, _, file = rest.partition("/")
        if package_folder(package) is not None:
            return f"the package {package!r} is installed without {file!r}: install it anew, or correct {entry.where}"
        return f"they come with the package {package!r}: {with_extra(package)}"

    def fetch(self, rest: str, entry: ModelEntry) -> None:
        pass

    def load(self, rest: str, entry: ModelEntry) -> Any:
        return read_weights(self.path(rest, entry) or Path(rest))


class TorchvisionWeights:
    """`torchvision:NAME`, torchvision's own weights by name, in torch hub's folder; downloaded when absent."""

    def path(self, rest: str, entry: ModelEntry) -> Path | None:
        return _hub_folder() / (entry.file or self._enum(rest, entry).url.rsplit("/", 1)[1])

    def obtain(self, rest: str, entry: ModelEntry) -> str:
        return f"on a machine with a network download {self._enum(rest, entry).url} and save it as {self.path(rest, entry)}"

    def fetch(self, rest: str, entry: ModelEntry) -> None:
        self._enum(rest, entry).get_state_dict(progress=False, check_hash=True)

    def load(self, rest: str, entry: ModelEntry) -> Any:
        # torchvision renames keys (DenseNet) and drops heads (GoogLeNet) while it builds: let it.
        from torchvision.models import get_model

        return get_model(entry.builder.partition(":")[2], weights=self._enum(rest, entry), progress=False).state_dict()

    def _enum(self, rest: str, entry: ModelEntry) -> Any:
        from torchvision.models import get_model_weights

        known = get_model_weights(entry.builder.partition(":")[2])
        try:
            return known[rest]
        except KeyError:
            raise WeightsError(f"{entry.where}: torchvision has no weights {rest!r}; there is {', '.join(w.name for w in known)}") from None


class RandomWeights:
    """`random:SEED`, the builder's own initialisation under that seed."""

    def path(self, rest: str, entry: ModelEntry) -> Path | None:
        if not rest.isdecimal():
            raise WeightsError(f"{entry.where}: weights 'random:{rest}': the seed must be a whole number")
        return None

    def obtain(self, rest: str, entry: ModelEntry) -> str:
        return "nothing is needed"

    def fetch(self, rest: str, entry: ModelEntry) -> None:
        pass

    def load(self, rest: str, entry: ModelEntry) -> Any:
        return None


class TrainedWeights:
    """`recipe:NAME`, trained by `harness train NAME` and kept in the user's cache with its card."""

    def path(self, rest: str, entry: ModelEntry) -> Path | None:
        return cache_folder("weights") / f"{rest}.safetensors"

    def obtain(self, rest: str, entry: ModelEntry) -> str:
        return f"run `harness train {rest}`"

    def fetch(self, rest: str, entry: ModelEntry) -> None:
        pass

    def load(self, rest: str, entry: ModelEntry) -> Any:
        return read_weights(self.path(rest, entry) or Path(rest))


def _hub_folder() -> Path:
    """torch hub's checkpoint folder, found as torch documents it, without importing torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch") / "hub" / "checkpoints"


def read_weights(path: Path) -> Any:
    """safetensors, a PyTorch state dict (tensors only), a pickle of numpy arrays, or the arrays stored in an ONNX graph; never runs code of
    the file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix in (".pth", ".pt"):
            import torch

            return torch.load(path, map_location="cpu", weights_only=True)
        if path.suffix in (".pkl", ".pickle"):
            return read_numpy_pickle(path)
        if path.suffix == ".onnx":
            return read_onnx(path)
    except (WeightsError, KeyboardInterrupt):
        raise
    except Exception as error:
        problem = " ".join(str(error).split())[:160]
        raise WeightsError(f"{path}: cannot be read as weights ({type(error).__name__}: {problem})") from error
    raise WeightsError(f"{path}: weights must be .safetensors, .pth, .pt, .onnx or .pkl (numpy arrays only)")


class _NumpyOnly(pickle.Unpickler):
    """Admits what arrays are made of and nothing else, so that a pickle cannot run code."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return _frombuffer
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how old protocols write bytes
            return _latin1
        raise WeightsError(f"{self._path}: refused: the pickle asks for {module}.{name}; only numpy arrays are admitted")


def _reconstruct(subtype: Any, shape: Any, code: Any) -> np.ndarray:
    if subtype is not np.ndarray:
        raise WeightsError("refused: the pickle makes something other than a plain numpy array")
    return np.ndarray.__new__(np.ndarray, (0,), np.dtype("b"))


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(bytes(buffer), dtype=np.dtype(dtype)).reshape(shape, order=order)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def read_numpy_pickle(path: Path) -> Any:
    """A pickle of dicts, lists and numeric numpy arrays; anything else is a WeightsError."""
    with path.open("rb") as file:
        value = _NumpyOnly(file, path).load()
    _refuse_objects(value, path)
    return value


def _refuse_objects(value: Any, path: Path) -> None:
    if isinstance(value, dict):
        for v in value.values():
            _refuse_objects(v, path)
    elif isinstance(value, list | tuple):
        for v in value:
            _refuse_objects(v, path)
    elif isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        raise WeightsError(f"{path}: refused: an array of dtype {value.dtype}")


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """{name: array} of the numbers that an ONNX graph holds in itself. What lies in other files, which no pin covers, and sparse arrays
    are refused."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise WeightsError(f"{path}: reading ONNX needs the package 'onnx' ({error}): {with_extra('onnx')}") from None
    graph = onnx.load(path, load_external_data=False).graph
    if graph.sparse_initializer:
        raise WeightsError(f"{path}: refused: the graph has sparse arrays")
    arrays: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise WeightsError(f"{path}: refused: {tensor.name!r} is kept in another file")
        if tensor.name in arrays:
            raise WeightsError(f"{path}: refused: there are two arrays {tensor.name!r}")
        arrays[tensor.name] = numpy_helper.to_array(tensor)
    if not arrays:
        raise WeightsError(f"{path}: the graph holds no arrays")
    _refuse_objects(arrays, path)
    return arrays


# -- use ---------------------------------------------------------------------------------------------------------------


def weight_source(entry: ModelEntry) -> tuple[WeightSource, str]:
    """(source, rest) of an entry's `weights`."""
    from .plugins import load_plugins

    scheme, _, rest = entry.weights.partition(":")
    return load_plugins().get("weight_sources", scheme), rest


def weights_present(name: str, entry: ModelEntry, hint: bool = True) -> tuple[bool, str]:
    """(are they here, how to get them when not); without the hint torchvision need not be imported."""
    source, rest = weight_source(entry)
    path = source.path(rest, entry)
    present = path is None or path.is_file()
    return present, "" if present or not hint else source.obtain(rest, entry)


def weights_hash(name: str, entry: ModelEntry, fetch: bool = True) -> str:
    """What identifies the weights: the file's sha256 (checked against the pin), or 'random:SEED'."""
    source, rest = weight_source(entry)
    path = source.path(rest, entry)
    if path is None:
        return entry.weights
    if not path.is_file() and fetch:
        try:
            source.fetch(rest, entry)
        except ConfigError:
            raise
        except Exception as error:
            problem = " ".join(str(error).split())[:120]
            raise WeightsError(
                f"weights of {name!r} are not here and could not be downloaded ({problem}): {source.obtain(rest, entry)}"
            ) from None
    if not path.is_file():
        raise WeightsError(f"weights of {name!r} are not here: {source.obtain(rest, entry)}")
    digest = sha256_file(path)
    if entry.sha256 and digest != entry.sha256:
        raise WeightsError(
            f"weights of {name!r}: {path} has sha256 {digest[:16]}..., but {entry.where} pins {entry.sha256[:16]}...; "
            "the file was altered or is another version: get it again, or correct the pin"
        )
    return digest


def load_weights(name: str, entry: ModelEntry) -> State | None:
    """The state dict of an entry, or None when the builder's own seeded initialisation is meant."""
    weights_hash(name, entry)
    source, rest = weight_source(entry)
    loaded = source.load(rest, entry)
    if entry.convert:
        module, _, function = entry.convert.partition(":")
        try:
            convert = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{entry.where}: convert {entry.convert!r}: {error}") from None
        try:
            loaded = convert(loaded, entry)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise WeightsError(f"{entry.where}: {entry.convert} cannot convert these weights ({type(error).__name__}: {error})") from error
    elif isinstance(loaded, dict):  # arrays of numpy under a state dict's names
        loaded = {k: _tensor(v) if isinstance(v, np.ndarray) else v for k, v in loaded.items()}
    return loaded


def squeezenet1_1_from_ndf(layers: Mapping[str, Any], entry: ModelEntry) -> State:
    """ndf's Caffe-style SqueezeNet 1.1 as torchvision's; kernels are HWIO."""
    blocks = dict(zip(range(2, 10), (3, 4, 6, 7, 9, 10, 11, 12), strict=True))
    state: dict[str, torch.Tensor] = {}
    for name, (kernel, bias) in layers.items():
        if name == "conv1":
            target = "features.0"
        elif name == "conv10":
            target = "classifier.1"
        else:
            block, part = name.split("/")
            target = f"features.{blocks[int(block.removeprefix('fire'))]}.{part.replace('squeeze1x1', 'squeeze')}"
        w, b = _tensor(kernel).permute(3, 2, 0, 1), _tensor(bias).reshape(-1)
        state[f"{target}.weight"], state[f"{target}.bias"] = _for_rgb(w, b, entry) if name == "conv1" else (w.contiguous(), b)
    return state


def vgg16_from_keras(arrays: Mapping[str, np.ndarray], entry: ModelEntry) -> State:
    """The convolutions of Keras's VGG-16 in an ONNX graph, under torchvision's names; kernels are OIHW. Other layers are left out."""
    state: dict[str, torch.Tensor] = {}
    layer = 0
    for block, convolutions in enumerate((2, 2, 3, 3, 3), 1):
        for number in range(1, convolutions + 1):
            stored = f"functional_1/block{block}_conv{number}_1"
            w, b = _tensor(arrays[f"{stored}/convolution/ReadVariableOp:0"]), _tensor(arrays[f"{stored}/Squeeze:0"])
            state[f"features.{layer}.weight"], state[f"features.{layer}.bias"] = (w, b) if layer else _for_rgb(w, b, entry)
            layer += 2  # torchvision counts the ReLU behind it, too
        layer += 1  # and the pooling
    return state


def _tensor(array: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(array))


def _for_rgb(weight: torch.Tensor, bias: torch.Tensor, entry: ModelEntry) -> tuple[torch.Tensor, torch.Tensor]:
    """A first convolution that expects BGR in 0..255 less Caffe's means, as one for RGB in [0, 1] less `entry.input.mean` over
    `entry.input.std`. Padded zeros then stand for `entry.input.mean`, which is not Caffe's by up to half a 255th."""
    import torch

    caffe_mean = torch.tensor((123.68, 116.779, 103.939), device="cpu")  # RGB
    mean = torch.tensor(entry.input.mean, device="cpu")
    std = torch.tensor(entry.input.std, device="cpu")
    weight = weight.flip(1)  # BGR -> RGB
    bias = bias + (weight * (255 * mean - caffe_mean)[:, None, None]).sum((1, 2, 3))
    return (weight * (255 * std)[:, None, None]).contiguous(), bias


@hookimpl
def harness_weight_sources() -> Mapping[str, WeightSource]:
    return {
        "file": SafetensorsFile(),
        "package": PackageFile(),
        "torchvision": TorchvisionWeights(),
        "random": RandomWeights(),
        "recipe": TrainedWeights(),
    }
