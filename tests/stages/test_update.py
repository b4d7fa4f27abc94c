"""One iteration's optimizer steps: how many, on which rows, against what, and what a broken gradient does."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import tiny
import torch

from tercet.runtime.distributed import World
from tercet.stages import rollout as rollout_module
from tercet.stages import update as update_module
from tercet.stages.rollout import Actors, Rollout
from tercet.stages.update import Trainables, UpdateProgress, update_flops
from tercet.types import KeptPass


@pytest.fixture
def actors() -> Actors:
    return tiny.actors_of()


def begin(actors: Actors, **options: Any) -> tuple[Rollout, Any]:
    config = tiny.ppo_config(**options)
    return tiny.rollout_of(actors, config), config


@pytest.mark.parametrize(("epochs", "minibatch"), [(1, 12), (4, 12), (2, 6), (3, 4), (1, 1)])
def test_optimizer_steps_are_epochs_times_minibatches(actors: Actors, epochs: int, minibatch: int) -> None:
    """Section 3, rows 1 and 2: whatever the micro-batches, and the same in the last epoch as in the first."""
    rollout, config = begin(actors, ppo_epochs=epochs, minibatch_size=minibatch)
    recorder = tiny.Recorder(actors.policy)
    progress = tiny.update_of(rollout.experience, actors, config, policy_optimizer=recorder, tokens=14)
    assert len(recorder.gradients) == epochs * (12 // minibatch) == progress.steps
    assert progress.finished and progress.epoch == epochs and progress.skipped == 0


def test_each_row_once_an_epoch_in_an_order_of_its_own(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, config = begin(actors, ppo_epochs=3, minibatch_size=4)
    seen: list[list[int]] = []
    step = update_module._step

    def spy(*arguments: Any) -> None:
        seen.append(arguments[5].tolist())
        step(*arguments)

    monkeypatch.setattr(update_module, "_step", spy)
    tiny.update_of(rollout.experience, actors, config)
    epochs = [[seen[3 * e + m] for m in range(3)] for e in range(3)]
    for minibatches in epochs:
        assert Counter(row for rows in minibatches for row in rows) == Counter(range(12))
    assert epochs[0] != epochs[1] != epochs[2]


def test_what_was_recorded_stays_as_it_was_and_the_ratio_moves(actors: Actors) -> None:
    """Row 48: old log-probabilities, values and advantages are fixed over the epochs, so the second epoch's ratio is not 1."""
    rollout, config = begin(actors, ppo_epochs=2, learning_rate=1e-2)
    names = ("logprobs", "ref_logprobs", "values", "scores", "rewards", "advantages", "returns")
    before = {name: getattr(rollout.experience, name).clone() for name in names}
    kls: list[float] = []
    tiny.update_of(
        rollout.experience, actors, config, policy_learning_rate=1e-2, after_step=lambda p: kls.append(p.sums["approx_kl"])
    )
    assert all(torch.equal(getattr(rollout.experience, name), value) for name, value in before.items())
    assert kls[0] == 0.0  # the first minibatch: the very forward of the rollout
    assert kls[1] > 1e-4


@pytest.mark.parametrize("tokens", [4096, 21, 8])
def test_ratio_is_exactly_one_at_the_first_minibatch(actors: Actors, tokens: int) -> None:
    config = tiny.ppo_config(ppo_epochs=1)
    rollout = tiny.rollout_of(actors, config, tokens=tokens)
    progress = tiny.update_of(rollout.experience, actors, config, tokens=tokens)
    figures = progress.metrics()
    assert (figures["ratio"], figures["approx_kl"], figures["clip_fraction"]) == (1.0, 0.0, 0.0)


def test_the_first_update_makes_the_forwards_of_the_rollout(actors: Actors) -> None:
    """The same micro-batches in the same order, so that the ratio is 1 to the bit whatever a kernel does with a shape."""
    forwards: list[list[list[int]]] = []
    actors.policy.register_forward_hook(lambda module, inputs, output: forwards.append(inputs[0].input_ids.tolist()))
    options = {"policy_optimizer": tiny.Recorder(actors.policy), "value_optimizer": tiny.Recorder(actors.value_model)}
    for tokens in (14, 20):
        forwards.clear()
        config = tiny.ppo_config(ppo_epochs=1)
        experience = tiny.rollout_of(actors, config, tokens=tokens).experience
        made = len(forwards)
        tiny.update_of(experience, actors, config, tokens=tokens, **options)
        assert made > 1 and forwards[made:] == forwards[:made]


@pytest.mark.parametrize(("tokens", "cuts"), [(4096, 1), (21, 4)])
@pytest.mark.parametrize("room", [2**27, 0], ids=["room", "none"])
def test_the_first_step_takes_the_rollouts_own_forwards(
    actors: Actors, monkeypatch: pytest.MonkeyPatch, tokens: int, cuts: int, room: int
) -> None:
    """The same weights to the bit as with forward passes of its own, and as many fewer as there was room for: at least one."""
    monkeypatch.setattr(rollout_module, "MOST_KEPT", room)
    rollout, config = tiny.rollout_of(actors, tiny.ppo_config(ppo_epochs=3), tokens=tokens), tiny.ppo_config(ppo_epochs=3)
    straight = tiny.update_of(rollout.experience, actors, config, tokens=tokens)
    again = tiny.actors_of()
    forwards: list[int] = []
    for model in (again.policy, again.value_model):
        model.register_forward_hook(lambda module, inputs, output: forwards.append(1))
    sampled = tiny.rollout_of(again, config, tokens=tokens)
    assert len(forwards) == 2 * cuts
    assert tiny.update_of(sampled.experience, again, config, tokens=tokens, kept=sampled.kept) == straight
    assert len(forwards) == (1 + 3) * 2 * cuts - (2 * cuts if room else 1)
    assert tiny.largest_gap(tiny.weights(actors.policy), tiny.weights(again.policy)) == 0.0
    assert tiny.largest_gap(tiny.weights(actors.value_model), tiny.weights(again.value_model)) == 0.0


def test_max_approx_kl_ends_the_epochs_after_the_crossing_one(actors: Actors) -> None:
    """Row 53. The first epoch's first minibatch has KL 0, but its later ones have moved: three minibatches an epoch."""
    rollout, config = begin(actors, ppo_epochs=4, minibatch_size=4, max_approx_kl=1e-9)
    progress = tiny.update_of(rollout.experience, actors, config, policy_learning_rate=1e-2)
    assert (progress.steps, progress.epoch, progress.finished) == (3, 1, True)
    rollout, config = begin(tiny.actors_of(), ppo_epochs=4, minibatch_size=12, max_approx_kl=1e-9)
    progress = tiny.update_of(rollout.experience, tiny.actors_of(), config, policy_learning_rate=1e-2)
    assert (progress.steps, progress.epoch) == (2, 2)  # one minibatch: KL 0 in the first epoch, crossed in the second
    config = config.model_copy(update={"max_approx_kl": 100.0})
    assert tiny.update_of(rollout.experience, tiny.actors_of(), config).steps == 4


def test_max_approx_kl_is_about_one_epoch_at_a_time() -> None:
    """A limit that the second epoch crosses and the mean of both epochs does not ends after the second."""
    totals = [0.0]  # from the figures' own sums, which run over all epochs
    rollout, config = begin(tiny.actors_of(), ppo_epochs=4)
    tiny.update_of(rollout.experience, tiny.actors_of(), config, after_step=lambda p: totals.append(p.sums["approx_kl"]))
    tokens = int(rollout.experience.sequences.response_lens.sum())
    first, second, third, _ = ((b - a) / tokens for a, b in zip(totals, totals[1:]))
    assert first < 1e-9 < second < third
    limit = 0.75 * second
    config = tiny.ppo_config(ppo_epochs=4, max_approx_kl=limit)
    assert tiny.update_of(rollout.experience, tiny.actors_of(), config).epoch == 2


def test_each_minibatch_divides_by_its_own_tokens(actors: Actors, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, config = begin(actors, ppo_epochs=1, minibatch_size=3)
    counts: list[tuple[int, int]] = []
    loss = update_module.policy_loss

    def spy(*arguments: Any) -> Any:
        counts.append((arguments[5], int(arguments[3].sum())))
        return loss(*arguments)

    monkeypatch.setattr(update_module, "policy_loss", spy)
    tiny.update_of(rollout.experience, actors, config)
    assert len(counts) == 4 and all(count == tokens for count, tokens in counts)
    assert len({count for count, _ in counts}) > 1 and sum(count for count, _ in counts) == int(
        rollout.experience.sequences.response_lens.sum()
    )


def test_gradient_norm_after_the_clip_is_at_most_the_limit(actors: Actors) -> None:
    """Section 3, row 3. The norm that is logged is the one before clipping."""
    rollout, config = begin(actors, ppo_epochs=1)
    limit, norms, after = 1e-3, [], []
    optimizer = tiny.optimizer_of(actors.policy, max_grad_norm=limit)
    adam_step = optimizer._adam.step

    def spy() -> None:
        after.append(math.sqrt(sum(float((p.grad**2).sum()) for p in actors.policy.parameters() if p.grad is not None)))
        adam_step()

    optimizer._adam.step = spy  # type: ignore[method-assign]
    progress = tiny.update_of(rollout.experience, actors, config, policy_optimizer=optimizer)
    norms.append(progress.metrics()["grad_norm"])
    assert norms[0] > limit and after == [pytest.approx(limit, rel=1e-4)]


def test_value_warm_up_moves_the_value_model_alone(actors: Actors) -> None:
    rollout, config = begin(actors, ppo_epochs=2)
    policy, value = tiny.weights(actors.policy), tiny.weights(actors.value_model)
    progress = tiny.update_of(rollout.experience, actors, config, policy_learning_rate=None)
    assert tiny.largest_gap(policy, tiny.weights(actors.policy)) == 0.0
    assert tiny.largest_gap(value, tiny.weights(actors.value_model)) > 0.0
    assert progress.steps == 2 and progress.metrics()["value_loss"] > 0 and progress.metrics()["grad_norm"] == 0.0


@pytest.mark.parametrize(("name", "struck"), [("advantages", 0), ("returns", 1)])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(actors: Actors, name: str, struck: int) -> None:
    """The model that it struck stands still in that minibatch, and the figures of the other steps stay finite."""
    rollout, config = begin(actors, ppo_epochs=1, minibatch_size=4)
    getattr(rollout.experience, name)[0, 0] = float("inf")
    models = (actors.policy, actors.value_model)
    before = [tiny.weights(model) for model in models]
    history: list[tuple[int, list[bool]]] = []

    def after_step(progress: UpdateProgress) -> None:
        now = [tiny.weights(model) for model in models]
        history.append((progress.skipped, [tiny.largest_gap(a, b) > 0 for a, b in zip(before, now)]))
        before[:] = now

    progress = tiny.update_of(rollout.experience, actors, config, after_step=after_step)
    assert (progress.steps, progress.skipped) == (2, 1)
    skipped_before = 0
    for skipped, moved in history:
        assert moved[struck] == (skipped == skipped_before) and moved[1 - struck]
        skipped_before = skipped
    assert all(math.isfinite(value) for value in progress.metrics().values())


@pytest.mark.parametrize("stop_ids", [range(4), ()])
def test_immediate_ends_and_no_ends_at_all_are_finite(stop_ids: Any) -> None:
    """Section 3, row 26: length-1 responses, and batches of truncated ones, also one row a micro-batch."""
    actors = tiny.actors_of(stop_ids=stop_ids)
    config = tiny.ppo_config(ppo_epochs=2, minibatch_size=4, missing_eos_penalty=1.0)
    rollout = tiny.rollout_of(actors, config, tokens=1)
    assert rollout.experience.sequences.response_lens.tolist() == [1 if stop_ids else 4] * 12
    assert rollout.metrics["finished"] == float(bool(stop_ids))
    progress = tiny.update_of(rollout.experience, actors, config, tokens=1)
    assert progress.steps == 6 and progress.skipped == 0
    assert all(math.isfinite(value) for value in progress.metrics().values())
    assert all(bool(value.isfinite().all()) for value in tiny.weights(actors.policy).values())


def test_every_trainable_parameter_gets_a_gradient_and_nothing_else_does(actors: Actors) -> None:
    """Section 2, row 1: the loss is a tensor of the new forward pass."""
    rollout, config = begin(actors, ppo_epochs=1)
    policy, value = tiny.Recorder(actors.policy), tiny.Recorder(actors.value_model)
    tiny.update_of(rollout.experience, actors, config, policy_optimizer=policy, value_optimizer=value)
    for recorder in (policy, value):
        for name, gradient in recorder.gradients[0].items():
            assert gradient.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in actors.ref_policy.parameters())


def test_shares_of_a_minibatch_add_up_over_ranks(actors: Actors) -> None:
    """Row i belongs to rank i mod 2; each rank divides by the whole minibatch's tokens, so gradients add up to one process's."""
    rollout, config = begin(actors, ppo_epochs=1, minibatch_size=6)
    whole = tiny.Recorder(actors.policy)
    tiny.update_of(rollout.experience, actors, config, policy_optimizer=whole, value_optimizer=tiny.Recorder(actors.value_model))

    class Half(World):
        def gather(self, value: Any) -> list[Any]:
            if isinstance(value, list) and value and isinstance(value[0], int):
                return [rollout.experience.sequences.response_lens[rank::2].tolist() for rank in range(2)]
            return [value, value]

        def all_sum(self, value: torch.Tensor) -> torch.Tensor:
            return value

    parts = []
    for rank in range(2):
        recorder = tiny.Recorder(actors.policy)
        trainables = update_module.Trainables(
            actors.policy,
            actors.value_model,
            recorder,
            tiny.Recorder(actors.value_model),
            1e-3,
            1e-3,  # type: ignore[arg-type]
        )
        own = rollout.experience.select(list(range(rank, 12, 2)))
        update_module.update(
            own,
            trainables,
            config,
            Half(rank, 2),
            UpdateProgress(),
            iteration=0,
            seed=0,
            max_tokens=64,
            after_step=lambda p: None,
        )
        parts.append(recorder.gradients)
    for step in range(2):
        total = {name: parts[0][step][name] + parts[1][step][name] for name in parts[0][step]}
        assert tiny.largest_gap(whole.gradients[step], total) < 1e-9


def test_an_interrupted_update_goes_on_where_it_stopped() -> None:
    """The same weights and figures as without the interruption, whatever the step it came after."""

    class Stop(Exception):
        pass

    for after in (1, 2, 3, 4, 5):
        actors, again = tiny.actors_of(), tiny.actors_of()
        rollout, config = begin(actors, ppo_epochs=2, minibatch_size=4)
        straight = tiny.update_of(rollout.experience, actors, config)
        progress = UpdateProgress()
        optimizers = {
            "policy_optimizer": tiny.optimizer_of(again.policy),
            "value_optimizer": tiny.optimizer_of(again.value_model),
        }

        def after_step(progress: UpdateProgress, after: int = after) -> None:
            if progress.steps == after:
                raise Stop

        with pytest.raises(Stop):
            tiny.update_of(rollout.experience, again, config, after_step=after_step, progress=progress, **optimizers)
        tiny.update_of(rollout.experience, again, config, progress=progress, **optimizers)
        assert progress == straight
        assert tiny.largest_gap(tiny.weights(actors.policy), tiny.weights(again.policy)) == 0.0


def test_flops_of_an_update_by_hand() -> None:
    """Two epochs of two minibatches: each text goes twice forward and backward through both models, three times a forward's cost."""
    actors = tiny.actors_of()
    config = tiny.ppo_config(ppo_epochs=2, minibatch_size=6)
    experience = tiny.rollout_of(actors, config).experience
    progress = UpdateProgress(steps=3, skipped=1)
    trainables = Trainables(actors.policy, actors.value_model, None, None, 1e-3, 1e-3)  # type: ignore[arg-type]
    tokens, responses = int(experience.sequences.lengths.sum()), int(experience.sequences.response_lens.sum())
    trunk, width, vocabulary = 12 * 32**2, 32, 4
    wanted = 2 * 3 * 2 * (2 * trunk * tokens + (vocabulary + 1) * width * responses)
    assert update_flops(experience, trainables, config, progress, ()) == wanted
    still = dataclasses.replace(trainables, policy_learning_rate=None)
    assert update_flops(experience, still, config, progress, ()) == 2 * 3 * 2 * (trunk * tokens + width * responses)


def test_a_forward_that_the_rollout_made_is_none_of_the_updates() -> None:
    """Two epochs of one minibatch: the policy goes once forward and twice backward, and so does the value model with two of its texts."""
    actors = tiny.actors_of()
    config = tiny.ppo_config(ppo_epochs=2)
    experience, progress = tiny.rollout_of(actors, config).experience, UpdateProgress(steps=2)
    trainables = Trainables(actors.policy, actors.value_model, None, None, 1e-3, 1e-3)  # type: ignore[arg-type]
    lens, response_lens = experience.sequences.lengths, experience.sequences.response_lens

    def cost(labels: int, rows: list[int]) -> int:
        return 2 * (12 * 32**2 * int(lens[rows].sum()) + labels * 32 * int(response_lens[rows].sum()))

    two, others, there = [3, 7], [row for row in range(12) if row not in (3, 7)], torch.zeros(())
    kept = [KeptPass(torch.tensor(two), there, there), KeptPass(torch.tensor(others), there, None)]
    wanted = 5 * cost(4, two + others) + 6 * cost(1, two + others) - cost(1, two)
    assert update_flops(experience, trainables, config, progress, kept) == wanted
    still = dataclasses.replace(trainables, policy_learning_rate=None)
    assert update_flops(experience, still, config, progress, kept) == 6 * cost(1, two + others) - cost(1, two)
