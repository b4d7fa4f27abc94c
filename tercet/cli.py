"""The command line: each command is one call into the floor below."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tercet.errors import Interrupted, TercetError

if TYPE_CHECKING:
    from tercet.config import Config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Learning from human preferences: SFT, a reward model from comparisons, PPO.",
    pretty_exceptions_enable=False,
)
ConfigFile = Annotated[Path, typer.Argument(help="the configuration, a YAML file")]
Set = Annotated[
    list[str], typer.Option("--set", help="override a setting: section.key=value", default_factory=list, show_default=False)
]
From = Annotated[str | None, typer.Option("--from", help="redo this stage and those after it")]


@app.command()
def init(file: Annotated[Path, typer.Argument(help="where to write it")] = Path("tercet.yaml")) -> None:
    """Write a commented configuration file."""
    from tercet.config import commented_yaml

    if file.exists():
        raise TercetError(f"{file} exists already: remove it first, or name another file")
    try:
        file.write_text(commented_yaml(), encoding="utf-8")
    except OSError as error:
        raise TercetError(f"{file} cannot be written ({error.strerror}): choose another place") from None
    print(f"{file} written. Set model.name and the files under data:, then: tercet run {file}")


@app.command()
def run(config: ConfigFile, settings: Set, from_stage: From = None) -> None:
    """All stages that the configuration has data for; finished ones are skipped."""
    _run(config, settings, None, from_stage)


@app.command()
def pretrain(config: ConfigFile, settings: Set, from_stage: From = None) -> None:
    """Language modelling from scratch (where model.scratch is set)."""
    _run(config, settings, ["pretrain"], from_stage)


@app.command()
def sft(config: ConfigFile, settings: Set, from_stage: From = None) -> None:
    """Stage 1: supervised fine-tuning on demonstrations."""
    _run(config, settings, ["sft"], from_stage)


@app.command()
def reward(config: ConfigFile, settings: Set, from_stage: From = None) -> None:
    """Stage 2: a reward model from comparisons."""
    _run(config, settings, ["reward"], from_stage)


@app.command()
def ppo(config: ConfigFile, settings: Set, from_stage: From = None) -> None:
    """Stage 3: PPO against the reward, with a KL penalty to the SFT policy."""
    _run(config, settings, ["ppo"], from_stage)


@app.command()
def evaluate(config: ConfigFile, settings: Set, from_stage: From = None) -> None:
    """Base, SFT and PPO on held-out prompts."""
    _run(config, settings, ["evaluate"], from_stage)


@app.command()
def report(config: ConfigFile, settings: Set) -> None:
    """Write report.html anew from the run folder."""
    from tercet.pipeline import Pipeline
    from tercet.runtime.files import disk_errors_explained

    pipeline = Pipeline(_load(config, settings))
    with disk_errors_explained(pipeline.folder):
        print(pipeline.write_report())


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="run folders, two to six")],
    output: Annotated[Path, typer.Option(help="where to write the page")] = Path("compare.html"),
) -> None:
    """One page for several runs: verdicts, figures with intervals, settings that differ, curves."""
    from tercet.report import write_comparison

    try:
        print(write_comparison(folders, output))
    except (FileNotFoundError, ValueError) as error:
        raise TercetError(str(error)) from None
    except OSError as error:
        raise TercetError(f"{output} cannot be written ({error.strerror}): choose another place with --output") from None


@app.command()
def doctor(
    config: ConfigFile,
    settings: Set,
    quick: Annotated[
        bool, typer.Option("--quick", help="without the dry run, which takes the first steps of each stage")
    ] = False,
) -> None:
    """Everything that can be known to be wrong before hours are spent; memory and time that each stage will take."""
    from tercet.config import load_config
    from tercet.doctor import examine

    try:
        fine = examine(load_config(config, settings), quick=quick)
    except (Interrupted, KeyboardInterrupt):
        print("stopped; doctor keeps nothing of what it did", file=sys.stderr)
        raise typer.Exit(130) from None
    if not fine:
        raise typer.Exit(2)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="a prompt; may be given several times")],
    stage: Annotated[
        list[str],
        typer.Option(
            "--stage",
            help="sft, ppo, base, best or one of evaluation.policies; by default the first three",
            default_factory=list,
            show_default=False,
        ),
    ],
    seed: Annotated[int, typer.Option(min=0, help="of the random numbers, shared by all stages")] = 0,
) -> None:
    """Sample responses of the run's policies side by side, with reward scores."""
    from tercet.sampler import sample_side_by_side

    sample_side_by_side(folder, prompt, stage, seed)


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="the run folder")] = Path("runs/quickstart"),
    settings: Annotated[list[str] | None, typer.Option("--set", help="override a setting: section.key=value")] = None,
    from_stage: From = None,
) -> None:
    """The embedded world: a tiny model from scratch through all stages, offline, in minutes."""
    from tercet.quickstart import run_quickstart

    with _stopped_at_once():
        run_quickstart(output, settings or [], from_stage)


def _run(config: Path, settings: list[str], stages: list[str] | None, from_stage: str | None) -> None:
    from tercet.pipeline import Pipeline
    from tercet.table import print_summary

    with _stopped_at_once():
        result = Pipeline(_load(config, settings)).run(stages, from_stage)
    print_summary(result)


def _load(config: Path, settings: list[str]) -> Config:
    from tercet.config import load_config
    from tercet.folder import require_own_folder

    loaded = load_config(config, settings)
    if not any(setting.partition("=")[0].strip() == "output" for setting in settings):
        require_own_folder(config, Path(loaded.output))
    return loaded


@contextmanager
def _stopped_at_once() -> Iterator[None]:
    """Say how to go on after a second signal. Here and not in `main`, because typer keeps KeyboardInterrupt to itself."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None


def _without_passwords(text: str) -> str:
    """Messages quote what was configured, and libraries what they asked for: an address may hold a password."""
    return re.sub(r"(:/{1,2})[^/\s@]+@", r"\1***@", text)


def main() -> None:
    """Entry point: a TercetError is one message and status 2; an interrupted run says how to go on."""
    try:
        app()
    except TercetError as error:
        print(f"error: {_without_passwords(str(error))}", file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print("stopped; the state is saved, and the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
