import json
import math
from pathlib import Path

import pytest

from tercet.report.load import RunData, load_run, number


def test_number_takes_finite_figures_only() -> None:
    assert number(3) == 3.0 and number(True) == 1.0 and number(-0.5) == -0.5
    for broken in (math.nan, math.inf, -math.inf, "1", None, [1], 1e31, 10**400):
        assert number(broken) is None


def test_every_part_is_read(new_run) -> None:
    run = load_run(new_run("toy", steps=9, iterations=5, count=4))
    assert run.name == "toy" and "coef: 0.05" in run.config and not run.problems
    assert [len(run.metrics[stage]) for stage in ("pretrain", "sft", "reward", "ppo")] == [0, 9, 9, 5]
    assert len(run.samples) == 4 and run.wins["gold"]["n"] == 500 and len(run.timings["sft"]) == 30
    assert run.series("ppo", "length")[0] == [1, 2, 3, 4, 5]


def test_value_prefers_the_summary_and_falls_back_on_the_policy() -> None:
    run = RunData(summary={"ppo.kl": 3.0, "sft.kl": math.nan}, policies={"ppo": {"kl": 9.0, "length": 20}, "sft": {"kl": 0.5}})
    assert run.value("ppo.kl") == 3.0 and run.value("ppo.length") == 20 and run.value("sft.kl") == 0.5
    assert run.value("base.kl") is None and run.value("seconds") is None


def test_series_keeps_broken_values_as_gaps_and_counts_by_line_without_a_counter() -> None:
    run = RunData(metrics={"sft": [{"loss": 1.0}, {"loss": math.nan}, {"other": 1}, {"step": 9, "loss": 2}]})
    xs, ys = run.series("sft", "loss")
    assert xs == [0, 1, 9] and ys[0] == 1.0 and math.isnan(ys[1]) and ys[2] == 2.0
    assert run.finite("sft", "loss") == [1.0, 2.0]


def test_groups_are_told_from_headline_figures() -> None:
    run = RunData(summary={"win_rate": 0.8, "win_rate[new]": 0.6, "gold.ppo[a[b]]": 1, "x[new]": "text", "[y]": 1})
    assert run.groups() == {"new": {"win_rate": 0.6}, "a[b]": {"gold.ppo": 1.0}}


def test_damaged_files_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("[1, 2]")
    (tmp_path / "sft").mkdir()
    # U+2028 inside a string is one line of JSON; a write cut short by a crash leaves half a line.
    good = json.dumps({"step": 1, "loss": 2.0, "note": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "sft/metrics.jsonl").write_bytes(good.encode() + b'\n{"step": 2, "lo\n7\n\xff\xfe\n')
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo/metrics.jsonl").mkdir()
    run = load_run(tmp_path)
    assert run.metrics["sft"] == [{"step": 1, "loss": 2.0, "note": "a\u2028b"}] and run.summary == {}
    assert len(run.problems) == 3
    assert "summary.json" in run.problems[0] and "3 of 4 lines of sft/metrics.jsonl" in run.problems[1]
    assert "ppo/metrics.jsonl" in run.problems[2]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        load_run(tmp_path / "nowhere")
