"""Prompts to experience: which prompts, what every tensor holds, and metrics that do not depend on how a batch was cut."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import tiny
import torch

from tercet.generation.native import NativeGenerator
from tercet.stages import rollout as rollout_module
from tercet.stages.rollout import Actors, PromptSet, Room, prompt_rows, read
from tercet.types import Message, Sequences, TercetError, TokenRow


@pytest.mark.parametrize(("count", "batch"), [(3, 2), (7, 7), (5, 12), (10, 3), (1, 4)])
def test_every_prompt_comes_once_a_pass(count: int, batch: int) -> None:
    rows = [row for iteration in range(2 * count) for row in prompt_rows(count, batch, 5, iteration)]
    for start in range(0, len(rows) - count + 1, count):
        assert sorted(rows[start : start + count]) == list(range(count))


def test_the_order_of_prompts_is_a_pure_function_that_differs_by_pass_and_seed() -> None:
    torch.manual_seed(1)
    first = prompt_rows(50, 50, 5, 3)
    torch.rand(7)
    assert first == prompt_rows(50, 50, 5, 3)
    assert first != prompt_rows(50, 50, 5, 4) and first != prompt_rows(50, 50, 6, 3)
    # The sequence of prompts does not depend on the batch size.
    assert prompt_rows(50, 25, 5, 6) + prompt_rows(50, 25, 5, 7) == first


@pytest.fixture
def actors() -> Actors:
    return tiny.actors_of()


def test_scores_kl_and_rewards_against_a_slow_loop(actors: Actors) -> None:
    """Every number of the experience, computed row by row from the models' plain logits."""
    config = tiny.ppo_config(temperature=0.7, missing_eos_penalty=1.5, whiten_advantages=False, gae_lambda=0.9, gamma=0.8)
    actors.generator = NativeGenerator(actors.policy, stop_ids=[tiny.EOS], max_new_tokens=4, temperature=0.7)
    with torch.no_grad():
        for parameter in actors.ref_policy.parameters():
            parameter.add_(0.05)
    rollout = tiny.rollout_of(actors, config, kl_coef=0.3)
    experience, sequences = rollout.experience, rollout.experience.sequences
    kls, finished, entropies = [], [], []
    for i in range(12):
        prompt, length = int(sequences.prompt_lens[i]), int(sequences.response_lens[i])
        ids = sequences.input_ids[i, : prompt + length]
        with torch.no_grad():
            logs = [m.model(input_ids=ids[None]).logits[0].div(0.7).log_softmax(-1) for m in (actors.policy, actors.ref_policy)]
            hidden = actors.value_model.model.transformer(input_ids=ids[None]).last_hidden_state[0]
            values = actors.value_model.head(hidden).squeeze(-1)[prompt - 1 : prompt + length - 1]
        own, ref = (torch.stack([log[prompt - 1 + t, ids[prompt + t]] for t in range(length)]) for log in logs)
        entropies.append(-sum((logs[0][prompt - 1 + t].exp() * logs[0][prompt - 1 + t]).sum() for t in range(length)))
        ended = int(ids[-1]) == tiny.EOS
        words = [tiny.spell(part.tolist()) for part in (ids[:prompt], ids[prompt:])]
        raw = tiny.length_reward(words[:1], words[1:])[0]
        rewards = -0.3 * (own - ref)
        rewards[-1] += raw - (0.0 if ended else 1.5)
        advantage, later, wanted = 0.0, 0.0, []
        for t in reversed(range(length)):
            advantage = rewards[t] + 0.8 * later - values[t] + 0.8 * 0.9 * advantage
            later = values[t]
            wanted.append(advantage)
        advantages = torch.stack(wanted[::-1])
        assert bool(sequences.finished[i]) == ended
        pairs = (experience.logprobs, own), (experience.ref_logprobs, ref), (experience.values, values)
        more = (experience.rewards, rewards), (experience.advantages, advantages), (experience.returns, advantages + values)
        for found, expected in (*pairs, *more):
            assert torch.allclose(found[i, :length], expected, rtol=1e-9, atol=1e-9)
            assert (found[i, length:] == 0).all()
        assert rollout.samples[i]["score"] == pytest.approx(raw)
        kls.append(float((own - ref).sum()))
        finished.append(ended)
    assert 0 < sum(finished) < 12
    metrics = rollout.metrics
    assert metrics["kl"] == pytest.approx(sum(kls) / 12) and metrics["finished"] == sum(finished) / 12
    assert metrics["length"] == pytest.approx(float(sequences.response_lens.sum()) / 12)
    assert metrics["entropy"] == pytest.approx(float(sum(entropies) / sequences.response_lens.sum()))
    raw_scores = torch.tensor([sample["score"] for sample in rollout.samples], dtype=torch.float64)
    assert metrics["score"] == pytest.approx(float(raw_scores.mean()))
    assert metrics["score_std"] == pytest.approx(float(raw_scores.std(correction=0)))
    penalised = raw_scores - 1.5 * (1 - torch.tensor(finished).double())
    assert metrics["reward"] == pytest.approx(float(penalised.mean()) - 0.3 * metrics["kl"])


def test_the_score_stands_on_the_last_token_alone(actors: Actors) -> None:
    """With policy = reference every reward but the last token's is exactly 0, EOS or not (section 3, row 5)."""
    experience = tiny.rollout_of(actors, tiny.ppo_config()).experience
    mask, last = experience.sequences.response_mask, experience.sequences.response_lens - 1
    assert torch.equal(experience.rewards.gather(1, last[:, None]).squeeze(1), experience.scores)
    assert int((experience.rewards != 0).sum()) <= 12 and mask.sum() > 12
    ended = experience.sequences.finished
    assert (experience.sequences.response_ids.gather(1, last[:, None]).squeeze(1)[ended] == tiny.EOS).all()


def test_kl_is_zero_at_the_start_and_positive_after_an_update(actors: Actors) -> None:
    """Row 28: the reference is a copy of its own, and stays where it was."""
    config, before = tiny.ppo_config(), tiny.weights(actors.ref_policy)
    rollout = tiny.rollout_of(actors, config)
    assert rollout.metrics["kl"] == 0.0 and rollout.metrics["kl_k3"] == 0.0
    assert rollout.metrics["sampler_logprob_gap"] < 1e-6  # carried in float32
    tiny.update_of(rollout.experience, actors, config, policy_learning_rate=1e-2)
    after = tiny.rollout_of(actors, config, iteration=1)
    assert after.metrics["kl_k3"] > 1e-4
    assert tiny.largest_gap(before, tiny.weights(actors.ref_policy)) == 0.0


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ({"missing_eos_penalty": 1.0}, (5.0, 4.0)),
        ({"missing_eos_penalty": None, "missing_eos_score": -1.0}, (5.0, -1.0)),
        ({"missing_eos_penalty": None}, (5.0, 5.0)),
    ],
)
def test_scores_are_clipped_before_the_missing_end_rule(rule: dict[str, Any], wanted: tuple[float, float]) -> None:
    """Row 37 with the score 7.5 and a clip at 5; the raw score is what is logged."""
    actors = tiny.actors_of(lambda prompts, responses: [7.5] * len(responses))
    rollout = tiny.rollout_of(actors, tiny.ppo_config(score_clip=5.0, **rule))
    finished = rollout.experience.sequences.finished
    assert finished.any() and not finished.all()
    assert (rollout.experience.scores[finished] == wanted[0]).all() and (rollout.experience.scores[~finished] == wanted[1]).all()
    assert rollout.metrics["score"] == 7.5


def test_the_penalty_goes_by_finish_reason_not_by_the_tokenizers_end() -> None:
    """Section 3, row 6: with another stop token, a response that ends by it is finished."""
    actors = tiny.actors_of(stop_ids=(3,), steps=8, reward=lambda prompts, responses: [0.0] * len(responses))
    rollout = tiny.rollout_of(actors, tiny.ppo_config(max_new_tokens=8, missing_eos_penalty=1.0))
    sequences = rollout.experience.sequences
    for ids, length, score in zip(sequences.response_ids, sequences.response_lens, rollout.experience.scores):
        assert float(score) == (0.0 if int(ids[length - 1]) == 3 else -1.0)
    assert (sequences.response_ids == tiny.EOS)[sequences.response_mask].any()  # an ordinary token here


def test_advantages_are_whitened_over_the_mask_and_returns_are_not(actors: Actors) -> None:
    plain = tiny.rollout_of(actors, tiny.ppo_config(whiten_advantages=False)).experience
    white = tiny.rollout_of(actors, tiny.ppo_config()).experience
    mask = plain.sequences.response_mask
    assert torch.equal(plain.returns, white.returns)
    assert torch.allclose(plain.returns, (plain.advantages + plain.values) * mask)
    chosen = white.advantages[mask]
    assert abs(float(chosen.mean())) < 1e-12 and float(chosen.std(correction=0)) == pytest.approx(1.0, abs=1e-6)


def test_metrics_and_experience_do_not_depend_on_micro_batches(actors: Actors) -> None:
    wanted = tiny.rollout_of(actors, tiny.ppo_config(), tokens=4096)
    for tokens in (1, 9, 16, 40):
        found = tiny.rollout_of(actors, tiny.ppo_config(), tokens=tokens)
        assert torch.equal(found.experience.sequences.input_ids, wanted.experience.sequences.input_ids)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-9, abs=1e-12)
        assert torch.allclose(found.experience.advantages, wanted.experience.advantages, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("tokens", "count"), [(4096, 1), (21, 4)])
def test_the_experience_carries_no_graph_and_the_kept_passes_do(actors: Actors, tokens: int, count: int) -> None:
    rollout = tiny.rollout_of(actors, tiny.ppo_config(), tokens=tokens)
    experience = rollout.experience
    assert not any(getattr(experience, name).requires_grad for name in ("logprobs", "values", "rewards", "advantages", "returns"))
    assert len(rollout.kept) == count and sorted(row for one in rollout.kept for row in one.rows.tolist()) == list(range(12))
    for one in rollout.kept:
        for name in ("logprobs", "values"):
            found, whole = getattr(one, name), getattr(experience, name)[one.rows]
            assert found.requires_grad and torch.equal(found, whole[:, : found.shape[1]]) and not whole[:, found.shape[1] :].any()


def test_no_graph_is_kept_that_the_first_step_could_not_take(actors: Actors) -> None:
    """Of several minibatches; of the policy where it does not learn yet."""
    (one,) = tiny.rollout_of(actors, tiny.ppo_config(minibatch_size=6)).kept
    assert one.logprobs is None and one.values is None
    (one,) = tiny.rollout_of(actors, tiny.ppo_config(value_warmup_iterations=1)).kept
    assert one.logprobs is None and one.values is not None


def test_room_for_graphs_by_hand(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first costs nothing, since an update holds one anyway; after it 2^27 bytes are there, and what does not fit takes none of them."""
    monkeypatch.setattr(type(actors.policy).__base__, "kept_bytes", lambda role, tokens, head_tokens: tokens * 2**20)
    policy, value_model = actors.policy, actors.value_model

    def texts(tokens: int) -> Sequences:
        return Sequences.from_rows([TokenRow((1,) * tokens, 1)])

    room = Room([policy, value_model])
    asked = [(policy, 900), (value_model, 100), (policy, 29), (value_model, 28), (policy, 1)]
    assert [room.take(role, texts(size)) for role, size in asked] == [True, True, False, True, False]
    room = Room([value_model])
    assert [room.take(role, texts(size)) for role, size in asked] == [False, True, False, True, False]
    assert not Room().take(policy, texts(1))


def test_graphs_that_find_no_room_are_not_kept(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "MOST_KEPT", actors.policy.kept_bytes(21, 12))
    kept = tiny.rollout_of(actors, tiny.ppo_config(), tokens=21).kept
    found = [[one.logprobs is not None, one.values is not None] for one in kept]
    assert found[0] == [True, True] and not any(found[-1])


def test_metrics_do_not_depend_on_padding(actors: Actors) -> None:
    """Section 3, row 25: means over pads would change with the width of the batch."""
    sequences = tiny.rollout_of(actors, tiny.ppo_config()).experience.sequences
    wanted = read(actors, sequences, 1.0, 4096, Room())[:4]
    sequences.input_ids = torch.nn.functional.pad(sequences.input_ids, (0, 5), value=3)
    for found, expected in zip(read(actors, sequences, 1.0, 4096, Room()), wanted):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_distinct_bigrams_are_counted_over_the_whole_batch() -> None:
    """Greedy decoding gives one response to each of three prompts, four times over."""
    actors = tiny.actors_of(stop_ids=())
    sample = actors.generator.sample
    actors.generator.sample = lambda prompts, uniforms: sample(prompts, None)  # type: ignore[method-assign]
    rollout = tiny.rollout_of(actors, tiny.ppo_config())
    responses = {tuple(row) for row in rollout.experience.sequences.response_ids.tolist()}
    bigrams = {pair for row in responses for pair in zip(row, row[1:])}
    assert rollout.metrics["distinct2"] == pytest.approx(len(bigrams) / (12 * 3))


def test_samples_show_what_was_sampled(actors: Actors) -> None:
    prompts = tiny.prompts_of()
    prompts.texts[0] = (Message("user", "hello"),)
    actors.scorer = tiny.FunctionScorer(lambda prompts, responses: [0.5] * len(responses), name="half")
    rollout = tiny.rollout_of(actors, tiny.ppo_config(rollout_batch_size=3), prompts, iteration=4)
    assert len(rollout.samples) == 3 and {row["iteration"] for row in rollout.samples} == {5}
    shown = Counter(str(row["prompt"]) for row in rollout.samples)
    assert shown == Counter(["[{'role': 'user', 'content': 'hello'}]", "2 3", "3 1 2"])


def test_each_iteration_draws_numbers_of_its_own(actors: Actors) -> None:
    """One prompt, one policy: only the numbers can make the responses of two iterations differ."""
    first, again, second = (
        tiny.rollout_of(actors, tiny.ppo_config(), tiny.prompts_of([[1]]), iteration=k).experience.sequences for k in (0, 0, 1)
    )
    assert first.input_ids.tolist() == again.input_ids.tolist() != second.input_ids.tolist()


def test_numbers_that_are_not_finite_end_the_run_with_the_culprits_name(actors: Actors) -> None:
    with torch.no_grad():
        actors.value_model.head.weight[0, 0] = math.nan
    with pytest.raises(TercetError, match="value model gave numbers that are not finite"):
        tiny.rollout_of(actors, tiny.ppo_config())


def test_samples_of_another_policy_version_are_refused(actors: Actors) -> None:
    actors.generator.sync = lambda version: None  # type: ignore[method-assign]
    with pytest.raises(TercetError, match="sampled from policy version 0"):
        tiny.rollout_of(actors, tiny.ppo_config(), iteration=3)


def test_a_field_that_no_prompt_of_a_batch_has_is_none_for_each_of_them() -> None:
    prompts = PromptSet([[5], [6], [7]], ["a", "b", "c"], [{"answer": "x"}, {}, {"level": 2}], str)
    texts = prompts.texts_of(tiny.sequences_of([([6], [1]), ([6], [2])]), [1, 1])
    assert texts.fields == [{"answer": None, "level": None}] * 2
