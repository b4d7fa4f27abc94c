"""Seconds and memory of one PPO iteration, Tercet against TRL's PPOTrainer, taking turns within one run.

    python benchmarks/ppo_iteration.py --peer-python TRL_ENV/bin/python gpt2 ragged tiny

Ratios are medians over pairs of neighbouring turns, the first iteration of each side left out. Without --peer-python only
Tercet is measured. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from protocol import Worker
from workloads import WORKLOADS, prepare

HERE = Path(__file__).parent
PHASES = ("generate_s", "score_s", "update_s")


def measure(name: str, sides: dict[str, list[str]], folder: Path, pairs: int) -> None:
    prepare(WORKLOADS[name], folder / name)
    workers = {
        side: Worker([*command, str(folder / name), name, side.split(":")[1]], folder / f"{name}-{side.replace(':', '-')}.log")
        for side, command in sides.items()
    }
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for worker in workers.values():
        worker.turn()  # the first iteration: allocations, caches
    for _ in range(pairs):
        for side, worker in workers.items():
            turns[side].append(worker.turn())
    for worker in workers.values():
        worker.close()
    print(f"\n{name}: {pairs} turns a side")
    for side, found in turns.items():
        seconds = sorted(turn["seconds"] for turn in found)
        line = f"  {side:22} median {statistics.median(seconds):7.3f} s (min {seconds[0]:.3f}, max {seconds[-1]:.3f})"
        print(f"{line}  peak {found[-1]['peak_mib'] / 1024:.2f} GiB")
        phases = {key: statistics.median(turn[key] for turn in found) for key in PHASES if key in found[-1]}
        if phases:
            print("    " + "  ".join(f"{key.removesuffix('_s')} {value:.3f}" for key, value in phases.items()))
    peers = [side for side in turns if side.startswith("trl")]
    for ours in (side for side in turns if side.startswith("tercet")):
        for peer in peers:
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(turns[ours], turns[peer]))
            memory = turns[ours][-1]["peak_mib"] / turns[peer][-1]["peak_mib"]
            print(f"  {ours} is {ratio:.2f} times as fast as {peer}, in {memory:.2f} of its memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer-python", help="the Python of an environment with trl==1.12.0")
    parser.add_argument("--dtypes", nargs="*", default=["auto+auto", "float32+auto"])
    parser.add_argument("--peer-dtypes", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tercet-benchmarks")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sides = {f"tercet:{dtype}": [sys.executable, str(HERE / "ours_ppo.py")] for dtype in options.dtypes}
    if options.peer_python:
        sides |= {f"trl:{dtype}": [options.peer_python, str(HERE / "peer_ppo.py")] for dtype in options.peer_dtypes}
    for name in options.workloads:
        measure(name, sides, options.folder, options.pairs)


if __name__ == "__main__":
    main()
