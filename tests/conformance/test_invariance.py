"""Whatever the padding, row order, micro-batches, neighbours and processes: the same loss, gradients, metrics and weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from tercet.generation.native import NativeGenerator
from tercet.generation.sampling import uniforms
from tercet.types import Experience

sys.path.insert(0, str(Path(__file__).parent))
import worker

# Tokens per forward: all rows at once, ragged cuts by length, one row at a time.
BUDGETS = [4096, 33, 20, 1]
LEARNING_RATE = 1e-3  # of every step below
STEPS = {"sft": 2, "reward": 2, "ppo": 2 * 2 + 2 * 14}  # optimizer steps of worker.py's stages
ALL_DTYPES = pytest.mark.parametrize("experience", [torch.float64, torch.float32], indirect=True, ids=["float64", "float32"])


@dataclass
class Step:
    """What one optimizer step over the whole batch gives, of both models."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class Watched(tiny.Recorder):
    """The optimizer, with a record of the gradient that it was given."""

    def step(self, learning_rate: float) -> float:
        gradients = {name: p.grad for name, p in self.module.named_parameters()}
        super().step(learning_rate)
        for name, parameter in self.module.named_parameters():
            parameter.grad = gradients[name]
        return tiny.optimizer_of(self.module).step(learning_rate)


def one_step(experience: Experience, **options: Any) -> Step:
    actors = tiny.actors_of(dtype=experience.logprobs.dtype)
    config = tiny.ppo_config(ppo_epochs=1, rollout_batch_size=len(experience.sequences))
    models = actors.policy, actors.value_model
    with torch.no_grad():  # away from ratio 1, so that the ratio and both clips take part
        for model in models:
            model.model.transformer.wte.weight.mul_(1.05)
    policy, value = (Watched(model) for model in models)
    progress = tiny.update_of(experience, actors, config, policy_optimizer=policy, value_optimizer=value, **options)
    gradients, weights = (
        {f"{i}.{name}": tensor for i, part in enumerate(parts) for name, tensor in part.items()}
        for parts in ([policy.gradients[0], value.gradients[0]], map(tiny.weights, models))
    )
    return Step(progress.metrics(), gradients, weights)


@pytest.fixture(scope="module")
def experience(request: pytest.FixtureRequest) -> Experience:
    found = tiny.rollout_of(tiny.actors_of(dtype=request.param), tiny.ppo_config(rollout_batch_size=8)).experience
    assert len(set(found.sequences.lengths.tolist())) > 2 and found.logprobs.dtype is request.param  # ragged
    return found


def same(found: Step, wanted: Step) -> None:
    """In float64 everything to 1e-9; in float32 losses to 1e-5 and weights to a hundredth of the learning rate."""
    assert wanted.metrics["approx_kl"] > 1e-6 and wanted.metrics["policy_loss"] != 0
    if next(iter(wanted.weights.values())).dtype is torch.float64:
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-9, abs=1e-13)
        assert tiny.largest_gap(found.gradients, wanted.gradients) < 1e-9
        assert tiny.largest_gap(found.weights, wanted.weights) < 1e-9
    else:
        losses = {name: value for name, value in wanted.metrics.items() if name.endswith("loss")}
        assert {name: found.metrics[name] for name in losses} == pytest.approx(losses, rel=1e-5, abs=1e-6)
        assert furthest(found.weights, wanted.weights) < 1e-2 * LEARNING_RATE


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of two weights."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@ALL_DTYPES
@pytest.mark.parametrize("tokens", BUDGETS)
def test_micro_batches(experience: Experience, tokens: int) -> None:
    """Section 3, row 17: a mean of micro-batch means would be tens of per cent off."""
    same(one_step(experience, tokens=tokens), one_step(experience))


@ALL_DTYPES
@pytest.mark.parametrize("split", [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [5, 1, 2]])
def test_micro_batches_cut_by_hand(experience: Experience, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """1x8, 2x4, 4x2, 8x1 and a ragged cut."""
    wanted = one_step(experience)

    def cut(lengths: Any, tokens: int) -> list[list[int]]:
        rows = iter(range(sum(split)))
        return [[next(rows) for _ in range(size)] for size in split]

    monkeypatch.setattr("tercet.stages.update.microbatches", cut)
    same(one_step(experience), wanted)


@ALL_DTYPES
def test_row_order(experience: Experience) -> None:
    same(one_step(experience.select([5, 2, 7, 0, 1, 6, 4, 3])), one_step(experience))


@ALL_DTYPES
def test_padding(experience: Experience) -> None:
    """Wider rows with junk in the pads, and junk in every response-aligned tensor outside the mask (rows 5 and 40)."""
    padded = experience.select(range(8))
    padded.sequences.input_ids = torch.nn.functional.pad(padded.sequences.input_ids, (0, 3))
    real = torch.arange(padded.sequences.input_ids.shape[1]) < padded.sequences.lengths[:, None]
    padded.sequences.input_ids[~real] = 3
    outside = ~padded.sequences.response_mask
    for name in ("logprobs", "values", "advantages", "returns"):
        getattr(padded, name)[outside] = math.nan
    same(one_step(padded), one_step(experience))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_neighbours_do_not_change_what_a_row_samples_or_scores(dtype: torch.dtype, rtol: float) -> None:
    """Each row alone, in a batch, and in the reverse order: the very same tokens, their log-probabilities, values and score."""
    policy, value, prompts = tiny.policy_of(dtype=dtype), tiny.value_of(dtype=dtype), tiny.PROMPTS * 3
    numbers = uniforms(1, "rollout", 5, range(9), 6)
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6)
    together = generator.sample(prompts, numbers)
    backwards = generator.sample(prompts[::-1], numbers.flip(0))
    with torch.no_grad():
        wide, values, scores = policy(together)[0], value(together, per_token=True), value(together)
        for i, prompt in enumerate(prompts):
            alone = generator.sample([prompt], numbers[i : i + 1])
            length = int(alone.response_lens[0])
            for batch, row in ((together, i), (backwards, 8 - i)):
                assert batch.response_ids[row, : int(batch.response_lens[row])].tolist() == alone.response_ids[0].tolist()
            assert torch.allclose(policy(alone)[0][0], wide[i, :length], rtol=rtol, atol=rtol / 10)
            assert torch.allclose(value(alone, per_token=True)[0], values[i, :length], rtol=rtol, atol=rtol / 10)
            assert torch.allclose(value(alone)[0], scores[i], rtol=rtol, atol=rtol / 10)


def read_run(folder: Path) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    files = sorted(folder.rglob("metrics.jsonl")) + sorted(folder.rglob("rollouts.jsonl"))
    rows = {str(file.relative_to(folder)): [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return load_file(folder / "rank0.safetensors"), rows


def assert_same_run(found: Path, wanted: Path) -> None:
    """Weights and every metric to 1e-9; the sampled texts exactly."""
    (weights, rows), (wanted_weights, wanted_rows) = read_run(found), read_run(wanted)
    assert tiny.largest_gap(weights, wanted_weights) < 1e-9
    assert rows.keys() == wanted_rows.keys() and any(name.endswith("metrics.jsonl") for name in rows)
    for name, lines in wanted_rows.items():
        assert len(lines) == len(rows[name]) > 0
        for line, other in zip(lines, rows[name]):
            texts = {key: value for key, value in line.items() if isinstance(value, str)}
            assert texts == {key: value for key, value in other.items() if isinstance(value, str)}
            numbers = {key: value for key, value in line.items() if key not in texts and key != "sampler_logprob_gap"}
            # Differences of nearly equal numbers (a KL close to 0) carry an absolute error of a few roundings.
            assert {key: other[key] for key in numbers} == pytest.approx(numbers, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a stage run in one process and one micro-batch, run once."""
    done: dict[tuple[str, torch.dtype], Path] = {}

    def folder(stage: str, dtype: torch.dtype = torch.float64) -> Path:
        if (stage, dtype) not in done:
            done[stage, dtype] = tmp_path_factory.mktemp(stage)
            worker.run_stage(stage, done[stage, dtype], 4096, dtype)
        return done[stage, dtype]

    return folder


@pytest.mark.parametrize("stage", STEPS)
@pytest.mark.parametrize("tokens", [40, 1])
def test_whole_stages_do_not_depend_on_micro_batches(
    stage: str, tokens: int, tmp_path: Path, reference: Callable[..., Path]
) -> None:
    worker.run_stage(stage, tmp_path, tokens)
    assert_same_run(tmp_path, reference(stage))


def assert_near_run(found: Path, wanted: Path, stage: str) -> None:
    """In float32: the first loss to 1e-5, the very same samples in PPO's first rollout, weights to 1e-2 of a learning rate a step."""
    (weights, rows), (wanted_weights, wanted_rows) = read_run(found), read_run(wanted)
    assert next(iter(weights.values())).dtype is torch.float32 and rows.keys() == wanted_rows.keys()
    assert furthest(weights, wanted_weights) < 1e-2 * LEARNING_RATE * STEPS[stage]
    for name, lines in wanted_rows.items():
        if name.endswith("rollouts.jsonl"):
            first = [row["response"] for row in lines if row["iteration"] == 1]
            assert first and first == [row["response"] for row in rows[name] if row["iteration"] == 1]
    first, wanted_first = (next(iter(r.values()))[0] for r in (rows, wanted_rows))
    losses = {"loss", "policy_loss", "value_loss"} & first.keys()
    assert losses and {key: first[key] for key in losses} == pytest.approx(
        {key: wanted_first[key] for key in losses}, rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize("stage", STEPS)
def test_float32_is_near(stage: str, tmp_path: Path, reference: Callable[..., Path]) -> None:
    worker.run_stage(stage, tmp_path, 40, torch.float32)
    assert_near_run(tmp_path, reference(stage, torch.float32), stage)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_row_order_of_stages_1_and_2(stage: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """One step over all records, and over the same records in another order."""
    names = ("as they are", "turned round")
    for name, turned in zip(names, (False, True)):
        worker.run_stage(stage, tmp_path / name, 4096, dtype, rows=worker.ROWS, turned=turned)
    (weights, rows), (wanted, wanted_rows) = (read_run(tmp_path / name) for name in names)
    (line,), (wanted_line,) = (next(iter(part.values())) for part in (rows, wanted_rows))
    if dtype is torch.float64:
        assert tiny.largest_gap(weights, wanted) < 1e-9 and line == pytest.approx(wanted_line, rel=1e-9)
    else:
        assert furthest(weights, wanted) < 1e-2 * LEARNING_RATE and line["loss"] == pytest.approx(wanted_line["loss"], rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize(("size", "dtype"), [(2, "float64"), (3, "float64"), (2, "float32")])
def test_one_process_or_several(size: int, dtype: str, tmp_path: Path, reference: Callable[..., Path]) -> None:
    """torchrun with gloo; section 3, rows 17 and 18. Every rank ends with the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", worker.__file__]
    arguments, environment = [str(tmp_path), "40", dtype], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in STEPS:
        if dtype == "float64":
            assert_same_run(tmp_path / stage, reference(stage))
        else:
            assert_near_run(tmp_path / stage, reference(stage, torch.float32), stage)
        ranks = [load_file(tmp_path / stage / f"rank{rank}.safetensors") for rank in range(size)]
        assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:] for name in ranks[0])
