"""Settings of PPO. Defaults are those of Ziegler 2019 and Stiennon 2020 unless docs/decisions.md says otherwise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tercet.config.section import Path, Schedule, Section, setting

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RewardTerm(Section):
    """One source of the score: the score is the weighted sum of all terms."""

    kind: Literal["stage", "classifier", "function"] = setting(
        "stage", "stage: the reward model of stage 2; classifier: a sequence-classification checkpoint; function: Python"
    )
    model: Path | None = setting(None, "classifier: its Hugging Face name or folder; it keeps its own tokenizer")
    label: int | str | None = setting(None, "classifier: the label whose logit is the score, where it has several")
    function: str | None = setting(
        None, "function: file.py:name or module:name, called as name(prompts, responses, **fields) -> list[float]"
    )
    timeout: float = setting(300.0, "function: seconds that one call may take", gt=0)
    weight: float = setting(1.0, "factor of this term")

    @model_validator(mode="after")
    def _matching(self) -> RewardTerm:
        wanted = {"stage": None, "classifier": "model", "function": "function"}[self.kind]
        for name in ("model", "function"):
            if name == wanted and getattr(self, name) is None:
                raise ValueError(f"kind: {self.kind} needs {name}: set it, or choose another kind")
            if name != wanted and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is set but kind is {self.kind}: set kind: {'classifier' if name == 'model' else 'function'}"
                )
        if self.label is not None and self.kind != "classifier":
            raise ValueError(f"label is set but kind is {self.kind}: only a classifier has labels")
        return self


class KLConfig(Section):
    """The penalty on the KL divergence from the reference policy."""

    coef: float = setting(0.05, "factor of the per-token KL in the reward; the first value, where adaptive", ge=0)
    controller: Literal["fixed", "adaptive"] = setting("fixed", "adaptive: coef follows target (Ziegler 2019, section 2.2)")
    target: float = setting(6.0, "adaptive: nats per response to settle at", gt=0)
    horizon: int = setting(10_000, "adaptive: episodes over which coef can change by 20 %", ge=1)
    limit: float | None = setting(
        5.0,
        "the run stops once the KL exceeds this, nats a response token: the policy has left the reference; empty: never",
        gt=0,
    )

    @model_validator(mode="after")
    def _adaptive_needs_a_start(self) -> KLConfig:
        if self.controller == "adaptive" and self.coef == 0:
            raise ValueError("coef is 0 and controller is adaptive: coef is changed by factors and would stay 0, try 0.05")
        return self


class PPOConfig(Section):
    """Proximal policy optimisation against the score, with a KL penalty to the SFT policy."""

    iterations: int = setting(100, "rollout and update, this many times", ge=1)
    rollout_batch_size: int = setting(128, "responses sampled per iteration", ge=1)
    minibatch_size: int | None = setting(None, "responses per optimizer step; empty: the whole rollout batch", ge=1)
    ppo_epochs: int = setting(4, "passes over each rollout batch", ge=1)
    learning_rate: Literal["auto"] | Positive = setting(
        "auto",
        "of the policy (AdamW, betas 0.9, 0.999, eps 1e-5); auto: 1e-5 * sqrt(minibatch_size / 512 / billions of its parameters)",
    )
    value_learning_rate: Literal["auto"] | Positive = setting("auto", "of the value model; auto: the policy's")
    schedule: Schedule = setting("linear", "of both learning rates, over iterations")
    warmup_iterations: int = setting(0, "iterations of linear warm-up of the learning rates", ge=0)
    value_warmup_iterations: int = setting(0, "first iterations in which only the value model learns", ge=0)
    max_grad_norm: float = setting(1.0, "gradients of each model are scaled down to this global norm", gt=0)
    clip_range: float = setting(0.2, "of the probability ratio (Schulman 2017)", gt=0, lt=1)
    value_clip_range: float | None = setting(0.2, "of the change of a value; empty: not clipped", gt=0)
    gamma: float = setting(1.0, "discount per token", gt=0, le=1)
    gae_lambda: float = setting(0.95, "of generalised advantage estimation (Schulman 2016)", ge=0, le=1)
    whiten_advantages: bool = setting(True, "advantages get mean 0 and standard deviation 1 over the rollout batch")
    max_approx_kl: float | None = setting(None, "ends an iteration's epochs once old against new policy exceeds this", gt=0)
    kl: KLConfig = setting(KLConfig(), "the penalty on leaving the SFT policy")
    temperature: float = setting(1.0, "of sampling; the log-probabilities of policy and reference use the same", gt=0)
    max_new_tokens: int = setting(64, "length limit of a response", ge=1)
    stop: list[str] = setting([], "texts that end a response, beside the tokenizer's and the model's own end tokens")
    truncate_after: int = setting(0, "end tokens before this position of the response do not end it", ge=0)
    rewards: list[RewardTerm] = setting(
        [RewardTerm()], "the terms of the score; empty only where Python gives the reward function"
    )
    score_clip: float | None = setting(None, "scores are clipped to plus or minus this", gt=0)
    missing_eos_penalty: float | None = setting(1.0, "subtracted from the score of a response that no end token ended", ge=0)
    missing_eos_score: float | None = setting(None, "instead: the score of such a response")
    policy: Path | None = setting(None, "a policy to start from, where it is not the SFT model (a second round)")
    value_model: Path | None = setting(
        None, "a value model to start from; empty: the reward model, or the SFT trunk with a zero head"
    )
    evaluate_every: int = setting(
        0, "iterations between evaluations on held-out prompts, with one after the last; 0: none while training", ge=0
    )
    best_kl_budget: float | None = setting(
        None, "ppo/best is the evaluated policy with the judge's highest score among those within this KL, nats a response", gt=0
    )
    interpolation: float = setting(
        1.0,
        "the policy that is evaluated and saved is this share of the way from the one that PPO began with to the one it has trained, "
        "weight by weight (Ramé 2024): 0.7 has less KL at the same score, and takes longer to get there",
        gt=0,
        le=1,
    )
    save_rollouts_every: int = setting(10, "iterations between rollouts written to rollouts.jsonl; 0: never", ge=0)

    @property
    def minibatch(self) -> int:
        """Responses per optimizer step."""
        return self.minibatch_size or self.rollout_batch_size

    def policy_learns(self, iteration: int) -> bool:
        """Whether the policy learns in this iteration, counted from 0; the value model always does."""
        return iteration >= self.value_warmup_iterations

    @model_validator(mode="after")
    def _fits(self) -> PPOConfig:
        if self.rewards and not any(term.weight for term in self.rewards):
            raise ValueError("rewards have no weight but 0, so every score would be the same: give one of them a weight")
        if "" in self.stop:
            raise ValueError("stop has an empty text, which would end nothing: leave it out")
        if self.rollout_batch_size % self.minibatch:
            divisors = [d for d in range(1, self.rollout_batch_size + 1) if self.rollout_batch_size % d == 0]
            nearest = min(divisors, key=lambda d: abs(d - self.minibatch))
            raise ValueError(
                f"minibatch_size ({self.minibatch}) must divide rollout_batch_size ({self.rollout_batch_size}): try {nearest}"
            )
        if self.missing_eos_penalty is not None and self.missing_eos_score is not None:
            raise ValueError(
                "missing_eos_penalty and missing_eos_score are both set: to replace the score, set missing_eos_penalty: null"
            )
        least = self.rollout_batch_size // 5 + 1  # a horizon of a fifth could turn the coefficient to 0 in one iteration
        if self.kl.controller == "adaptive" and self.kl.horizon < least:
            raise ValueError(
                f"kl.horizon ({self.kl.horizon}) must exceed a fifth of rollout_batch_size ({self.rollout_batch_size}), or one iteration "
                f"could bring kl.coef to 0: try {max(10_000, 10 * self.rollout_batch_size)}"
            )
        if self.truncate_after >= self.max_new_tokens:
            raise ValueError(
                f"truncate_after ({self.truncate_after}) must be below max_new_tokens ({self.max_new_tokens}), or no response can end"
            )
        if self.best_kl_budget is not None and self.evaluate_every == 0:
            raise ValueError(
                "best_kl_budget is set but evaluate_every is 0: the best policy is chosen among those that are evaluated while training, "
                f"try evaluate_every: {max(1, self.iterations // 10)}"
            )
        if self.value_warmup_iterations >= self.iterations:
            raise ValueError(
                f"value_warmup_iterations ({self.value_warmup_iterations}) must be below iterations ({self.iterations}), "
                f"or the policy never learns: try {self.iterations // 10}"
            )
        return self
