import json
import math

import pytest

from tercet.report.causes import CAUSES
from tercet.report.findings import interval_of_mean, judged_by, wilson
from tercet.report.load import RunData, load_run
from tercet.report.page import sentence
from tercet.report.samples import shelves
from tercet.report.tables import comparison, headline
from tercet.report.verdict import verdict, verdict_of


def ppo(**series: list[float]) -> dict[str, list[dict[str, float]]]:
    """PPO metrics from columns."""
    count = len(next(iter(series.values())))
    return {"ppo": [{"iteration": i + 1} | {key: values[i] for key, values in series.items()} for i in range(count)]}


def sft(*losses: float) -> dict[str, list[dict[str, float]]]:
    """The first of the losses is that before the first step."""
    rows = [{"step": i + 1.0, "eval_loss": loss} for i, loss in enumerate(losses[1:])]
    rows[0]["eval_loss_before"] = losses[0]
    return {"sft": rows}


def gains(*values: float) -> list[dict[str, float]]:
    return [{"sft_score": 0.5, "ppo_score": 0.5 + value} for value in values]


def told(summary: dict[str, float]) -> RunData:
    return RunData(summary=summary)


def scored(score: float) -> RunData:
    """Training texts score between -1 and 3; the last tenth of the iterations has this mean score."""
    rows = [{"iteration": i, "score": score if i > 18 else 0.0} for i in range(1, 21)]
    return RunData(summary={"ppo.score_range_low": -1.0, "ppo.score_range_high": 3.0}, metrics={"ppo": rows})


def drawn(**series: list[float]) -> RunData:
    return RunData(metrics=ppo(**series))


def trained(accuracy: float) -> RunData:
    return RunData(summary={"reward.eval_accuracy": 0.75}, metrics={"reward": [{"accuracy": accuracy}] * 8})


PAIRS = {"reward.eval_accuracy": 0.55, "reward.eval_pairs": 100}
GOOD = {"reward.eval_accuracy": 0.75, "reward.eval_pairs": 1000}
LENGTH = GOOD | {"reward.length_accuracy": 0.6, "reward.over_length": 0.15, "reward.over_length_low": 0.1}
WON = {"win_rate": 0.8, "win_rate_low": 0.75, "sft.length": 20, "ppo.length": 30, "lc_win_rate": 0.6}


def turned(judge: str, **figures: float) -> RunData:
    turn = {"iteration": 60, "low": 40, "high": 70, "fall": 0.9, "fall_low": 0.4, "fall_high": 1.4, "rise": 2.0, "kl": 9.0}
    return RunData(path={"turns": {judge: turn | figures}})


def misled(high: float) -> RunData:
    sides = {"longer_better": {"accuracy": 0.9, "high": 0.95}, "longer_worse": {"accuracy": 0.21, "high": high}}
    return RunData(summary=GOOD, card=sides)


def both(*pairs: tuple[float, float]) -> RunData:
    """Samples of which PPO's score gains the first and gold the second number."""
    return RunData(samples=[{"sft_score": 0, "ppo_score": a, "sft_gold": 0, "ppo_gold": b} for a, b in pairs])


def of_base(*kls: float) -> RunData:
    """The base model's samples at these distances from SFT; those of other groups do not count."""
    others = [{"base_kl": 5.0, "main": False}, {"base_kl": -5.0, "main": False}]
    return RunData(summary={"base.kl": 0.01}, samples=[*({"base_kl": kl} for kl in kls), *others])


# rule, level, the figure its sentence rests on, a run that breaks it, a run just inside
CASES = [
    ("not_finite", "error", "step 2", drawn(policy_loss=[1, math.nan, 1]), drawn(policy_loss=[1, 2, 1])),
    ("skipped", "warning", "3", drawn(skipped=[0, 1, 2]), drawn(skipped=[0, 0, 0])),
    ("sft_loss_rose", "error", "2.10", RunData(metrics=sft(2.0, 1.9, 2.1)), RunData(metrics=sft(2.0, 1.99, 2.019))),
    ("sft_overfit", "warning", "1.60", RunData(metrics=sft(2.0, 1.5, 1.6)), RunData(metrics=sft(2.0, 1.5, 1.57))),
    ("sft_none", "warning", "0.01", told({"base.kl": 0.01}), told({"base.kl": 0.03})),
    ("sft_none", "warning", "0.01", of_base(0.01, 0.0101, 0.0099), of_base(0.01, 0.3, -0.28)),  # the second may be chance
    ("sft_stop", "error", "41\u202f%", told({"sft.finished": 0.41}), told({"sft.finished": 0.8})),
    (
        "sft_stop",
        "warning",
        "79\u202f%",
        RunData(policies={"sft": {"finished": 0.79}}),
        RunData(policies={"sft": {"finished": 0.81}}),
    ),
    ("reward_chance", "error", "55\u202f%", told(PAIRS), told(PAIRS | {"reward.eval_pairs": 1000})),
    ("reward_weak", "warning", "55\u202f%", told(PAIRS | {"reward.eval_pairs": 1000}), told({"reward.eval_accuracy": 0.6})),
    ("reward_inverted", "error", "30\u202f%", told({"reward.eval_accuracy": 0.3, "reward.eval_pairs": 90}), told(PAIRS)),
    ("reward_few", "error", "20", told({"reward.comparisons": 20}), told({"reward.comparisons": 200})),
    ("reward_few", "warning", "60", told({"reward.comparisons": 60}), told({})),
    ("reward_unmeasured", "warning", "0", told({"reward.comparisons": 900}), told({"reward.comparisons": 900} | PAIRS)),
    ("reward_length", "error", "+0.01", told(LENGTH | {"reward.over_length": 0.01}), told(LENGTH)),
    (
        "reward_length",
        "warning",
        "+0.15",
        told(LENGTH | {"reward.over_length_low": -0.01}),
        told(LENGTH | {"reward.eval_pairs": 49}),
    ),
    ("reward_misled", "warning", "21\u202f%", misled(0.3), misled(0.51)),
    (
        "reward_overconfident",
        "warning",
        "2.50",
        told(GOOD | {"reward.temperature": 2.5}),
        told(GOOD | {"reward.temperature": 1.9}),
    ),
    ("reward_overfit", "warning", "20\u202f%", trained(0.95), trained(0.89)),
    ("sampler_gap", "error", "0.9", drawn(sampler_logprob_gap=[0.9] * 3), drawn(sampler_logprob_gap=[0.1] * 3)),
    ("kl_none", "error", "0.3\u202fnats", told({"ppo.kl": 0.3}), told({"ppo.kl": 0.5})),
    ("kl_none", "warning", "0.3\u202fnats", told({"ppo.kl": 0.3, "win_rate_low": 0.6}), told({"ppo.kl": 1})),
    ("kl_negative", "error", "\u22122\u202fnats", told({"ppo.kl": -2.0}), told({"ppo.kl": 2.0})),
    ("kl_exploded", "error", "61\u202fnats", told({"ppo.kl": 61, "ppo.length": 60}), told({"ppo.kl": 61, "ppo.length": 90})),
    ("kl_exploded", "error", "11\u202fnats", told({"ppo.kl": 11, "ppo.kl_budget": 10}), told({"ppo.kl": 9, "ppo.kl_budget": 10})),
    ("score_range", "warning", "3.40", scored(3.4), scored(2.9)),
    ("score_range", "warning", "\u22121.50", scored(-1.5), scored(-0.9)),
    ("score_flat", "error", "+0.5", RunData(samples=gains(2, -1)), RunData(samples=gains(1.0, 1.1, 0.9))),
    ("score_fell", "error", "\u22121", RunData(samples=gains(-1.0, -1.1, -0.9)), RunData(samples=gains(1.0, 1.1, 0.9))),
    ("win_rate_low", "error", "40\u202f%", told({"win_rate": 0.4, "win_rate_high": 0.45}), told({"win_rate": 0.6})),
    (
        "win_rate_even",
        "warning",
        "52\u202f%",
        told({"win_rate": 0.52, "win_rate_low": 0.48, "win_rate_high": 0.56}),
        told({"win_rate": 0.6, "win_rate_low": 0.55}),
    ),
    (
        "judge_disagrees",
        "error",
        "30\u202f%",
        RunData(summary={"win_rate": 0.9}, wins={"judge": {"win_rate": 0.3, "high": 0.35}}),
        RunData(summary={"win_rate": 0.9}, wins={"judge": {"win_rate": 0.6, "high": 0.65}}),
    ),
    ("over_optimised", "error", "\u22120.9", turned("gold"), turned("gold", fall_low=-0.1)),
    ("over_optimised", "error", "\u22120.9", turned("judge"), RunData(path={"turns": {}})),
    ("over_optimised", "error", "\u22121", both((2, -1), (2.1, -1.1), (1.9, -0.9)), both((2, -1), (2.1, 1.1), (1.9, 0.9))),
    (
        "win_by_length",
        "warning",
        "60\u202f%",
        told(WON | {"lc_win_rate_low": 0.49, "lc_win_rate_high": 0.7}),
        told(WON | {"lc_win_rate_low": 0.51, "lc_win_rate_high": 0.7}),
    ),
    ("win_by_length", "warning", "60\u202f%", told(WON | {"lc_win_rate_low": 0.49}), told(WON | {"lc_win_rate_low": 0.51})),
    ("score_constant", "error", "0", drawn(score_std=[0.0, 0.0]), drawn(score_std=[0.0, 0.1])),
    ("repeats", "error", "45\u202f%", told({"sft.repetition": 0.02, "ppo.repetition": 0.45}), told({"ppo.repetition": 0.45})),
    (
        "repeats",
        "warning",
        "30\u202f%",
        told({"sft.repetition": 0, "ppo.repetition": 0.3}),
        told({"sft.repetition": 0.2, "ppo.repetition": 0.3}),
    ),
    ("step_size", "error", "2", drawn(approx_kl=[0.1, 2.0, 0.1]), drawn(approx_kl=[0.1, 0.2])),
    ("step_size", "warning", "0.5", drawn(approx_kl=[0.5]), drawn(approx_kl=[0.3])),
    (
        "finished_fell",
        "warning",
        "80\u202f%",
        told({"sft.finished": 0.95, "ppo.finished": 0.8}),
        told({"sft.finished": 0.95, "ppo.finished": 0.9}),
    ),
    (
        "finished_fell",
        "error",
        "50\u202f%",
        told({"sft.finished": 0.95, "ppo.finished": 0.5}),
        told({"sft.finished": 0.9, "ppo.finished": 1}),
    ),
    ("entropy_collapse", "warning", "20\u202f%", drawn(entropy=[2.0, 1.5, 1.0, 0.4]), drawn(entropy=[2.0, 1.5, 1.0, 0.6])),
    ("entropy_collapse", "error", "5\u202f%", drawn(entropy=[2.0, 1.5, 1.0, 0.1]), drawn(entropy=[2.0, 2.0, 2.0, 2.0])),
    (
        "distinct_fell",
        "warning",
        "60\u202f%",
        told({"sft.distinct2": 0.5, "ppo.distinct2": 0.3}),
        told({"sft.distinct2": 0.5, "ppo.distinct2": 0.36}),
    ),
    (
        "distinct_fell",
        "error",
        "20\u202f%",
        told({"sft.distinct2": 0.5, "ppo.distinct2": 0.1}),
        told({"sft.distinct2": 0.5, "ppo.distinct2": 0.5}),
    ),
    (
        "value_model",
        "warning",
        "0.02",
        drawn(explained_variance=[0.9, 0.9, 0.02, 0.02]),
        drawn(explained_variance=[0, 0, 0.06, 0.06]),
    ),
    ("clip_fraction", "warning", "50\u202f%", drawn(clip_fraction=[0, 0, 0.5, 0.5]), drawn(clip_fraction=[0.9, 0.9, 0.3, 0.3])),
    ("length_grew", "warning", "2 ×", told({"sft.length": 20, "ppo.length": 40}), told({"sft.length": 20, "ppo.length": 35})),
    ("length_shrank", "warning", "0.2 ×", told({"sft.length": 20, "ppo.length": 4}), told({"sft.length": 20, "ppo.length": 7})),
]


@pytest.mark.parametrize(("rule", "level", "figure", "broken", "inside"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_each_rule_fires_with_its_figure_and_not_just_inside(rule, level, figure, broken, inside) -> None:
    found = [finding for finding in verdict(broken) if finding.rule == rule]
    assert [(finding.level, finding.figure) for finding in found] == [(level, figure)]
    assert found[0].title and found[0].text.endswith(".") and found[0].advice == CAUSES[rule].advice
    assert rule not in {finding.rule for finding in verdict(inside)}


def test_every_cause_has_a_case_at_each_of_its_levels() -> None:
    wanted = {
        (rule, level) for rule, cause in CAUSES.items() for level in ("error", "warning") if getattr(cause, level) is not None
    }
    assert wanted <= {(case[0], case[1]) for case in CASES}
    assert {case[0] for case in CASES} == set(CAUSES)


def test_what_a_model_goes_by_is_not_asked_where_a_coin_is_as_good() -> None:
    chance = {"reward.eval_accuracy": 0.5, "reward.eval_pairs": 1000, "reward.temperature": 100.0}
    chance |= {"reward.length_accuracy": 0.5, "reward.over_length": 0.0, "reward.over_length_low": -0.02}
    run = RunData(summary=chance, card={"longer_worse": {"accuracy": 0.1, "high": 0.2}})
    assert [finding.rule for finding in verdict(run)] == ["reward_chance"]


def test_the_point_where_a_judge_turns_down_is_named() -> None:
    (found,) = [finding for finding in verdict(turned("judge")) if finding.rule == "over_optimised"]
    assert "After iteration 60 (95 % interval 40 to 70) the second reward model's score fell by 0.9" in found.text
    (found,) = [finding for finding in verdict(turned("gold", iteration=0)) if finding.rule == "over_optimised"]
    assert found.text.startswith("From the first evaluation on the gold score fell")
    both_turn = RunData(path={"turns": turned("mine").path["turns"] | turned("gold").path["turns"]})
    assert [f.text.count("gold") for f in verdict(both_turn) if f.rule == "over_optimised"] == [1], "the truth is asked first"


def test_a_ppo_that_stopped_before_the_evaluation_is_judged_by_its_own_iterations() -> None:
    found = {
        f.rule: f.figure for f in verdict(drawn(length=[20.0, 19.0, 2.0], finished=[0.9, 0.9, 0.4], distinct2=[0.5, 0.5, 0.1]))
    }
    assert found == {"length_shrank": "0.1 ×", "finished_fell": "40\u202f%", "distinct_fell": "20\u202f%"}
    assert [f.rule for f in verdict(drawn(length=[20.0]))] == ["healthy"]


def test_a_few_responses_that_did_not_end_may_be_chance() -> None:
    for lost, told in ((1, False), (6, True)):
        samples = [{"sft_finished": True, "ppo_finished": place >= lost} for place in range(8)]
        found = verdict(RunData(summary={"sft.finished": 1.0, "ppo.finished": 1 - lost / 8}, samples=samples))
        assert ("finished_fell" in [finding.rule for finding in found]) == told


def test_broken_contents_of_files_say_nothing() -> None:
    for path in (
        {"turns": 3},
        {"turns": {"gold": 3}},
        {"turns": {"gold": {"iteration": "x", "fall": None}}},
        {"points": [1, None]},
    ):
        assert [finding.rule for finding in verdict(RunData(path=path, card={"longer_worse": 7}))] == ["empty"]


def test_the_verdict_for_the_summary(new_run) -> None:
    folder = new_run(steps=12, iterations=6, count=5)
    found = verdict_of(folder)
    assert [set(one) for one in found] == [{"cause", "severity", "stage", "sentence", "figure", "advice"}] * len(found)
    assert (found[0]["cause"], found[0]["severity"]) == ("healthy", "ok") and found[0]["sentence"].startswith(
        "Healthy. All three"
    )


def test_healthy_run_has_neither_errors_nor_warnings(new_run) -> None:
    found = verdict(load_run(new_run()))
    assert {finding.level for finding in found} == {"ok"} and found[0].title == "Healthy"
    assert {"reward_good", "score_rose", "win_rate_good"} <= {finding.rule for finding in found}


def test_a_win_that_another_judge_denies_is_not_called_one() -> None:
    won = {"win_rate": 0.9, "win_rate_low": 0.85}
    rules = [
        {finding.rule for finding in verdict(RunData(summary=won, wins={"gold": {"win_rate": rate, "high": rate + 0.05}}))}
        for rate in (0.6, 0.1)
    ]
    assert "win_rate_good" in rules[0] and not rules[1] & {"win_rate_good", "healthy"} and "judge_disagrees" in rules[1]


def test_a_run_that_has_not_ended_is_not_called_healthy(new_run) -> None:
    """Nor blamed for what it has not come to yet."""
    folder = new_run()
    assert load_run(folder).unfinished is None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) | {"ppo.kl": 0.0}
    (folder / "summary.json").write_text(json.dumps({key: value for key, value in summary.items() if key != "ppo.seconds"}))
    assert load_run(folder).unfinished is None  # there is ppo/done.json
    (folder / "ppo/done.json").unlink()
    run = load_run(folder)
    assert run.unfinished == "ppo"
    found = verdict(run)
    assert (found[0].rule, found[0].level, found[0].title) == ("unfinished", "warning", "The run is not finished")
    assert found[0].text.startswith("PPO is at iteration ") and not {"healthy", "kl_none"} & {finding.rule for finding in found}


def test_few_pairs_do_not_say_that_the_reward_model_is_good() -> None:
    few, enough = ({"reward.comparisons": 500, "reward.eval_accuracy": 1.0, "reward.eval_pairs": pairs} for pairs in (14, 140))
    rules = [{finding.rule for finding in verdict(told(summary))} for summary in (few, enough)]
    assert "reward_unmeasured" in rules[0] and "reward_good" not in rules[0] and "reward_good" in rules[1]


def test_the_training_score_is_no_second_judge() -> None:
    won = RunData(summary={"win_rate": 0.9}, wins={"score": {"win_rate": 0.1, "high": 0.15}})
    assert "judge_disagrees" not in {finding.rule for finding in verdict(won)}


def test_the_change_of_the_score_is_that_of_what_ppo_was_trained_on() -> None:
    """Scores that fell a little where responses that end now no longer lose a point for it."""
    rows = [row | {"sft_combined": row["sft_score"] - 1, "ppo_combined": row["ppo_score"]} for row in gains(-0.2, -0.3, -0.25)]
    (found,) = [
        finding for finding in verdict(RunData(samples=rows)) if finding.rule in ("score_rose", "score_fell", "score_flat")
    ]
    assert found.rule == "score_rose" and "clipped and with what an unended response loses, changed by +0.75" in found.text


def test_what_greedy_evaluation_calls_kl_is_not_taken_for_one() -> None:
    greedy = {"evaluation.greedy": 1.0, "ppo.kl": -2.0, "base.kl": -1.0}
    assert not {"kl_negative", "kl_none", "sft_none"} & {finding.rule for finding in verdict(told(greedy))}
    trained = [{"iteration": i, "kl": 0.0} for i in range(1, 21)]
    assert "kl_none" in {finding.rule for finding in verdict(RunData(summary=greedy, metrics={"ppo": trained}))}


def test_a_win_by_the_score_that_was_trained_on_is_called_so() -> None:
    """In the sentence, the headline and the figure; a second reward model needs no such words."""
    won = {"win_rate": 0.97, "win_rate_low": 0.95, "win_rate_high": 0.99}
    by = "by the reward that PPO was trained on"
    for judge, wanted in (("the training score", True), ("the second reward model", False), (None, False)):
        run = RunData(summary=won | {"win_rate_by": judge})
        (found,) = [one for one in verdict(run) if one.rule == "win_rate_good"]
        told = (found.text, sentence(verdict(run), judged_by(run)), headline(run)[0][2])
        assert [by in one for one in told] == [wanted] * 3, told
        assert "PPO wins 97\u202f% against SFT" in told[1] and told[1] == told[1].strip()


def test_what_was_not_asked_for_is_not_missed() -> None:
    """sft.score is there without SFT, too; a run that was evaluated has nothing left to run."""
    figures = {"sft.score": 0.0, "ppo.score": 1.0, "ppo.seconds": 3.0}
    (begun,) = [one for one in verdict(RunData(summary=figures)) if one.rule == "healthy"]
    (ended,) = [one for one in verdict(RunData(summary=figures | {"evaluate.seconds": 1.0})) if one.rule == "healthy"]
    assert begun.title == "Healthy so far" and "Not run so far: SFT, the reward model." in begun.text
    assert ended.title == "Healthy" and "(without SFT and the reward model) ran" in ended.text


def test_within_a_level_the_earlier_stage_comes_first() -> None:
    losses = [{"step": i, "eval_loss": loss, "eval_loss_before": 1.0} for i, loss in enumerate((2.0, 3.0))]
    rows = [{"iteration": i, "score": math.nan} for i in range(4)]
    found = [one for one in verdict(RunData(metrics={"sft": losses, "ppo": rows})) if one.level == "error"]
    assert [(one.stage, one.rule) for one in found] == [("sft", "sft_loss_rose"), ("ppo", "not_finite")]


def test_the_figure_of_wins_names_its_judge() -> None:
    run = RunData(summary={"win_rate": 0.9, "win_rate_low": 0.8, "win_rate_high": 1.0, "win_rate_by": "the second reward model"})
    assert headline(run)[0][2].endswith(", by the second reward model")


def test_a_kl_below_0_is_said_to_be_an_estimate() -> None:
    for kl, said in ((-0.02, True), (0.02, False)):
        run = RunData(summary={"ppo.kl": kl, "sft.kl": 0.0}, policies={"base": {}, "sft": {"kl": 0.0}, "ppo": {"kl": kl}})
        table = comparison(run)
        assert (
            table is not None and [name for name, note, _ in table.rows if "by chance" in note] == ["KL to the reference"] * said
        )
        assert ("by chance" in headline(run)[0][2]) == said


def test_what_ppo_maximises_is_shown_where_a_rule_makes_it_another_figure() -> None:
    for lost, wanted in ((0.0, ["Training reward"]), (0.5, ["Training reward", "What PPO maximises"])):
        figures = {"sft": {"score": 1.0, "combined": 1.0}, "ppo": {"score": 2.0, "combined": 2.0 - lost}}
        flat = {f"{policy}.{name}": value for policy, own in figures.items() for name, value in own.items()}
        table = comparison(RunData(summary=flat, policies=figures))
        assert table is not None and [name for name, _, _ in table.rows] == wanted
        assert table.rows[-1][2][-1] == ("+1" if not lost else "+0.5")


def test_without_demonstrations_sft_is_said_to_be_the_model_as_it_came() -> None:
    for base, said in ({"base": {"score": 1.0}}, False), ({}, True):
        run = RunData(
            summary={"sft.score": 1.0, "ppo.score": 2.0}, policies={**base, "sft": {"score": 1.0}, "ppo": {"score": 2.0}}
        )
        table = comparison(run)
        assert table is not None and ("as it came: there were no demonstrations" in table.caption) == said


def test_what_was_measured_on_training_prompts_is_not_called_held_out() -> None:
    samples = gains(1.0, 1.1, 0.9)
    for held_out, wanted in ((0.0, "training prompts (none could be held out)"), (1.0, "held-out prompts")):
        run = RunData(summary={"win_rate": 0.9, "evaluation.held_out": held_out, "sft.score": 1.0}, samples=samples)
        table = comparison(run)
        assert table is None or table.caption == f"On {wanted}"
        assert f"on {wanted}" in headline(run)[0][2] and f" {wanted}, put in order" in shelves(run)[0]
        told = {one.rule: one.text for one in verdict(run)}
        assert f"On {wanted} the score" in told["score_rose"] and f"Against SFT on {wanted} it wins" in told["win_rate_good"]


def test_the_scores_change_is_that_of_the_main_group() -> None:
    samples = [row | {"group": "known", "main": True} for row in gains(1.0, 1.1, 0.9)]
    samples += [row | {"group": "new", "main": False} for row in gains(-9.0, -9.1)]
    (found,) = [finding for finding in verdict(RunData(samples=samples)) if finding.rule == "score_rose"]
    assert "by +1 (" in found.text and "3 prompts" in found.text


def test_what_went_wrong_leads_and_earlier_stages_come_first() -> None:
    run = RunData(summary={"ppo.kl": 0.1, "win_rate": 0.9, "win_rate_low": 0.4, "sft.finished": 0.1, "reward.eval_accuracy": 0.4})
    found = verdict(run)
    assert [(finding.level, finding.stage) for finding in found] == [
        ("error", "sft"),
        ("error", "reward"),
        ("error", "ppo"),
        ("warning", "ppo"),
    ]


def test_empty_and_partial_runs_are_not_faults() -> None:
    assert [finding.rule for finding in verdict(RunData())] == ["empty"]
    (found,) = verdict(RunData(metrics=sft(2.0, 1.0)))
    assert found.title == "Healthy so far" and "the reward model, PPO" in found.text


def test_first_broken_step_is_named_across_metrics() -> None:
    run = RunData(
        metrics={"sft": [{"step": 10, "loss": 1.0, "grad_norm": math.inf}, {"step": 11, "loss": math.nan, "grad_norm": 1.0}]}
    )
    assert "grad_norm is not a finite number at step 10 of sft, and 1 more" in verdict(run)[0].text


def test_explained_variance_may_lack_a_value() -> None:
    assert [f.level for f in verdict(RunData(metrics=ppo(explained_variance=[math.nan, 0.5, 0.5, 0.5])))] == ["ok"]


def test_intervals() -> None:
    # Wilson for 8 of 10: (0.4902, 0.9433), the textbook value.
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    # mean 2, sd 1, n 3: 2 -+ 1.96 / sqrt(3)
    # Student's t: 2.776 standard errors at 4 degrees of freedom (published tables).
    half = 2.776 * 2.5**0.5 / 5**0.5
    assert interval_of_mean([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-3)
    assert interval_of_mean([4.0]) == (4.0, -math.inf, math.inf)


def test_a_loss_that_rose_since_the_first_epoch_is_still_below_the_base_models() -> None:
    """Three epochs and a little overfitting: not an error."""
    assert not [one for one in verdict(RunData(metrics=sft(3.9, 2.40, 2.35, 2.401))) if one.rule == "sft_loss_rose"]
    without = sft(3.9, 2.40, 2.35, 2.401)
    del without["sft"][0]["eval_loss_before"]  # of a run made before there was one
    assert not [one for one in verdict(RunData(metrics=without)) if one.rule == "sft_loss_rose"]
    (found,) = verdict(RunData(metrics=sft(2.0, 2.1)))
    assert found.rule == "sft_loss_rose", "also after a single epoch"
