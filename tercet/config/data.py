"""The user's files and how they are split."""

from __future__ import annotations

from pydantic import model_validator

from tercet.config.section import Path, Section, setting


class DataConfig(Section):
    """Each entry is a .jsonl, .jsonl.gz, .json, .parquet or .csv file, a folder of them, or a Hugging Face data set's name."""

    pretrain: Path | None = setting(None, "text to train a scratch model on before SFT: {text} or {prompt, response}")
    sft: Path | None = setting(None, "demonstrations: {prompt, response}, {messages} or {text}")
    comparisons: Path | None = setting(
        None, "{prompt, chosen, rejected}, {chosen, rejected} transcripts, or {prompt, responses, ranks}"
    )
    prompts: Path | None = setting(None, "prompts for PPO: {prompt} or {messages}; other fields go to a reward function")
    eval_sft: Path | None = setting(None, "held-out demonstrations; without it they are split off by a hash of the prompt")
    eval_comparisons: Path | None = setting(None, "held-out comparisons; likewise")
    eval_prompts: Path | None = setting(None, "held-out prompts; likewise")
    held_out: float = setting(
        0.1, "share of the prompts held out, the same ones in every file; none below 20 records", ge=0.0, le=0.5
    )
    max_prompt_length: int = setting(256, "tokens of a prompt in every stage; of a longer one the last are kept", ge=1)

    @model_validator(mode="after")
    def _nothing_held_out_alone(self) -> DataConfig:
        for name in ("sft", "comparisons", "prompts"):
            if getattr(self, f"eval_{name}") is not None and getattr(self, name) is None:
                raise ValueError(f"eval_{name} is set but {name} is empty: there would be nothing to train on; set {name}")
        return self
