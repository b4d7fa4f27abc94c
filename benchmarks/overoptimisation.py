"""Where PPO over-optimises: runs with few and many comparisons and with several kl_coef, and their figures in one table.

    python benchmarks/overoptimisation.py world FOLDER --comparisons 64 256 1024 4096 --seeds 0
    python benchmarks/overoptimisation.py world FOLDER --coefs 0.02 0.05 0.1 0.2 0.5 --seeds 0 1 2
    python benchmarks/overoptimisation.py CONFIG.yaml FOLDER --comparisons 256 4096 --coefs 0.02 0.1 0.3 --seeds 0

`world` is the embedded one, whose gold score is known. Elsewhere the judge is a reward model on 5,000 comparisons that no run trains
on. Cells share the stages before the first setting in which they differ. Killed, the same command goes on; FOLDER keeps the runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tercet.config import load_config
from tercet.data.records import Comparison, read_comparisons, split
from tercet.world import generate

FOR_THE_JUDGE = 5_000
Settings = list[str]


def tercet(command: str, config: Path, folder: Path, settings: Sequence[str]) -> None:
    options = [part for setting in (f"output={folder}", *settings) for part in ("--set", setting)]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        subprocess.run([sys.executable, "-m", "tercet.cli", command, str(config), *options], stdout=log, stderr=log, check=True)


def begun_from(parent: Path, folder: Path) -> Path:
    """A run folder with the stages of another one."""
    if not folder.exists():
        shutil.copytree(parent, folder.with_name(f".{folder.name}"), dirs_exist_ok=True)
        folder.with_name(f".{folder.name}").rename(folder)
    return folder


def world(folder: Path, seed: int) -> Path:
    """The embedded world's data with the quickstart's configuration."""
    config = folder / "tercet.yaml"
    if not config.exists():
        generate(folder / "data", seed=seed)
        config.write_text(resources.files("tercet").joinpath("quickstart.yaml").read_text(encoding="utf-8"))
    return config


def lines(records: Sequence[Comparison]) -> str:
    rows = ({"prompt": one.prompt, "responses": list(one.responses), "ranks": list(one.ranks)} for one in records)
    return "".join(json.dumps(row) + "\n" for row in rows)


def with_comparisons(config: Path, folder: Path, sizes: Sequence[int], own_judge: bool) -> dict[int, Settings]:
    """Settings for each size: the first so many comparisons that are not held out; always the same ones held out."""
    data = load_config(config).data
    train, held_out = list(read_comparisons(str(data.comparisons))), None
    if data.eval_comparisons is None:
        train, held_out = split(train, data.held_out)
        (folder / "held_out.jsonl").write_text(lines(held_out))
    if own_judge:
        (folder / "for_the_judge.jsonl").write_text(lines(train[-FOR_THE_JUDGE:]))
        train = train[:-FOR_THE_JUDGE]
    found = {}
    for size in sizes:
        if size > len(train):
            sys.exit(f"{size} comparisons wanted, but there are {len(train)}")
        (folder / f"comparisons-{size}.jsonl").write_text(lines(train[:size]))
        found[size] = [f"data.comparisons={folder}/comparisons-{size}.jsonl", "reward.judge=false"]
        found[size] += [f"data.eval_comparisons={folder}/held_out.jsonl"] if held_out is not None else []
    return found


def run_seed(source: str, folder: Path, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All cells of one seed, one after the other; the figures of each."""
    folder.mkdir(parents=True, exist_ok=True)
    config = world(folder, seed) if source == "world" else Path(source)
    common = [f"seed={seed}", *options.set]
    base = folder / "base"
    base.mkdir(exist_ok=True)
    for stage in ("pretrain", "sft") if source == "world" else ("sft",):
        tercet(stage, config, base, common)
    subsets: dict[int | None, Settings] = {None: []}
    if options.comparisons:
        subsets = dict(with_comparisons(config, folder, options.comparisons, source != "world"))
    if options.comparisons and source != "world":
        judge = begun_from(base, folder / "judge")
        others = [f"data.comparisons={folder}/for_the_judge.jsonl", "reward.judge=false"]
        tercet("reward", config, judge, [*common, *others])
        common.append(f"evaluation.judges={{independent: {{kind: classifier, model: {judge}/reward/model}}}}")
    rows = []
    for size, settings in subsets.items():
        scored = begun_from(base, folder / f"comparisons-{size or 'all'}")
        tercet("reward", config, scored, [*common, *settings])
        for coef in options.coefs:
            run = begun_from(scored, folder / f"comparisons-{size or 'all'}-coef-{coef:g}")
            tercet("run", config, run, [*common, *settings, f"ppo.kl.coef={coef}"])
            rows.append({"seed": seed, "comparisons": size or "all", "coef": coef, **figures(run)})
            print(line(rows[-1]), flush=True)
    return rows


def figures(run: Path) -> dict[str, Any]:
    """What PPO and best-of-n gained over SFT, by the training score and by the judge, and where the judge turned down."""
    summary = json.loads((run / "summary.json").read_text())
    path = json.loads((run / "evaluation/path.json").read_text())
    best_of_n = json.loads((run / "evaluation/best_of_n.json").read_text())["curve"][-1]
    last = path["points"][-1]
    judge = next(name for name in ("gold", "independent", "judge") if f"{name}_gain" in last)
    top = max(path["points"], key=lambda point: point[judge])
    turn = path["turns"].get(judge)
    return {
        "accuracy": summary["reward.eval_accuracy"],
        "kl": last["kl"],
        "score_gain": last["score_gain"],
        "gain": [last[f"{judge}_gain{end}"] for end in ("", "_low", "_high")],
        "top": [top["iteration"], top["kl"], top[f"{judge}_gain"]],
        "turn": None if turn is None else [turn["kl"], turn["low"], turn["high"]],
        "best_of": [best_of_n["n"], best_of_n["kl"], *(best_of_n[f"{judge}_gain{end}"] for end in ("", "_low", "_high"))],
    }


COLUMNS = ("seed", "comparisons", "kl_coef", "pair accuracy", "KL at the end", "score's gain", "judge's gain (95 %)")
COLUMNS += ("highest on the way", "turns down", "best of n")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(row: dict[str, Any]) -> str:
    gain, top, turn, best = row["gain"], row["top"], row["turn"], row["best_of"]
    cells = [f"{row['seed']}", f"{row['comparisons']}", f"{row['coef']:g}", f"{row['accuracy']:.3f}", f"{row['kl']:.2f}"]
    cells += [f"{row['score_gain']:+.2f}", f"{gain[0]:+.2f} ({gain[1]:+.2f} to {gain[2]:+.2f})"]
    cells += [f"{top[2]:+.2f} at {top[1]:.2f} nats"]
    cells += ["no" if turn is None else f"at {turn[0]:.2f} nats (iterations {turn[1]} to {turn[2]})"]
    cells += [f"n = {best[0]}: {best[2]:+.2f} ({best[3]:+.2f} to {best[4]:+.2f}) at {best[1]:.2f} nats"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="world, or a configuration file")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comparisons", type=int, nargs="*", default=[], help="sizes; without: all of the data's")
    parser.add_argument("--coefs", type=float, nargs="*", default=[0.05])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--set", action="append", default=[], help="a setting for every run: section.key=value")
    options = parser.parse_args()
    folder = options.folder.resolve()
    rows = [row for seed in options.seeds for row in run_seed(options.source, folder / f"seed-{seed}", seed, options)]
    print("\n" + HEADER + "\n" + "\n".join(map(line, rows)))


if __name__ == "__main__":
    main()
