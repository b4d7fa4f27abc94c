"""Evaluation: shared random numbers, figures by hand, win rates with intervals, groups."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny
import torch

from tercet.generation.native import NativeGenerator
from tercet.models.roles import Policy
from tercet.stages.evaluate import (
    Journey,
    Judges,
    Sampling,
    compare,
    draw,
    groups_of,
    judged,
    respond,
    summarise,
    surprisal,
    wins,
)
from tercet.stages.evaluate import answers as sample
from tercet.stages.rollout import PromptSet

SAMPLING = Sampling(seed=4, temperature=1.0, max_new_tokens=6, batch_size=4, greedy=False, max_tokens=64)
JUDGES = Judges(
    tiny.FunctionScorer(tiny.length_reward, name="score"),
    {"gold": tiny.FunctionScorer(lambda prompts, responses: [float(len(r)) for r in responses], name="gold")},
)
PROMPTS = tiny.PROMPTS * 5


def answers(
    policy: Policy, reference: Policy | None = None, prompts: PromptSet | None = None, **options: Any
) -> list[dict[str, Any]]:
    sampling = Sampling(**({**vars(SAMPLING)} | options))
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6, temperature=sampling.temperature)
    return respond(policy, reference or tiny.policy_of(), generator, prompts or tiny.prompts_of(PROMPTS), JUDGES, sampling)


def test_the_same_policy_twice_gives_identical_responses_and_half_the_wins() -> None:
    first, second = answers(tiny.policy_of(2)), answers(tiny.policy_of(2))
    assert first == second
    assert wins(first, second, "score", seed=0) == {
        "win_rate": 0.5,
        "low": 0.5,
        "high": 0.5,
        "n": 15,
        "lc_win_rate": 0.5,
        "lc_low": 0.5,
        "lc_high": 0.5,
    }
    assert len({tuple(row["ids"]) for row in first}) > 3  # random numbers by place: equal prompts get several answers


def test_a_share_of_all_or_nothing_is_not_certain() -> None:
    """Five of five: Wilson's interval, as of any share that the bootstrap cannot vary."""
    rows = [{"score": float(won), "length": 3} for won in (1, 1, 1, 1, 1)]
    beaten = [{"score": 0.0, "length": 3} for _ in rows]
    found = wins(rows, beaten, "score", seed=0)
    assert found["win_rate"] == found["high"] == 1.0 and found["low"] == pytest.approx(1 / (1 + 1.96**2 / 5), abs=1e-5)
    assert wins(beaten, rows, "score", seed=0)["high"] == pytest.approx(1 - found["low"])


def test_policies_share_their_random_numbers_and_iterations_of_training_do_not_matter() -> None:
    """A policy that differs by a hair gives the same responses: only then does a comparison of two policies have little noise."""
    near = tiny.policy_of(2)
    with torch.no_grad():
        near.model.transformer.ln_f.bias[0] += 1e-9
    assert [row["ids"] for row in answers(near)] == [row["ids"] for row in answers(tiny.policy_of(2))]
    assert [row["ids"] for row in answers(tiny.policy_of(2), seed=5)] != [row["ids"] for row in answers(tiny.policy_of(2))]


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 15}, {"max_tokens": 1}])
def test_neither_batch_size_nor_micro_batches_change_an_answer(options: dict[str, int]) -> None:
    wanted, found = answers(tiny.policy_of(2)), answers(tiny.policy_of(2), **options)
    for a, b in zip(wanted, found):
        assert a["ids"] == b["ids"] and a["place"] == b["place"]
        assert b["kl"] == pytest.approx(a["kl"], rel=1e-9) and b["entropy"] == pytest.approx(a["entropy"], rel=1e-9)


def test_kl_and_entropy_against_a_slow_loop() -> None:
    policy, reference = tiny.policy_of(2), tiny.policy_of(0)
    for row in answers(policy, reference, temperature=0.7):
        prompt, kl, entropy = PROMPTS[row["place"]], 0.0, 0.0
        for t, token in enumerate(row["ids"]):
            ids = torch.tensor([[*prompt, *row["ids"][:t]]])
            with torch.no_grad():
                own, ref = ((m.model(input_ids=ids).logits[0, -1] / 0.7).log_softmax(-1) for m in (policy, reference))
            kl += float(own[token] - ref[token])
            entropy -= float((own.exp() * own).sum())
        assert row["kl"] == pytest.approx(kl, rel=1e-9) and row["entropy"] == pytest.approx(entropy / len(row["ids"]), rel=1e-9)
        assert row["finished"] == (row["ids"][-1] == tiny.EOS) and row["length"] == len(row["ids"])
        assert row["gold"] == len(row["response"]) and row["response"] == tiny.spell(row["ids"])
        assert row["score"] == tiny.length_reward([tiny.spell(prompt)], [row["response"]])[0]


def test_surprisal_against_a_slow_loop() -> None:
    """At temperature 1 whatever the sampling temperature, without the stop token that ended the response."""
    rows, base = answers(tiny.policy_of(2), temperature=0.7), tiny.policy_of(5)
    cooler = Sampling(**({**vars(SAMPLING)} | {"temperature": 0.7}))
    found = surprisal(base, tiny.prompts_of(PROMPTS), rows[::-1], cooler)[::-1]
    assert {row["finished"] for row in rows} == {True, False}
    for row, (nats, count) in zip(rows, found):
        text, wanted = row["ids"][: len(row["ids"]) - row["finished"]], 0.0
        for t, token in enumerate(text):
            ids = torch.tensor([[*PROMPTS[row["place"]], *text[:t]]])
            with torch.no_grad():
                wanted -= float(base.model(input_ids=ids).logits[0, -1].log_softmax(-1)[token])
        assert count == len(text) and nats == pytest.approx(wanted, rel=1e-9)


def test_perplexity_is_over_all_tokens_together() -> None:
    row = {"score": 0.0, "combined": 0.0, "kl": 0.0, "length": 1, "finished": True, "entropy": 0.0, "ids": [1]}
    rows = [row | {"surprisal": pair} for pair in ((6.0, 2), (1.0, 1), (0.0, 0))]
    assert summarise(rows, [])["perplexity"] == pytest.approx(math.exp(7 / 3))
    assert "perplexity" not in summarise([row], []) and "perplexity" not in summarise(rows[2:], [])


def draws(count: int, places: list[int], **options: Any) -> list[dict[str, Any]]:
    policy, sampling = tiny.policy_of(2), Sampling(**({**vars(SAMPLING)} | options))
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6)
    return draw(generator, tiny.prompts_of(PROMPTS), JUDGES, sampling, count, places=places)


def test_many_draws_of_a_prompt_are_different_and_do_not_depend_on_how_many() -> None:
    few, many = draws(3, [1, 4], greedy=True), draws(30, [4, 1, 2], batch_size=7)
    assert [(row["place"], row["draw"]) for row in few] == [(1, 0), (4, 0), (1, 1), (4, 1), (1, 2), (4, 2)]
    by_draw = {(row["place"], row["draw"]): row for row in many}
    assert all(by_draw[row["place"], row["draw"]] == row for row in few)
    scores = [row["score"] for row in many if row["place"] == 1]
    assert len(scores) == 30 and len(set(scores)) > 5
    assert set(many[0]) == {"draw", "place", "length", "finished", "score", "gold"}
    # Places 1 and 4 hold the same prompt: neither has the other's random numbers a few draws later, nor those of the evaluation.
    of_four = [row["score"] for row in many if row["place"] == 4]
    assert all(scores[shift:] != of_four[: len(of_four) - shift] for shift in range(20))
    assert [row["score"] for row in draws(1, list(range(15)))] != [row["score"] for row in answers(tiny.policy_of(2))]


def test_draws_have_the_distribution_of_the_policy() -> None:
    """The mean score of 2,000 draws is that of enumeration over all responses."""
    policy = tiny.policy_of(2)
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=2)
    sampling = Sampling(**({**vars(SAMPLING)} | {"max_new_tokens": 2, "batch_size": 500}))
    found = draw(generator, tiny.prompts_of(), JUDGES, sampling, 2000, places=[1])
    mean = square = 0.0
    for response in tiny.all_responses(tiny.VOCABULARY, 2):
        chance = 1.0
        for t, token in enumerate(response):
            ids = torch.tensor([[*tiny.PROMPTS[1], *response[:t]]])
            with torch.no_grad():
                chance *= float(policy.model(input_ids=ids).logits[0, -1].softmax(-1)[token])
        score = tiny.length_reward([tiny.spell(tiny.PROMPTS[1])], [tiny.spell(list(response))])[0]
        mean, square = mean + chance * score, square + chance * score**2
    error = math.sqrt((square - mean**2) / 2000)
    assert sum(row["score"] for row in found) / 2000 == pytest.approx(mean, abs=4 * error)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_rows() -> None:
    class Stop(Exception):
        pass

    def interrupted(task: Any) -> tuple[list[dict[str, Any]], list[int]]:
        """The rows of a first attempt that ends after two batches, then those of a second one that goes on; and batches counted."""
        kept: list[dict[str, Any]] = []
        counted: list[int] = []

        def keep(rows: Any) -> None:
            kept.extend(rows)
            if len(kept) == 8:
                raise Stop

        with pytest.raises(Stop):
            task(Journey((), keep, counted.append))
        return task(Journey(list(kept), kept.extend, counted.append)), counted

    policy, reference, prompts = tiny.policy_of(2), tiny.policy_of(), tiny.prompts_of(PROMPTS)
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6)
    rows, counted = interrupted(lambda journey: sample(policy, generator, prompts, SAMPLING, journey=journey))
    rows = json.loads(json.dumps(rows))  # as the journal keeps them
    assert counted == [0, 4, 8, 4, 3] and all(len(row["logprobs"]) == row["length"] == len(row["ids"]) for row in rows)
    rows, counted = interrupted(lambda journey: judged(rows, reference, prompts, JUDGES, SAMPLING, journey=journey))
    assert rows == answers(policy) and counted == [0, 4, 8, 4, 3]
    rows, _ = interrupted(lambda journey: draw(generator, prompts, JUDGES, SAMPLING, 5, places=[3, 1], journey=journey))
    assert rows == draws(5, [3, 1])


def test_judges_see_the_texts_that_were_sampled() -> None:
    seen: list[Any] = []

    class Noting:
        def score(self, sequences: Any, texts: Any) -> torch.Tensor:
            seen.append(sequences)
            return torch.zeros(len(sequences))

    policy, prompts = tiny.policy_of(2), tiny.prompts_of(PROMPTS)
    rows = sample(policy, NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6), prompts, SAMPLING)
    judged(rows, tiny.policy_of(), prompts, Judges(Noting(), {}), SAMPLING)
    texts = [ids[:length] for part in seen for ids, length in zip(part.input_ids.tolist(), part.lengths.tolist())]
    assert texts == [[*PROMPTS[row["place"]], *row["ids"]] for row in rows]
    finished = [ended for part in seen for ended in part.finished.tolist()]
    assert finished == [row["finished"] for row in rows] and {True, False} == set(finished)


def test_some_places_get_the_answers_that_they_have_among_all() -> None:
    policy, prompts = tiny.policy_of(2), tiny.prompts_of(PROMPTS)
    generator = NativeGenerator(policy, stop_ids=[tiny.EOS], max_new_tokens=6)
    some = respond(policy, tiny.policy_of(), generator, prompts, JUDGES, SAMPLING, places=[7, 2, 11])
    everything = answers(policy)
    assert [row["place"] for row in some] == [7, 2, 11]
    assert [row["ids"] for row in some] == [everything[place]["ids"] for place in (7, 2, 11)]


def test_greedy_takes_the_likeliest_token() -> None:
    policy = tiny.policy_of(2)
    for row in answers(policy, greedy=True):
        ids = list(PROMPTS[row["place"]])
        for token in row["ids"]:
            assert token == int(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)


def test_figures_by_hand() -> None:
    rows = [
        {
            "score": 1.0,
            "combined": 0.0,
            "kl": 2.0,
            "length": 4,
            "finished": True,
            "entropy": 0.5,
            "gold": 3.0,
            "ids": [1, 2, 1, 2],
        },
        {"score": 4.0, "combined": 3.0, "kl": 0.0, "length": 2, "finished": False, "entropy": 1.5, "gold": 3.0, "ids": [1, 2]},
    ]
    figures = summarise(rows, ["gold"])
    assert (figures["score"], figures["score_std"], figures["kl"], figures["length"]) == (2.5, 1.5, 1.0, 3.0)
    assert figures["combined"] == 1.5
    assert (figures["finished"], figures["entropy"], figures["gold"], figures["gold_std"]) == (0.5, 1.0, 3.0, 0.0)
    assert figures["distinct1"] == 2 / 6 and figures["distinct2"] == 2 / 4
    assert figures["repetition"] == pytest.approx((1 / 3 + 0) / 2)


def test_win_rates_count_ties_half_and_intervals_hold_them() -> None:
    ours = [{"score": value, "length": 5} for value in (1.0, 2.0, 3.0, 4.0)]
    theirs = [{"score": value, "length": 5} for value in (0.0, 2.0, 5.0, 1.0)]
    won = wins(ours, theirs, "score", seed=0)
    assert won["win_rate"] == (1 + 0.5 + 0 + 1) / 4 and won["low"] < won["win_rate"] < won["high"]
    assert wins(theirs, ours, "score", seed=0)["win_rate"] == 1 - won["win_rate"]
    assert won["lc_win_rate"] == pytest.approx(3 / 5)  # equal lengths: 2.5 of 4, and the tie that the regression adds
    longer = [row | {"length": 5 + 4 * (row["score"] > 2)} for row in ours]
    assert wins(longer, theirs, "score", seed=0)["lc_win_rate"] != pytest.approx(3 / 5)


def test_compare_asks_every_judge_where_there_are_two_policies() -> None:
    responses = {"sft": answers(tiny.policy_of(0)), "ppo": answers(tiny.policy_of(2))}
    policies, won = compare(responses, ["gold"], 0)
    assert set(policies) == {"sft", "ppo"} and set(won) == {"score", "gold"}
    assert policies["sft"]["kl"] == 0.0 and math.isfinite(policies["ppo"]["kl"]) and policies["ppo"]["kl"] != 0.0
    better = sum((a["gold"] > b["gold"]) + (a["gold"] == b["gold"]) / 2 for a, b in zip(responses["ppo"], responses["sft"]))
    assert won["gold"]["win_rate"] == pytest.approx(better / 15)
    assert compare({"sft": responses["sft"]}, ["gold"], 0)[1] == {}
    assert policies["ppo"]["win_rate"] == won["score"]["win_rate"] and "win_rate" not in policies["sft"]


def test_other_policies_are_held_against_sft_by_the_second_reward_model() -> None:
    judged = [[row | {"judge": -row["score"]} for row in answers(tiny.policy_of(seed))] for seed in (0, 2)]
    policies, won = compare({"sft": judged[0], "mine": judged[1]}, ["judge"], 0)
    better = sum((a["score"] < b["score"]) + (a["score"] == b["score"]) / 2 for a, b in zip(judged[1], judged[0]))
    assert won == {} and policies["mine"]["win_rate"] == pytest.approx(better / 15)
    assert policies["mine"]["win_rate_low"] <= policies["mine"]["win_rate"] <= policies["mine"]["win_rate_high"]


def test_groups_are_the_values_of_a_field() -> None:
    prompts = tiny.prompts_of([[1], [2], [3]])
    prompts.fields[:] = [{"topic": "known"}, {"topic": "new"}, {"topic": "known"}]
    assert groups_of(prompts, "topic") == {"known": [0, 2], "new": [1]}
    assert groups_of(prompts, None) == {}
    assert groups_of(prompts, "absent") == {"None": [0, 1, 2]}
