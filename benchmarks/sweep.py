"""Does the cost of a token stay the same? One PPO iteration over response length, batch and vocabulary, in seconds per response token.

    python benchmarks/sweep.py [--workload gpt2@epochs=1] [--axes batch vocabulary]

The workload's own sizes (small: GPT-2 of 4 layers x 256, batch 64, 64 new tokens, vocabulary 8,192, one epoch), of which one is changed at a
time. Each value's figure is the median of three iterations after a first one; "times the least" compares the values of one row. Run it on
an idle machine.
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


def measure(name: str, folder: Path, dtype: str, turns: int) -> tuple[float, float]:
    """(seconds per response token, peak memory in MiB)."""
    workload = workload_of(name)
    prepare(workload, folder / name)
    worker = Worker([sys.executable, str(HERE / "ours_ppo.py"), str(folder / name), name, f"{dtype}+auto"], folder / "log")
    worker.turn()
    found = [worker.turn() for _ in range(turns)]
    worker.close()
    seconds = statistics.median(turn["seconds"] for turn in found)
    return seconds / (workload.batch * workload.new_tokens), found[-1]["peak_mib"]  # the end token is as rare as any other


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
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in ((axis, AXES[axis]) for axis in options.axes):
            names = [f"{options.workload}@{axis}={value}" for value in values]
            found = [measure(name, Path(folder), options.dtype, options.turns) for name in names]
            weights = [weights_of(name) for name in names]
            least = min(seconds for seconds, _ in found)
            print(f"\n| {axis} | ms a token | times the least | arithmetic, times the least | peak GiB |\n|---|---|---|---|---|")
            for value, count, (seconds, peak) in zip(values, weights, found):
                more = f"{seconds * 1e3:.3f} | {seconds / least:.2f} | {count / min(weights):.2f}"
                print(f"| {value:,} | {more} | {peak / 1024:.2f} |", flush=True)


if __name__ == "__main__":
    main()
