"""tercet/algo/products.py: matrix products in the precision and the parts that are fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tercet.algo import products
from tercet.algo.products import by_rows, contiguous, onednn_computes, product_dtype


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
@pytest.mark.parametrize("rows", [1, 641, 1281])  # the second in halves
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
    product = products._product
    monkeypatch.setattr(products, "_product", lambda x, *rest: parts.append(len(x)) or product(x, *rest))  # type: ignore[func-returns-value]
    found = by_rows(x, weight, bias)
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
    monkeypatch.setattr(products, "_product", lambda *inputs: pytest.fail("oneDNN was asked"))
    assert onednn_computes(torch.zeros(1)) and not onednn_computes(torch.zeros(1).bfloat16())
    assert not onednn_computes(torch.zeros(1).double())
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    assert torch.equal(by_rows(x, weight, None), torch.nn.functional.linear(x, weight))


def test_other_precisions_are_torchs_own() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    assert torch.equal(by_rows(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
