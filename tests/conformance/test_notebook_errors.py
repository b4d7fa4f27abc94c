"""The errors of the notebook that Tercet began as, each with a test that it is right here; rows.py says what went wrong there.

A test's name begins with its row's: docs/conformance.md is made from these names (write_table.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_zoo import bpe_tokenizer, causal_lm, classifier, write_checkpoint
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import GenerationConfig

from tercet.algo.advantages import token_rewards
from tercet.algo.kl import k1
from tercet.algo.losses import policy_loss, ranking_loss, sft_loss, value_loss
from tercet.config.training import SFTConfig
from tercet.data.template import Template
from tercet.generation.native import NativeGenerator
from tercet.models.load import load_causal_lm, load_classifier
from tercet.models.roles import Policy, ScoreModel
from tercet.stages import ppo
from tercet.stages.ppo import train_ppo, weights_hash
from tercet.stages.rollout import Actors
from tercet.stages.sft import train_sft
from tercet.types import Demonstration, Sequences


def train(actors: Actors, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a few PPO iterations."""
    run = tiny.run_of(folder)
    train_ppo(run, tiny.ppo_config(**options), actors, tiny.prompts_of(), seed=0, evaluate=lambda i: {})
    return run.metrics.read()


def plain_logprobs(model: Any, ids: list[int]) -> Tensor:
    """(len(ids), V): log-probabilities at every position of one text alone."""
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1))


def test_row_01_every_trainable_parameter_gets_a_gradient() -> None:
    """From the loss of the update itself; the reference and the scorer's reward get none."""
    actors = tiny.actors_of()
    config = tiny.ppo_config(ppo_epochs=1)
    recorder, values = tiny.Recorder(actors.policy), tiny.Recorder(actors.value_model)
    experience = tiny.rollout_of(actors, config).experience
    tiny.update_of(experience, actors, config, policy_optimizer=recorder, value_optimizer=values)
    for role, found in ((actors.policy, recorder), (actors.value_model, values)):
        assert found.gradients[0].keys() == dict(role.named_parameters()).keys()
        assert all(gradient.abs().max() > 0 for gradient in found.gradients[0].values())
    assert all(p.grad is None and not p.requires_grad for p in actors.ref_policy.parameters())


def test_row_02_the_reference_is_another_object_that_stays(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    before, policy_before = weights_hash(actors.ref_policy), weights_hash(actors.policy)
    assert before == policy_before
    metrics = train(actors, tmp_path, learning_rate=1e-2)
    assert metrics[0]["kl"] == 0 and metrics[1]["kl_k3"] > 0
    assert weights_hash(actors.ref_policy) == before != weights_hash(actors.policy)


def test_row_02_one_object_for_both_is_an_error(tmp_path: Path) -> None:
    actors = tiny.actors_of()
    actors.ref_policy = actors.policy
    with pytest.raises(AssertionError, match="reference policy's weights changed"):
        train(actors, tmp_path)


def test_row_03_the_kl_is_over_response_tokens_alone() -> None:
    """Against a loop over the response's tokens; the prompt's own, whose log-probabilities differ as much, are not in it."""
    actors = tiny.actors_of()
    with torch.no_grad():
        actors.policy.model.transformer.wte.weight.mul_(1.1)
    rollout = tiny.rollout_of(actors, tiny.ppo_config())
    sequences = rollout.experience.sequences
    for row, sample in enumerate(rollout.samples):
        start, end = int(sequences.prompt_lens[row]), int(sequences.lengths[row])
        ids = sequences.input_ids[row, :end].tolist()
        new, ref = (plain_logprobs(role.model, ids) for role in (actors.policy, actors.ref_policy))
        terms = [float(new[t - 1, ids[t]] - ref[t - 1, ids[t]]) for t in range(1, end)]
        assert sample["kl"] == pytest.approx(sum(terms[start - 1 :]), abs=1e-9)
        if start > 1:
            assert abs(sum(terms[: start - 1])) > 1e-6
    assert rollout.experience.rewards.shape == sequences.response_mask.shape


def test_row_04_the_kl_is_that_of_policy_against_reference() -> None:
    """Expected k1 under the policy is the full KL(policy, reference), not the reverse and not a mean over the vocabulary."""
    policy = torch.tensor([0.7, 0.2, 0.06, 0.03, 0.01], dtype=torch.float64).log()
    reference = torch.tensor([0.1, 0.1, 0.2, 0.25, 0.35], dtype=torch.float64).log()
    wanted = sum(math.exp(p) * (p - q) for p, q in zip(policy.tolist(), reference.tolist()))
    reverse = sum(math.exp(q) * (q - p) for p, q in zip(policy.tolist(), reference.tolist()))
    found = float((policy.exp() * k1(policy, reference)).sum())
    assert found == pytest.approx(wanted, rel=1e-12) and abs(wanted - reverse) > 0.1
    assert found == pytest.approx(float(kl_div(reference, policy, log_target=True, reduction="none").sum()), rel=1e-12)
    for wrong in (kl_div(policy, reference.exp(), reduction="sum"), kl_div(reference, policy.exp(), reduction="none").mean()):
        assert abs(float(wrong) - found) > 0.1  # arguments swapped; divided by the vocabulary's size
    # In the reward: minus the coefficient times k1 of each token, and nothing else before the last one.
    kl = k1(policy, reference)[None, :3]
    rewards = token_rewards(torch.tensor([2.0], dtype=torch.float64), kl, torch.ones(1, 3, dtype=torch.bool), 0.1)
    assert rewards[0].tolist() == pytest.approx((-0.1 * kl[0] + torch.tensor([0, 0, 2.0])).tolist(), abs=1e-12)


def test_row_05_the_response_does_not_repeat_the_prompt() -> None:
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        seen.extend(zip(prompts, responses))
        return [0.0] * len(prompts)

    rollout = tiny.rollout_of(tiny.actors_of(reward), tiny.ppo_config(), tiny.prompts_of([[3, 1, 2]]))
    sequences = rollout.experience.sequences
    for row, (prompt, response) in enumerate(seen):
        ids = sequences.input_ids[row, : int(sequences.lengths[row])].tolist()
        assert prompt == "3 1 2" and ids[:3] == [3, 1, 2] and tiny.spell(ids[3:]) == response == rollout.samples[row]["response"]
    assert len(seen) == 12 and int(sequences.response_lens.max()) <= 4  # the prompt's three ids are there once


def test_row_06_only_the_response_and_its_end_are_labels() -> None:
    """Equal to transformers' labels with -100 on prompts and pads and EOS kept, though EOS has the id of the pads."""
    template = tiny.template_of()
    policy = tiny.policy_of(vocabulary=300, positions=64)
    records = [("what is rain", "water"), ("sun", "warm kind happy words"), ("define", "short")]
    sequences = Sequences.from_rows([template.encode(*record).row for record in records])
    assert template.eos_id == 0
    labels = torch.full_like(sequences.input_ids, -100)
    for row, (start, end) in enumerate(zip(sequences.prompt_lens.tolist(), sequences.lengths.tolist())):
        labels[row, start:end] = sequences.input_ids[row, start:end]
        assert labels[row, end - 1] == template.eos_id
    with torch.no_grad():
        logits = policy.model(input_ids=sequences.input_ids).logits
        logprobs = policy(sequences)[0]
    wanted = cross_entropy(logits[:, :-1].reshape(-1, 300), labels[:, 1:].reshape(-1), ignore_index=-100)
    count = int(sequences.response_lens.sum())
    found = sft_loss(logprobs, sequences.response_mask, count)
    assert float(found) == pytest.approx(float(wanted), rel=1e-10)
    everything = cross_entropy(logits[:, :-1].reshape(-1, 300), sequences.input_ids[:, 1:].reshape(-1))
    assert abs(float(everything) - float(wanted)) > 1e-3


def test_row_07_greedy_text_in_a_batch_is_that_of_each_prompt_alone() -> None:
    policy = Policy(causal_lm("gpt2"), torch.float64).eval()
    generator = NativeGenerator(policy, stop_ids=[0], max_new_tokens=6)
    prompts = [[5], [9, 8, 7, 6, 5, 4], [11, 12, 13]]
    together = generator.sample(prompts, None)
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and (len(ids) == len(prompt) or ids[-1] != 0):
            ids.append(int(plain_logprobs(policy.model, ids)[-1].argmax()))
        assert together.input_ids[row, : int(together.lengths[row])].tolist() == ids


def test_row_08_a_classifier_without_a_pad_id_scores_batches() -> None:
    """transformers refuses them, or reads the pad; here each row has the score that it has alone."""
    model = classifier("gpt2")
    texts = tiny.sequences_of([([5, 6], [7, 0]), ([9], [8, 3, 4, 2, 1]), ([1], [0])])
    assert model.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=texts.input_ids)
    scorer = ScoreModel(model).eval()
    with torch.no_grad():
        together = scorer(texts)
        for row, length in enumerate(texts.lengths.tolist()):
            alone = model(input_ids=texts.input_ids[row : row + 1, :length]).logits[0, 0]
            assert float(together[row]) == pytest.approx(float(alone), abs=1e-5)


@pytest.mark.parametrize("gap", [90.0, 800.0])
def test_row_09_a_pair_far_in_the_wrong_order_has_a_finite_loss(gap: float) -> None:
    scores = torch.tensor([-gap, 0.0], requires_grad=True)
    assert torch.log(torch.sigmoid(scores[0] - scores[1])).isinf()  # what the notebook computed
    loss, _, _ = ranking_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(gap) and scores.grad is not None and scores.grad.tolist() == [-1.0, 1.0]


def test_row_10_the_reward_model_starts_from_the_sft_model(tmp_path: Path) -> None:
    """The trunk is the SFT checkpoint's to the bit; head and nothing else is new."""
    tokenizer = bpe_tokenizer()
    folder = write_checkpoint(tmp_path / "sft", causal_lm("gpt2", vocabulary=len(tokenizer), seed=4), tokenizer)
    trunk, sft = load_classifier(folder, num_labels=1).base_model, load_causal_lm(folder).base_model
    assert trunk.state_dict().keys() == sft.state_dict().keys()
    assert all(torch.equal(value, sft.state_dict()[name]) for name, value in trunk.state_dict().items())


def test_row_11_a_tokenizer_without_a_pad_token_trains(tmp_path: Path) -> None:
    """Our own loop on ragged rows; no pad token is needed and none is added."""
    template = tiny.template_of()
    assert template.tokenizer.pad_token is None
    policy = tiny.policy_of(vocabulary=300, positions=64)
    records = [Demonstration("what is rain", "water"), Demonstration("sun", "warm kind happy words")]
    config = SFTConfig(epochs=2, batch_size=2, learning_rate=1e-2, max_length=64)
    run = tiny.run_of(tmp_path, "sft")
    train_sft(run, config, policy, template, records, [], loss_on="response", seed=0)
    losses = [row["loss"] for row in run.metrics.read()]
    assert len(losses) == 2 and losses[1] < losses[0] and template.tokenizer.pad_token is None


def test_row_12_ratio_clip_values_and_advantages_take_part() -> None:
    """A ratio beyond the clip has no gradient, a value beyond its clip neither, and the baseline is in the advantages."""
    logprobs, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    new = torch.tensor([[math.log(1.3), math.log(1.1)]], requires_grad=True)
    policy_loss(new, logprobs, torch.ones(1, 2), mask, 0.2, 2)[0].backward()
    assert new.grad is not None and new.grad[0].tolist() == pytest.approx([0.0, -0.55])
    values = torch.tensor([[0.5, 0.1]], requires_grad=True)
    value_loss(values, torch.zeros(1, 2), torch.ones(1, 2) * torch.tensor([0.6, 1.0]), mask, 0.2, 2)[0].backward()
    assert values.grad is not None and values.grad[0].tolist() == pytest.approx([0.0, -0.45])
    actors, other = tiny.actors_of(), tiny.actors_of()
    with torch.no_grad():
        other.value_model.head.weight.mul_(3.0)
    found, wanted = (tiny.rollout_of(each, tiny.ppo_config(whiten_advantages=False)).experience for each in (other, actors))
    assert torch.equal(found.rewards, wanted.rewards) and not torch.allclose(found.advantages, wanted.advantages, atol=1e-3)


def test_row_13_the_reward_model_has_no_dropout_in_any_mode(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "reward", classifier("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1))
    scorer = ScoreModel(load_classifier(folder)).train()
    texts = tiny.sequences_of([([5, 6], [7, 0])])
    with torch.no_grad():
        assert torch.equal(scorer(texts), scorer(texts))


def test_row_13_rollouts_carry_no_gradient() -> None:
    experience = tiny.rollout_of(tiny.actors_of(), tiny.ppo_config()).experience
    tensors = {name: value for name, value in vars(experience).items() if isinstance(value, Tensor)}
    assert len(tensors) == 7 and not any(value.requires_grad for value in tensors.values())


def test_row_13_the_reward_is_tied_to_tokens() -> None:
    """Each token pays for its own KL; summed over its tokens, a response's reward is its score minus the penalised KL."""
    actors = tiny.actors_of()
    with torch.no_grad():
        actors.policy.model.transformer.wte.weight.mul_(1.1)
    experience = tiny.rollout_of(actors, tiny.ppo_config(), kl_coef=0.3).experience
    kl = experience.logprobs - experience.ref_logprobs
    assert torch.allclose(experience.rewards.sum(1), experience.scores - 0.3 * kl.sum(1), atol=1e-10) and kl.abs().max() > 1e-3
    for row, length in enumerate(experience.sequences.response_lens.tolist()):
        assert torch.allclose(experience.rewards[row, : length - 1], -0.3 * kl[row, : length - 1], atol=1e-12)


def test_row_13_pad_as_eos_hides_no_end() -> None:
    """The tokenizer's pad is its EOS: the end is still a target, and the text without it another text."""
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    row = Template(tokenizer).encode("the sun", "is warm").row
    sequences = Sequences.from_rows([row])
    assert row.ids[-1] == tokenizer.pad_token_id and int(sequences.response_mask.sum()) == len(row.ids) - row.prompt_len


def test_row_13_the_optimizer_moves_the_policy_that_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator of iteration 1 reports the log-probabilities of the policy that iteration 0 updated."""
    actors, versions = tiny.actors_of(), []
    before = weights_hash(actors.policy)
    collect = ppo.collect

    def spy(given: Actors, *arguments: Any, **options: Any) -> Any:
        rollout = collect(given, *arguments, **options)
        versions.append((weights_hash(given.policy), rollout.metrics["sampler_logprob_gap"]))
        return rollout

    monkeypatch.setattr(ppo, "collect", spy)
    train(actors, tmp_path, learning_rate=1e-2)
    assert versions[0][0] == before != versions[1][0] and max(gap for _, gap in versions) < 1e-10


def test_row_13_top_k_50_is_not_left_on() -> None:
    """288 tokens and a nearly uniform policy whose checkpoint asks for top_k 50: far more than 50 of them come first."""
    policy = tiny.policy_of(vocabulary=288, scale=0.02)
    policy.model.generation_config = GenerationConfig(top_k=50, do_sample=True)
    sequences = tiny.sample(policy, [[1]] * 400, steps=1)
    assert len(set(sequences.response_ids[:, 0].tolist())) > 150
