"""Settings of the evaluation after training, of the checkpoints and of the machine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tercet.config.ppo import RewardTerm
from tercet.config.section import Path, Section, setting

Count = Annotated[int, Field(ge=1)]
# What evaluation itself calls the columns of a response and the judges that it makes, and the policies.
_TAKEN = {"score", "judge", "bag_of_words", "gold", "kl", "entropy", "place", "response", "ids", "length", "finished"}
_TAKEN |= {"combined", "surprisal", "draw", "win_rate", "lc_win_rate", "perplexity", "distinct1", "distinct2", "repetition"}
_TAKEN |= {"base", "sft", "ppo", "best", "prompt", "group", "main"}
# And PPO's metrics, into whose rows evaluations on the way write.
_TAKEN |= {"iteration", "reward", "kl_k3", "kl_coef", "score_std", "explained_variance", "skipped", "ratio", "alarms"}
_TAKEN |= {"sampler_logprob_gap", "epochs_done", "optimizer_steps", "learning_rate"}
_TAKEN |= {"eval_score", "eval_combined", "eval_kl"}
_TAKEN |= {"policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "grad_norm", "value_grad_norm"}
_ENDINGS = ("_std", "_low", "_high")  # of a figure's spread and interval


class EvaluationConfig(Section):
    """Responses to held-out prompts of the base model, SFT, PPO and other policies, with the same random numbers."""

    prompts: int = setting(500, "held-out prompts used at most", ge=1)
    batch_size: int | None = setting(
        None, "responses sampled at once, lower it when memory runs out; empty: ppo.rollout_batch_size", ge=1
    )
    greedy: bool = setting(
        False, "take the likeliest token instead of sampling at the training temperature; what is called KL then is none"
    )
    judges: dict[str, RewardTerm] = setting({}, "further judges by name, beside the reward model and the second reward model")
    policies: dict[str, Path] = setting({}, "further policies by name: checkpoints that read this model's token ids")
    best_of_prompts: int = setting(
        16, "held-out prompts on which best-of-n from SFT's samples is measured, what PPO is compared with; 0: off", ge=0
    )
    best_of_samples: int = setting(64, "samples for each of them; best-of-n is given for n up to 64 of them", ge=1)
    gold: str | None = setting(None, "where the truth is known: file.py:name or module:name, a function as in ppo.rewards")
    group_by: str | None = setting(None, "a field of the prompts; each of its values is reported apart")
    main_group: str | None = setting(
        None, "the value of that field whose prompts the headline figures are over; empty: all prompts"
    )

    @model_validator(mode="after")
    def _fits(self) -> EvaluationConfig:
        if self.main_group is not None and self.group_by is None:
            raise ValueError(f"main_group is {self.main_group!r} but group_by is empty: name the field that it is a value of")
        for field, names in (("judges", list(self.judges)), ("policies", list(self.policies))):
            taken = next((name for name in names if name in _TAKEN), None)
            if taken is not None:
                raise ValueError(f"{field}: the name {taken!r} means something else already: call it my_{taken}, for example")
            ending = next((name for name in names if name.endswith(_ENDINGS)), None)
            if ending is not None:
                raise ValueError(f"{field}: the name {ending!r} ends as a figure's spread or interval does: choose another")
        odd = next(
            (name for name in self.policies if not name.replace("_", "").replace("-", "").isalnum() or name in self.judges), None
        )
        if odd is not None:
            raise ValueError(f"policies: the name {odd!r} should be letters, digits, - and _, and no judge's name: rename it")
        judged = ("score", "combined", "kl", "length", "finished", "judge", "bag_of_words", "gold", *self.judges)
        columns = {f"{policy}_{figure}" for policy in ("base", "sft", "ppo", "best", *self.policies) for figure in judged}
        clash = next((name for name in self.policies if name in columns), None)
        if clash is not None:
            raise ValueError(f"policies: the name {clash!r} is that of a column of evaluation/samples.jsonl: rename it")
        return self


class CheckpointConfig(Section):
    """Exact-resume state, written while a stage runs."""

    every: int = setting(50, "optimizer steps (PPO: iterations) between checkpoints", ge=1)
    every_minutes: float | None = setting(
        30.0, "and as soon as this many minutes have passed since the last one; empty: by steps alone", gt=0
    )
    keep: int = setting(2, "newest checkpoints kept per stage while it runs", ge=1)


class MachineConfig(Section):
    """What `auto` chose is written to the run folder's config.yaml and used again on resume."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:0, mps")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting(
        "auto", "of matrix products; master weights, losses and log-probabilities are never below float32"
    )
    threads: Literal["auto"] | Count = setting(
        "auto", "CPU threads of this process; auto: as many as cores have nothing to do, one for the tiniest models"
    )
    microbatch_tokens: Literal["auto"] | Count = setting(
        "auto", "tokens per forward, padding counted; lower it when memory runs out"
    )
    activation_checkpointing: bool = setting(
        False, "compute each layer's activations again in the backward pass: about a quarter slower, in far less memory"
    )
