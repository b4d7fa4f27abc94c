"""Ways to break the code on purpose: each is one small error of the kind that people make, and names the tests that notice it.

`original` must stand exactly once in the file; tests/mutants/run.py applies each to a copy of the repository and runs its tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """name: what is wrong; equivalent: why no test can see it, empty where one must."""

    name: str
    file: str
    original: str
    replacement: str
    tests: tuple[str, ...]
    equivalent: str = ""


Row = tuple[str, str, str]


def _of(file: str, tests: str, rows: list[Row]) -> Iterator[Mutant]:
    """Several mutants of one file that the same tests see."""
    for name, original, replacement in rows:
        yield Mutant(name, f"tercet/{file}", original, replacement, tuple(f"tests/{test}" for test in tests.split()))


MASKS: list[Row] = [
    ("the stop token is cut off", "kept = ends.long().cumsum(1) - ends.long() == 0", "kept = ends.long().cumsum(1) == 0"),
    ("truncate_after is off by one", "device=ids.device) >= truncate_after", "device=ids.device) > truncate_after"),
    ("truncate_after is ignored", "torch.isin(ids, stops) & late_enough", "torch.isin(ids, stops)"),
    ("the last index is one too far", "(steps * mask).amax(1) - 1", "(steps * mask).amax(1)"),
    ("positions count from 1", "counts.cumsum(1) - counts", "counts.cumsum(1)"),
    (
        "multiplied by the mask in place of selected: NaN on a pad leaks",
        "return all_sum(torch.where(mask, at_least_float32(x), 0.0).sum())",
        "return all_sum((at_least_float32(x) * mask).sum())",
    ),
    ("the mean is over pads too", "sums[0] / sums[1].clamp(min=1)", "sums[0] / mask.numel()"),
    ("an empty mask divides by 0", "sums[1].clamp(min=1)", "sums[1]"),
    ("the mean is per rank", "sums = all_sum(torch.stack(", "sums = (torch.stack("),
    (
        "sample variance in place of population variance",
        "return masked_mean((x - masked_mean(x, mask, all_sum)) ** 2, mask, all_sum)",
        "return masked_mean((x - masked_mean(x, mask, all_sum)) ** 2, mask, all_sum) * mask.sum() / (mask.sum() - 1)",
    ),
    ("the variance is around the rank's own mean", "(x - masked_mean(x, mask, all_sum)) ** 2", "(x - masked_mean(x, mask)) ** 2"),
    ("whitening adds the mean back (torchtune)", "if not shift_mean:", "if shift_mean:"),
    ("whitened pads are not 0", "return torch.where(mask, whitened, 0.0)", "return whitened"),
    (
        "the whitening mean is over pads",
        "mean = masked_mean(x, mask, all_sum)",
        "mean = masked_mean(x, torch.ones_like(mask), all_sum)",
    ),
    ("standard deviation in place of its inverse", "torch.rsqrt(masked_var", "torch.sqrt(masked_var"),
    ("bfloat16 is summed in bfloat16", "tensor.dtype in (torch.float32,", "tensor.dtype in (torch.bfloat16, torch.float32,"),
]

LOGPROBS: list[Row] = [
    ("spare tokens have log-probabilities", "return logprobs[:count]", "return logprobs"),
    ("products of any number of tokens", "spare = spare_rows(count)", "spare = 0"),
    ("the state of the token itself predicts it", "prompt_lens[:, None] - 1 + steps", "prompt_lens[:, None] + steps"),
    ("the state two before predicts", "prompt_lens[:, None] - 1 + steps", "(prompt_lens[:, None] - 2 + steps).clamp(min=0)"),
    ("the temperature is left out", "logits = logits / temperature", "logits = logits / 1.0"),
    ("multiplied by the temperature", "logits = logits / temperature", "logits = logits * temperature"),
    ("the entropy's sign", "entropy = -(every.exp()", "entropy = (every.exp()"),
    ("0 x -inf in the entropy", "every.clamp(min=torch.finfo(every.dtype).min)", "every"),
    ("half precision is not upcast", "logits = at_least_float32(logits)", "logits = logits + 0"),
    (
        "the entropy carries a gradient",
        "    with torch.no_grad():\n        every",
        "    with torch.enable_grad():\n        every",
    ),
    (
        "every chunk of tokens gets the first targets",
        "for part, wanted in zip(torch.split(states, height), torch.split(targets, height))",
        "for part, wanted in zip(torch.split(states, height), [targets[:height]] * len(states))",
    ),
    (
        "a chunk's targets are a column off",
        "return rows, targets[rows] - span.start",
        "return rows, (targets[rows] - span.start - 1)",
    ),
    ("log Z of the last chunk alone", "log_z = every.logsumexp(0)", "log_z = every[-1]"),
    (
        "the entropy without the choice of a chunk",
        "(torch.stack([one[1] for one in parts]) - log_share)",
        "torch.stack([one[1] for one in parts])",
    ),
    ("chunks weigh the same in the entropy", "log_share.exp() * (torch", "1 / len(every) * (torch"),
    ("0 x -inf within a chunk", "logits.clamp_(min=least)).sum(1)", "logits).sum(1)"),
    ("0 / 0 in a chunk of impossible tokens", "total.clamp_(min=tiny).log()", "total.log()"),
    ("-inf - -inf in a chunk of impossible tokens", "logits.amax(1).clamp_(min=least)", "logits.amax(1)"),
    ("the chunks' gradient without the target", "slope[rows, columns] = logprobs[rows].expm1().to(self.dtype)", "pass"),
    ("p - 1 from a rounded p", "logprobs[rows].expm1().to(self.dtype)", "logprobs[rows].exp().to(self.dtype) - 1"),
    (
        "the chunks' gradient without the temperature",
        "gradients[0] * (ctx.head.transform.scale / -ctx.head.temperature)",
        "-gradients[0] * ctx.head.transform.scale",
    ),
    (
        "the chunks' gradient without the scale",
        "gradients[0] * (ctx.head.transform.scale / -ctx.head.temperature)",
        "gradients[0] / -ctx.head.temperature",
    ),
    ("the chunks' gradient without the cap's slope", "into.mul_(inner)", "pass"),
    ("the scale is forgotten", "tanh() * (self.cap * self.scale)", "tanh() * self.cap"),
    ("the scale goes into the cap", "/ self.cap).tanh() * (", "* self.scale / self.cap).tanh() * ("),
    ("the cap's slope is a cosine's", "/ self.cap).tanh_().square_()", "/ self.cap).tanh_()"),
    (
        "a capped head is centred",
        "head_centre(weight, self.dtype) if transform.cap is None else None",
        "head_centre(weight, self.dtype)",
    ),
    ("only the last tokens reach the head's weight", "for_weight[span] += gradient", "for_weight[span] = gradient"),
    ("the head's gradient begins with what was in memory", "fresh=not place", "fresh=False"),
    ("the weight's gradient forgets the loss", "transposed_product(slope, scaled)", "transposed_product(slope, inputs)"),
    ("kept logits are those of another chunk", "self.chunks.append(logits)", "self.chunks.insert(0, logits)"),
    ("all logits are kept", "if self._room >= 0:", "if True:"),
    ("raw logits in place of log-probabilities", "squeeze(-1) - log_z", "squeeze(-1) - 0 * log_z"),
]

KL: list[Row] = [
    ("k1's sign", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),
    ("k2 without its half", "(logprobs - ref_logprobs) ** 2 / 2", "(logprobs - ref_logprobs) ** 2"),
    ("k3 of the other direction", "torch.expm1(-difference) + difference", "torch.expm1(difference) - difference"),
    ("k3 loses its digits near 0", "torch.expm1(-difference) + difference", "torch.exp(-difference) - 1 + difference"),
    ("the KL counts pads", "torch.where(mask, at_least_float32(kl), 0.0).sum(1)", "at_least_float32(kl).sum(1)"),
    ("the KL per token in place of per response", "at_least_float32(kl), 0.0).sum(1)", "at_least_float32(kl), 0.0).mean(1)"),
    ("the controller steers the wrong way", "mean_sequence_kl / self.target - 1", "1 - mean_sequence_kl / self.target"),
    (
        "the controller's error is not clipped",
        "max(-ERROR_LIMIT, min(ERROR_LIMIT, mean_sequence_kl / self.target - 1))",
        "mean_sequence_kl / self.target - 1",
    ),
    ("the controller forgets the number of episodes", "error * n_episodes / self.horizon", "error / self.horizon"),
    ("the coefficient is lost on resume", 'self.coef = float(state["coef"])', "_ = state"),
    ("a target of 0 is accepted", "if not 0 < value < math.inf:", "if not 0 <= value < math.inf:"),
    ("the optimum avoids reward", "ref_probs.log() + rewards / kl_coef", "ref_probs.log() - rewards / kl_coef"),
    ("log Z is not scaled", "kl_coef * tilted.logsumexp(-1)", "tilted.logsumexp(-1)"),
]

ADVANTAGES: list[Row] = [
    ("the score is not clipped", "scores = scores.clamp(-score_clip, score_clip)", "scores = scores + 0"),
    (
        "the score is clipped after the penalty",
        "        scores = torch.where(finished, scores, missing_eos_score)\n    return scores",
        "        scores = torch.where(finished, scores, missing_eos_score)\n"
        "    return scores if score_clip is None else scores.clamp(-score_clip, score_clip)",
    ),
    (
        "finished responses are punished",
        "torch.where(finished, scores, scores - missing",
        "torch.where(~finished, scores, scores - missing",
    ),
    ("the penalty is a bonus", "scores - missing_eos_penalty", "scores + missing_eos_penalty"),
    ("the KL is rewarded", "rewards = -kl_coef *", "rewards = kl_coef *"),
    ("the score stands one token before the end", "last_index(response_mask)[:, None]", "last_index(response_mask)[:, None] - 1"),
    (
        "the score stands on the first token",
        "is_last = steps == last_index(response_mask)[:, None]",
        "is_last = (steps == 0) & response_mask",
    ),
    (
        "the score stands at the row's width",
        "is_last = steps == last_index(response_mask)[:, None]",
        "is_last = (steps == len(steps) - 1).expand_as(response_mask)",
    ),
    (
        "the last token loses its KL term",
        "+ torch.where(is_last, scores.detach()[:, None], 0.0)",
        "* ~is_last + torch.where(is_last, scores.detach()[:, None], 0.0)",
    ),
    ("rewards stand on pads", "return torch.where(response_mask, rewards, 0.0)", "return rewards"),
    ("the reward carries the KL's gradient", "at_least_float32(kl.detach())", "at_least_float32(kl)"),
    (
        "values on pads leak into the end",
        "values = torch.where(response_mask, at_least_float32(values), 0.0)",
        "values = at_least_float32(values)",
    ),
    ("delta's sign of V", "gamma * next_value - values[:, t]", "gamma * next_value + values[:, t]"),
    ("no discount of the next value", "rewards[:, t] + gamma * next_value", "rewards[:, t] + next_value"),
    ("no discount of the next advantage", "gamma * gae_lambda * next_advantage", "gae_lambda * next_advantage"),
    ("lambda is left out", "gamma * gae_lambda * next_advantage", "gamma * next_advantage"),
    ("returns are advantages", "return advantages, advantages + values", "return advantages, advantages"),
    ("one-step advantages", "advantages[:, t] = next_advantage", "advantages[:, t] = delta"),
    (
        "advantages run through pads",
        "torch.where(response_mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)",
        "delta + gamma * gae_lambda * next_advantage",
    ),
    ("returns carry the value model's gradient", "@torch.no_grad()\ndef gae(", "def gae("),
    ("unexplained in place of explained variance", "1 - unexplained / total", "unexplained / total"),
]

LOSSES: list[Row] = [
    (
        "the optimistic bound: min of losses",
        "torch.maximum(unclipped, clipped), mask)",
        "torch.minimum(unclipped, clipped), mask)",
    ),
    ("the ratio is upside down", "(new_logprobs - logprobs).exp()", "(logprobs - new_logprobs).exp()"),
    ("the surrogate's sign", "unclipped = -advantages * ratio", "unclipped = advantages * ratio"),
    ("the clipped surrogate's sign", "clipped = -advantages * ratio.clamp", "clipped = advantages * ratio.clamp"),
    ("clipped from above only", "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(max=1 + clip_range)"),
    ("clipped from below only", "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(min=1 - clip_range)"),
    ("clip sides swapped", "ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(1 - clip_range / 2, 1 + clip_range * 2)"),
    ("junk on pads enters exp", "    new_logprobs = torch.where(mask, new_logprobs, 0.0)\n", ""),
    (
        "old log-probabilities and advantages are not detached",
        "logprobs, advantages = logprobs.detach(), advantages.detach()",
        "logprobs, advantages = logprobs, advantages",
    ),
    (
        "the loss is a mean of micro-batch means",
        "torch.maximum(unclipped, clipped), mask), count)",
        "torch.maximum(unclipped, clipped), mask), mask.sum().clamp(min=1))",
    ),
    (
        "the loss counts pads",
        "masked_sum(torch.maximum(unclipped, clipped), mask)",
        "masked_sum(torch.maximum(unclipped, clipped), torch.ones_like(mask))",
    ),
    ("clip fraction of the unclipped", "(clipped > unclipped).to(ratio)", "(clipped < unclipped).to(ratio)"),
    ("approximate KL of the other direction", "k3(logprobs, new_logprobs)", "k3(new_logprobs, logprobs)"),
    ("approximate KL over pads", "masked_sum(k3(logprobs, new_logprobs), mask)", "k3(logprobs, new_logprobs).sum()"),
    (
        "value clip around the new value",
        "torch.clamp(new_values, values - value_clip_range, values + value_clip_range)",
        "torch.clamp(new_values, new_values.detach() - value_clip_range, new_values.detach() + value_clip_range)",
    ),
    (
        "value clip around the return",
        "torch.clamp(new_values, values - value_clip_range, values + value_clip_range)",
        "torch.clamp(new_values, returns - value_clip_range, returns + value_clip_range)",
    ),
    ("the smaller value error", "worst = torch.maximum(error,", "worst = torch.minimum(error,"),
    ("the value loss without its half", "0.5 * masked_sum(worst, mask)", "masked_sum(worst, mask)"),
    ("the value loss is unmasked", "0.5 * masked_sum(worst, mask)", "0.5 * worst.sum()"),
    (
        "the return moves with the value",
        "values, returns = values.detach(), returns.detach()",
        "values, returns = values, returns",
    ),
    ("the SFT loss's sign", "_divide(-masked_sum(logprobs, mask), count)", "_divide(masked_sum(logprobs, mask), count)"),
    (
        "the SFT loss is a mean of micro-batch means",
        "_divide(-masked_sum(logprobs, mask), count)",
        "_divide(-masked_sum(logprobs, mask), mask.sum().clamp(min=1))",
    ),
    ("log(sigmoid(x)) overflows", "-logsigmoid(shifted)", "-torch.log(torch.sigmoid(shifted))"),
    ("the worse response is preferred", "-logsigmoid(shifted)", "-logsigmoid(-shifted)"),
    (
        "pairs are pooled over prompts",
        "(losses / pairs.clamp(min=1)).sum()",
        "losses.sum() / pairs.sum().clamp(min=1) * (pairs > 0).sum()",
    ),
    ("prompts with more responses weigh more", "(losses / pairs.clamp(min=1)).sum()", "losses.sum()"),
    ("ties count", "(ranked[:, :, None] < ranked[:, None, :])", "(ranked[:, :, None] <= ranked[:, None, :])"),
    ("ranks are read upside down", "(ranked[:, :, None] < ranked[:, None, :])", "(ranked[:, :, None] > ranked[:, None, :])"),
    ("padding of a group counts as a response", "& real[:, :, None] & real[:, None, :]", ""),
    ("the margin helps the worse response", "difference - margins.to", "difference + margins.to"),
    ("equal scores count as wrong", "(difference.detach().sign() + 1) / 2", "(difference.detach() > 0).to(difference)"),
    ("the gain is of the sample deviation", "scores.std(correction=0)", "scores.std(correction=1)"),
    ("the bias forgets the gain", "return gain, -gain * float(scores.mean())", "return gain, -float(scores.mean())"),
    ("prompts of ties alone count", "_pairs(ranks, groups)[1].any(2).any(1).sum()", "_pairs(ranks, groups)[1].shape[0]"),
]

SCHEDULES: list[Row] = [
    ("larger models learn as fast", "1e9 / max(1, parameters) * minibatch / 512", "minibatch / 512"),
    ("small minibatches learn as fast", " * minibatch / 512", ""),
    ("the smallest models learn ever faster", "min(1e-3, 1e-5", "max(0.0, 1e-5"),
    ("the first step of warm-up learns nothing", "base * (step + 1) / warmup_steps", "base * step / warmup_steps"),
    ("the last step learns nothing", "max(1, total_steps - warmup_steps)", "max(1, total_steps - warmup_steps - 1)"),
    ("the cosine ends at 0", "(min_ratio + (1 - min_ratio) *", "(0 * min_ratio + 1 *"),
]

STATISTICS: list[Row] = [
    ("a mean of few rows is as certain as resamples", "if 1 < len(rows) < _FEW_ROWS:", "if False:"),
    ("best-of-n with replacement", "(i - n + 1) / i if i else 0.0", "((i - 1) / i) ** (n - 1) if i else 0.0"),
    ("KL of best-of-n without its second term", "math.log(n) - (n - 1) / n", "math.log(n)"),
    ("one policy against itself is uncertain", " * (not certain)", ""),
    ("the interval is half as wide", "error = 1.96 * (second", "error = 0.98 * (second"),
    ("few rows are taken for many", "if count is not None and count > 1:", "if False:"),
    ("few rows are taken for normal ones", "* student_quantile(count - 1, level))", "* NormalDist().inv_cdf((1 + level) / 2))"),
    ("Student's t by its first term", "enumerate(terms))", "enumerate(terms[:1]))"),
]

TYPES: list[Row] = [
    ("the response mask is one token too long", "steps < self.response_lens[:, None]", "steps <= self.response_lens[:, None]"),
    (
        "response ids start with the prompt's last token",
        "(self.prompt_lens[:, None] + steps)",
        "(self.prompt_lens[:, None] - 1 + steps)",
    ),
    ("response length counts the prompt", "prompt_lens, lengths - prompt_lens, finished)", "prompt_lens, lengths, finished)"),
    ("every text is finished", "[row.finished for row in rows]", "[True for row in rows]"),
    ("selected rows keep the first rows' prompt lengths", "self.prompt_lens[index],", "self.prompt_lens[: len(index)],"),
    ("selected rows keep the first rows' finish flags", "self.finished[index],", "self.finished[: len(index)],"),
    (
        "selected rows keep the first rows' sampler log-probabilities",
        "logprobs[index, :response_width]",
        "logprobs[: len(index), :response_width]",
    ),
    ("selected experience keeps the first rows' scores", "scores=self.scores[index]", "scores=self.scores[: len(index)]"),
    (
        "selected experience keeps the first rows' tensors",
        "getattr(self, f.name)[index, :width]",
        "getattr(self, f.name)[: len(index), :width]",
    ),
    (
        "pads are the last token of the vocabulary",
        "input_ids = torch.zeros(len(rows), width, dtype=torch.long)",
        "input_ids = torch.full((len(rows), width), -1)",
    ),
]

TEMPLATE: list[Row] = [
    ("no EOS is appended", "return [*response_ids, self.eos_id]", "return response_ids"),
    (
        "a cut text gets a false EOS",
        "ids = ids[:max_length] if truncated else ids",
        "ids = [*ids[: (max_length or 1) - 1], self.eos_id] if truncated else ids",
    ),
    ("a cut text counts as finished", "prompt_len, not truncated)", "prompt_len, True)"),
    ("a long prompt keeps its beginning", "head + ids[len(ids) - (limit - len(head)) :]", "head + ids[len(head) : limit]"),
    ("a long prompt loses its BOS", "head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []", "head = ids[:0]"),
    ("a space is added to a space", "prompt[-1].isspace() or response[0].isspace()", "prompt[-1].isspace()"),
    ("a second BOS", "if self.bos_id is None or ids[:1] == [self.bos_id] else", "if self.bos_id is None else"),
    ("no BOS", "else [self.bos_id, *ids]", "else ids"),
    ("the stop token of the text itself is dropped", "return response_ids[: first + 1]", "return response_ids[:first]"),
    ("a second EOS", "if stops and not str(self.tokenizer.decode(", "if False and not str(self.tokenizer.decode("),
    (
        "prompt and response are tokenised together",
        "ids = prompt_ids + self._end(next(later if continues else first))",
        "ids = self._ids([self.tokenizer.decode(prompt_ids + next(later if continues else first))])[0] + [self.eos_id]",
    ),
    ("a tokenizer's own space gets into the middle", "self.separator) + response, True", "self.separator) + response, False"),
    ("special tokens show in the text", "skip_special_tokens=True", "skip_special_tokens=False"),
    (
        "the prompt's boundary is one too late",
        "prompt_len = min(max(1, len(prompt_ids)), len(ids))",
        "prompt_len = min(len(prompt_ids) + 1, len(ids))",
    ),
    (
        "a prompt is ended by EOS",
        '{"add_special_tokens": False, "return',
        '{"return',
    ),
    ("answers to earlier prompts", "next(later if continues else first)", "next(first if continues else later)"),
    ("the model's stop ids are forgotten", "frozenset({self.eos_id, *map(int, stop_ids)})", "frozenset({self.eos_id})"),
]

ROLLOUT: list[Row] = [
    ("a field that nobody in the batch has is left out", "for name in self._names}", "for name in self.fields[row]}"),
    ("the reference's temperature is left out", "actors.ref_policy(part, temperature=temperature)", "actors.ref_policy(part)"),
    (
        "the old policy's temperature is left out",
        "actors.policy(part, temperature=temperature, with_entropy=True)",
        "actors.policy(part, with_entropy=True)",
    ),
    (
        "graphs of all rows are kept for one of several minibatches",
        "if config.minibatch == config.rollout_batch_size:",
        "if True:",
    ),
    ("the graph of a policy that stands still is kept", " if config.policy_learns(iteration) else [actors.value_model]", ""),
    ("the first graph takes room", "left = size + MOST_KEPT if", "left = MOST_KEPT if"),
    ("a graph that does not fit takes room", "left - size if size <= left else left", "left - size"),
    ("the experience carries a graph", "@torch.no_grad()\ndef read(", "def read("),
    ("KL of the reference against the policy", "kl = k1(logprobs, ref_logprobs)", "kl = k1(ref_logprobs, logprobs)"),
    ("k3 in the reward", "kl = k1(logprobs, ref_logprobs)", "kl = k3(logprobs, ref_logprobs)"),
    (
        "the reference is the policy object",
        "ref_logprobs[rows, :width], _ = actors.ref_policy(",
        "ref_logprobs[rows, :width], _ = actors.policy(",
    ),
    (
        "returns are taken after whitening",
        "        advantages = whiten(advantages, mask, all_sum=world.all_sum)",
        "        advantages = whiten(advantages, mask, all_sum=world.all_sum)\n        returns = advantages + values",
    ),
    ("advantages keep their mean", "whiten(advantages, mask, all_sum", "whiten(advantages, mask, shift_mean=False, all_sum"),
    ("pads are whitened", "whiten(advantages, mask, all_sum", "whiten(advantages, torch.ones_like(mask), all_sum"),
    (
        "every response counts as finished",
        "        sequences.finished,\n        score_clip",
        "        torch.ones_like(sequences.finished),\n        score_clip",
    ),
    (
        "the controller's coefficient is not used",
        "token_rewards(scores, kl, mask, kl_coef)",
        "token_rewards(scores, kl, mask, config.kl.coef)",
    ),
    (
        "the raw score is the reward",
        "token_rewards(scores, kl, mask, kl_coef)",
        "token_rewards(raw_scores.to(kl), kl, mask, kl_coef)",
    ),
    (
        "gamma and lambda are swapped",
        "gae(rewards, values, mask, config.gamma, config.gae_lambda)",
        "gae(rewards, values, mask, config.gae_lambda, config.gamma)",
    ),
    ("pads are decoded", "self.decode(ids[:length]) for", "self.decode(ids) for"),
    (
        "every iteration has the same random numbers",
        'uniforms(seed, "rollout", iteration, places',
        'uniforms(seed, "rollout", 0, places',
    ),
    (
        "every iteration has the same prompts",
        "range(iteration * batch_size, (iteration + 1) * batch_size)",
        "range(0, batch_size)",
    ),
    ("entropy is averaged over pads", 'metrics["entropy"] /= metrics["length"]', 'metrics["entropy"] /= mask.shape[1]'),
    ("a stale sample passes", "sequences.policy_version != iteration", "sequences.policy_version > iteration"),
    ("values are not read", "= actors.value_model(part, per_token=True)", "= 0 * actors.value_model(part, per_token=True)"),
]

PEERS = "conformance/test_peer_errors.py::test_row_"
RANKS: list[Row] = [
    ("advantages are whitened per rank", "whiten(advantages, mask, all_sum=world.all_sum)", "whiten(advantages, mask)"),
    (
        "metrics are divided by the rank's own rows",
        "world.all_sum(sums) / count).tolist()",
        "world.all_sum(sums) / max(1, count // world.size)).tolist()",
    ),
    ("each rank scores other prompts than its own", "rows = [batch[place] for place in places]", "rows = batch[: len(places)]"),
    (
        "each rank has the first ranks' random numbers",
        "iteration, places, config.max_new_tokens",
        "iteration, range(len(places)), config.max_new_tokens",
    ),
]

SPLIT: list[Row] = [
    ("a policy loss per micro-batch", "config.clip_range, count)", "config.clip_range, int(mask.sum()))"),
    ("a value loss per micro-batch", "config.value_clip_range, count)", "config.value_clip_range, int(mask.sum()))"),
]

TEMPERATURE: list[Row] = [
    (
        "the new policy's temperature is left out",
        "trainables.policy(batch.sequences, temperature=config.temperature)",
        "trainables.policy(batch.sequences)",
    ),
]

UPDATE: list[Row] = [
    ("every epoch has the same order", "iteration * config.ppo_epochs + progress.epoch)", "iteration)"),
    (
        "every minibatch is the first",
        "order[progress.minibatch * config.minibatch :][: config.minibatch]",
        "order[: config.minibatch]",
    ),
    ("micro-batches of the update differ from the rollout's", ".sort().values", ".flip(0)"),
    ("the second step takes the rollout's forwards too", "            kept = ()\n", ""),
    ("the rollout's forward is taken for another micro-batch", "kept[place].logprobs", "kept[-1 - place].logprobs"),
    ("the rollout's values are taken for another micro-batch", "kept[place].values", "kept[-1 - place].values"),
    ("the rollout's forward is passed over", "if new_logprobs is None:", "if True:"),
    ("the rollout's values are passed over", "if new_values is None:", "if True:"),
    ("the KL stop works upside down", "mean_kl > config.max_approx_kl", "mean_kl < config.max_approx_kl"),
    ("the KL stop sums over epochs", "        progress.epoch_tokens = progress.epoch_approx_kl = 0.0\n", ""),
    ("old values and returns are swapped", "batch.values, batch.returns, mask", "batch.returns, batch.values, mask"),
    ("advantages are the value's target", "batch.values, batch.returns, mask", "batch.values, batch.advantages, mask"),
    (
        "a broken gradient of one model passes",
        "math.isfinite(norm) and math.isfinite(value_norm)",
        "math.isfinite(norm) or math.isfinite(value_norm)",
    ),
    (
        "old log-probabilities are the new ones",
        "new_logprobs, batch.logprobs, batch.advantages",
        "new_logprobs, new_logprobs, batch.advantages",
    ),
    (
        "only the first minibatch counts its tokens",
        "count = int(response_lens[rows].sum())",
        "count = int(response_lens[: len(rows)].sum())",
    ),
    (
        "the other ranks' tokens are not counted",
        "count = int(response_lens[rows].sum())",
        "count = int(response_lens[rows][rows % world.size == world.rank].sum())",
    ),
    (
        "the value model learns at the policy's rate",
        "value_optimizer.step(trainables.value_learning_rate)",
        "value_optimizer.step(trainables.policy_learning_rate or 0.0)",
    ),
]

ATTENTION: list[Row] = [
    (
        "autocast rounds rotated queries",
        "autocast(query.device.type, enabled=False)",
        "autocast(query.device.type, enabled=query.dtype is dtype)",
    ),
    ("attention looks ahead", "-torch.inf, dtype=dtype).triu_(1)", "-torch.inf, dtype=dtype).triu_(2)"),
    ("attention is not scaled", "k.transpose(1, 2), alpha=scale)", "k.transpose(1, 2))"),
    ("gradients of queries are not scaled", "beta=0, alpha=ctx.scale, out=for_q)", "beta=0, out=for_q)"),
    ("gradients of keys are not scaled", "beta=0, alpha=ctx.scale, out=for_k)", "beta=0, out=for_k)"),
    (
        "what lay in memory is added to gradients of queries",
        "beta=0, alpha=ctx.scale, out=for_q)",
        "beta=1, alpha=ctx.scale, out=for_q)",
    ),
    (
        "scores are rounded to the precision of values",
        ".softmax(-1).to(dtype)\n                torch",
        ".to(dtype).softmax(-1)\n                torch",
    ),
    ("pads have gradients", "packing.clear_pads(apart[3], h)", "pass"),
    ("heads are mixed up with texts", "group.rows * heads, -1, places.shape[1]", "-1, group.length, places.shape[1]"),
    (
        "keys and queries have each other's gradients",
        "(for_k, scores.transpose(1, 2), q, beta",
        "(for_k, scores.transpose(1, 2), k, beta",
    ),
]

PACKING: list[Row] = [
    ("batches of any length", "spare = spare_rows(len(tokens))", "spare = 0"),
    ("groups of any number of texts", "-count % _ROWS if count > 2 * _ROWS else 0", "0"),
    ("positions go on over texts", "F.pad(tokens % width, (0, spare))", "F.pad(torch.arange(len(tokens)), (0, spare))"),
    (
        "tokens lie as heads would",
        "(token * group.of(self.places, 1).squeeze(-1) + shifts)",
        "(head * group.of(self.places, 1).squeeze(-1) + token * torch.arange(heads)[:, None])",
    ),
    ("spare tokens have states", "tokens[len(self.tokens) :].zero_()", "pass"),
    (
        "a pad stands for its text's last token",
        "places[real]",
        "places[real] * 0 + places[self._rows(heads, heads, 1).argsort()[: len(places[real])]]",
    ),
    (
        "long texts' pads have gradients",
        "ctx.packing.clear_pads(ctx.packing.by_head(gradients[0]), ctx.heads)",
        "ctx.packing.by_head(gradients[0])",
    ),
]

CARRIED: list[Row] = [
    ("what carries states past attention is packed", "tolerance * own.abs().max()) for row", "1e9 * own.abs().max()) for row"),
]

DECODING: list[Row] = [
    ("decoding does not see what is masked", "scores.masked_fill_(~mask, -torch.inf)", "scores"),
    ("decoding adds no mask", "else scores.add_(mask)", "else scores"),
    ("decoding is not scaled", "beta=0.0, alpha=scale", "beta=0.0, alpha=1.0"),
    ("query heads take other keys", "head.repeat_interleave(h // heads)", "head.repeat(h // heads)"),
    ("weights are summed in another order", "embedding_bag(values, places,", "embedding_bag(values, places.flip(0),"),
]

ROWS: list[Row] = [
    ("what does not lie in rows is taken for it", "        x = x.contiguous()", "        pass"),
    ("rows lie as in a copy", "x.stride()[:-1])\n    last", "x.contiguous().stride()[:-1])\n    last"),
    ("the last row is cut off", "(last + 1, size)", "(last, size)"),
]

SAMPLING: list[Row] = [
    (
        "every part of the rows gets the first numbers",
        "zip(parts, pieces(uniform, logits, _ROWS))",
        "zip(parts, [uniform[: len(p)] for p in parts])",
    ),
    (
        "the temperature is left out",
        "part.to(wide) / temperature if temperature != 1.0 else part",
        "part",
    ),
    (
        "tokens of mass 0 at the edge",
        "block = torch.searchsorted(cumulative, point, right=True)",
        "block = torch.searchsorted(cumulative, point)",
    ),
    (
        "tokens of mass 0 inside a block",
        "inner = torch.searchsorted(cumulative, point, right=True)",
        "inner = torch.searchsorted(cumulative, point)",
    ),
    ("the mass is not normalised", "uniform.to(total.device)[:, None] * total", "uniform.to(total.device)[:, None] * 1.0"),
    ("the mass before the block is forgotten", "point - before, total", "point, total"),
    (
        "the blocks are summed in float32",
        "sums.cumsum(-1, dtype=torch.float64)",
        "sums.cumsum(-1, dtype=torch.float32).double()",
    ),
    ("rounding leaves the vocabulary", "inner = torch.minimum(inner, last)", "inner = inner.clamp(max=_BLOCK - 1)"),
    ("log-probabilities without normalisation", "gather(1, inner) / total).log()", "gather(1, inner)).log()"),
    ("the last block has no mass", "rest.sum(-1, keepdim=True)", "0.0 * rest.sum(-1, keepdim=True)"),
    ("numbers depend on the place in the batch", "np.array([0, 0, int(row), iteration]", "np.array([0, 0, place, iteration]"),
    ("numbers are the same every iteration", "np.array([0, 0, int(row), iteration]", "np.array([0, 0, int(row), 0]"),
    ("numbers are the same for every purpose", "np.array([seed, PURPOSES.index(purpose)]", "np.array([seed, 0]"),
    ("greedy takes the least likely", "log_softmax(-1, dtype=wide).max(-1)", "log_softmax(-1, dtype=wide).min(-1)"),
]

NATIVE = "generation/test_native.py::test_"
GREEDY = f"{NATIVE}greedy_in_a_padded_batch_is_generate_of_each_row_alone"
FORWARD = f"{NATIVE}the_reported_logprobs_are_the_training_forwards"
ENDS = f"{NATIVE}rows_end_at_the_first_stop_id_and_leave_the_batch {NATIVE}immediate_eos_and_the_length_limit"

PRODUCTS: list[Row] = [
    ("every processor is held to have bfloat16", "and _onednn_has_bfloat16()", "and True"),
    ("many rows come in as many numbers as a few do", "max(32, 2 ** (count.bit_length() - 6))", "32"),
    ("a half of the rows twice", "zip(x.chunk(2), (None, None)", "zip((x.chunk(2)[0], x[: len(x) // 2]), (None, None)"),
    ("everything in halves", "if lopsided and x.dtype is torch.bfloat16:", "if True:"),
    ("halves of fewer rows than columns", "between = len(weight) <= len(x) <= 1280", "between = len(x) <= 1280"),
    ("halves of more than twice as many", "and len(x) < 2 * len(weight) <= 2048", "and len(weight) <= 1024"),
    ("the last columns are not copied", "zip(torch.split(copied, 64, dim=1),", "zip(torch.split(copied, 64, dim=1)[:-1],"),
    ("MKL is thought to hold back on Intel's processors", '_vendor() == "AuthenticAMD"', "True"),
    ("packing is thought to pay for small weights", "and (work >= _MUCH or", "and (True or"),
    ("packing is thought to pay where MKL holds back alone", "and (work >= _MUCH or", "and (False or"),
    ("packing is thought to pay without MKL", "and _has_mkl() and (work", "and (work"),
    ("the wider of two is copied, and comes out transposed", "left.t(), None).t())", "left.t(), None))"),
    ("halves without the bias", "_by_onednn(part, weight, bias, added)", "_by_onednn(part, weight, None, added)"),
    ("oneDNN's reference code", "weight.is_contiguous() or weight.t().is_contiguous()", "True"),
    ("logits are rounded where GPT-2's are", "    if centre is None:\n", "    if True:\n"),
    ("a frozen output layer loses what its rows have in common", "rows - centre if rows is weight else rows", "rows"),
    ("autocast is not looked at", "if torch.is_autocast_enabled(kind) else weight.dtype", "if False else weight.dtype"),
]

KERNELS: list[Row] = [
    (
        "every packed layer loses what its rows have in common",
        "head_centre(weight, dtype) if centred else None",
        "head_centre(weight, dtype)",
    ),
    ("GELU by its exact formula", 'width, "gelu", [], "tanh"', 'width, "gelu", [], "none"'),
    ("sampling activates twice", "{activation: _unchanged for activation in activated.values()}", "{}"),
    ("sampling does not activate", "gelu=layer in activated", "gelu=False"),
    ("the gradient of the exact GELU", 'gelu_backward(gradients[0], x, approximate="tanh")', "gelu_backward(gradients[0], x)"),
    ("GELU of rows that lie elsewhere", "x = x.contiguous()", "pass"),
    ("columns are shuffled by GELU", ".permute(0, 3, 1, 2)  # rows", ".reshape(1, width, 1, -1)  # rows"),
    (
        "an adapter's scale is left out",
        "onto=F.linear(low * scale, up.to(dtype))",
        "onto=F.linear(low, up.to(dtype))",
    ),
    (
        "an adapter's A learns without the scale",
        "(gradient @ up.to(low.dtype)).mul_(ctx.scale)",
        "(gradient @ up.to(low.dtype))",
    ),
    ("an adapter's B learns without the scale", "(gradient.t() @ low).mul_(ctx.scale)", "(gradient.t() @ low)"),
    ("nothing flows back through adapters", "None, onto=for_low @ down.to(low.dtype))", "None)"),
    ("routers get adapters", "isinstance(found, Tensor) and found.shape == (1, module.out_features)", "True"),
    ("adapters are not sampled", "torch.cat([x, project(x)], -1)", "torch.cat([x, 0 * project(x)], -1)"),
    ("adapters are sampled without the scale", 'F.pad(up * adapter.scaling["default"], (0, spare))', "F.pad(up, (0, spare))"),
    (
        "small adapters are lost in sampling",
        "return whole(torch.cat([x, project(x)], -1))",
        "return whole(torch.cat([x, 0 * project(x)], -1)) + project(x) @ up.t()",
    ),
    (
        "small adapters are lost in learning",
        "None if bias is None else bias.to(dtype), onto=F.linear(low * scale, up.to(dtype)))",
        "None if bias is None else bias.to(dtype)) + F.linear(low * scale, up.to(dtype))",
    ),
    ("frozen weights are copied whatever their size", "for layer in frozen) > MOST_PACKED:", "for layer in frozen) < 0:"),
    ("adapters are gone after sampling", "if forward is not None:", "if forward is None:"),
]

ROLES: list[Row] = [
    (
        "a policy that learns looks up numbers that a frozen one rounds",
        "            round_lookups(self.model)\n",
        "            pass\n",
    ),
    ("the reference is not frozen", "self.requires_grad_(False).eval()", "self.eval()"),
    ("the reference stays in training mode", "self.requires_grad_(False).eval()", "self.requires_grad_(False).train()"),
    ("the score is read at the row's width", "self._score(last_states(hidden, sequences.lengths))", "self._score(hidden[:, -1])"),
    ("the score does not see EOS", "last_states(hidden, sequences.lengths)", "last_states(hidden, sequences.lengths - 1)"),
    (
        "the value sees its own token",
        "states = response_states(hidden, sequences.prompt_lens, mask)",
        "states = response_states(hidden, sequences.prompt_lens + 1, mask)",
    ),
    ("the temperature is left out", '{"temperature": temperature, ', "{"),
    (
        "the temperature is left out where a model scales its logits",
        "targets[mask], temperature=temperature, with_entropy=with_entropy)\n            else",
        "targets[mask], with_entropy=with_entropy)\n            else",
    ),
    ("a model's own cap or scale is passed over", "return transform if same_states and", "return LogitTransform() if True or"),
    ("a cap is looked for in small logits", "1e2, -1e6]", "1e2, -1e1]"),
    ("logits of no known kind pass", "torch.allclose(transform(products)", "torch.allclose(logits.to(products)"),
    ("the states are changed before the head", "same_states = bool(", "same_states = True or bool("),
    ("logits that are all the same are divided by", "if not scale > 0:", "if False:"),
    ("the transform is not passed on", '"transform": self.transform, ', ""),
    ("the old offset is not scaled", "self.set_offset(gain * self.offset + bias)", "self.set_offset(self.offset + bias)"),
    ("the offset is not added", "squeeze(-1) + self.offset", "squeeze(-1)"),
    ("the offset is not stored", "        self.model.config.score_offset = offset\n", ""),
    ("the head's weight misses the root", "(head.in_features + 1) ** 0.5", "(head.in_features + 1)"),
    ("a new value model does not start at 0", "head.weight.zero_()", "head.weight.fill_(0.1)"),
    ("encoders pass as reward models", "        _check_score(model, self.head)\n", ""),
    ("a value model of several labels passes", "if head.out_features != 1:", "if head.out_features < 1:"),
]

PRECISION: list[Row] = [
    ("an embedding scales in half precision", "return type(embedding) is nn.Embedding", "return True"),
    ("norms are rounded too", "if id(parameter) in rounded else", "if True else"),
    ("the output layer is not rounded", "*([] if head is None else [head])", "*[]"),
]

STORAGE: list[Row] = [
    ("a checkpoint some of which is wider is read in half precision", 'return found == {"BF16"}', 'return "BF16" in found'),
    ("a base model's names are not found", "name.removeprefix(prefix)", "name"),
    ("rows that are not there move what follows", "file.write(bytes(4 * missing))", "pass"),
    ("tensors of other shapes pass", "if found is None or found.shape != wanted.shape:", "if found is None:"),
    ("what the configuration ties is tied whatever the checkpoint has", "if _ties_differ(model, places):", "if False:"),
    (
        "a head of its own is lost when an adapter is merged",
        "and name not in own for name in _saved_names(model)) or _ties_differ(model, places):",
        "and name not in own for name in _saved_names(model)):",
    ),
    ("buffers keep what they began with", "wanted.copy_(found)", "pass"),
    ("tied weights part", "    model.tie_weights()\n", ""),
    (
        "a checkpoint in several files has only one",
        "for name, file in files.items() if",
        "for name, file in list(files.items())[:1] if",
    ),
]

JUDGED: list[Row] = [
    ("log-probabilities of pads count", '{"logprobs": values[: batch[row]["length"]],', '{"logprobs": values,'),
    (
        "the reference is read hotter than the policy",
        "ref_policy(chosen, temperature=sampling.temperature)",
        "ref_policy(chosen)",
    ),
    (
        "whether a response has ended is forgotten",
        'torch.tensor([row["finished"] for row in rows], dtype=torch.bool)',
        "torch.ones(len(rows), dtype=torch.bool)",
    ),
]
ONE_AT_A_TIME: list[Row] = [
    ("the base model comes last", "sorted(sources, key=lambda name: shop.on_backbone(sources[name]))", "list(sources)[::-1]"),
    (
        "the judges' backbone stays for the base model's second turn",
        "    if not shop.on_backbone(shop.base):\n        shop.leave_backbone()\n",
        "",
    ),
]
INTERPOLATION: list[Row] = [
    (
        "the way is measured from its other end",
        "lerp(value_at_start(name).to(tensor), tensor, weight)",
        "lerp(tensor, value_at_start(name).to(tensor), weight)",
    ),
    ("the trained weights are not put back", "tensor.copy_(own[name])", "pass"),
    (
        "the trained weights were not kept",
        "name: tensor.clone() for name, tensor in trained",
        "name: tensor for name, tensor in trained",
    ),
    ("both matrices of an adapter are scaled", 'elif ".lora_B." in name:', "else:"),
    ("all the way is computed too", "if weight == 1.0:", "if False:"),
]
MERGING: list[Row] = [
    ("what the adapter adds is left out", ' + module.get_delta_weight("default").float()', ""),
    ("a checkpoint that has changed is merged", "if not torch.equal(stored.to(held), held):", "if False:"),
    ("the head that was learned is not saved", 'f"{_head_name(role.model)}.weight": role.head.weight}', "}"),
]

LOAD: list[Row] = [
    ("dropout stays on", "            setattr(config, key, value)\n    for key in", "            pass\n    for key in"),
    ("the saved policy samples with top_k 50", "top_k=0, top_p=1.0", "top_k=50, top_p=1.0"),
    ("the saved policy forgets the temperature", "do_sample=True, temperature=temperature", "do_sample=True, temperature=1.0"),
    (
        "the scorer's pad is EOS",
        'saved.add_special_tokens({"pad_token": PAD_TOKEN})\n    assert saved.pad_token_id == pad_id',
        "saved.pad_token = saved.eos_token\n    pad_id = saved.pad_token_id",
    ),
    ("missing weights are filled with random numbers", "    names = sorted(missing)\n", "    names = sorted(missing)[:0]\n"),
    (
        "the checkpoint's stop ids are forgotten",
        "sorted({tokenizer.eos_token_id, *listed, *",
        "sorted({tokenizer.eos_token_id, *",
    ),
    ("a special token without a role is text", "if token.special}", "if not token.special}"),
]

FUSED: list[Row] = [
    ("a norm's gradient misses the row's own scale", ".addcmul_(unit, along)", ""),
    ("a norm's weight learns from its output", "rows.sum(0) if ctx", "slope.reshape(rows.shape).sum(0) if ctx"),
    ("a gate's up learns without the activation", "F.silu(gate).mul_(gradients[0])", "gradients[0].clone()"),
    ("a norm rounds for the residual stream", "edges.get(output.grad_fn, 0) > 0:", "taken.get(key, 0) > 0:"),
    ("norms of other formulas are taken", "return torch.allclose(module(probe), weight * unit, rtol=1e-5)", "return True"),
    ("gates of other formulas are taken", "return torch.equal(module(probe), down(", "return bool(down("),
]

MACHINE: list[Row] = [
    ("kernels of all shapes are kept", "        _keep_few_kernels()\n", ""),
    ("the user's own limit is overruled", "os.environ.setdefault(name, _KERNELS)", "os.environ.update({name: _KERNELS})"),
    ("busy cores are taken", "round(_idle_cores(own_cores()) / local_ranks())", "round(len(own_cores()) / local_ranks())"),
    ("every rank takes all cores", "round(_idle_cores(own_cores()) / local_ranks())", "round(_idle_cores(own_cores()))"),
    ("a minute is spent on a slow precision", "if best and 2 * size**3 / best > 0.5:", "if False:"),
    ("the rate is that of the smallest product", "max(best, 2 * size**3 / (end - start))", "best or 2 * size**3 / (end - start)"),
    ("emulated bfloat16", "including_emulation=False", "including_emulation=True"),
]

FOLDER: list[Row] = [
    ("other people's files are written over", "    if found:\n", "    if False:\n"),
    ("somebody's whole configuration is a run's", ' and values["output"] == str(folder):', ":"),
    ("a configuration that was copied goes on at the original", "and folder != output.resolve()", "and False"),
    ("nothing may be there, a run's own model neither", "return  # a model from scratch", "pass  # a model from scratch"),
]
SHARE: list[Row] = [
    ("an interval without a width", "if share in (0.0, 1.0) else", "if False else"),
    ("ties alone are uncertain", "if share in (0.0, 1.0) else", "if share in (0.0, 0.5, 1.0) else"),
]

CLASSIFIER: list[Row] = [
    ("RoBERTa's positions begin at 0", "int(pad) + 1 for pad", "0 for pad"),
    ("pads stand on the left", 'padding_side="right"', 'padding_side="left"'),
    ("the response is cut off", 'tokenizer.truncation_side = "left"', 'tokenizer.truncation_side = "right"'),
    ("a second BOS", "add_special_tokens=plain", "add_special_tokens=True"),
    ("the end token is left off", "ended = plain and finished and", "ended = False and finished and"),
    ("a response that was cut gets an end token", "plain and finished and self._end", "plain and self._end"),
    ("other people's models get an end token", 'if hasattr(model.config, "score_offset") else None', ""),
    ("the end token makes a text too long", "self._max_length - ended", "self._max_length"),
    ("plain prompts stay plain under chat", "if self._chat and isinstance(prompt, str)", "if False and isinstance(prompt, str)"),
    ("always the first label", "logits[:, self._label].float()", "logits[:, 0].float()"),
    ("the offset is forgotten", ".float() + self._offset)", ".float())"),
    ("a decoder without a pad token reads the pad", "self._batch_size = 1  # without", "pass  # without"),
    ("dropout is on while scoring", "model.requires_grad_(False).eval()", "model.requires_grad_(False).train()"),
    (
        "scores come back in the micro-batches' order",
        "scores[rows] = model(",
        "scores[sorted(rows)] = model(",
    ),
    (
        "scores carry a gradient",
        "@torch.no_grad()\ndef scores_of(",
        "def scores_of(",
    ),
]

SCORING_BASE: list[Row] = [
    ("weights are left out", "weight * scorer.score(sequences, texts).cpu()", "scorer.score(sequences, texts).cpu()"),
    ("the last term alone", "total = total + weight", "total = weight"),
    ("infinite scores pass", "if not math.isfinite(value)]", "if math.isnan(value)]"),
]

SFT: list[Row] = [
    ("the loss is on the prompt too", 'first = store.prompt_lens if loss_on == "response" else 1', "first = 1"),
    (
        "the loss is on all tokens",
        '    if loss_on == "response":\n        return sequences',
        '    if loss_on == "nothing":\n        return sequences',
    ),
]

REWARD: list[Row] = [
    ("margins are forgotten", "ranking_loss(scores, ranks, groups, margins=margins)", "ranking_loss(scores, ranks, groups)"),
    ("margins are forgotten where it is held out", "groups, margins=data.margins[part])", "groups)"),
    (
        "ranks of other rows",
        "data.ranks[rows].unique(return_inverse=True)",
        "data.ranks[: len(rows)].unique(return_inverse=True)",
    ),
]

PPO: list[Row] = [
    ("a learning rate that is given is passed over", 'usual if config.learning_rate == "auto" else', "usual if True else"),
    ("the value model learns three times as fast", "value_first = first if", "value_first = 3 * first if"),
    ("a NaN passes the sampler's check", "if not gap <= limit:", "if gap > limit:"),
    ("the reference may move", "if weights_hash(actors.ref_policy) != reference_hash:", "if reference_hash is None:"),
    (
        "the coefficient adapts while the policy stands still",
        "            if trainables.policy_learning_rate is not None:  #",
        "            if True:  #",
    ),
    ("the generator keeps its first weights", "actors.generator.sync(version=iteration)", "actors.generator.version = iteration"),
    ("a policy that is not the reference passes", "1e-5) and not second_round:", "1e-5) and second_round:"),
    ("the size of the logits is forgotten", "32 * torch.finfo(dtype).eps * largest_logit", "0.0"),
    (
        "float32 may differ as much as bfloat16",
        "torch.float32: max(1e-5, rounding)}.get(dtype, half)",
        "torch.float32: 0.5}.get(dtype, half)",
    ),
    ("the temperature of the sampler's limit is forgotten", "* largest_logit / config.temperature", "* largest_logit"),
    ("the first minibatch is not looked at", "if (progress.steps, progress.skipped) != (1, 0):", "if progress.steps:"),
]

MUTANTS: list[Mutant] = [
    *_of("algo/masks.py", "algo/test_masks.py", MASKS),
    *_of("algo/logprobs.py", "algo/test_logprobs.py", LOGPROBS),
    *_of(
        "algo/logprobs.py",
        "models/test_roles.py::test_score_is_transformers_own_plus_offset_and_reads_eos",
        [
            (
                "the score is read one before the last token",
                "_states_at(hidden, lengths - 1,",
                "_states_at(hidden, (lengths - 2).clamp(min=0),",
            )
        ],
    ),
    *_of("algo/kl.py", "algo/test_kl.py", KL),
    *_of("algo/advantages.py", "algo/test_advantages.py", ADVANTAGES),
    *_of("algo/losses.py", "algo/test_losses.py", LOSSES),
    *_of("algo/schedules.py", "algo/test_schedules.py", SCHEDULES),
    *_of("algo/statistics.py", "algo/test_statistics.py", STATISTICS),
    *_of("types.py", "test_types.py", TYPES),
    *_of("data/template.py", "data/test_template.py", TEMPLATE),
    *_of("stages/rollout.py", "stages/test_rollout.py", ROLLOUT),
    *_of("stages/rollout.py", f"{PEERS}18_whitening_and_metrics_are_over_all_ranks", RANKS),
    *_of("stages/update.py", "stages/test_update.py", UPDATE),
    *_of("stages/update.py", f"{PEERS}17_gradients_do_not_depend_on_micro_batches", SPLIT),
    *_of("stages/update.py", f"{PEERS}11_trained_tokens_are_the_sampled_ones_at_their_temperature", TEMPERATURE),
    *_of("generation/sampling.py", "generation/test_sampling.py", SAMPLING),
    *_of("models/attention.py", "models/test_attention.py", ATTENTION),
    *_of("models/packing.py", "models/test_attention.py", PACKING),
    *_of("models/roles.py", "models/test_attention.py", CARRIED),
    *_of(
        "generation/native.py",
        f"{NATIVE}a_cap_sees_what_all_logits_share_also_in_bfloat16",
        [("a capped head is centred", " and transform.cap is None else None", " else None")],
    ),
    *_of("models/roles.py", FORWARD, [("a scale or cap is passed over", "return self.transform(self.head", "return (self.head")]),
    *_of("models/decoding.py", "models/test_attention.py", DECODING),
    *_of("models/rows.py", "models/test_attention.py", ROWS),
    *_of(
        "generation/native.py",
        GREEDY,
        [
            ("positions are not passed", '{"position_ids": positions} if self._takes_positions else {}', "{}"),
            ("positions stand still", "positions = positions[:, -1:] + 1", "positions = positions[:, -1:]"),
            ("pads at the left are attended to", "mask[row, width - len(prompt) :] = True", "mask[row, :] = True"),
            ("no attention mask", '"attention_mask": mask, ', ""),
            ("steps attend to the pads at the left", "zeros.masked_fill_(~prompts, -torch.inf)", "zeros"),
            ("steps attend to room that nothing fills yet", "value=-torch.inf)[:, None, None]", "value=0.0)[:, None, None]"),
            ("steps do not see the tokens before", "mask[..., length - 1] = 0.0", "pass"),
            ("a window is passed over", "policy.sees_all and policy.transform", "policy.transform"),
            ("the first token follows another prompt", "lengths.cumsum(0) - 1", "lengths - 1"),
        ],
    ),
    *_of(
        "generation/native.py",
        FORWARD,
        [
            (
                "the temperature is left out",
                "inverse_cdf(logits, uniform, self._temperature)",
                "inverse_cdf(logits, uniform, 1.0)",
            ),
            (
                "float64 is reported in float32",
                "wide = torch.float64 if self._policy.compute_dtype is torch.float64 else torch.float32\n        logprobs",
                "wide = torch.float32\n        logprobs",
            ),
        ],
    ),
    *_of(
        "generation/native.py",
        f"{PEERS}06_the_missing_end_penalty_goes_by_finish_reason",
        [
            (
                "a pad id counts as the end",
                "ended = torch.isin(tokens, self._stops)",
                "ended = torch.isin(tokens, self._stops) | (tokens == 0)",
            ),
        ],
    ),
    *_of(
        "generation/native.py",
        ENDS,
        [
            ("the end token is cut off", "lengths.index_fill_(0, rows, step + 1)", "lengths.index_fill_(0, rows, step)"),
            ("every response counts as finished", "finished[rows] = ended ", "finished[:] = True "),
            ("rows that ended go on", "_close_ranks(rows == nowhere)", "_close_ranks(torch.zeros_like(ended))"),
            ("rows that ended still write", "rows = rows.masked_fill(ended, nowhere)", "rows = rows.clone()"),
            ("rows that have not ended leave", "kept[ended[:size].nonzero().squeeze(1)[: len(late)]] = late", "pass"),
            ("rows leave one by one", "if len(going) <= 8", "if True"),
        ],
    ),
    *_of(
        "generation/native.py",
        f"{NATIVE}samples_depend_on_neither_batch_nor_order_nor_split",
        [
            (
                "the numbers of other rows",
                "uniforms[rows.to(uniforms.device).clamp(max=nowhere - 1), step]",
                "uniforms[: len(rows), step]",
            )
        ],
    ),
    *_of(
        "generation/native.py",
        f"{NATIVE}truncation_of_the_reference_vectors {NATIVE}stop_texts",
        [
            ("truncate_after is off by one", "if step < self._truncate_after:", "if step <= self._truncate_after:"),
            ("a stop text of a split token is missed", "longest = max(len(text.encode()) for", "longest = min(1 for"),
        ],
    ),
    *_of(
        "generation/native.py",
        f"{NATIVE}the_version_is_that_of_the_last_sync",
        [
            ("samples carry no version", "sequences.policy_version = version", "sequences.policy_version = 0"),
        ],
    ),
    *_of(
        "generation/cache.py",
        f"{NATIVE}the_roomy_cache_is_the_cache_of_transformers {NATIVE}the_room_grows_by_steps_and_keeps_what_is_there",
        [
            ("the new token overwrites the last", "self._length : end] = states", "self._length - 1 : end - 1] = states"),
            ("what there was is lost with the room", "wider[:, :, :held] = storage", "wider[:, :, :held] = 0"),
            ("what lies behind is left as it was", "wider[:, :, held:].zero_()", "pass"),
            ("rows do not move", "index_copy_(0, moved, storage[indices[moved]])", "index_copy_(0, moved, storage[moved])"),
        ],
    ),
    *_of(
        "generation/cache.py",
        f"{NATIVE}rows_leave_a_model_whose_layers_carry_states",
        [("states of linear attention keep all rows", "layer.reorder_cache(rows)", "layer.reorder_cache(rows[:0])")],
    ),
    *_of(
        "runtime/optim.py",
        "runtime/test_optim.py",
        [
            ("a large embedding learns nothing", "weight.grad.index_add_(0, ids, rows)", "pass"),
            ("a large embedding forgets the micro-batch before", "if weight.grad is None:", "if True:"),
            ("padding learns", "if embedding.padding_idx is not None:", "if False:"),
            ("an embedding that scales is taken for a plain one", "type(embedding) is nn.Embedding and", ""),
        ],
    ),
    *_of("algo/products.py", "algo/test_products.py algo/test_logprobs.py", PRODUCTS),
    *_of("models/kernels.py", "models/test_kernels.py", KERNELS),
    *_of(
        "runtime/checkpoint.py",
        "runtime/test_checkpoint.py",
        [("tied tensors are saved as one", "value.clone() if memory.data_ptr() in taken or", "value.clone() if")],
    ),
    *_of("models/roles.py", "models/test_roles.py", ROLES),
    *_of("models/fused.py", "models/test_fused.py", FUSED),
    *_of("models/precision.py", "models/test_roles.py models/test_storage.py", PRECISION),
    *_of("models/storage.py", "models/test_storage.py", STORAGE),
    *_of("models/adapters.py", "models/test_storage.py", MERGING),
    *_of("stages/evaluate.py", "stages/test_evaluate.py", JUDGED),
    *_of("jobs/evaluation.py", "end_to_end/test_adapters.py", ONE_AT_A_TIME),
    *_of(
        "jobs/training.py",
        "end_to_end/test_evaluation.py",
        [("the best policy goes by the raw reward", 'if name in means), "combined")', 'if name in means), "score")')],
    ),
    *_of("models/interpolation.py", "models/test_interpolation.py", INTERPOLATION),
    *_of("runtime/machine.py", "runtime/test_machine_and_world.py", MACHINE),
    *_of("models/load.py", "models/test_load.py", LOAD),
    *_of("folder.py", "test_folder.py", FOLDER),
    *_of("algo/statistics.py", "stages/test_evaluate.py", SHARE),
    *_of("scoring/model.py", "scoring/test_model.py", CLASSIFIER),
    *_of("scoring/base.py", "scoring/test_base.py", SCORING_BASE),
    *_of(
        "scoring/function.py",
        "scoring/test_function.py",
        [("a function is asked about nothing", "if not texts.responses:", "if False:")],
    ),
    *_of("stages/sft.py", "stages/test_sft.py", SFT),
    *_of("stages/reward.py", "stages/test_reward.py", REWARD),
    *_of(
        "stages/reward.py",
        "conformance/test_invariance.py::test_whole_stages_do_not_depend_on_micro_batches",
        [("the loss is a mean of micro-batch means", "(loss / count).backward()", "(loss / len(part)).backward()")],
    ),
    *_of("stages/ppo.py", "stages/test_ppo.py", PPO),
]
