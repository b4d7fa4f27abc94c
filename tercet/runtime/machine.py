"""What `auto` means on this machine: device, precision, threads, tokens per forward."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tercet.errors import TercetError
from tercet.runtime.launch import local_rank, local_ranks, ranks
from tercet.runtime.metrics import peak_memory_mb

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Below this many parameters a matrix product is so small that casting to bfloat16 costs more than it saves.
_BFLOAT16_PARAMETERS = 300_000
WORTH_RELEASING_MB = 1024
TINY_MODEL, _SMALL_MODEL, _LARGE_MODEL, _HUGE_MODEL = 300_000, 20_000_000, 100_000_000, 1_000_000_000


@dataclass(frozen=True)
class Machine:
    """The resolved choices; every one of them is written to the run folder's config.yaml."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    microbatch_tokens: int

    def apply(self) -> None:
        """Apply these choices to this process, and make it deterministic; on CUDA, kernels with no deterministic version, such as
        attention's gradient, stay as they are."""
        torch.set_num_threads(self.threads)
        _settle_vector_functions()
        _keep_freed_memory()
        _keep_few_kernels()
        torch.use_deterministic_algorithms(True, warn_only=True)
        # cuDNN's attention builds a plan for every new shape, a second each, and texts bring ever new ones.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Else every new tensor is filled with NaN first: a pass over memory, against bugs in torch alone.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def settings(self) -> dict[str, str | int]:
        """The values for the configuration's machine section."""
        names = {value: key for key, value in _DTYPES.items()}
        return {
            "device": str(self.device),
            "dtype": names[self.dtype],
            "threads": self.threads,
            "microbatch_tokens": self.microbatch_tokens,
        }


def resolve(
    device: str, dtype: str, threads: str | int, microbatch_tokens: str | int, parameters: int, *, adapter: bool = False
) -> Machine:
    """Choose what is `auto`, for a model with that many parameters; adapter: of which only adapters are trained."""
    chosen = _device(device)
    kind = _DTYPES[dtype] if dtype != "auto" else _fastest_dtype(chosen, parameters)
    count = threads if isinstance(threads, int) else _threads(parameters)
    tokens = microbatch_tokens if isinstance(microbatch_tokens, int) else _tokens(chosen, parameters, adapter)
    if count < 1 or tokens < 1:
        raise TercetError(f"machine: threads ({count}) and microbatch_tokens ({tokens}) must be at least 1, or auto")
    return Machine(chosen, kind, count, tokens)


# What torch computes by MKL's vector library.
_VECTOR_FUNCTIONS = (
    *("exp", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "erf", "erfc", "erfinv", "lgamma"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "trunc", "floor", "ceil", "round"),
)


def _settle_vector_functions() -> None:
    """Call each of them once on one thread: MKL chooses a function's code at its first call, and if that comes from several threads
    at once, one of them may use code of half the digits that one time (pytorch issue 188792).

    Seen as a first rollout half of whose log-probabilities were off by 3e-5, in one process of eight.
    """
    for dtype in (torch.float32, torch.float64):
        for name in _VECTOR_FUNCTIONS:
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks: it hands each back to the kernel, which then fills every page of the next one with zeros.

    A PPO iteration of GPT-2 on two cores took 10.7 s instead of 12.4. Elsewhere than on Linux with glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory at the heap's end that is kept


_KERNELS = "256"


def _keep_few_kernels() -> None:
    """Let oneDNN, and torch's own cache in front of it, keep what they compile for fewer shapes than the 1,024 of their default: in
    bfloat16 it takes half a megabyte each, and responses whose lengths vary bring ever new ones. What the user has set stays."""
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS)


@functools.cache
def measured_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of matrix products in `dtype` on this process's threads, or on a device of another type,
    measured once (some half a second).

    The best of several products of growing sizes, a multiply and an add counted as two. (Of 1,024 x 1,024 x 1,024 in bfloat16 oneDNN
    gave two threads no more than one, 1.5 TFLOP/s; of 2,048 x 2,048 x 2,048 2.4.) A size that would take over half a second is left
    out: a processor without bfloat16 took a minute for the largest.
    """
    sizes = (256, 1024, 2048) if device == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        if best and 2 * size**3 / best > 0.5:
            break
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        start = time.perf_counter()
        until = start + 0.1
        while start < until:
            product = left @ right
            if device != "cpu":
                product[0, 0].item()
            end = time.perf_counter()
            best, start = max(best, 2 * size**3 / (end - start)), end
    return best


def release_free_memory() -> None:
    """Hand back what loading models, or a stage, has left free: from here on, what is freed is kept for reuse.

    A process that never had WORTH_RELEASING_MB, of which libraries are half, is left alone: it would win little, and the garbage
    collector takes a quarter of a second to walk through the libraries' objects, twenty times a run.
    """
    if peak_memory_mb() < WORTH_RELEASING_MB and not torch.cuda.is_initialized():  # there a process's own memory says nothing
        return
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on the device, None where that cannot be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        limit, used = (Path("/sys/fs/cgroup", name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))
    return min(found, default=None)


@contextlib.contextmanager
def out_of_memory_explained(stage: str, microbatch_tokens: int, sampled: tuple[str, int] | None) -> Iterator[None]:
    """Turn what torch and Python raise when memory runs out into a TercetError that names the settings to lower, with their values.
    sampled: the setting that says how many responses the stage samples at once, if it samples any."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error)
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY)):
            raise
        settings = f"machine.microbatch_tokens ({microbatch_tokens} now; try {max(1, microbatch_tokens // 2)})"
        if sampled is not None:
            name, rows = sampled
            settings += f" or, if it was sampling, {name} ({rows} now; try {max(1, rows // 2)})"
        first = (text.strip() or type(error).__name__).splitlines()[0][:200]
        raise TercetError(
            f"stage {stage}: memory ran out ({first}). What was finished and the last checkpoint are kept: lower {settings}; "
            "`tercet doctor` shows what each stage needs; machine.activation_checkpointing needs less, model.adapter least"
        ) from error


_OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory"),
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def _device(name: str) -> torch.device:
    if name == "auto":
        available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
        return torch.device(available[0] if available else "cpu")
    try:
        device = torch.device(name)
        if device.index is not None and ranks() > 1:
            raise TercetError(f"machine.device: {name} is one device, but torchrun started several processes: say {device.type}")
        if device.type == "cuda" and device.index is None:  # as World.start does: a rank must not touch another's GPU
            torch.cuda.set_device(local_rank())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, AttributeError) as error:  # the last where torch was built without it
        raise TercetError(
            f"machine.device: {name!r} cannot be used here ({str(error).splitlines()[0]}): try auto, or cpu for a run that began on "
            "another device, which its config.yaml keeps"
        ) from None
    return device


def _fastest_dtype(device: torch.device, parameters: int) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    computes = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if computes and parameters >= _BFLOAT16_PARAMETERS else torch.float32


def _threads(parameters: int) -> int:
    # A tiny model's matrices are too small to share. A thread that shares its core with other work lets all the others wait: an iteration
    # of GPT-2 took 41 s on two threads beside one busy process, 23 on one (12 on two alone).
    return 1 if parameters < TINY_MODEL else max(1, round(_idle_cores(own_cores()) / local_ranks()))


def own_cores() -> list[int]:
    """The processor's cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _idle_cores(cores: list[int]) -> float:
    """How many of the cores have nothing to do just now: the best of three looks of a fifth of a second, so that what ends soon does not
    count; or the last minute's load where there is no /proc/stat. (The load counts what has ended: after a busy minute one thread was
    chosen on an idle machine.)"""
    try:
        found = max(_look(cores, 0.2) for _ in range(3))
    except (OSError, ValueError, KeyError, IndexError):
        found = len(cores) - (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0)
    return min(found, float(len(cores)))


def _look(cores: list[int], seconds: float) -> float:
    before = _idle_ticks(cores)
    time.sleep(seconds)
    return (_idle_ticks(cores) - before) / os.sysconf("SC_CLK_TCK") / seconds


def _idle_ticks(cores: list[int]) -> int:
    lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    fields = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("cpu")}
    return sum(int(fields[f"cpu{core}"][3]) + int(fields[f"cpu{core}"][4]) for core in cores)  # idle, waiting for a disk


def _tokens(device: torch.device, parameters: int, adapter: bool) -> int:
    if device.type == "cuda":
        return 16_384
    if parameters < _SMALL_MODEL:
        return 4_096
    if not adapter or parameters < _LARGE_MODEL:
        return 2_048
    # Beside the adapters of a large model a micro-batch's activations are most of the memory.
    return 1_280 if parameters < _HUGE_MODEL else 768
