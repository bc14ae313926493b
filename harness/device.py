"""One device for a run, with the switches that make its results repeatable; all of them are recorded.

Set around a run and put back afterwards: deterministic algorithms, cuDNN without benchmarking, TF32 off. On a CPU the process also keeps
the memory it frees until the run ends; that it may do so stays set, as glibc has no way back to what it does by itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Module = TypeVar("Module", bound=nn.Module)

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16", "float16"]


def device_kind(choice: str) -> str:
    """'cuda', 'mps' or 'cpu': 'auto' takes the first that is there. Does not import torch where 'cpu' is asked for."""
    kind, _, number = choice.partition(":")
    if choice == "cpu":
        return choice
    if kind == "auto" and not _accelerator_possible():
        return "cpu"
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        return next(k for k in ("cuda", "mps", "cpu") if there[k])
    if kind not in there or (number and kind != "cuda"):
        raise ConfigError(f"device {choice!r}: choose auto, cpu, cuda, cuda:N or mps")
    if not there[kind]:
        raise ConfigError(f"device {choice!r} is not available here; choose auto or cpu")
    if number and (not number.isdecimal() or int(number) >= torch.cuda.device_count()):
        raise ConfigError(f"device {choice!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return choice


def _accelerator_possible() -> bool:
    """False where no accelerator can be, told without torch's import: neither a Mac nor an NVIDIA or AMD driver."""
    return sys.platform != "linux" or any(os.path.exists(p) for p in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"))


@dataclass(frozen=True)
class DeviceFacts:
    """What a result depends on besides its inputs."""

    kind: str
    name: str
    precision: str
    deterministic: bool
    tf32: bool
    threads: int
    cuda: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def device_settings(choice: str, precision: str = "float32") -> Iterator[DeviceFacts]:
    """Deterministic switches on, TF32 off, optional autocast; the process's own settings return at the end."""
    # CUDA reads it when it starts; without it some cuBLAS calls are not repeatable.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    device = torch.device(device_kind(choice))
    fill: Any = torch.utils.deterministic  # its type stub does not know the switch
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
    )
    # Some backward passes on CUDA have no repeatable form (adaptive pooling in VGG); refusing them would refuse the model.
    # They warn instead, and the runner writes the warning into the record.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    fill.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    facts = DeviceFacts(
        kind=device.type,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        precision=precision,
        deterministic=True,
        tf32=False,
        threads=torch.get_num_threads(),
        cuda=torch.version.cuda or "" if device.type == "cuda" else "",
    )
    libc = keep_freed_memory() if device.type == "cpu" else None
    try:
        if precision == "float32":
            yield facts
        else:
            # Without its cache, which would keep the weights of a network that is trained as they were at its first pass.
            with torch.autocast(device.type, dtype=getattr(torch, precision), cache_enabled=False):
                yield facts
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        fill.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[3:5]
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[5:7]
        if libc is not None:
            libc.malloc_trim(0)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which passes are computed in the precision of their tensors, also within a run in a lower one: what is very small,
    or summed over very many, does not survive that."""
    import torch

    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def at_least_single(x: Tensor) -> Tensor:
    """In single precision where it is in a lower one."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialisations, which draw from torch's own generator on the CPU, under a seed; the generator is given back as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change those of all devices as well
        yield


def synchronise(device: torch.device) -> None:
    """Wait for a device, before a clock is read."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names for what it sets, see malloc.h


def physical_memory() -> int:
    """Bytes of memory of this machine; of a container its machine's."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> ctypes.CDLL | None:
    """Let glibc keep freed blocks for the next pass; None where the C library is another one.

    It gives blocks of 32 MB and more, such as the maps of eight pictures, back to the system at once, and each pass then waits for the
    same pages to be cleared again: eight pictures took seven times as long as one through SqueezeNet, and so take five times.
    """
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    # Either setting ends glibc's own adjustment of both, and older versions refuse more than 32 MB for the second: which still spares
    # the blocks below.
    if libc.mallopt(MMAP_THRESHOLD, 2**30) or libc.mallopt(MMAP_THRESHOLD, 2**25):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    return libc


def placed(module: Module, device: str | torch.device) -> Module:
    """The module on a device, its kernels channels last as pictures come."""
    import torch

    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks memory_format


def peak_memory(device: str) -> int:
    """Bytes: the device's peak since the run began on CUDA, otherwise the process's peak so far."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
