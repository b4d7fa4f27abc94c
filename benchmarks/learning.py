"""Learning per second: the held-out reward-model score that Tercet and TRL's PPOTrainer reach, from the same checkpoints, in the same time.

    python benchmarks/learning.py RUN/sft/model RUN/reward/model PROMPTS --peer-python TRL_ENV/bin/python --seconds 300 --seeds 0 1 2

Both train at once, each on one thread, so that each has the same machine. Every policy on the way is judged by the same code: responses
at temperature 1 to each held-out prompt, their score by the reward model and their KL from the SFT policy in nats; equally often
on both sides, for of more noisy scores the highest is higher. --ours and --peer are settings in JSON, beside which each side has its
own defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tercet.algo.kl import k1, sequence_kl
from tercet.data.batches import microbatches
from tercet.data.records import read_prompts, split
from tercet.data.template import Template
from tercet.generation.native import NativeGenerator
from tercet.generation.sampling import uniforms
from tercet.models.load import load_causal_lm, load_classifier, load_tokenizer
from tercet.models.roles import Policy, ScoreModel

HERE = Path(__file__).parent
MAX_PROMPT = 32
Point = tuple[float, float, float]  # seconds, score, KL


def write_prompts(source: str, policy: str, target: Path, count: int) -> None:
    tokenizer = load_tokenizer(policy)
    template = Template(tokenizer, max_prompt_length=MAX_PROMPT)
    train, held_out = split(read_prompts(source))
    ids = {
        name: [list(template.prompt_ids(record.prompt).ids) for record in part]
        for name, part in (("train", train), ("held_out", held_out[:count]))
    }
    target.write_text(json.dumps(ids))


class Judge:
    """Score and KL of a policy: means over `responses` responses to each held-out prompt, always by the same random numbers."""

    def __init__(self, policy: str, reward: str, prompts: list[list[int]], new_tokens: int, responses: int = 1):
        self.reference, self.reward = Policy(load_causal_lm(policy)), ScoreModel(load_classifier(reward))
        self.reference.freeze()
        self.reward.freeze()
        self.prompts, self.new_tokens = prompts * responses, new_tokens
        self.stop = int(load_tokenizer(policy).eos_token_id)

    @torch.no_grad()
    def __call__(self, folder: str) -> tuple[float, float]:
        policy = Policy(load_causal_lm(folder))
        policy.freeze()
        generator = NativeGenerator(policy, stop_ids=[self.stop], max_new_tokens=self.new_tokens)
        numbers = uniforms(1, "evaluation", 0, range(len(self.prompts)), self.new_tokens)
        sequences = generator.sample(self.prompts, numbers)
        scores, kls = [], []
        for rows in microbatches(sequences.lengths.tolist(), 4096):
            part = sequences.select(rows)
            scores += self.reward(part).tolist()
            kls += sequence_kl(k1(policy(part)[0], self.reference(part)[0]), part.response_mask).tolist()
        return statistics.fmean(scores), statistics.fmean(kls)


def train(options: argparse.Namespace, folder: Path, seed: int) -> None:
    settings = {
        "policy": options.policy,
        "reward": options.reward,
        "every": options.every,
        "seconds": options.seconds,
        "seed": seed,
    }
    settings |= {"ours": json.loads(options.ours), "peer": json.loads(options.peer)}
    sides = {
        "ours": [sys.executable, str(HERE / "ours_learning.py")],
        "peer": [options.peer_python, str(HERE / "peer_learning.py")],
    }
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = {
        side: subprocess.Popen([*command, str(folder), json.dumps(settings)], stdout=log, stderr=subprocess.STDOUT, env=env)
        for side, command in sides.items()
        for log in [(folder / f"{side}.log").open("w")]
    }
    for side, process in running.items():
        if process.wait():
            sys.exit(f"{side} failed: {(folder / f'{side}.log').read_text()[-2000:]}")


def judged(folder: Path, judge: Judge, start: tuple[float, float]) -> list[Point]:
    points: list[Point] = [(0.0, *start)]
    for station in sorted(path for path in folder.iterdir() if path.is_dir()):
        points.append((float(station.name.split("-")[1]), *judge(str(station))))
    return points


def when(points: list[Point], score: float) -> tuple[float, float] | None:
    """Seconds and KL at which the score is first reached, on straight lines between the points."""
    for (t0, s0, k0), (t1, s1, k1_) in zip(points, points[1:]):
        if s1 >= score > s0:
            part = (score - s0) / (s1 - s0)
            return t0 + part * (t1 - t0), k0 + part * (k1_ - k0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", help="the SFT model's folder")
    parser.add_argument("reward", help="the reward model's folder")
    parser.add_argument("prompts")
    parser.add_argument("--peer-python", required=True, help="the Python of an environment with trl==1.12.0")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--every", type=float, default=10, help="seconds of training between two policies that are judged")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=256, help="held-out prompts, at most, that policies are judged on")
    parser.add_argument("--responses", type=int, default=1, help="responses to each held-out prompt: four halve the noise of one")
    parser.add_argument("--ours", default="{}")
    parser.add_argument("--peer", default="{}")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tercet-learning")
    options = parser.parse_args()
    ratios = []
    for seed in options.seeds:
        folder = options.folder / f"seed-{seed}"
        folder.mkdir(parents=True)
        write_prompts(options.prompts, options.policy, folder / "prompts.json", options.held_out)
        train(options, folder, seed)
        held_out = json.loads((folder / "prompts.json").read_text())["held_out"]
        judge = Judge(options.policy, options.reward, held_out, options.new_tokens, options.responses)
        start = judge(options.policy)
        curves = {side: judged(folder / side, judge, start) for side in ("ours", "peer")}
        for side, points in curves.items():
            shown = "  ".join(f"{t:.0f} s {score:+.2f} ({kl:.1f})" for t, score, kl in points)
            print(f"seed {seed} {side}: {shown}", flush=True)
        target = min(max(score for _, score, _ in points) for points in curves.values())
        ours, peer = (when(curves[side], target) for side in ("ours", "peer"))
        if ours is None or peer is None:
            print(f"seed {seed}: nobody got above {target:+.2f}")
            continue
        ratios.append(peer[0] / ours[0])
        shown = f"{ours[0]:.0f} s (KL {ours[1]:.1f}) against {peer[0]:.0f} s (KL {peer[1]:.1f})"
        print(f"seed {seed}: score {target:+.2f} after {shown}: {ratios[-1]:.2f}")
    if ratios:
        print(f"median {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
