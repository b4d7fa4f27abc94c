import math
import re
from xml.dom.minidom import parseString

import pytest

from tercet.report.plots import Line, Mark, draw, smooth, thin


def test_moving_average_by_hand() -> None:
    assert smooth([1, 2, 6, 3], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    gapped = smooth([1, math.nan, 3], 3)
    assert gapped[0] == 1 and math.isnan(gapped[1]) and gapped[2] == 3


def test_thinning_keeps_every_spike_and_the_order() -> None:
    ys = [0.0] * 10_000
    ys[1234], ys[7777], ys[5000] = 9.0, -9.0, math.nan
    xs, kept = thin(list(range(10_000)), ys)
    assert len(kept) <= 600 and 9.0 in kept and -9.0 in kept and list(xs) == sorted(xs)
    assert thin([1, 2], [3, 4]) == ([1, 2], [3, 4])


@pytest.mark.parametrize(
    "ys",
    [[1.0], [2.0, 2.0], [math.nan, 1.0], [0.0] * 3, [-1e29, 1e29], [1e-12, 2e-12], [float(i) for i in range(2000)]],
    ids=["one", "equal", "gap", "zeros", "huge", "tiny", "long"],
)
def test_any_series_gives_well_formed_svg_in_the_pages_colours(ys) -> None:
    lines = [Line(range(len(ys)), ys, "training"), Line([0], [1.0], "held-out", "held-out")]
    svg = draw("a-b", lines, x_label="step", label='loss "<&', marks=[Mark(0.5, "a coin")])
    root = parseString(svg).documentElement
    assert root.getAttribute("role") == "img" and root.getAttribute("aria-label") == 'loss "<&'
    assert "var(--ppo)" in svg and "var(--eval)" in svg and "var(--rule)" in svg and "#0102" not in svg
    assert "<style" not in svg and "<metadata" not in svg and "nan" not in svg.lower()
    assert len(svg) < 60_000


def test_ids_are_apart_and_all_references_meet_one() -> None:
    one, two = (draw(name, [Line([1, 2], [1, 2], "x")], x_label="step", label="x") for name in ("first", "second"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, known in zip((one, two), ids, strict=True):
        assert set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", svg)) <= known
    assert one == draw("first", [Line([1, 2], [1, 2], "x")], x_label="step", label="x")  # the same page every time


def test_ids_hold_no_markup_and_stay_apart() -> None:
    names = ("a_b", "a-b", "a b", '"><h1>&', "\ud800")
    drawn = {name: draw(name, [Line([1, 2], [1, 2], "x")], x_label="step", label="x") for name in names}
    ids = {name: set(re.findall(r'\bid="([^"]*)"', svg)) for name, svg in drawn.items()}
    assert all(re.fullmatch(r"[A-Za-z0-9-]+?-[\w.]+", one) for known in ids.values() for one in known)
    assert len(set.union(*ids.values())) == sum(map(len, ids.values())) and all(ids.values())
    for svg in drawn.values():
        assert parseString(svg).getElementsByTagName("h1") == []
