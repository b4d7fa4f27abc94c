"""Scores from models: the reward model of stage 2, and sequence classifiers from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tercet.data.batches import microbatches
from tercet.data.template import seam
from tercet.models.roles import ScoreModel
from tercet.scoring.base import Texts, check_finite
from tercet.types import Message, Sequences, TercetError, Text


@torch.no_grad()
def scores_of(model: ScoreModel, sequences: Sequences, max_tokens: int) -> Tensor:
    """The scores (B,) of whole texts, in micro-batches, in the precision of the model's head and where the texts are."""
    scores = torch.zeros(len(sequences), dtype=model.head.weight.dtype, device=sequences.input_ids.device)
    for rows in microbatches(sequences.lengths.tolist(), max_tokens):
        scores[rows] = model(sequences.select(rows))
    return scores


class RewardModelScorer:
    """The reward model of stage 2: reads the very token ids that were sampled, never re-tokenised text."""

    def __init__(self, reward_model: ScoreModel, max_tokens: int):
        self.reward_model = reward_model
        self._max_tokens = max_tokens

    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        return check_finite(scores_of(self.reward_model, sequences, self._max_tokens), texts, "the reward model")


class ClassifierScorer:
    """Any sequence-classification checkpoint with a tokenizer of its own, encoders included: sees text, not our ids.

    With several labels the logit of `label` (an id or a name) is the score. A conversation goes through the tokenizer's own chat
    template, and so does plain text where the policy reads it through one (`chat`); otherwise it is joined as it was for the policy. Of a
    text beyond the model's positions the beginning is cut off, because the response is what is scored. A reward model of Tercet's
    (`score_offset` in config.json) reads the end token of a response that has one, and its offset is added.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: int | str | None,
        name: str,
        chat: bool = False,
        batch_size: int = 32,
    ):
        self._model: Any = model.requires_grad_(False).eval()
        self._tokenizer = tokenizer
        self._name = name
        self._batch_size = batch_size
        self._label = _label_index(model, label, name)
        if tokenizer.pad_token_id is None:
            self._batch_size = 1  # without a pad token a decoder's head finds the last token of a single text only
        else:
            model.config.pad_token_id = tokenizer.pad_token_id
        self._chat = chat and tokenizer.chat_template is not None
        self._offset = float(getattr(model.config, "score_offset", 0.0))
        self._end = tokenizer.eos_token_id if hasattr(model.config, "score_offset") else None
        tokenizer.truncation_side = "left"
        longest = min(tokenizer.model_max_length, _positions(model))
        self._max_length = longest if longest < 10**9 else None

    @torch.no_grad()
    def score(self, sequences: Sequences, texts: Texts) -> Tensor:
        finished = sequences.finished.tolist()
        encoded = [self._encode(*row) for row in zip(texts.prompts, texts.responses, finished, strict=True)]
        scores = [torch.zeros(0, device=self._model.device)]
        for start in range(0, len(encoded), self._batch_size):
            chunk = encoded[start : start + self._batch_size]
            # On the right: pads on the left would shift the positions of a decoder that counts from the start.
            batch = self._tokenizer.pad(chunk, padding=len(chunk) > 1, padding_side="right", return_tensors="pt")
            logits = self._model(**batch.to(self._model.device)).logits
            scores.append(logits[:, self._label].float() + self._offset)
        return check_finite(torch.cat(scores), texts, self._name)

    def _encode(self, prompt: Text, response: str, finished: bool) -> Any:
        if self._chat and isinstance(prompt, str):
            prompt = (Message("user", prompt),)
        plain = isinstance(prompt, str)
        ended = plain and finished and self._end is not None
        # A chat template writes its own special tokens; the tokenizer would put a second BOS before them.
        encoded = self._tokenizer(
            self._text(prompt, response),
            add_special_tokens=plain,
            truncation=self._max_length is not None,
            max_length=None if self._max_length is None else self._max_length - ended,
        )
        if ended:
            for name, value in (("input_ids", self._end), ("attention_mask", 1), ("token_type_ids", 0)):
                if name in encoded:
                    encoded[name].append(value)
        return encoded

    def _text(self, prompt: Text, response: str) -> str:
        if isinstance(prompt, str):
            return prompt + seam(prompt, response) + response
        if self._tokenizer.chat_template is None:
            raise TercetError(
                f"{self._name}: the prompts are conversations but its tokenizer has no chat template to write them with"
            )
        turns = [*(dict(vars(turn)) for turn in prompt), {"role": "assistant", "content": response}]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False))


def _positions(model: PreTrainedModel) -> int:
    """Tokens that a text may have. RoBERTa and its like count positions from one beyond the pad's id: 512 of their 514 are left."""
    found: int = getattr(model.config, "max_position_embeddings", None) or 10**9
    pads = (
        part.padding_idx
        for name, part in model.named_modules()
        if name.endswith("position_embeddings") and hasattr(part, "padding_idx")
    )
    return found - max((int(pad) + 1 for pad in pads if pad is not None), default=0)


def _label_index(model: PreTrainedModel, label: int | str | None, name: str) -> int:
    names = {int(key): value for key, value in (model.config.id2label or {}).items()}
    count = len(names)
    if label is None and count == 1:
        return 0
    listed = ", ".join(f"{index} ({names.get(index, '?')})" for index in range(count))
    if label is None:
        raise TercetError(f"{name} has {count} labels: say which one's logit is the score with label:, one of {listed}")
    matches = [index for index in range(count) if label in (index, names.get(index), str(index))]
    if not matches:
        raise TercetError(f"{name} has no label {label!r}: it has {listed}")
    return matches[0]
