"""Does the cost of a token stay the same? One PPO iteration over response length, batch and vocabulary, in seconds per response token.

    python benchmarks/sweep.py [--workload gpt2@epochs=1] [--axes batch vocabulary]

The workload's own sizes (small: GPT-2 of 4 layers x 256, batch 64, 64 new tokens, vocabulary 8,192, one epoch), of which one is changed at a
time. Each value's figure is the median of three iterations after a first one, the values taking turns, each in a process of its own (all at
once in memory: --values takes fewer of one axis); "times the least" compares the values of one row. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from protocol import Worker
from workloads import prepare, workload_of

HERE = Path(__file__).parent
AXES = {"new_tokens": (32, 64, 128, 256, 512), "batch": (16, 64, 256), "vocabulary": (2_048, 8_192, 32_768, 150_000)}


def measure(names: list[str], folder: Path, dtype: str, turns: int) -> list[tuple[float, float]]:
    """(seconds per response token, peak memory in MiB) of each workload."""
    workers = []
    for name in names:
        prepare(workload_of(name), folder / name)
        worker = Worker(
            [sys.executable, str(HERE / "ours_ppo.py"), str(folder / name), name, f"{dtype}+auto"], folder / f"{name}.log"
        )
        worker.turn()
        workers.append(worker)
    found = [[worker.turn() for worker in workers] for _ in range(turns)]
    for worker in workers:
        worker.close()
    figures = []
    for name, own in zip(names, zip(*found)):
        workload = workload_of(name)
        seconds = statistics.median(turn["seconds"] for turn in own)
        # The end token is as rare as any other.
        figures.append((seconds / (workload.batch * workload.new_tokens), own[-1]["peak_mib"]))
    return figures


def weights_of(name: str) -> int:
    """Weights that a response token is multiplied with, by policy and reference (with the head), reward and value model (without)."""
    workload = workload_of(name)
    trunk, head = 12 * workload.layers * workload.width**2, workload.vocabulary * workload.width
    # Sampling; scoring by four models, two of them with a head; an epoch's forward and backward passes of two models, one with a head.
    return trunk * (1 + 4 + 6 * workload.epochs) + head * (1 + 2 + 3 * workload.epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="small", help="one of workloads.py, or a changed one")
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--values", nargs="*", type=int, help="instead of the axis's own, of one axis")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in ((axis, options.values or AXES[axis]) for axis in options.axes):
            names = [f"{options.workload}@{axis}={value}" for value in values]
            found = measure(names, Path(folder), options.dtype, options.turns)
            weights = [weights_of(name) for name in names]
            least = min(seconds for seconds, _ in found)
            print(f"\n| {axis} | ms a token | times the least | arithmetic, times the least | peak GiB |\n|---|---|---|---|---|")
            for value, count, (seconds, peak) in zip(values, weights, found):
                more = f"{seconds * 1e3:.3f} | {seconds / least:.2f} | {count / min(weights):.2f}"
                print(f"| {value:,} | {more} | {peak / 1024:.2f} |", flush=True)


if __name__ == "__main__":
    main()
