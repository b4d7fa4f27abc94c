"""Every entry of reference_vectors.json that concerns Tercet, at rtol 1e-8 and atol 1e-10 in float64.

The file holds values computed apart from Tercet, and values that usual errors give; Tercet must not give those.
"""

import inspect
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tercet.algo.advantages import combine_score, explained_variance, gae, token_rewards
from tercet.algo.calibration import right
from tercet.algo.kl import AdaptiveKL, k1, k2, k3, kl_optimum, sequence_kl
from tercet.algo.logprobs import logits_logprobs, token_logprobs
from tercet.algo.losses import normalisation, policy_loss, ranking_loss, sft_loss, value_loss
from tercet.algo.masks import last_index, masked_mean, position_ids, truncate_at_stop, whiten
from tercet.algo.schedules import learning_rate
from tercet.algo.statistics import best_of_n, best_of_n_kl

VECTORS = json.loads((Path(__file__).parent / "reference_vectors.json").read_text())

LEFT_OUT = {
    "running_reward_norm": "Tercet normalises the reward model once (row 24); running normalisation is not built (row 35)",
    "dpo": "direct preference optimisation is not built",
    "gao_curves": "curves fitted to another paper's figures",
    "group_advantages": "critic-free advantages are not built",
    "loss_reduction/sum_over_constant_8 (Dr.GRPO style, L=4,G=2)": "Tercet has one loss average, over tokens (row 49)",
    "adaptive_kl/paper_K0.1_from_0.15": "the paper's form without a horizon: Tercet has the code's (row 34)",
    "rm_loss/best_of_4_cross_entropy": "best-of-4 labels are not built (row 18)",
    "rm_normalise/shift_only": "the shift-only form is not built (row 25)",
    "adam_eps/tf_eps1e-5": "TensorFlow's Adam: Tercet uses PyTorch's (row 51)",
    "adam_eps/ratio_step1_torch_over_tf": "TensorFlow's Adam: Tercet uses PyTorch's (row 51)",
    "schedules/head_std": "the head's initialisation belongs to tercet.models, tested there",
    "schedules/ema_from_1_to_0_after_100": "an average of weights is not built (row 56)",
    "ptx_and_sft/ppo_ptx_loss": "mixing in pretraining text is not built (row 55)",
    "kl_estimators/categorical/norm_of_in_reward_grad_over_true_near_reference": (
        "the file does not record the policy; its order of magnitude is tested on one of ours"
    ),
}


def vector(entry: str) -> tuple[dict, dict]:
    return VECTORS[entry]["in"], VECTORS[entry]["out"]


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def boolean(values: object) -> Tensor:
    return torch.tensor(values) > 0


def is_close(actual: Tensor | float, expected: object) -> bool:
    actual, expected = torch.as_tensor(actual, dtype=torch.float64), tensor(expected)
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-8, atol=1e-10)


def check(actual: Tensor | float, expected: object) -> None:
    if isinstance(actual, Tensor) and actual.is_floating_point():
        assert actual.dtype == torch.float64, "float64 must stay float64"
    assert is_close(actual, expected), f"{actual} is not {expected}"


def check_not(actual: Tensor | float, wrong: object) -> None:
    """The wrong value differs visibly, and has the shape that makes the comparison fair."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    assert actual.shape == tensor(wrong).shape
    assert not torch.allclose(actual, tensor(wrong), rtol=1e-3, atol=1e-6)


# gae, gae_padded, reward_placement


@pytest.mark.parametrize("case", ["gamma=1.0,lam=0.95", "gamma=1.0,lam=1.0", "gamma=1.0,lam=0.0", "gamma=0.99,lam=0.95"])
def test_gae(case: str) -> None:
    given, out = vector("gae")
    gamma, lam = (float(part.split("=")[1]) for part in case.split(","))
    rewards, values = tensor([given["rewards"]]), tensor([given["values"]])
    advantages, returns = gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), gamma, lam)
    check(advantages[0], out[case]["advantages"])
    check(returns[0], out[case]["returns"])


def padded_gae() -> tuple[Tensor, Tensor]:
    given, _ = vector("gae_padded")
    rewards, values, mask = tensor([given["rewards"]]), tensor([given["values_raw"]]), boolean([given["mask"]])
    return gae(rewards, values, mask, given["gamma"], given["lam"])


def test_gae_padded() -> None:
    _, out = vector("gae_padded")
    advantages, returns = padded_gae()
    check(advantages[0], out["advantages"])
    check(returns[0], out["returns"])


def test_gae_padded_not_wrong() -> None:
    _, out = vector("gae_padded")
    check_not(padded_gae()[0][0, :3], out["WRONG_if_pad_values_kept"]["advantages"])


def test_reward_placement() -> None:
    given, out = vector("reward_placement")
    length = given["T_real"]
    mask = boolean([[1] * length + [0, 0]])
    zeros = torch.zeros(1, length + 2, dtype=torch.float64)
    rewards = token_rewards(tensor([given["score"]]), zeros, mask, 0.1)
    advantages, _ = gae(rewards, zeros + given["values"], mask, given["gamma"], given["lam"])
    check(advantages[0, :length], out["at_L"])
    check_not(advantages[0, :length], out["at_L_plus_1"])


# loss_reduction


def test_loss_reduction() -> None:
    given, out = vector("loss_reduction")
    rows = [tensor([row]) for row in given["token_losses"]]
    count = sum(row.numel() for row in rows)
    total = sum(sft_loss(-row, torch.ones_like(row, dtype=torch.bool), count) for row in rows)
    check(total, out["token_mean"])
    check_not(total, out["mean_of_means"])


# whiten


def test_whiten() -> None:
    given, out = vector("whiten")
    x = tensor(given["x"])
    everything = torch.ones_like(x, dtype=torch.bool)
    check(whiten(x, everything, shift_mean=True), out["shift_mean_true"])
    check(whiten(x, everything, shift_mean=False), out["shift_mean_false"])
    check(whiten(tensor(given["masked_x"]), boolean(given["mask"])), out["masked_shift_mean_true"])


def test_whiten_not_wrong() -> None:
    given, out = vector("whiten")
    x = tensor(given["x"])
    check_not(whiten(x, torch.ones_like(x, dtype=torch.bool), shift_mean=False), out["WRONG_ddof1_shift_mean_false"])
    masked = whiten(tensor(given["masked_x"]), boolean(given["mask"]))
    check_not(masked, out["WRONG_unmasked_shift_mean_true_on_real"])


# adaptive_kl


def test_adaptive_kl() -> None:
    given, out = vector("adaptive_kl")
    controller = AdaptiveKL(given["beta0"], given["target"], given["horizon"])
    for measured, after, single in zip(given["measured_kl"], out["beta_after_each"], out["single_steps_from_0.15"], strict=True):
        controller.update(measured, given["n_steps"])
        check(controller.coef, after)
        fresh = AdaptiveKL(given["beta0"], given["target"], given["horizon"])
        fresh.update(measured, given["n_steps"])
        check(fresh.coef, single)


# kl_estimators

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@pytest.mark.parametrize(("name", "total"), [("k1", "sum_k1"), ("k2", "sum_k2"), ("k3", "sum_k3")])
def test_kl_estimators(name: str, total: str) -> None:
    given, out = vector("kl_estimators")
    kl = ESTIMATORS[name](tensor(given["logp"]), tensor(given["ref_logp"]))
    check(kl, out[name])
    check(sequence_kl(kl[None], torch.ones(1, 3, dtype=torch.bool))[0], out[total])


@pytest.mark.parametrize("mean", ["mu=0.1", "mu=1.0"])
def test_kl_estimators_gaussian_table_analytic(mean: str) -> None:
    """Policy N(0, 1), reference N(mu, 1), by quadrature."""
    expected = vector("kl_estimators")[1]["gaussian_table_analytic"][mean]
    mu = float(mean.removeprefix("mu="))
    x = torch.linspace(-14, 14, 20_001, dtype=torch.float64)
    logprobs, ref_logprobs = (-((x - center) ** 2) / 2 - math.log(2 * math.pi) / 2 for center in (0.0, mu))
    weight = logprobs.exp() * (x[1] - x[0])
    check((weight * k1(logprobs, ref_logprobs)).sum(), expected["true"])
    for name, estimator in ESTIMATORS.items():
        values = estimator(logprobs, ref_logprobs)
        average = (weight * values).sum()
        deviation = (weight * (values - average) ** 2).sum().sqrt()
        check(average / expected["true"] - 1, expected[name]["bias_over_true"])
        check(deviation / expected["true"], expected[name]["sd_over_true"])


def categorical(policy: Tensor, reference: Tensor, name: str, as_reward: bool) -> tuple[Tensor, Tensor]:
    """E[k] under the policy, and the expected gradient w.r.t. its logits, of k as a loss or as a detached reward (sign of KL)."""
    logits = policy.clone().requires_grad_()
    targets = torch.arange(len(policy))
    logprobs, _ = logits_logprobs(logits.expand(len(policy), -1), targets)
    ref_logprobs, _ = logits_logprobs(reference.expand(len(policy), -1), targets)
    probs = logprobs.exp().detach()
    kl = ESTIMATORS[name](logprobs, ref_logprobs)
    objective = probs * kl.detach() * logprobs if as_reward else probs * kl
    (gradient,) = torch.autograd.grad(objective.sum(), logits)
    return (probs * kl).sum().detach(), gradient


@pytest.mark.parametrize(
    ("name", "expectation", "as_loss", "in_reward"),
    [
        ("k1", "E_k1", "grad_k1_as_loss", "grad_k1_in_reward"),
        ("k2", "E_k2", "grad_k2_as_loss", "grad_k2_in_reward"),
        ("k3", "E_k3", "grad_k3_as_loss", "grad_k3_in_reward"),
    ],
)
def test_kl_estimators_categorical(name: str, expectation: str, as_loss: str, in_reward: str) -> None:
    given, out = vector("kl_estimators")
    policy, reference = tensor(given["logits_policy"]), tensor(given["logits_ref"])
    average, loss_gradient = categorical(policy, reference, name, as_reward=False)
    _, reward_gradient = categorical(policy, reference, name, as_reward=True)
    check(average, out["categorical"][expectation])
    check(loss_gradient, out["categorical"][as_loss])
    check(reward_gradient, out["categorical"][in_reward])


def test_kl_estimators_k1_in_reward_is_the_true_gradient() -> None:
    given, out = vector("kl_estimators")
    policy, reference = tensor(given["logits_policy"]), tensor(given["logits_ref"])
    average, gradient = categorical(policy, reference, "k1", as_reward=True)
    check(average, out["categorical"]["KL_policy_ref"])
    check(gradient, out["categorical"]["grad_true_reverse_KL"])
    check(categorical(reference, policy, "k1", as_reward=True)[0], out["categorical"]["KL_ref_policy"])
    near = reference + 0.01 * (policy - reference)
    true = categorical(near, reference, "k1", as_reward=True)[1].norm()
    for name in ("k2", "k3"):
        assert categorical(near, reference, name, as_reward=True)[1].norm() / true < 0.01


# token_rewards


def rewards_of(score_clip: float | None = None, **rule: float) -> Tensor:
    given, _ = vector("token_rewards")
    scores = combine_score(tensor(given["score"]), boolean(given["has_eos"]), score_clip=score_clip, **rule)
    kl = k1(tensor(given["logp"]), tensor(given["ref_logp"]))
    return token_rewards(scores, kl, boolean(given["mask"]), given["beta"])


def test_token_rewards() -> None:
    given, out = vector("token_rewards")
    mask = boolean(given["mask"])
    assert last_index(mask).tolist() == out["last_index"]
    check(rewards_of(), out["rewards"])
    check(rewards_of(score_clip=5.0), out["rewards_score_clip_5"])
    check(rewards_of(missing_eos_score=-1.0), out["rewards_missing_eos_REPLACED_by_-1"])
    check(rewards_of(missing_eos_penalty=1.0), out["rewards_missing_eos_minus_1"])
    kl = sequence_kl(k1(tensor(given["logp"]), tensor(given["ref_logp"])), mask)
    check(kl, out["seq_kl"])
    check(kl.mean(), out["mean_seq_kl"])
    check(rewards_of().sum(1), out["episode_return_equals_score_minus_beta_seqkl"])
    check(rewards_of().sum(1).mean(), out["rlhf_reward_mean"])


# truncation


def padded(ids: list[list[int]], lens: Tensor, pad: int) -> list[list[int]]:
    return [row[:n] + [pad] * (len(row) - n) for row, n in zip(ids, lens.tolist(), strict=True)]


def test_truncation() -> None:
    given, out = vector("truncation")
    lens, finished = truncate_at_stop(torch.tensor(given["responses"]), [given["truncate_token"]], given["truncate_after"])
    assert lens.tolist() == out["n_real"]
    assert finished.tolist() == out["passes_filter"]
    assert padded(given["responses"], lens, given["pad"]) == out["truncated"]


def test_truncation_eos() -> None:
    given, out = vector("truncation")
    lens, finished = truncate_at_stop(torch.tensor(given["eos_responses"]), torch.tensor([given["eos"]]))
    assert lens.tolist() == out["eos_n_real"]
    assert finished.tolist() == out["eos_passes"]
    assert padded(given["eos_responses"], lens, given["pad"]) == out["eos_truncated"]


# rm_loss, rm_normalise


def ranked(*prompts: list[float], margins: list[float] | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """ranking_loss of prompts whose responses are listed best first; also the scores, which carry gradients."""
    scores = tensor([score for prompt in prompts for score in prompt]).requires_grad_()
    ranks = tensor([float(rank) for prompt in prompts for rank in range(len(prompt))])
    groups = torch.tensor([index for index, prompt in enumerate(prompts) for _ in prompt])
    loss, count, stats = ranking_loss(scores, ranks, groups, margins=None if margins is None else tensor(margins))
    return loss, count, stats, scores


def test_rm_loss() -> None:
    given, out = vector("rm_loss")
    four, two = given["ranked_rewards_K4"], given["ranked_rewards_K2"]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    for (i, j), expected in zip(pairs, out["pair_losses"], strict=True):
        check(ranked([four[i], four[j]])[0].detach(), expected)
    loss, count, stats, scores = ranked(four)
    check(loss.detach(), out["loss_K4"])
    check(torch.autograd.grad(loss, scores)[0], out["grad_K4"])
    check(stats["correct"] / stats["pairs"], out["pair_accuracy_K4"])
    better, worse = (tensor([four[pair[side]] for pair in pairs]) for side in (0, 1))
    check(float(right(better - worse).mean()), out["pair_accuracy_K4"])
    check(ranked(two)[0].detach(), out["loss_K2"])
    loss, count, _, _ = ranked(four, two)
    check(loss.detach() / count, out["batch_mean_of_prompts"])
    check(ranked(four[:2], margins=[given["margin"]])[0].detach(), out["margin_loss_first_pair"])


def test_rm_loss_stable_losses_at_extremes() -> None:
    given, out = vector("rm_loss")
    for difference, expected in zip(given["extreme_diffs"], out["stable_losses_at_extremes"], strict=True):
        loss, _, _, scores = ranked([difference, 0.0])
        check(loss.detach(), expected)
        assert torch.autograd.grad(loss, scores)[0].isfinite().all()


def test_rm_loss_not_wrong() -> None:
    given, out = vector("rm_loss")
    loss, count, _, _ = ranked(given["ranked_rewards_K4"], given["ranked_rewards_K2"])
    check_not(loss.detach() / count, out["WRONG_mean_over_all_7_pairs"])


def test_rm_normalise() -> None:
    given, out = vector("rm_normalise")
    scores = tensor(given["scores"])
    gain, bias = normalisation(scores)
    check(gain, out["gain"])
    check(bias, out["bias"])
    check(-bias / gain, out["mean"])
    check(1 / gain, out["std_pop"])
    check_not(1 / gain, out["std_sample_ddof1"])
    check(gain * scores + bias, out["normalised"])
    check(gain * given["probe"] + bias, out["probe_out"])


# ppo_loss


def ppo_losses() -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor], Tensor]:
    given, _ = vector("ppo_loss")
    new_logprobs = tensor(given["new_logp"]).requires_grad_()
    mask = boolean(given["mask"])
    count = int(mask.sum())
    old, advantages = tensor(given["old_logp"]), tensor(given["advantages"])
    policy, stats = policy_loss(new_logprobs, old, advantages, mask, given["cliprange"], count)
    values = (tensor(given[name]) for name in ("values", "old_values", "returns"))
    value, value_stats = value_loss(*values, mask, given["cliprange_value"], count)
    return policy, {k: v / count for k, v in stats.items()}, value, {k: v / count for k, v in value_stats.items()}, new_logprobs


def test_ppo_loss() -> None:
    given, out = vector("ppo_loss")
    policy, stats, value, value_stats, new_logprobs = ppo_losses()
    check(policy.detach(), out["pg_loss"])
    check(torch.autograd.grad(policy, new_logprobs)[0], out["d_pg_d_new_logp"])
    check(stats["ratio"], sum(map(sum, out["ratio"])) / 5)
    check(stats["clipped_active"], out["clipfrac_active (l2>l1)"])
    check(stats["clipped_ratio"], out["clipfrac_ratio (|r-1|>eps)"])
    check(stats["approx_kl_half_sq"], out["approxkl_half_sq"])
    check(stats["approx_kl"], out["approxkl_k3 (old||new)"])
    check(value, out["vf_loss"])
    check(value_stats["value_clipped"], out["vf_clipfrac"])
    check(policy.detach() + given["vf_coef"] * value, out["total"])


def test_ppo_loss_pg_per_token() -> None:
    """Each token's loss, seen by masking the others."""
    given, out = vector("ppo_loss")
    new, old, advantages = (tensor(given[name]) for name in ("new_logp", "old_logp", "advantages"))
    mask = boolean(given["mask"])
    for row, step in mask.nonzero().tolist():
        alone = torch.zeros_like(mask)
        alone[row, step] = True
        loss, stats = policy_loss(new, old, advantages, alone, given["cliprange"], 1)
        check(loss, out["pg_per_token"][row][step])
        check(stats["ratio"], out["ratio"][row][step])


def test_ppo_loss_not_sequence_mean() -> None:
    _, out = vector("ppo_loss")
    check_not(ppo_losses()[0].detach(), out["pg_loss_if_sequence_mean_then_batch_mean"])


def test_ppo_loss_explained_variance() -> None:
    given, out = vector("ppo_loss")
    mask = boolean(given["mask"])
    check(explained_variance(tensor(given["old_values"]), tensor(given["returns"]), mask), out["explained_variance"])


# temperature_logprob


def test_temperature_logprob() -> None:
    given, out = vector("temperature_logprob")
    logits, temperature, token = tensor(given["logits"]), given["T"], torch.tensor([given["token"]])
    logprobs, entropy = logits_logprobs(logits.expand(4, -1), torch.arange(4), temperature, with_entropy=True)
    check(logprobs, out["logprobs_T"])
    check(entropy, [out["entropy_T"]] * 4)
    chunked, _ = token_logprobs(logits[None], token, torch.eye(len(logits)).to(logits), temperature=temperature)
    check(chunked[0], out["token_logprob_T"])
    plain, _ = logits_logprobs(logits[None], token, 1.0)
    check((plain - chunked).exp()[0], out["ratio_error_if_mixed"])


def test_temperature_logprob_not_wrong() -> None:
    given, out = vector("temperature_logprob")
    logprobs, _ = logits_logprobs(tensor([given["logits"]]), torch.tensor([given["token"]]), given["T"])
    check_not(logprobs[0], out["WRONG_token_logprob_T1"])


# adam_eps, schedules


@pytest.mark.parametrize("name", ["torch_eps1e-5", "torch_eps1e-8"])
def test_adam_eps(name: str) -> None:
    given, out = vector("adam_eps")
    parameter = torch.nn.Parameter(tensor(given["x0"]))
    eps = float(name.removeprefix("torch_eps"))
    optimizer = torch.optim.AdamW([parameter], lr=given["lr"], betas=tuple(given["betas"]), eps=eps, weight_decay=0.0)
    for gradient, moved in zip(given["grads"], out[name], strict=True):
        parameter.grad = tensor(gradient)
        optimizer.step()
        # Displacements of 1e-5: compare them relatively, not under the absolute tolerance.
        assert float(given["x0"] - parameter.detach()) == pytest.approx(moved, rel=1e-8, abs=0)


def test_schedules() -> None:
    given, out = vector("schedules")
    for step, expected in enumerate(out["linear"]):
        assert learning_rate(step, given["N"], given["lr"], "linear") == pytest.approx(expected, rel=1e-8, abs=0)
    for step, expected in enumerate(out["cosine_to_10pct_at_0_25_50_100pct"]):
        quarter = [0, 1, 2, 4][step]
        check(learning_rate(quarter, 4, 1.0, "cosine", min_ratio=0.1), expected)


# best_of_n, kl_optimum


def test_best_of_n() -> None:
    given, out = vector("best_of_n")
    for n, expected in zip(given["n"], out["kl_formula"], strict=True):
        check(best_of_n_kl(n), expected)
    proxy, gold = tensor(given["proxy"]), tensor(given["gold"])
    for n, expected in out["unbiased_estimates"].items():
        check(best_of_n(proxy, gold, int(n)), expected["gold"])
        check(best_of_n(proxy, proxy, int(n)), expected["proxy"])
    for n, expected in out["discrete_exact"].items():
        check(best_of_n_kl(int(n)), expected["formula"])
        assert best_of_n_kl(int(n)) > expected["kl"]
        kl = k1(tensor(expected["policy"]).log(), tensor(given["rho_sorted_by_reward"]).log())
        check((tensor(expected["policy"]) * kl).sum(), expected["kl"])
        assert expected["kl"] < out["limit_kl_of_discrete"]


@pytest.mark.parametrize("kl_coef", ["2.0", "1.0", "0.5", "0.25", "0.1"])
def test_kl_optimum(kl_coef: str) -> None:
    given, out = vector("kl_optimum")
    reference, rewards = tensor(given["rho"]), tensor(given["reward"])
    probs, objective = kl_optimum(reference, rewards, float(kl_coef))
    check(probs, out[kl_coef]["pi"])
    check(objective, out[kl_coef]["objective"])
    check((probs * rewards).sum(), out[kl_coef]["reward"])
    check((probs * k1(probs.log(), reference.log())).sum(), out[kl_coef]["kl"])


# positions


def test_positions() -> None:
    given, out = vector("positions")
    mask = boolean(given["mask"])
    positions = position_ids(mask)
    assert positions.tolist() == out["position_ids_exclusive_cumsum"]
    assert last_index(mask).tolist() == out["last_index"]
    # Both conventions agree wherever there is a token.
    other = torch.tensor(out["hf_generate_style (cumsum-1, pad->1)"])
    assert positions[mask].tolist() == other[mask].tolist()


# ptx_and_sft


def sft_of_vector() -> Tensor:
    given, out = vector("ptx_and_sft")
    logprobs = tensor(given["token_logp"])
    mask = torch.tensor(out["predicted_targets"]) != -100
    assert out["predicted_targets"] == given["labels_prompt2_resp2_eos_then_pad"][1:]
    return sft_loss(logprobs, mask, int(mask.sum()))


def test_ptx_and_sft() -> None:
    given, out = vector("ptx_and_sft")
    check(sft_of_vector(), out["sft_loss_masked"])
    mask = torch.tensor(out["predicted_targets"]) != -100
    check(-masked_mean(tensor(given["token_logp"]), mask), out["sft_loss_masked"])


def test_ptx_and_sft_not_wrong() -> None:
    _, out = vector("ptx_and_sft")
    check_not(sft_of_vector(), out["WRONG_all_tokens"])


# completeness


def keys_of_file() -> list[str]:
    """entry/key for each output; one level deeper where a key holds named values that are not cases of one table."""
    keys = []
    for entry, content in VECTORS.items():
        for key, value in content["out"].items():
            nested = key == "categorical"
            keys += [f"{entry}/{key}/{inner}" for inner in value] if nested else [f"{entry}/{key}"]
    return keys


def test_every_key_is_tested_or_left_out() -> None:
    """A key counts as tested when a test_<entry>... function, or a helper it calls, names it."""
    module = sys.modules[__name__]
    functions = {name: inspect.getsource(item) for name, item in vars(module).items() if name.startswith("test_")}
    keys = keys_of_file()
    for left_out in LEFT_OUT:
        assert any(key == left_out or key.startswith(left_out + "/") for key in keys), f"no such key: {left_out}"
    for key in keys:
        entry, *_, name = key.split("/")
        sources = "".join(source for test, source in functions.items() if test.startswith(f"test_{entry}"))
        listed = key in LEFT_OUT or entry in LEFT_OUT
        assert listed or f'"{name}"' in sources, f"{key} is neither tested nor listed in LEFT_OUT"
