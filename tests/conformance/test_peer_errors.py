"""Known errors of other trainers, each with a test that Tercet does not make it; rows.py says what goes wrong elsewhere.

A test's name begins with its row's: docs/conformance.md is made from these names (write_table.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conformance.ranks import together
from model_zoo import SHAPES, causal_lm, classifier, ragged, write_checkpoint
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig, GPT2LMHeadModel

import tercet.algo.advantages
from tercet.algo.advantages import gae
from tercet.algo.kl import AdaptiveKL, FixedKL
from tercet.algo.masks import whiten
from tercet.config.load import load_config
from tercet.config.ppo import KLConfig, PPOConfig
from tercet.generation.native import NativeGenerator
from tercet.models.load import load_causal_lm, save_classifier
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.distributed import World
from tercet.runtime.optim import Optimizer
from tercet.scoring.model import RewardModelScorer
from tercet.stages import reward, sft
from tercet.stages.evaluate import Judges, Sampling, respond
from tercet.stages.ppo import kl_controller, train_ppo
from tercet.stages.rollout import Actors, PromptSet, Rollout
from tercet.types import Comparison, Demonstration, Experience, Sequences, TercetError

MODEL = {"model": {"name": "gpt2"}}


def rollout_and_config(actors: Actors, kl_coef: float = 0.05, **options: Any) -> tuple[Rollout, PPOConfig]:
    config = tiny.ppo_config(**options)
    return tiny.rollout_of(actors, config, kl_coef=kl_coef), config


def first_step(experience: Experience, actors: Actors, config: PPOConfig, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """Progress and both models' gradients of the first optimizer step; nothing is changed."""
    recorders = tiny.Recorder(actors.policy), tiny.Recorder(actors.value_model)
    progress = tiny.update_of(experience, actors, config, policy_optimizer=recorders[0], value_optimizer=recorders[1], **options)
    return progress, recorders[0].gradients[0] | {f"value.{n}": g for n, g in recorders[1].gradients[0].items()}


def nudge(module: torch.nn.Module) -> None:
    """Away from where it was, so that ratio, clip and KL take part."""
    with torch.no_grad():
        module.model.transformer.wte.weight.mul_(1.05)


def row_logprobs(model: Any, sequences: Sequences, row: int) -> Tensor:
    """log-probabilities of one row's response tokens, from the model's plain logits on that text alone."""
    start, end = int(sequences.prompt_lens[row]), int(sequences.lengths[row])
    ids = sequences.input_ids[row : row + 1, :end]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
    return torch.stack([logits[t - 1, ids[0, t]] for t in range(start, end)])


def refused(override: str, part: str) -> None:
    with pytest.raises(TercetError, match=part):
        load_config(MODEL, [override])


@pytest.mark.parametrize("size", [12, 6, 3])
def test_row_01_minibatches_are_optimizer_steps(size: int) -> None:
    actors = tiny.actors_of()
    rollout, config = rollout_and_config(actors, ppo_epochs=3, minibatch_size=size)
    recorder = tiny.Recorder(actors.policy)
    tiny.update_of(rollout.experience, actors, config, policy_optimizer=recorder)
    assert len(recorder.gradients) == 3 * 12 // size


def test_row_02_steps_are_the_same_at_the_end_of_the_prompts(tmp_path: Path) -> None:
    """Three prompts, four a rollout: passes over the data end inside rollouts, at their end and nowhere; one row a forward."""
    config, steps = tiny.ppo_config(iterations=4, rollout_batch_size=4, minibatch_size=2, ppo_epochs=2), []
    run, actors = tiny.run_of(tmp_path, tokens=1), tiny.actors_of()
    train_ppo(run, config, actors, tiny.prompts_of(), seed=0, evaluate=lambda i: {})
    steps = [row["optimizer_steps"] for row in run.metrics.read()]
    assert steps == [4, 4, 4, 4]


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_row_03_gradients_are_clipped_to_max_grad_norm(limit: float) -> None:
    """Adam's first moment after one step is a tenth of the gradient that it was given."""
    actors = tiny.actors_of()
    rollout, config = rollout_and_config(actors, ppo_epochs=1)
    optimizer = Optimizer(actors.policy, weight_decay=0.0, max_grad_norm=limit, world=World())
    progress = tiny.update_of(rollout.experience, actors, config, policy_optimizer=optimizer)
    before = progress.metrics()["grad_norm"]
    moments = [value for name, value in optimizer.state().items() if name.endswith("/exp_avg")]
    given = 10 * float(torch.cat([m.reshape(-1) for m in moments]).norm())
    assert before > 0.02 and given == pytest.approx(min(before, limit), rel=1e-4)


def test_row_04_a_hostile_generation_config_changes_nothing() -> None:
    actors, hostile = tiny.actors_of(), tiny.actors_of()
    settings = {"top_k": 1, "top_p": 0.1, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    hostile.policy.model.generation_config = GenerationConfig(**settings, min_length=4, suppress_tokens=[1], eos_token_id=2)
    (plain, _), (found, _) = rollout_and_config(actors), rollout_and_config(hostile)
    assert torch.equal(found.experience.sequences.input_ids, plain.experience.sequences.input_ids)
    assert found.metrics["sampler_logprob_gap"] < 1e-10


def test_row_05_the_score_stands_on_the_last_token_of_the_response() -> None:
    """With no KL the score is the only reward: at EOS where the response has one, else at the last token."""
    actors = tiny.actors_of()
    experience = rollout_and_config(actors, kl_coef=0.0)[0].experience
    sequences = experience.sequences
    for row, (length, finished) in enumerate(zip(sequences.response_lens.tolist(), sequences.finished.tolist())):
        rewarded = experience.rewards[row].nonzero().squeeze(1).tolist()
        assert rewarded == [length - 1] and float(experience.rewards[row, length - 1]) == float(experience.scores[row])
        assert (int(sequences.response_ids[row, length - 1]) == tiny.EOS) == finished
    assert 0 < int(sequences.finished.sum()) < len(sequences)  # both kinds were there


def test_row_06_the_missing_end_penalty_goes_by_finish_reason() -> None:
    """Token 2 ends responses and EOS does not: what ended in 2 pays nothing."""
    actors = tiny.actors_of(lambda prompts, responses: [7.5] * len(responses), stop_ids=[2])
    experience = rollout_and_config(actors, missing_eos_penalty=1.0)[0].experience
    sequences = experience.sequences
    last = sequences.input_ids[torch.arange(12), sequences.lengths - 1]
    assert 0 < int((last == 2).sum()) < 12
    assert experience.scores.tolist() == [7.5 if token == 2 else 6.5 for token in last.tolist()]


def test_row_07_an_end_token_inside_a_prompt_is_a_token() -> None:
    """Pads are id 0 and so is EOS: prompts with EOS inside, beside longer rows, give the plain logits' log-probabilities."""
    policy = tiny.policy_of()
    prompts = [[3, 0, 1, 0], [0], [2, 0, 0, 0, 1]]
    sequences = tiny.sample(policy, prompts)
    with torch.no_grad():
        logprobs = policy(sequences)[0]
    for row in range(3):
        wanted = row_logprobs(policy.model, sequences, row)
        assert torch.allclose(logprobs[row, : len(wanted)], wanted, atol=1e-10)
        assert sequences.sampler_logprobs is not None
        assert torch.allclose(sequences.sampler_logprobs[row, : len(wanted)], wanted, atol=1e-10)


def test_row_08_the_score_sees_eos_and_stage_2_and_3_agree(tmp_path: Path) -> None:
    tokenizer = tiny.template_of().tokenizer
    model = ScoreModel(classifier("gpt2", vocabulary=len(tokenizer))).eval()
    ids = [5, 9, 7]
    texts = tiny.sequences_of([(ids, [8]), (ids, [8, tokenizer.eos_token_id]), (ids, [8, 6, 5, 4])])
    with torch.no_grad():
        stage2 = model(texts)
    stage3 = RewardModelScorer(model, 1).score(texts, tiny.texts_of([([0], [0])] * 3))
    assert abs(float(stage2[0] - stage2[1])) > 1e-3 and torch.allclose(stage2, stage3, atol=1e-5)
    save_classifier(model.model, tokenizer, tmp_path, card="")
    theirs, own = AutoModelForSequenceClassification.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    rows = [{"input_ids": texts.input_ids[i, : int(texts.lengths[i])].tolist()} for i in range(3)]
    with torch.no_grad():
        assert torch.allclose(theirs(**own.pad(rows, return_tensors="pt")).logits[:, 0], stage2, atol=1e-5)


@pytest.mark.parametrize("eos", [0, 3])
def test_row_09_the_window_of_the_response_ends_with_its_last_token(eos: int) -> None:
    """Whether or not EOS has the id of the pads: mask, rewards, advantages and loss end with the end token, and include it."""
    actors = tiny.actors_of(stop_ids=[eos])
    rollout, config = rollout_and_config(actors, ppo_epochs=1)
    experience, sequences = rollout.experience, rollout.experience.sequences
    nudge(actors.policy)
    assert sequences.response_mask.sum(1).tolist() == sequences.response_lens.tolist()
    for row, finished in enumerate(sequences.finished.tolist()):
        end = int(sequences.lengths[row])
        assert (int(sequences.input_ids[row, end - 1]) == eos) == finished and not sequences.input_ids[row, end:].any()
    for name in ("logprobs", "rewards", "advantages", "returns", "values"):
        assert not getattr(experience, name)[~sequences.response_mask].any(), name
    gradient = first_step(experience, actors, config)[1]
    ended = sequences.finished.nonzero().squeeze(1)  # the end token's own advantage is in the loss
    experience.advantages[ended, sequences.response_lens[ended] - 1] += 1.0
    assert tiny.largest_gap(first_step(experience, actors, config)[1], gradient) > 1e-3


def test_row_10_neither_padding_nor_micro_batches_change_advantages_and_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True] * 4, [True] + [False] * 3, [True, True, False, False]])
    wide = [torch.nn.functional.pad(x, (0, 3), value=99.0) for x in (rewards, values)]
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    for x, m in ((rewards, mask), (values, mask)):
        x[~m] = -55.0
    for found, wanted in zip(gae(*wide, wide_mask, 0.9, 0.8), gae(rewards, values, mask, 0.9, 0.8)):
        assert torch.allclose(found[:, :4], wanted, atol=1e-12) and not found[:, 4:].any()
        assert torch.allclose(whiten(found, wide_mask)[:, :4], whiten(wanted, mask), atol=1e-12)
    actors = tiny.actors_of()
    config = tiny.ppo_config()
    one, each = (tiny.rollout_of(actors, config, tokens=tokens).experience for tokens in (4096, 1))
    assert torch.allclose(one.advantages, each.advantages, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_row_11_trained_tokens_are_the_sampled_ones_at_their_temperature(temperature: float) -> None:
    """A decode that loses everything changes no id; the ratio is 1 at any temperature."""
    actors = tiny.actors_of(lambda prompts, responses: [float(len(p)) for p in prompts], temperature=temperature)
    lossy = PromptSet(tiny.PROMPTS, [""] * 3, [{}] * 3, lambda ids: "the same for all")
    config = tiny.ppo_config(temperature=temperature, ppo_epochs=1)
    seen: list[Sequences] = []
    sample = actors.generator.sample
    actors.generator.sample = lambda *arguments: seen.append(sample(*arguments)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    experience = tiny.rollout_of(actors, config, lossy).experience
    assert torch.equal(experience.sequences.input_ids, seen[0].input_ids)
    metrics = first_step(experience, actors, config)[0].metrics()
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-12) and metrics["approx_kl"] == pytest.approx(0.0, abs=1e-12)


def stock_gpt2(folder: Path, frozen: bool = False) -> Policy:
    """GPT-2 as it comes, with its three dropouts of 0.1, through Tercet's own loading."""
    if not folder.exists():
        torch.manual_seed(0)
        config = tiny.config_of()
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.1
        write_checkpoint(folder, GPT2LMHeadModel(config))
    policy = Policy(load_causal_lm(str(folder)), torch.float64)
    if frozen:
        policy.freeze()
    return policy


def test_row_12_policy_and_reference_agree_in_training_mode(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    actors.policy, actors.ref_policy = stock_gpt2(tmp_path / "gpt2"), stock_gpt2(tmp_path / "gpt2", frozen=True)
    actors.policy.train()
    actors.generator = NativeGenerator(actors.policy, stop_ids=[tiny.EOS], max_new_tokens=4)
    rollout, _ = rollout_and_config(actors)
    assert torch.equal(rollout.experience.logprobs, rollout.experience.ref_logprobs)
    assert rollout.metrics["kl"] == 0 and rollout.metrics["sampler_logprob_gap"] < 1e-10


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "opt"])
def test_row_13_padding_shifts_no_position(architecture: str) -> None:
    """Absolute and rotary positions: each row of a ragged batch as alone, in the forward and in the sampler."""
    policy = Policy(causal_lm(architecture), torch.float64).eval()
    sequences = ragged(SHAPES)
    with torch.no_grad():
        logprobs = policy(sequences)[0]
    for row, (_, length) in enumerate(SHAPES):
        if length:
            assert torch.allclose(logprobs[row, :length], row_logprobs(policy.model, sequences, row), atol=1e-8)
    sampled = tiny.sample(policy, [[5], [6, 7, 8, 9], [10, 11]])
    assert sampled.sampler_logprobs is not None
    for row, length in enumerate(sampled.response_lens.tolist()):
        wanted = row_logprobs(policy.model, sampled, row)
        assert torch.allclose(sampled.sampler_logprobs[row, :length], wanted, atol=1e-8)


def test_row_14_rollouts_explore() -> None:
    """Sixty responses to one prompt from a nearly uniform policy: all four tokens come first, and the entropy is theirs."""
    actors = tiny.actors_of(scale=0.02)
    rollout = tiny.rollout_of(actors, tiny.ppo_config(rollout_batch_size=60), tiny.prompts_of([[1]]))
    firsts = rollout.experience.sequences.response_ids[:, 0].tolist()
    assert {firsts.count(token) > 5 for token in range(4)} == {True}
    assert math.log(4) * 0.95 < rollout.metrics["entropy"] <= math.log(4) + 1e-9


def test_row_15_dropout_is_off_in_the_update_too(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    actors.policy = stock_gpt2(tmp_path / "gpt2")
    actors.generator = NativeGenerator(actors.policy, stop_ids=[tiny.EOS], max_new_tokens=4)
    rollout, config = rollout_and_config(actors, ppo_epochs=1)
    actors.policy.train()
    actors.value_model.train()
    metrics = first_step(rollout.experience, actors, config)[0].metrics()
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-12) and metrics["clip_fraction"] == 0
    assert {m.p for m in actors.policy.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_row_16_whitened_advantages_have_mean_0() -> None:
    mask = torch.tensor([[True, True, False]])
    assert whiten(torch.tensor([[5.0, 6.0, 1000.0]]), mask)[0].tolist() == pytest.approx([-1.0, 1.0, 0.0], abs=1e-6)
    experience = rollout_and_config(tiny.actors_of())[0].experience
    counted = experience.advantages[experience.sequences.response_mask]
    assert float(counted.mean()) == pytest.approx(0, abs=1e-9) and float(counted.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("tokens", [1, 14, 30])
def test_row_17_gradients_do_not_depend_on_micro_batches(tokens: int) -> None:
    actors = tiny.actors_of()
    rollout, config = rollout_and_config(actors, ppo_epochs=1)
    nudge(actors.policy)
    whole, cut = (first_step(rollout.experience, actors, config, tokens=size)[1] for size in (4096, tokens))
    assert tiny.largest_gap(cut, whole) < 1e-9


@pytest.mark.parametrize("size", [2, 3])
def test_row_18_whitening_and_metrics_are_over_all_ranks(size: int) -> None:
    """Every rank's own rows of the one process's experience, and everywhere the one process's metrics."""
    config = tiny.ppo_config(rollout_batch_size=7, missing_eos_penalty=1.0)

    actors = [tiny.actors_of() for _ in range(size + 1)]  # here, because threads would share torch's seed
    for each in actors:
        nudge(each.policy)

    def work(world: World) -> Rollout:
        return tiny.rollout_of(actors[world.rank], config, iteration=1, world=world)

    wanted = tiny.rollout_of(actors[size], config, iteration=1)
    for rank, found in enumerate(together(size, work)):
        part = wanted.experience.select(range(rank, 7, size))
        assert torch.equal(found.experience.sequences.input_ids, part.sequences.input_ids)
        for name in ("advantages", "returns", "rewards", "scores"):
            assert torch.allclose(getattr(found.experience, name), getattr(part, name), atol=1e-9), name
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-9, abs=1e-12)
        assert [row["response"] for row in found.samples] == [row["response"] for row in wanted.samples]


def test_row_19_the_penalty_alone_lowers_the_kl(tmp_path: Path) -> None:
    actors = tiny.actors_of(lambda prompts, responses: [0.0] * len(responses))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    options = {"iterations": 12, "rollout_batch_size": 48, "learning_rate": 5e-3, "kl": {"coef": 1.0}, "save_rollouts_every": 0}
    run = tiny.run_of(tmp_path)
    config = tiny.ppo_config(**options)
    train_ppo(run, config, actors, tiny.prompts_of(), seed=0, evaluate=lambda i: {}, second_round=True)
    kl = [row["kl_k3"] for row in run.metrics.read()]
    assert kl[0] > 0.2 and kl[-1] < kl[0] / 2


def test_row_20_log_probabilities_are_wide_and_the_samplers_gap_is_reported() -> None:
    actors = tiny.actors_of(dtype=torch.bfloat16)
    rollout, _ = rollout_and_config(actors)
    experience = rollout.experience
    assert experience.logprobs.dtype == experience.ref_logprobs.dtype == experience.values.dtype == torch.float32
    assert experience.sequences.sampler_logprobs is not None
    gap = (experience.sequences.sampler_logprobs - experience.logprobs)[experience.sequences.response_mask].abs().max()
    assert 0 <= rollout.metrics["sampler_logprob_gap"] == pytest.approx(float(gap)) and gap < 0.5
    assert tiny.rollout_of(tiny.actors_of(), tiny.ppo_config()).metrics["sampler_logprob_gap"] < 1e-10


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_row_21_the_sampler_reports_the_trainers_temperature(temperature: float) -> None:
    actors = tiny.actors_of(temperature=temperature)
    rollout, _ = rollout_and_config(actors, temperature=temperature)
    assert rollout.metrics["sampler_logprob_gap"] < 1e-10 and rollout.metrics["kl"] == 0
    sequences = rollout.experience.sequences
    row = int(sequences.response_lens.argmax())
    with torch.no_grad():
        logits = actors.policy.model(input_ids=sequences.input_ids[row : row + 1]).logits[0, int(sequences.prompt_lens[row]) - 1]
    wanted = (logits / temperature).log_softmax(-1)[sequences.response_ids[row, 0]]
    assert float(rollout.experience.logprobs[row, 0]) == pytest.approx(float(wanted), abs=1e-10)


def test_row_22_cut_texts_get_no_false_end() -> None:
    """Stages 1 and 2 cut rows as stage 3's length limit does: no EOS, and the row says that it is not finished."""
    template = tiny.template_of()
    whole, cut = (template.encode("what is rain", " ".join(["warm"] * 9), max_length=n) for n in (None, 9))
    assert whole.row.ids[-1] == template.eos_id and whole.row.finished
    assert len(cut.row.ids) == 9 and template.eos_id not in cut.row.ids and cut.truncated and not cut.row.finished
    long = " ".join(tiny.WORDS * 3)
    stores = [
        sft.tokenise_demonstrations([Demonstration("what", long), Demonstration("what", "rain")], template, "sft", 12)[0],
        reward.tokenise_comparisons([Comparison("what", (long, "rain"), (0, 1))], template, 12).store,
    ]
    for store in stores:
        rows = store.sequences([0, 1])
        ends = rows.input_ids[torch.arange(2), rows.lengths - 1] == template.eos_id
        assert rows.finished.tolist() == ends.tolist() == [False, True]
    sequences = rollout_and_config(tiny.actors_of())[0].experience.sequences
    last = sequences.input_ids[torch.arange(12), sequences.lengths - 1]
    assert ((last == tiny.EOS) == sequences.finished).all() and not sequences.finished.all()


def test_row_23_merges_across_the_seam_do_not_move_it() -> None:
    """Every way to split a text: the prompt's ids are those that PPO's prompt has, and the whole decodes to the text."""
    template = tiny.template_of()
    text, merged = "explain happy words warm", 0
    for at in range(1, len(text) - 1):
        prompt, response = text[:at], text[at:]
        row = template.encode(prompt, response).row if " " in (prompt[-1], response[0]) else None
        own = template.tokenizer(prompt).input_ids
        assert template.prompt_ids(prompt).ids == own
        row = row or template.encode(prompt, " " + response).row
        assert list(row.ids[: row.prompt_len]) == own and row.ids[-1] == template.eos_id
        joined = prompt + (response if " " in (prompt[-1], response[0]) else " " + response)
        assert template.tokenizer.decode(row.ids[:-1]) == joined
        merged += list(row.ids[:-1]) != template.tokenizer(joined).input_ids
    assert merged > 0  # somewhere a merge did cross the seam


def test_row_25_metrics_are_over_response_tokens() -> None:
    actors = tiny.actors_of()
    rollout, config = rollout_and_config(actors, ppo_epochs=1)
    nudge(actors.policy)
    narrow = first_step(rollout.experience, actors, config)[0].metrics()
    wide = rollout.experience.select(range(12))
    wide.sequences.input_ids = torch.nn.functional.pad(wide.sequences.input_ids, (0, 5), value=3)
    for name in ("logprobs", "values", "advantages", "returns"):
        getattr(wide, name)[~wide.sequences.response_mask] = math.nan
    assert first_step(wide, actors, config)[0].metrics() == pytest.approx(narrow, rel=1e-9) and narrow["approx_kl"] > 1e-6
    assert 0 < rollout.metrics["entropy"] <= math.log(4)


def test_row_26_immediate_ends_one_row_at_a_time_are_finite() -> None:
    actors = tiny.actors_of(stop_ids=range(4))
    rollout, config = rollout_and_config(actors, minibatch_size=1)
    assert rollout.experience.sequences.response_lens.tolist() == [1] * 12 and rollout.experience.sequences.finished.all()
    metrics = tiny.update_of(rollout.experience, actors, config, tokens=1).metrics()
    assert all(map(math.isfinite, metrics.values())) and metrics["skipped"] == 0 and metrics["optimizer_steps"] == 48


def test_row_27_the_adaptive_controller_is_checked_and_resumed() -> None:
    refused("ppo.kl={controller: adaptive, target: 0}", "ppo.kl.target.*greater than 0")
    refused("ppo.kl={controller: adaptive, target: -2}", "ppo.kl.target.*greater than 0")
    refused("ppo.kl={controller: adaptive, horizon: 0}", "ppo.kl.horizon.*greater than or equal to 1")
    refused("ppo.kl={controller: adaptive, coef: 0}", "would stay 0")
    config = KLConfig(controller="adaptive")
    first, second = kl_controller(config), kl_controller(config)
    first.update(12.0, 512)
    assert first.coef == pytest.approx(0.05 * (1 + 0.2 * 512 / 10_000)) and isinstance(second, AdaptiveKL)
    second.load_state_dict(first.state_dict())
    assert second.coef == first.coef != config.coef


# Rows about things that Tercet does not have, and why the error cannot be made.
CANNOT_OCCUR = {
    24: "one response a prompt and a value model: no estimator over groups of responses",
    28: "texts that lie end to end are apart in attention",
}


def test_row_24_there_is_no_group_estimator_to_give_zero_advantages() -> None:
    for option in ("ppo.advantages=rloo", "ppo.advantage_estimator=grpo", "ppo.samples_per_prompt=1"):
        refused(option, "unknown key")
    assert not [name for name in vars(tercet.algo.advantages) if "rloo" in name.lower() or "grpo" in name.lower()]


def test_row_28_packing_is_refused_and_rows_do_not_see_each_other() -> None:
    for option in ("sft.packing=true", "sft.padding_free=true", "reward.packing=true"):
        refused(option, "unknown key")
    policy, sequences = tiny.policy_of(), tiny.sequences_of([([1], [2, 3, 0]), ([3, 2], [1]), ([2], [2, 0])])
    with torch.no_grad():
        together_, alone = policy(sequences)[0], [policy(sequences.select([i]))[0][0] for i in range(3)]
    for row, own in enumerate(alone):
        assert torch.allclose(together_[row, : len(own)], own, atol=1e-12)


def test_trap_old_log_probabilities_are_the_recorded_ones() -> None:
    """With one minibatch and one epoch too: a recorded value that is wrong must show in the ratio."""
    actors = tiny.actors_of()
    rollout, config = rollout_and_config(actors, ppo_epochs=1)
    rollout.experience.logprobs -= math.log(1.5)
    metrics = first_step(rollout.experience, actors, config)[0].metrics()
    assert metrics["ratio"] == pytest.approx(1.5, rel=1e-6)


def test_trap_there_is_a_kl_penalty_by_default() -> None:
    assert load_config(MODEL).ppo.kl.coef > 0
    controller = kl_controller(load_config(MODEL).ppo.kl)
    assert type(controller) is FixedKL
    actors = tiny.actors_of(lambda prompts, responses: [0.0] * len(responses))
    nudge(actors.policy)
    experience = rollout_and_config(actors, kl_coef=controller.coef)[0].experience
    wanted = -controller.coef * (experience.logprobs - experience.ref_logprobs)
    assert torch.allclose(experience.rewards, wanted, atol=1e-12) and experience.rewards.abs().max() > 1e-5


def test_trap_the_kl_of_a_token_is_not_clamped() -> None:
    """A policy that is nearly sure of a token that the reference nearly never takes: some 40 nats, all of them charged."""
    actors = tiny.actors_of(lambda prompts, responses: [0.0] * len(responses))
    with torch.no_grad():
        for role, sign in ((actors.policy, 1.0), (actors.ref_policy, -1.0)):
            role.model.transformer.ln_f.weight.zero_()
            role.model.transformer.ln_f.bias.copy_(sign * role.model.transformer.wte.weight[3])
            role.model.transformer.ln_f.bias.mul_(30 / role.model.transformer.wte.weight[3].norm() ** 2)
    experience = rollout_and_config(actors, kl_coef=0.5)[0].experience
    mask = experience.sequences.response_mask
    assert float(experience.rewards[mask].min()) < -0.5 * 20
    assert torch.allclose(experience.rewards, -0.5 * (experience.logprobs - experience.ref_logprobs), atol=1e-9)


def test_trap_evaluation_samples_at_the_training_temperature() -> None:
    refused("evaluation.temperature=0.01", "unknown key")
    actors = tiny.actors_of(temperature=1.7)
    sampling = Sampling(0, 1.7, 4, 2, False, 64)
    rows = respond(
        actors.policy, actors.ref_policy, actors.generator, tiny.prompts_of([[1]] * 30), Judges(actors.scorer, {}), sampling
    )
    assert len({tuple(row["response"]) for row in rows}) > 10
    with torch.no_grad():
        logits = actors.policy.model(input_ids=torch.tensor([[1]])).logits[0, -1] / 1.7
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    single = [row["entropy"] for row in rows if row["length"] == 1]
    assert single and single == pytest.approx([float(entropy)] * len(single), rel=1e-9)
