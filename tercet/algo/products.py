"""Matrix products: their precision, and the shapes that oneDNN is fast at."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F


def product_dtype(weight: Tensor) -> torch.dtype:
    """What matrix products with the weight are computed in: autocast's precision where it is on, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def head_centre(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the rows of an output layer (V, D) have in common, (D,), to be left out of products in half precision; else None.

    It adds one number to all logits of a token, which no softmax sees, but GPT-2's are around -100, where bfloat16 numbers are half a
    nat apart. Any vector would do: the mean of some thousand rows is near enough. Of rounded rows, so that a frozen copy of the
    layer, which holds those alone, gives the same bits.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    rows = weight.detach()[:: -(-len(weight) // 4096)].to(dtype)
    return rows.float().mean(0).to(dtype)


def head_rows(weight: Tensor, dtype: torch.dtype, centre: Tensor | None) -> Tensor:
    """Rows of an output layer as products in `dtype` take them."""
    rows = weight.to(dtype)
    if centre is None:
        return rows
    return rows - centre if rows is weight else rows.sub_(centre)


def onednn_computes(x: Tensor) -> bool:
    """Whether oneDNN has kernels for numbers such as those of x, where they are: for bfloat16 not on every processor."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and _onednn_has_bfloat16())


_MUCH = 2**23  # multiplications


def onednn_multiplies(x: Tensor, width: int) -> bool:
    """Whether oneDNN multiplies x (..., i) by a matrix (i, width) rather than what torch would take: bfloat16 wherever oneDNN has it,
    and float32 where MKL holds back, but for less than _MUCH multiplications, where MKL is faster all the same."""
    if not onednn_computes(x):
        return False
    return x.dtype is torch.bfloat16 or (x.numel() * width >= _MUCH and _mkl_holds_back())


def onednn_activates(x: Tensor) -> bool:
    """Whether oneDNN has the faster GELU for numbers such as those of x: with AVX-512. 1,088 x 3,072 numbers took 1.0 ms by oneDNN and 3.3
    by torch on two Intel cores with AMX, on two Zen 3 cores, which have AVX2, 10.0 and 6.3."""
    return onednn_computes(x) and _has_avx512()


def packing_pays(weight: Tensor, rows: int) -> bool:
    """Whether products of about `rows` rows at a time with the weight, in float32, are faster by oneDNN from a copy in its own layout:
    of a large weight, which MKL brings into a layout of its own at every product (64 rows and GPT-2's output layer took two Zen 3 cores
    67 ms, from a copy 37; a whole rollout two Intel cores 0.90 to 0.95 of its time), and of smaller ones where MKL holds back."""
    work = weight.numel() * rows
    return onednn_computes(weight) and _has_mkl() and (work >= _MUCH or (work >= 2**20 and _mkl_holds_back()))


@functools.cache
def _onednn_has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _mkl_holds_back() -> bool:
    """Whether MKL leaves half of the processor unused: on AVX-512 processors that are not Intel's it runs code for AVX2. Two Zen 5 cores
    multiply float32 at 190 to 210 GFLOP/s by MKL and at 380 to 470 by oneDNN."""
    return _has_avx512() and _has_mkl() and _vendor() == "AuthenticAMD"


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _vendor() -> str:
    """The processor's maker, in the words of CPUID."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        return next(line for line in lines if line.startswith("vendor_id")).split(":")[1].strip()
    return platform.processor().rpartition(" ")[2]


def spare_rows(count: int) -> int:
    """How many rows to add to `count` for products in few shapes: up to a multiple of 32, from 2,048 on of the power of two that is at
    most a 32nd. For each new shape oneDNN compiles code, 1 to 5 ms in bfloat16, and keeps it, half a megabyte."""
    step: int = max(32, 2 ** (count.bit_length() - 6))
    return -count % step


_PIECE = 2**19  # numbers that stay in a processor's cache from one element-wise operation to the next


def pieces(rows: Tensor, of: Tensor, step: int = 1) -> tuple[Tensor, ...]:
    """As many rows at a time as the same rows of `of` (n, v) stay in the cache, where a processor computes with it; a multiple of
    `step`, so that threads which take whole rows get equally many."""
    fitting = _PIECE // of.shape[1] // step * step
    return torch.split(rows, max(step, fitting) if of.device.type == "cpu" else max(1, len(of)))


def contiguous(x: Tensor) -> Tensor:
    """x (m, n) as it lies in memory, or a copy of a transposed one, some columns at a time: torch's own copy runs on one thread (1.7
    instead of 0.9 ms for 3,072 x 768 in bfloat16)."""
    if x.is_contiguous() or x.device.type != "cpu":
        return x.contiguous()
    copied = torch.empty(x.shape, dtype=x.dtype)
    for into, part in zip(torch.split(copied, 64, dim=1), torch.split(x, 64, dim=1)):
        into.copy_(part)
    return copied


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """x (n, i) @ weight (o, i)^T + bias (o,) + onto (n, o) in the precision of x, by oneDNN where that is faster: in two halves where it
    would give both to one thread, as it does in bfloat16 with 512 to 1,024 columns and rows from that number to twice as many (1,088 x
    3,072 x 768 took 4.6 ms on two threads, in halves 2.8; halves of fewer or more rows took up to twice as long).

    onto: something small is added before the sum is rounded, or bfloat16 would lose it: onto products around 1, numbers of 1e-4 that were
    added afterwards changed 5 % of what they should."""
    simple = weight.is_contiguous() or weight.t().is_contiguous()  # for other layouts oneDNN has slow reference code only
    if not simple or not onednn_multiplies(x, len(weight)):
        if onto is None:
            return F.linear(x, weight, bias)
        total = torch.addmm(onto, x, weight.t())
        return total if bias is None else total.add_(bias)
    between = len(weight) <= len(x) <= 1280 and len(x) < 2 * len(weight) <= 2048
    lopsided = between and weight.numel() >= 2**19 and torch.get_num_threads() > 1
    if lopsided and x.dtype is torch.bfloat16:
        halves = zip(x.chunk(2), (None, None) if onto is None else onto.chunk(2))
        return torch.cat([_by_onednn(part, weight, bias, added) for part, added in halves])
    return _by_onednn(x, weight, bias, onto)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left (n, h)^T @ right (n, w), the gradient of a weight: in float32 oneDNN wants a copy of one of the two transposed, the narrower
    one. In bfloat16 a large and wide result is faster from one of left^T: 768 x 1,088 x 3,072 took 2.5 instead of 3.3 ms."""
    height, width = left.shape[1], right.shape[1]
    if left.dtype is torch.float32 and onednn_multiplies(left, width):
        if height > width:
            return contiguous(_by_onednn(contiguous(right.t()), left.t(), None).t())
        return _by_onednn(contiguous(left.t()), right.t(), None)
    large = left.device.type == "cpu" and left.dtype is torch.bfloat16 and height < width and height * width >= 2**20
    return (contiguous(left.t()) if large else left.t()) @ right


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """F.linear writes the bias into every row first and adds the product to it: a fifth longer for some 128 columns."""
    if onto is not None:
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, onto, weight, bias, "add")
        return total
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
