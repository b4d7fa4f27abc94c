"""Best-of-n, the frontier and PPO's path: figures by hand, by brute force, and where the truth is known exactly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tercet.jobs.frontier import best_of_n_figures, path_of_ppo


def draws(scores: list[list[float]], **others: list[list[float]]) -> list[dict[str, Any]]:
    """Rows in the order in which they are drawn: all prompts once, then again."""
    columns = {"score": scores, **others}
    return [
        {"place": 10 * place, "draw": number} | {name: values[place][number] for name, values in columns.items()}
        for number in range(len(scores[0]))
        for place in range(len(scores))
    ]


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    scores, judge = [[1.0, 4.0, 2.0, 8.0], [5.0, 0.0, 3.0, -1.0]], [[0.5, 0.1, 0.9, -2.0], [1.0, 2.0, 3.0, 4.0]]
    found = best_of_n_figures(draws(scores, judge=judge), ["score", "judge"], 64, seed=0)
    assert (found["prompts"], found["samples"], "frontier" in found) == (2, 4, False)
    assert [point["n"] for point in found["curve"]] == [1, 2, 4]
    for point in found["curve"]:
        n = point["n"]
        assert point["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
        for name, table in (("score", scores), ("judge", judge)):
            means = []
            for own, values in zip(scores, table):
                picked = [max(subset, key=own.__getitem__) for subset in itertools.combinations(range(4), n)]
                means.append(sum(values[i] for i in picked) / len(picked) - sum(values) / 4)
            assert point[f"{name}_gain"] == pytest.approx(sum(means) / 2)
            assert point[f"{name}_gain_low"] <= point[f"{name}_gain"] + 1e-12
            assert point[f"{name}_gain_high"] >= point[f"{name}_gain"] - 1e-12


def test_n_stops_at_the_samples_and_at_the_limit() -> None:
    few = best_of_n_figures(draws([[float(i) for i in range(6)]] * 2), ["score"], 64, seed=0)
    assert [point["n"] for point in few["curve"]] == [1, 2, 4, 6]
    many = best_of_n_figures(draws([[float(i) for i in range(100)]] * 2), ["score"], 64, seed=0)
    assert [point["n"] for point in many["curve"]] == [1, 2, 4, 8, 16, 32, 64]
    assert best_of_n_figures([], ["score"], 64, seed=0) == {}


def test_the_frontier_of_normal_scores() -> None:
    """Scores N(0, 1) and gold = half of them plus noise: the optimum at beta has mean score 1 / beta and KL 1 / (2 beta^2)."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 3000, generator=generator, dtype=torch.float64)
    gold = 0.5 * scores + torch.randn(20, 3000, generator=generator, dtype=torch.float64)
    found = best_of_n_figures(draws(scores.tolist(), gold=gold.tolist()), ["score", "gold"], 64, seed=0)["frontier"]
    assert len(found) > 10 and all(point["effective"] >= 100 for point in found)
    for point in (found[0], found[len(found) // 2]):
        assert point["kl"] == pytest.approx(0.5 / point["beta"] ** 2, rel=0.1)
        assert point["score_gain"] == pytest.approx(1 / point["beta"], rel=0.1)
        assert point["gold_gain"] == pytest.approx(0.5 / point["beta"], abs=0.05)
    assert [point["kl"] for point in found] == sorted(point["kl"] for point in found)
    # It ends where 3,000 samples stop to show it: effective samples are 3000 * exp(-1 / beta^2), so about 100 at beta 0.54.
    assert found[-1]["beta"] == pytest.approx(1 / math.sqrt(math.log(30)), abs=0.1)


def test_a_few_samples_show_no_frontier() -> None:
    assert best_of_n_figures(draws([[0.0, 1.0]] * 50, gold=[[0.0, 1.0]] * 50), ["score", "gold"], 64, seed=0)["frontier"] == []


def rows(scores: list[float], judge: list[float], kl: float) -> list[dict[str, float]]:
    return [{"score": score, "judge": other, "kl": kl} for score, other in zip(scores, judge)]


def test_the_path_is_sft_the_evaluations_between_and_the_end() -> None:
    sft, ppo = rows([0.0, 2.0], [1.0, 1.0], 0.0), rows([3.0, 4.0], [0.0, 5.0], 9.0)
    between = [
        {"iteration": 5, "score": [1.0, 4.0], "judge": [2.0, 1.0], "kl": [2.0, 4.0]},
        {
            "iteration": 10,
            "score": [9.0, 9.0],
            "judge": [9.0, 9.0],
            "kl": [9.0, 9.0],
        },  # the last: what was evaluated afterwards counts
        {"iteration": 7, "score": [1.0], "judge": [2.0], "kl": [2.0]},  # of other prompts
        {"iteration": 8, "score": [1.0, 4.0], "kl": [2.0, 4.0]},  # without the judge
    ]
    found = path_of_ppo(sft, ppo, 10, between, ["score", "judge"], seed=0)
    assert [(point["iteration"], point["kl"]) for point in found["points"]] == [(0, 0.0), (5, 3.0), (10, 9.0)]
    middle, end = found["points"][1:]
    assert (middle["score"], middle["score_gain"], middle["judge_gain"]) == (2.5, 1.5, 0.5)
    assert (end["score_gain"], end["judge_gain"], end["judge_gain_low"], end["judge_gain_high"]) == (2.5, 1.5, -1.0, 4.0)
    assert middle["kl_low"] == 2.0 and middle["kl_high"] == 4.0
    assert found["prompts"] == 2 and found["turns"] == {}


def test_where_a_judge_turns_down_is_told_in_iterations_and_nats() -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(mean: float) -> list[float]:
        return (mean + torch.randn(100, generator=generator, dtype=torch.float64)).tolist()

    gold = dict(zip((5, 10, 15, 20), (1.0, 2.0, 1.5, 0.2)))
    between = [
        {"iteration": i, "score": noisy(i / 5), "gold": noisy(mean), "bag_of_words": noisy(mean), "kl": [i / 2] * 100}
        for i, mean in gold.items()
    ]
    start = [{"score": s, "gold": g, "bag_of_words": g, "kl": 0.0} for s, g in zip(noisy(0), noisy(0))]
    end = [{"score": s, "gold": g, "bag_of_words": g, "kl": 15.0} for s, g in zip(noisy(6), noisy(-1))]
    found = path_of_ppo(start, end, 25, between, ["score", "gold", "bag_of_words"], seed=0)["turns"]
    assert set(found) == {"gold"}  # the score rises; words alone are drawn but not asked
    turn = found["gold"]
    assert (turn["iteration"], turn["kl"]) == (10, 5.0) and 5 <= turn["low"] <= 10 <= turn["high"] <= 15
    assert turn["fall"] == pytest.approx(3, abs=0.4) and turn["rise"] == pytest.approx(4, abs=0.5)
