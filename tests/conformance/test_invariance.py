"""Whatever the padding, row order, micro-batches, neighbours and processes: the same loss, gradients, metrics and weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
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


def gradients(experience: Experience, **options: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures and gradients of both models for one optimizer step over the whole batch."""
    actors = tiny.actors_of()
    rows = len(experience.sequences)
    config = tiny.ppo_config(ppo_epochs=1, rollout_batch_size=rows)
    with torch.no_grad():  # away from ratio 1, so that the ratio and both clips take part
        actors.policy.model.transformer.wte.weight.mul_(1.05)
        actors.value_model.model.transformer.wte.weight.mul_(1.05)
    recorders = tiny.Recorder(actors.policy), tiny.Recorder(actors.value_model)
    progress = tiny.update_of(experience, actors, config, policy_optimizer=recorders[0], value_optimizer=recorders[1], **options)
    both = recorders[0].gradients[0] | {f"value.{name}": g for name, g in recorders[1].gradients[0].items()}
    return progress.metrics(), both


@pytest.fixture(scope="module")
def experience() -> Experience:
    found = tiny.rollout_of(tiny.actors_of(), tiny.ppo_config(rollout_batch_size=8)).experience
    assert len(set(found.sequences.lengths.tolist())) > 2  # ragged
    return found


def same(found: tuple[dict[str, float], dict[str, Tensor]], wanted: tuple[dict[str, float], dict[str, Tensor]]) -> None:
    assert wanted[0]["approx_kl"] > 1e-6 and wanted[0]["policy_loss"] != 0
    assert found[0] == pytest.approx(wanted[0], rel=1e-9, abs=1e-13)
    assert tiny.largest_gap(found[1], wanted[1]) < 1e-9


@pytest.mark.parametrize("tokens", BUDGETS)
def test_micro_batches(experience: Experience, tokens: int) -> None:
    """Section 3, row 17: a mean of micro-batch means would be tens of per cent off."""
    same(gradients(experience, tokens=tokens), gradients(experience))


@pytest.mark.parametrize("split", [[8], [4, 4], [2, 2, 2, 2], [1] * 8, [5, 1, 2]])
def test_micro_batches_cut_by_hand(experience: Experience, split: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """1x8, 2x4, 4x2, 8x1 and a ragged cut."""
    wanted = gradients(experience)

    def cut(lengths: Any, tokens: int) -> list[list[int]]:
        rows = iter(range(sum(split)))
        return [[next(rows) for _ in range(size)] for size in split]

    monkeypatch.setattr("tercet.stages.update.microbatches", cut)
    same(gradients(experience), wanted)


def test_row_order(experience: Experience) -> None:
    same(gradients(experience.select([5, 2, 7, 0, 1, 6, 4, 3])), gradients(experience))


def test_padding(experience: Experience) -> None:
    """Wider rows with junk in the pads, and junk in every response-aligned tensor outside the mask (rows 5 and 40)."""
    padded = experience.select(range(8))
    padded.sequences.input_ids = torch.nn.functional.pad(padded.sequences.input_ids, (0, 3))
    real = torch.arange(padded.sequences.input_ids.shape[1]) < padded.sequences.lengths[:, None]
    padded.sequences.input_ids[~real] = 3
    outside = ~padded.sequences.response_mask
    for name in ("logprobs", "values", "advantages", "returns"):
        getattr(padded, name)[outside] = math.nan
    found, wanted = gradients(padded), gradients(experience)
    same(found, wanted)


def test_neighbours_do_not_change_what_a_row_samples_or_scores() -> None:
    """Each row alone, in a batch, and in the reverse order: the same tokens, log-probabilities and values."""
    policy, value, prompts = tiny.policy_of(), tiny.value_of(), tiny.PROMPTS * 3
    numbers = uniforms(1, "rollout", 5, range(9), 6)
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6)
    together = generator.sample(prompts, numbers)
    backwards = generator.sample(prompts[::-1], numbers.flip(0))
    with torch.no_grad():
        wide, values = policy(together)[0], value(together, per_token=True)
        for i, prompt in enumerate(prompts):
            alone = generator.sample([prompt], numbers[i : i + 1])
            length = int(alone.response_lens[0])
            for batch, row in ((together, i), (backwards, 8 - i)):
                assert batch.response_ids[row, : int(batch.response_lens[row])].tolist() == alone.response_ids[0].tolist()
            assert torch.allclose(policy(alone)[0][0], wide[i, :length], rtol=1e-10)
            assert torch.allclose(value(alone, per_token=True)[0], values[i, :length], rtol=1e-10)


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
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a stage run in one process and one micro-batch, run once."""
    done: dict[str, Path] = {}

    def folder(stage: str) -> Path:
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(stage)
            worker.run_stage(stage, done[stage], 4096)
        return done[stage]

    return folder


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("tokens", [40, 1])
def test_whole_stages_do_not_depend_on_micro_batches(
    stage: str, tokens: int, tmp_path: Path, reference: Callable[[str], Path]
) -> None:
    worker.run_stage(stage, tmp_path, tokens)
    assert_same_run(tmp_path, reference(stage))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_float32_is_near(stage: str, tmp_path: Path, reference: Callable[[str], Path]) -> None:
    """In float32 the loss agrees to 1e-5 and parameters to 1e-2 of a learning rate, between micro-batch splits."""
    for tokens in (4096, 40):
        worker.run_stage(stage, tmp_path / str(tokens), tokens, torch.float32)
    (weights, rows), (wanted, wanted_rows) = read_run(tmp_path / "40"), read_run(tmp_path / "4096")
    steps = {"sft": 2, "reward": 2, "ppo": 2 * 2 + 2 * 14}[stage]
    assert all(float((weights[name] - wanted[name]).abs().max()) < 1e-2 * 1e-3 * steps for name in wanted)
    first, wanted_first = (next(iter(r.values()))[0] for r in (rows, wanted_rows))
    for key in {"loss", "policy_loss", "value_loss"} & first.keys():
        assert first[key] == pytest.approx(wanted_first[key], rel=1e-5, abs=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_one_process_or_several(stage: str, size: int, tmp_path: Path, reference: Callable[[str], Path]) -> None:
    """torchrun with gloo; section 3, rows 17 and 18. Every rank ends with the same weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", worker.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, stage, str(tmp_path), "40"], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path, reference(stage))
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(size)]
    assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:] for name in ranks[0])
