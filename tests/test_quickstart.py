"""`tercet quickstart` reaches what it promises, by real training: the embedded world's truth is known, so this can be measured."""

import json
import sys

import pytest
from typer.testing import CliRunner

from tercet.cli import app
from tercet.errors import TercetError
from tercet.quickstart import run_quickstart


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_embedded_world_is_learned_through_all_stages(tmp_path):
    done = CliRunner().invoke(app, ["quickstart", "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    world = json.loads((tmp_path / "run/data/world.json").read_text())
    assert summary["reward.eval_pairs"] >= 2_000
    assert summary["reward.eval_accuracy"] >= world["ceiling"]["known"] - 0.03
    assert summary["gold.ppo"] >= summary["gold.sft"] + summary["gold.sft_std"]
    assert summary["gold.win_rate"] >= 0.75
    assert summary["ppo.finished"] >= 0.95
    assert summary["ppo.distinct2"] >= 0.7 * summary["sft.distinct2"]
    assert "gold.ppo[new]" in summary  # topics never seen in training are reported apart
    assert (tmp_path / "run/report.html").exists() and "report.html" in done.output.replace("\n", "")


@pytest.mark.parametrize("name", ["q #1", "a: b", "[draft]", 'it\'s "q" \\', "été 🌧"])
def test_the_output_is_taken_literally(name, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(pipeline, from_stage=None):
        raise Stopped(pipeline.config.output, pipeline.config.data.prompts)

    monkeypatch.setattr("tercet.quickstart.Pipeline.run", stop)
    monkeypatch.setattr("tercet.quickstart.generate", lambda folder, seed: (folder.mkdir(), (folder / "prompts.jsonl").touch()))
    with pytest.raises(Stopped) as caught:
        run_quickstart(tmp_path / name)
    assert caught.value.args == (str(tmp_path / name), str(tmp_path / name / "data/prompts.jsonl"))


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_an_output_that_cannot_be_written_is_named(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TercetError, match=f"{place} cannot be written .*choose another place with --output"):
        run_quickstart(tmp_path / place)


@pytest.mark.parametrize("name", ["data/demonstrations.jsonl", "quickstart.yaml"])
def test_other_peoples_files_are_not_written_over(name, tmp_path, monkeypatch):
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("mine")
    with pytest.raises(TercetError, match=f"has '{name.split('/')[0]}' already, which is not the quickstart's"):
        run_quickstart(tmp_path)
    assert own.read_text() == "mine" and [path for path in tmp_path.rglob("*") if path.is_file()] == [own]


def test_data_of_two_seeds_are_never_mixed(tmp_path, monkeypatch):
    """Killed while it writes another seed's world, it does not take the half that is there for a whole."""
    from tercet.world import Sizes, generate

    module = sys.modules[generate.__module__]
    small = Sizes(**dict.fromkeys(vars(Sizes()), 8))
    generate(tmp_path, seed=0, sizes=small)

    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, seed=1, sizes=small)
    assert not (tmp_path / "world.json").exists()
