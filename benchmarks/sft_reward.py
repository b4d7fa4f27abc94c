"""Tokens a second of stages 1 and 2, Tercet against TRL's SFTTrainer and RewardTrainer, taking turns within one run.

    python benchmarks/sft_reward.py --peer-python TRL_ENV/bin/python --model MODEL --data FOLDER

MODEL is a checkpoint folder; FOLDER has sft.jsonl.gz (prompt, response) and preferences.jsonl.gz (prompt, chosen, rejected). Both
sides make the same number of optimizer steps of 32 records at most 256 tokens long, in the same precision; only real tokens count.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from pathlib import Path

from protocol import Worker

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="the Python of an environment with trl==1.12.0")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tercet-benchmarks")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for stage, file in (("sft", "sft.jsonl.gz"), ("reward", "preferences.jsonl.gz")):
        records = options.folder / f"{stage}.jsonl"
        with gzip.open(options.data / file, "rt", encoding="utf-8") as lines:
            records.write_text("".join(line for _, line in zip(range(2_000), lines)), encoding="utf-8")
        wanted = {"sft": ("prompt", "response"), "reward": ("prompt", "chosen", "rejected")}[stage]
        assert all(key in json.loads(records.read_text().split("\n")[0]) for key in wanted), f"{file} lacks one of {wanted}"
        for dtype in options.dtypes:
            measure(stage, dtype, records, options)


def measure(stage: str, dtype: str, records: Path, options: argparse.Namespace) -> None:
    sides = {"tercet": (sys.executable, "ours_supervised.py"), "trl": (options.peer_python, "peer_supervised.py")}
    workers = {
        side: Worker(
            [python, str(HERE / script), stage, str(options.model), str(records), dtype],
            options.folder / f"{stage}-{side}-{dtype}.log",
        )
        for side, (python, script) in sides.items()
    }
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for worker in workers.values():
        worker.turn()
    for _ in range(options.pairs):
        for side, worker in workers.items():
            turns[side].append(worker.turn())
    for worker in workers.values():
        worker.close()
    print(f"\n{stage}, {dtype}: {options.pairs} turns of ten optimizer steps a side")
    rates = {side: [turn["tokens"] / turn["seconds"] for turn in found] for side, found in turns.items()}
    for side, found in rates.items():
        print(f"  {side:8} {statistics.median(found):8.0f} tokens/s (min {min(found):.0f}, max {max(found):.0f})")
    print(f"  ratio {statistics.median(a / b for a, b in zip(rates['tercet'], rates['trl'])):.2f}")


if __name__ == "__main__":
    main()
