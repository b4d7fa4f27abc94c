"""tercet/algo/products.py: matrix products in the precision and the parts that are fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tercet.algo import products
from tercet.algo.products import (
    contiguous,
    head_centre,
    head_rows,
    linear_product,
    onednn_computes,
    onednn_multiplies,
    packing_pays,
    product_dtype,
    spare_rows,
    transposed_product,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_layers_rows_without_what_they_have_in_common_leave_the_layer_as_it_is(dtype: torch.dtype) -> None:
    """As a layer that learns is held, and as a frozen one."""
    weight = (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) + 10).to(dtype)
    before = weight.clone()
    centre = head_centre(weight, torch.bfloat16)
    assert centre is not None and torch.equal(centre, weight.bfloat16().float().mean(0).bfloat16())
    assert torch.equal(head_rows(weight, torch.bfloat16, centre), weight.bfloat16() - centre)
    assert torch.equal(head_rows(weight, torch.bfloat16, None), weight.bfloat16())
    assert head_centre(weight, torch.float32) is None
    assert torch.equal(weight, before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_precision_is_autocasts_where_it_is_on() -> None:
    weight = torch.zeros(2, 3)
    assert product_dtype(weight) is torch.float32 and product_dtype(weight.double()) is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(weight) is torch.bfloat16


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "columns of a wider one"])
@pytest.mark.parametrize("rows", [1, 511, 641, 1024])  # the third in halves
def test_products_are_those_of_float64_up_to_rounding(
    rows: int, layout: str, with_bias: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(rows, 1024).bfloat16(), torch.randn(512).bfloat16() if with_bias else None
    weight = torch.randn(512, 1024).bfloat16()
    if layout == "transposed":
        weight = torch.randn(1024, 512).bfloat16().t()
    elif layout == "columns of a wider one":
        weight = torch.randn(512, 1100).bfloat16()[:, 50:1074]
    parts: list[int] = []
    product = products._by_onednn if onednn_computes(x) else torch.nn.functional.linear
    monkeypatch.setattr(products, "_onednn_has_bfloat16", lambda: True)
    monkeypatch.setattr(products, "_by_onednn", lambda x, *rest: parts.append(len(x)) or product(x, *rest))  # type: ignore[func-returns-value]
    found = linear_product(x, weight, bias)
    wanted = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    assert found.dtype is torch.bfloat16 and (found.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    if layout == "columns of a wider one":
        assert not parts, "oneDNN takes a thousand times as long"
    else:
        assert parts == ([321, 320] if rows == 641 else [rows])


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (130, 200)])
def test_a_contiguous_copy(shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    assert contiguous(x) is x
    copied = contiguous(x.t())
    assert copied.is_contiguous() and torch.equal(copied, x.t())


def test_a_processor_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN refuses there; torch's own product does not."""
    monkeypatch.setattr(products, "_onednn_has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "_by_onednn", lambda *inputs: pytest.fail("oneDNN was asked"))
    assert onednn_computes(torch.zeros(1)) and not onednn_computes(torch.zeros(1).bfloat16())
    assert not onednn_computes(torch.zeros(1).double())
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert torch.equal(linear_product(x, weight, None), torch.nn.functional.linear(x, weight))


@pytest.fixture(params=[True, False], ids=["MKL holds back", "MKL is itself"])
def holds_back(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_mkl_holds_back", lambda: request.param)
    return bool(request.param)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [3, 900])
def test_float32_goes_to_onednn_where_mkl_holds_back_and_there_is_much_to_multiply(
    rows: int, with_bias: bool, holds_back: bool, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 200), torch.randn(120, 200), torch.randn(120) if with_bias else None
    parts: list[int] = []
    product = products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda x, *rest: parts.append(len(x)) or product(x, *rest))  # type: ignore[func-returns-value]
    for layout in (weight, weight.t().contiguous().t()):
        found = linear_product(x, layout, bias)
        wanted = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    assert parts == ([900, 900] if rows == 900 and holds_back else [])
    assert not onednn_multiplies(x.double(), 120)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 5), (2000, 40, 130), (2000, 130, 40), (300, 768, 1400)])
def test_the_gradient_of_a_weight(shape: tuple[int, int, int], dtype: torch.dtype, holds_back: bool) -> None:
    torch.manual_seed(0)
    rows, height, width = shape
    left, right = torch.randn(rows, height).to(dtype), torch.randn(rows, width).to(dtype)
    found = transposed_product(left, right)
    wanted = left.double().t() @ right.double()
    assert found.dtype is dtype and found.is_contiguous()
    assert (found.double() - wanted).abs().max() <= 16 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(
    ("vendor", "capability", "holds_back", "packs"),
    [
        ("AuthenticAMD", "AVX512", True, [False, True, True]),
        ("AuthenticAMD", "AVX2", False, [False, False, True]),
        ("GenuineIntel", "AVX512", False, [False, False, True]),
        ("none with MKL", "AVX512", False, [False, False, False]),
    ],
)
def test_where_mkl_holds_back_and_where_packing_pays(
    vendor: str, capability: str, holds_back: bool, packs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_mkl_holds_back", products._mkl_holds_back.__wrapped__)  # as at the first call
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: "MKL" not in vendor)
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._mkl_holds_back() is holds_back
    weight = torch.zeros(2**9, 2**7)
    assert [packing_pays(weight, rows) for rows in (15, 16, 128)] == packs
    assert not packing_pays(weight.double(), 128)


def test_the_processors_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "processor\t: 0\nvendor_id\t: AuthenticAMD\nflags\t: fpu\nprocessor\t: 1\nvendor_id\t: AuthenticAMD\n"
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: lines)
    assert products._vendor() == "AuthenticAMD"
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: "Processor : ARMv8\n")
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD")
    assert products._vendor() == "AuthenticAMD"


def test_small_products_in_float32_are_torchs_own() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(linear_product(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("count", "rounded"), [(0, 0), (1, 32), (32, 32), (1000, 1024), (2047, 2048), (2049, 2112), (4097, 4224), (5000, 5120)]
)
def test_rows_come_in_few_numbers(count: int, rounded: int) -> None:
    """Multiples of 32; of 64 from 2,048 on, of 128 from 4,096 on."""
    assert count + spare_rows(count) == rounded
