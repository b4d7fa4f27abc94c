"""What is in a run folder before a run begins: a run's own files, or somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.config import Config, load_config, to_yaml
from tercet.errors import TercetError
from tercet.folder import require_no_others_files, require_own_folder


def config_of(output: Path) -> Config:
    return load_config({"output": str(output), "model": {"name": "gpt2"}})


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.mark.parametrize("name", ["reward/train.py", "pretrain/corpus.jsonl", "summary.json", "report.html", "config.yaml"])
def test_what_no_run_has_made_is_refused(name: str, tmp_path: Path) -> None:
    touch(tmp_path / name)
    with pytest.raises(TercetError, match=f"but has '{name.split('/')[0]}' already.*such as .*/run$"):
        require_no_others_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["notes.txt", "data/pairs.jsonl", "pretrain/model/config.json", "ppo/started.json", "sft/done.json"]
)
def test_what_a_run_has_made_or_does_not_touch_is_not(name: str, tmp_path: Path) -> None:
    touch(tmp_path / name)
    require_no_others_files(tmp_path)
    require_no_others_files(tmp_path / "nowhere")


def test_a_configuration_is_a_runs_own_if_it_is_whole_and_of_this_folder(tmp_path: Path) -> None:
    text = to_yaml(config_of(tmp_path))
    (tmp_path / "config.yaml").write_text(text)
    require_no_others_files(tmp_path)
    for other in (to_yaml(config_of(tmp_path / "run")), text.replace("trackers", "# trackers"), "- a list\n"):
        (tmp_path / "config.yaml").write_text(other)
        with pytest.raises(TercetError, match="but has 'config.yaml' already"):
            require_no_others_files(tmp_path)


def test_a_configuration_whose_folder_was_moved_is_told_where_to_go_on(tmp_path: Path) -> None:
    source = tmp_path / "copy/config.yaml"
    touch(source)
    require_own_folder(source, tmp_path / "run")  # no run has begun beside it: a file of the user's
    touch(tmp_path / "copy/sft/started.json")
    require_own_folder(source, tmp_path / "copy")
    require_own_folder(tmp_path / "copy/mine.yaml", tmp_path / "run")
    with pytest.raises(TercetError, match=f"--set output={tmp_path}/copy to go on here, or --set output={tmp_path}/run"):
        require_own_folder(source, tmp_path / "run")
