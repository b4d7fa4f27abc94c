"""Stage 2: the K-way loss in one forward per response, what is reported, normalisation."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tercet.config.training import RewardConfig
from tercet.data.records import judge_split
from tercet.models.roles import ScoreModel
from tercet.stages.reward import normalise, score_pairs, score_responses, tokenise_comparisons, train_reward_model
from tercet.types import Comparison, Sequences, TercetError

RECORDS = [
    Comparison("what is rain", ("rain is water", "sun", "happy words happy words", "short"), (0, 2, 1, 2)),
    Comparison("explain sun", ("sun is warm", "rain that falls"), (0, 1), margin=0.5),
    Comparison("define kind", ("kind is kind", "happy is happy"), (1, 1)),  # a tie: does not count
    Comparison("what is short", ("a", "short is short is short", "words"), (3, 2, 1)),
]


@pytest.fixture
def template() -> Any:
    return tiny.template_of()


def model() -> ScoreModel:
    return tiny.value_of(3, vocabulary=300, positions=64)


def train(model: ScoreModel, template: Any, folder: Path, held_out: Any = (), records: Any = RECORDS, **options: Any) -> Any:
    tokens = options.pop("tokens", 4096)
    config = RewardConfig.model_validate({"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "max_length": 64} | options)
    run = tiny.run_of(folder, "reward", tokens=tokens)
    figures, pairs = train_reward_model(run, config, model, template, records, held_out, seed=0)
    return figures, pairs, [json.loads(line) for line in (folder / "reward/metrics.jsonl").read_text().splitlines()]


def scores_by_hand(model: ScoreModel, template: Any, record: Comparison) -> list[float]:
    """Each response alone through the transformers class: the logit at its last token, plus the offset."""
    scores = []
    for response in record.responses:
        ids = torch.tensor([template.encode(record.prompt, response).row.ids])
        with torch.no_grad():
            scores.append(float(model.model(input_ids=ids).logits[0, 0]) + model.offset)
    return scores


def loss_by_hand(model: ScoreModel, template: Any, records: Any) -> tuple[float, float]:
    """The mean over prompts that count of the mean over their pairs of log(1 + exp(-(better - worse - margin))), and accuracy."""
    losses, right = [], []
    for record in records:
        scores, terms = scores_by_hand(model, template, record), []
        for i, j in combinations(range(len(scores)), 2):
            if record.ranks[i] == record.ranks[j]:
                continue
            better, worse = (i, j) if record.ranks[i] < record.ranks[j] else (j, i)
            terms.append(math.log1p(math.exp(-(scores[better] - scores[worse] - record.margin))))
            right.append(scores[better] > scores[worse])
        if terms:
            losses.append(sum(terms) / len(terms))
    return sum(losses) / len(losses), sum(right) / len(right)


@pytest.mark.parametrize("tokens", [4096, 60, 1])
def test_the_loss_is_that_of_the_paper_whatever_the_micro_batches(tmp_path: Path, template: Any, tokens: int) -> None:
    wanted, accuracy = loss_by_hand(model(), template, RECORDS)
    _, _, rows = train(model(), template, tmp_path, tokens=tokens)
    assert rows[0]["loss"] == pytest.approx(wanted, rel=1e-9) and rows[0]["accuracy"] == pytest.approx(accuracy)


def test_margins_and_ties_matter(template: Any) -> None:
    plain = [Comparison(r.prompt, r.responses, r.ranks) for r in RECORDS]
    assert loss_by_hand(model(), template, plain)[0] < loss_by_hand(model(), template, RECORDS)[0] - 1e-3
    untied = [*RECORDS[:2], Comparison(RECORDS[2].prompt, RECORDS[2].responses, (0, 1)), RECORDS[3]]
    assert abs(loss_by_hand(model(), template, untied)[0] - loss_by_hand(model(), template, RECORDS)[0]) > 1e-3


def test_one_forward_per_response(tmp_path: Path, template: Any) -> None:
    """Row 17: K responses make K forwards, not K (K - 1), and a prompt's pairs stay in one batch element."""
    reward, seen = model(), []
    forward = reward.forward

    def spy(sequences: Sequences, **options: Any) -> Any:
        seen.append(len(sequences))
        return forward(sequences, **options)

    reward.forward = spy  # type: ignore[method-assign]
    train(reward, template, tmp_path, tokens=60)
    assert sum(seen) == sum(len(record.responses) for record in RECORDS) == 11 and len(seen) > 1


def test_every_parameter_learns(tmp_path: Path, template: Any) -> None:
    reward = model()
    before = tiny.weights(reward)
    train(reward, template, tmp_path)
    after = tiny.weights(reward)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not still


def test_held_out_figures_and_pairs(tmp_path: Path, template: Any) -> None:
    reward = model()
    figures, pairs, rows = train(reward, template, tmp_path, held_out=RECORDS[:3], epochs=2, tokens=50)
    loss, accuracy = loss_by_hand(reward, template, RECORDS[:3])
    assert figures["reward.eval_loss"] == pytest.approx(loss, rel=1e-9) == rows[-1]["eval_loss"]
    assert figures["reward.eval_accuracy"] == pytest.approx(accuracy) and figures["reward.eval_pairs"] == 6 == len(pairs)
    assert figures["reward.eval_accuracy_low"] <= accuracy <= figures["reward.eval_accuracy_high"]
    scores = scores_by_hand(reward, template, RECORDS[0])
    assert {(round(p["better"], 9), round(p["worse"], 9)) for p in pairs if p["comparison"] == 0} == {
        (round(scores[i], 9), round(scores[j], 9)) for i, j in ((0, 1), (0, 2), (0, 3), (2, 1), (2, 3))
    }
    tokens = len(template.tokenizer(" sun is warm").input_ids) + 1  # and EOS
    assert [p["better_tokens"] for p in pairs if p["comparison"] == 1] == [tokens]


def test_held_out_figures_do_not_depend_on_how_many_are_in_a_table(
    tmp_path: Path, template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rankings of different sizes, of which one has a margin."""
    whole, _, _ = train(model(), template, tmp_path / "whole", held_out=RECORDS)
    monkeypatch.setattr("tercet.stages.reward.AT_ONCE", 1)
    alone, _, _ = train(model(), template, tmp_path / "alone", held_out=RECORDS)
    assert alone["reward.eval_loss"] == pytest.approx(whole["reward.eval_loss"], rel=1e-12)
    assert alone["reward.eval_accuracy"] == whole["reward.eval_accuracy"]


def test_held_out_ties_alone_measure_nothing(tmp_path: Path, template: Any) -> None:
    figures, pairs, rows = train(model(), template, tmp_path, held_out=[RECORDS[2]])
    assert pairs == [] and not [name for name in (*figures, *rows[-1]) if "eval" in name]


def test_equal_scores_count_half(tmp_path: Path, template: Any) -> None:
    reward = model()
    reward.head.weight.data.zero_()
    run = tiny.run_of(tmp_path, "reward")
    data = tokenise_comparisons(RECORDS, template, 64)
    assert [pair["correct"] for pair in score_pairs(data, score_responses(run, reward, data))] == [0.5] * 9


def test_eos_is_part_of_the_scored_text(template: Any) -> None:
    """Section 3, row 8: the score changes with the end token; a truncated text has none (row 22)."""
    data = tokenise_comparisons([RECORDS[0]], template, 64)
    sequences = data.store.sequences([0])
    assert int(sequences.input_ids[0, -1]) == template.eos_id
    shorter = Sequences(sequences.input_ids[:, :-1], sequences.prompt_lens, sequences.response_lens - 1, torch.tensor([False]))
    reward = model()
    with torch.no_grad():
        assert abs(float(reward(sequences)) - float(reward(shorter))) > 1e-3
    cut = tokenise_comparisons([RECORDS[0]], template, 8)
    assert cut.truncated == 4 or cut.truncated > 0
    assert not cut.store.sequences([2]).finished[0] and template.eos_id not in cut.store.sequences([2]).input_ids[0].tolist()


@pytest.mark.parametrize("tokens", [4096, 12])
def test_normalised_samples_have_mean_0_and_deviation_1(tokens: int) -> None:
    """And the head's scores change by the same gain and offset for every other text, also with an offset before."""
    reward, samples = tiny.value_of(), tiny.sample(tiny.policy_of(), tiny.PROMPTS * 20)
    other = tiny.sample(tiny.policy_of(5), tiny.PROMPTS, seed=9)
    reward.set_offset(3.0)
    with torch.no_grad():
        before = reward(other)
        figures = normalise(reward, samples, tokens)
        scores = reward(samples)
        assert torch.allclose(
            reward(other), figures["reward.normalisation_gain"] * before + figures["reward.normalisation_bias"], rtol=1e-9
        )
    assert abs(float(scores.mean())) < 1e-9 and float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-9)
    assert reward.model.config.score_offset == reward.offset


def test_normalisation_in_float32_is_right_to_1e_5() -> None:
    reward, samples = tiny.value_of(dtype=torch.float32), tiny.sample(tiny.policy_of(dtype=torch.float32), tiny.PROMPTS * 40)
    normalise(reward, samples, 64)
    with torch.no_grad():
        scores = reward(samples).double()
    assert abs(float(scores.mean())) < 1e-5 and float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_a_constant_reward_model_cannot_be_normalised() -> None:
    reward = tiny.value_of()
    reward.head.weight.data.zero_()
    with pytest.raises(TercetError, match="cannot be normalised.*normalise_samples: 0"):
        normalise(reward, tiny.sample(tiny.policy_of(), tiny.PROMPTS), 64)


def test_all_ties_are_refused_and_tiny_data_works(tmp_path: Path, template: Any) -> None:
    with pytest.raises(TercetError, match="every comparison is a tie"):
        train(model(), template, tmp_path, records=[RECORDS[2]])
    figures, pairs, _ = train(model(), template, tmp_path / "one", records=[RECORDS[1]])
    assert figures["reward.comparisons"] == 1 and pairs == [] and "reward.eval_accuracy" not in figures


def test_the_judge_shares_no_prompt_with_the_reward_model() -> None:
    records = [Comparison(f"prompt {i % 400}", ("a", "b"), (0, 1)) for i in range(1000)]
    own, judge = judge_split(records)
    assert len(own) + len(judge) == 1000 and not {r.prompt for r in own} & {r.prompt for r in judge}
    assert 100 < len(judge) < 320
    assert judge_split(records[:499]) == (records[:499], [])
