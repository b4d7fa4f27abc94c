"""Settings of the supervised stages: pretraining from scratch, SFT, reward model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tercet.config.section import Path, Schedule, Section, setting


class TrainingConfig(Section):
    """What every supervised stage has."""

    epochs: int = setting(1, "passes over the data", ge=1)
    batch_size: int = setting(64, "records per optimizer step", ge=1)
    learning_rate: float = setting(1e-5, "peak learning rate of AdamW (betas 0.9, 0.999, eps 1e-5)", gt=0)
    schedule: Schedule = setting("linear", "linear to zero, cosine to a tenth, or constant")
    warmup_steps: int = setting(0, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", ge=0)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm", gt=0)
    max_length: int = setting(512, "tokens of prompt and response together; a longer response is cut and gets no EOS", ge=2)
    eval_every: int = setting(0, "optimizer steps between evaluations on held-out records; 0: once an epoch", ge=0)


class PretrainConfig(TrainingConfig):
    """Language modelling on data.pretrain, for a scratch model; runs only where data.pretrain is given."""

    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", gt=0)


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on demonstrations."""

    epochs: int = setting(3, "passes over the data", ge=1)
    loss_on: Literal["response", "all"] = setting("response", "response: its tokens and EOS; all: the prompt's tokens too")
    dropout: float = setting(0.0, "dropout while training; every other stage has none", ge=0, lt=1)


class RewardConfig(TrainingConfig):
    """The reward model, trained on comparisons with the Bradley-Terry (K-way ranking) loss."""

    use: Path | None = setting(None, "a sequence-classification checkpoint with one label, in place of this stage")
    normalise_samples: int = setting(
        256, "responses of the SFT policy on which scores get mean 0 and standard deviation 1; 0: off", ge=0
    )
    judge: bool = setting(
        True, "train a second reward model on a fifth of the comparisons, unseen by the first (500 or more after the hold-out)"
    )

    @model_validator(mode="after")
    def _samples_have_a_deviation(self) -> RewardConfig:
        if self.normalise_samples == 1:
            raise ValueError(
                "normalise_samples is 1, and one response has no standard deviation: set some hundreds, or 0 for none"
            )
        return self
