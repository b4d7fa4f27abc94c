"""Whatever the shapes: masks that count exactly the sampled tokens, and finite losses, through rollout and update (hypothesis).

Pads are id 0, so a world whose stop token is 0 is one where pad and EOS share an id. Prompts may hold the stop token, too.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tercet.stages.rollout import Rollout

Prompts = list[list[int]]
KL_COEF, PENALTY = 0.3, 1.0
PROMPT_LISTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5)
NO_STOP, PAD_STOPS, OTHER_STOP, ALL_STOP = (), (0,), (3,), (0, 1, 2, 3)


def check_masks(rollout: Rollout, asked: Prompts, stops: tuple[int, ...], limit: int) -> None:
    """Texts, masks and finish flags against the definition, row by row."""
    experience = rollout.experience
    sequences = experience.sequences
    width = max(sequences.response_lens.tolist())
    assert sequences.response_mask.shape == experience.logprobs.shape == (len(asked), width)
    for i, prompt in enumerate(asked):
        length = int(sequences.response_lens[i])
        ids = sequences.input_ids[i].tolist()
        response = ids[len(prompt) : len(prompt) + length]
        assert ids == prompt + response + [0] * (len(ids) - len(prompt) - length)
        assert sequences.response_ids[i].tolist() == response + [0] * (width - length)
        assert sequences.response_mask[i].tolist() == [True] * length + [False] * (width - length)
        assert 1 <= length <= limit and not set(response[:-1]) & set(stops)
        assert bool(sequences.finished[i]) == (response[-1] in stops)
        assert bool(sequences.finished[i]) or length == limit


def check_numbers(rollout: Rollout, whitened: bool) -> None:
    """Nothing outside the mask, the score on the last token, and advantages with mean 0 and deviation 1 where asked."""
    experience = rollout.experience
    sequences, mask = experience.sequences, experience.sequences.response_mask
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages"):
        tensor: Tensor = getattr(experience, name)
        assert bool(tensor.isfinite().all()) and not bool(tensor[~mask].any()), name
    for i, length in enumerate(sequences.response_lens.tolist()):
        prompt, response = sequences.prompt_lens[i], sequences.response_ids[i, :length].tolist()
        score = tiny.length_reward([tiny.spell([0] * int(prompt))], [tiny.spell(response)])[0]
        score -= 0.0 if sequences.finished[i] else PENALTY
        penalties = [KL_COEF * float(experience.logprobs[i, t] - experience.ref_logprobs[i, t]) for t in range(length)]
        wanted = [-penalty + (score if t == length - 1 else 0.0) for t, penalty in enumerate(penalties)]
        assert experience.rewards[i, :length].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    real = experience.advantages[mask]
    if whitened:
        assert abs(float(real.mean())) < 1e-7
        before = float((experience.returns - experience.values)[mask].var(correction=0))
        # 1, but for the 1e-8 that keeps equal advantages from a division by 0
        assert float(real.var(correction=0)) == pytest.approx(before / (before + 1e-8), rel=1e-5, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    PROMPT_LISTS,
    st.sampled_from([NO_STOP, PAD_STOPS, OTHER_STOP, ALL_STOP]),
    st.integers(1, 4),
    st.sampled_from([1, 9, 4096]),
    st.booleans(),
    st.integers(0, 99),
)
@example([[0], [0, 0, 0]], PAD_STOPS, 4, 1, True, 0)
@example([[3, 3], [1]], OTHER_STOP, 4, 1, True, 0)
@example([[1, 2, 3, 0], [2]], NO_STOP, 3, 9, True, 0)  # every response is cut
@example([[1], [2, 0]], ALL_STOP, 4, 1, True, 0)  # every response ends at once
@example([[1]], PAD_STOPS, 1, 1, True, 0)  # one token in all
def test_masks_are_right_and_losses_finite(
    prompts: Prompts, stops: tuple[int, ...], limit: int, tokens: int, whitened: bool, seed: int
) -> None:
    actors = tiny.actors_of(steps=limit, stop_ids=stops)
    with torch.no_grad():  # away from the reference, so that the KL takes part
        actors.policy.model.transformer.wte.weight.mul_(1.1)
    rows = len(prompts)
    config = tiny.ppo_config(
        rollout_batch_size=rows,
        ppo_epochs=2,
        max_new_tokens=limit,
        missing_eos_penalty=PENALTY,
        whiten_advantages=whitened,
    )
    rollout = tiny.rollout_of(actors, config, tiny.prompts_of(prompts), kl_coef=KL_COEF, seed=seed, tokens=tokens)
    asked = [[int(token) for token in sample["prompt"].split()] for sample in rollout.samples]
    assert sorted(asked) == sorted(prompts)
    check_masks(rollout, asked, stops, limit)
    check_numbers(rollout, whitened)
    progress = tiny.update_of(rollout.experience, actors, config, tokens=tokens)
    assert (progress.steps, progress.skipped) == (2, 0)
    assert progress.tokens == 2 * int(rollout.experience.sequences.response_lens.sum())
    assert all(math.isfinite(value) for value in progress.metrics().values())
    for model in (actors.policy, actors.value_model):
        assert all(bool(value.isfinite().all()) for value in tiny.weights(model).values())
