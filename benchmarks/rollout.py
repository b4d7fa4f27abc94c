"""Tokens a second of sampling, Tercet's decode loop against transformers' `generate`, taking turns on the same model.

    python benchmarks/rollout.py gpt2 tiny --batches 16 64 256

Both sample 48 tokens for each prompt from softmax(logits) without end tokens, `generate` with its own best setting: dynamic cache,
SDPA, in float32 and, where the processor computes in it, in bfloat16. The floor is the time to read the weights once a step and to do
the arithmetic, at the rates measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from workloads import EOS, PAD, WORKLOADS, prepare

from tercet.algo.products import onednn_computes
from tercet.generation.native import NativeGenerator
from tercet.generation.sampling import uniforms
from tercet.models.roles import Policy
from tercet.runtime.machine import measured_rate, resolve

TOKENS = 48


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_rate() -> float:
    """Bytes a second at which memory is read, from summing 512 MiB."""
    block = torch.ones(2**27)
    return 2**29 / min(seconds(block.sum) for _ in range(5))


def measure(name: str, batch: int, folder: Path, pairs: int) -> None:
    workload = WORKLOADS[name]
    prepare(workload, folder / name)
    source = folder / name / "policy"
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    machine = resolve("auto", "auto", "auto", "auto", parameters)
    machine.apply()
    prompts = (json.loads((folder / name / "prompts.json").read_text()) * 2)[:batch]
    policy = Policy(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), machine.dtype).eval()
    policy.freeze()
    generator = NativeGenerator(policy, stop_ids=[], max_new_tokens=TOKENS)
    numbers = uniforms(0, "rollout", 0, range(batch), TOKENS)
    sides: dict[str, Callable[[], object]] = {f"tercet {machine.dtype}": lambda: generator.sample(prompts, numbers)}
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    half = [torch.bfloat16] if onednn_computes(torch.zeros(1).bfloat16()) else []  # elsewhere minutes instead of seconds
    for dtype in (torch.float32, *half):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        model.generation_config.eos_token_id = None

        def generate(model: torch.nn.Module = model) -> object:
            with torch.no_grad():
                return model.generate(
                    ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=TOKENS, pad_token_id=PAD, eos_token_id=None
                )

        sides[f"generate {dtype}"] = generate
    for work in sides.values():
        work()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(pairs):
        for side, work in sides.items():
            times[side].append(seconds(work))
    trunk = sum(p.numel() for p in policy.model.base_model.parameters())
    flops = 2 * trunk * (sum(map(len, prompts)) + batch * (TOKENS - 1))
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    floor = TOKENS * size / read_rate() + flops / measured_rate(machine.dtype, str(machine.device))
    print(f"\n{name}, batch {batch}, {machine.threads} threads (EOS {EOS} never ends a row)")
    ours = next(iter(times))
    for side, found in times.items():
        middle = statistics.median(found)
        ratio = statistics.median(other / own for other, own in zip(found, times[ours]))
        print(f"  {side:26} {batch * TOKENS / middle:9.0f} tokens/s   {ratio:5.2f} times Tercet's time")
    print(f"  floor: {floor:.3f} s, {floor / statistics.median(times[ours]):.0%} of Tercet's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=["tiny", "gpt2"])
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tercet-benchmarks")
    options = parser.parse_args()
    for name in options.workloads:
        for batch in options.batches:
            measure(name, batch, options.folder, options.pairs)


if __name__ == "__main__":
    main()
