"""One page for several runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pages import HOSTILE, Page, hostile

from tercet.report.compare import settings_of, write_comparison


def changed(folder: Path, name: str, **figures: float) -> Path:
    """A copy of the run with another kl_coef and other figures."""
    copy = Path(shutil.copytree(folder, folder.parent / name / "run"))
    (copy / "config.yaml").write_text("name: toy\nseed: 0\nppo:\n  kl:\n    coef: 0.4\n  stop:\n  - END\n")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | figures))
    return copy


def test_two_runs_side_by_side(new_run, tmp_path: Path) -> None:
    first = new_run("first/run", steps=30, iterations=20, count=20)
    second = changed(first, "second", **{"ppo.kl": 0.1, "win_rate": 0.42})
    target = write_comparison([first, second], tmp_path / "deep/compare.html")
    html = target.read_text(encoding="utf-8")
    page = Page(html)
    assert "2 runs side by side" in html and page.count("script") == 0 and len(html) < 500_000
    assert ">first/run<" in html and ">second/run<" in html, "names by which the two can be told apart"
    cells = [words.strip() for words in page.words if words.strip()]
    assert cells[cells.index("ppo.kl.coef") + 1 :][:2] == ["0.05", "0.4"]
    assert cells[cells.index("ppo.stop.0") + 1 :][:2] == ["–", "END"] and "seed" not in cells
    assert cells[cells.index("PPO preferred to SFT") + 1 :][:2] == [
        "84.6\u202f% (81.2\u202f% to 87.7\u202f%)",
        "42.0\u202f% (81.2\u202f% to 87.7\u202f%)",
    ]
    assert "PPO never left the reference" in html and "Healthy" in html
    for title in ("Training reward", "KL", "Gold score", "Second reward model’s score"):
        assert f"<b>{title}</b>" in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and not list(target.parent.glob(".compare*"))


def test_what_is_not_set_is_no_other_setting_than_what_is_absent(new_run, tmp_path: Path) -> None:
    first = new_run("first/run", steps=6, iterations=4)
    second = changed(first, "second")
    with (second / "config.yaml").open("a") as file:
        file.write("some: {thing: null, other: 1}\n")
    cells = [words.strip() for words in Page(write_comparison([first, second], tmp_path / "c.html").read_text()).words]
    assert "some.other" in cells and "some.thing" not in cells


def test_runs_with_nothing_in_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    html = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "c.html").read_text()
    assert "Nothing has run yet" in html and "All settings are the same" in html and Page(html).count("figure") == 0


def test_a_folder_without_a_run_is_refused(new_run, tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    with pytest.raises(FileNotFoundError, match="holiday is no run folder: it has no config.yaml"):
        write_comparison([new_run(), tmp_path / "holiday"], tmp_path / "c.html")


def test_hostile_text_is_shown_and_not_run(new_run, tmp_path: Path) -> None:
    run = hostile(new_run("hostile", steps=6, iterations=4))
    html = write_comparison([run, new_run("other", steps=6, iterations=4)], tmp_path / "c.html").read_text(encoding="utf-8")
    assert Page(html).count("script") == 0 and HOSTILE[:30] not in html


def test_how_many(new_run, tmp_path: Path) -> None:
    run = new_run(steps=3, iterations=3, count=3)
    for folders in ([run], [run] * 7):
        with pytest.raises(ValueError, match="2 to 6 runs"):
            write_comparison(folders, tmp_path / "c.html")
    html = write_comparison([run] * 6, tmp_path / "c.html").read_text()
    assert all(f"run {place}" in html for place in range(1, 7)), "the same folder several times: numbered"
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        write_comparison([run, tmp_path / "nowhere"], tmp_path / "c.html")


def test_settings_of_a_written_configuration() -> None:
    text = "a: 1\nppo:\n  kl:\n    coef: 0.1\n  stop:\n  - END\n  - '##'\n  rewards:\n  - kind: stage\n    model: null\n"
    text += "  - kind: function\n    function: /x/a.py:f\n  score: 3\n# a comment\nz: []\n"
    assert settings_of(text) == {
        "a": "1",
        "ppo.kl.coef": "0.1",
        "ppo.stop.0": "END",
        "ppo.stop.1": "##",
        "ppo.rewards.0.kind": "stage",
        "ppo.rewards.0.model": "null",
        "ppo.rewards.1.kind": "function",
        "ppo.rewards.1.function": "/x/a.py:f",
        "ppo.score": "3",
        "z": "[]",
    }
    assert settings_of("") == {} and settings_of(HOSTILE) is not None


def test_settings_are_those_that_a_run_writes() -> None:
    """Against a real configuration written out: every leaf of it, under its own name."""
    from tercet.config import load_config, to_yaml

    config = load_config({"model": {"name": "gpt2"}, "ppo": {"stop": ["a", "b"], "kl": {"coef": 0.3}}})
    found = settings_of(to_yaml(config))
    assert found["ppo.kl.coef"] == "0.3" and found["ppo.rewards.0.kind"] == "stage" and found["ppo.stop.1"] == "b"
    assert found["model.name"] == "gpt2" and found["evaluation.prompts"] == "500"
