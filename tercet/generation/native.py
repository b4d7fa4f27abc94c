"""The project's own decode loop over a Hugging Face model with its key-value cache."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from tercet.algo.masks import position_ids
from tercet.generation.cache import cache_for, keep_rows, room_for
from tercet.generation.sampling import inverse_cdf
from tercet.models.kernels import packed_weights
from tercet.models.packing import Packing
from tercet.models.roles import Policy
from tercet.types import Sequences, TercetError, TokenRow


class NativeGenerator:
    """Samples from softmax(logits / temperature): no top-k, no top-p, no repetition penalty, whatever the checkpoint suggests.

    A response ends with the first of `stop_ids`, or with the token that completes one of `stop_texts`, at index >=
    `truncate_after`; the ending token is kept. Rows that have ended leave the batch, of many by eights. Pads stand on the
    left in here, and nowhere else in Tercet: then a model with a sliding window sees the right distances. copies: multiply by copies of
    the weights where that is faster (models/kernels.py), which takes their memory again.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        stop_ids: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        truncate_after: int = 0,
        stop_texts: list[str] | None = None,
        decode: Callable[[list[int]], str] | None = None,
        copies: bool = True,
    ):
        self._policy = policy
        self._takes_positions = "position_ids" in inspect.signature(policy.model.forward).parameters
        self._packs_prompts = policy.sees_all and policy.transform is not None
        self.stop_ids, self.stop_texts = stop_ids, stop_texts or []
        self._stops = torch.tensor(stop_ids, dtype=torch.long, device=policy.device)
        self._decode = decode
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._truncate_after = truncate_after
        self._copies = copies
        self.version = 0

    def sync(self, version: int) -> None:
        """The policy's present weights are number `version` (it is sampled itself: there is nothing to copy)."""
        self.version = version

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], uniforms: Tensor | None) -> Sequences:
        """One response for each prompt; uniforms (B, >= max_new_tokens) float64, None for greedy decoding."""
        device, steps = self._policy.device, self._max_new_tokens
        if not all(prompts):
            raise ValueError("a prompt without a token: there is nothing to predict the response from")
        inputs, prompt_mask = _left_padded(prompts, device)
        positions, width = position_ids(prompt_mask), inputs.shape[1]
        mask = self._mask_of_steps(prompt_mask)
        cache = cache_for(self._policy.model, width + steps, prompt_mask if self._packs_prompts else None)
        uniforms = None if uniforms is None else uniforms.to("cpu" if device.type == "mps" else device)  # MPS has no float64
        # The rows' places in the batch; what rows draw that have ended and not left yet goes to a place behind it.
        rows, nowhere = torch.arange(len(prompts), device=device), len(prompts)
        responses = torch.zeros(len(prompts) + 1, steps, dtype=torch.long, device=device)
        wide = torch.float64 if self._policy.compute_dtype is torch.float64 else torch.float32
        logprobs = torch.zeros(len(prompts) + 1, steps, dtype=wide, device=device)
        lengths = torch.zeros(len(prompts) + 1, dtype=torch.long, device=device)
        finished = torch.zeros(len(prompts) + 1, dtype=torch.bool, device=device)
        # A cap, and what a model makes of its logits itself, see more of the products than their differences.
        transform = self._policy.transform
        head = self._policy.head if transform is not None and transform.cap is None else None
        # Inference mode, whose tensors keep no versions for autograd, takes a tenth off a tiny model's step.
        policy = self._policy
        copies = (
            packed_weights(policy.model, len(prompts), policy.compute_dtype, head) if self._copies else contextlib.nullcontext()
        )
        with torch.inference_mode(), copies:
            for step in range(steps if prompts else 0):  # a rank of many may have no rows
                if step == 0:
                    logits = self._first_logits(inputs, prompt_mask, positions, cache)
                else:
                    logits = self._next_logits(inputs, _seen(mask, width + step), positions, cache)
                uniform = None if uniforms is None else uniforms[rows.to(uniforms.device).clamp(max=nowhere - 1), step]
                tokens, token_logprobs = inverse_cdf(logits, uniform, self._temperature)
                responses[rows, step], logprobs[rows, step] = tokens, token_logprobs.to(wide)
                lengths.index_fill_(0, rows, step + 1)
                ended = self._ended(tokens, responses, rows, step)
                finished[rows] = ended  # (an index by a mask, or a number to write, would wait for a GPU)
                rows = rows.masked_fill(ended, nowhere)
                if bool(ended.any()):
                    kept = _close_ranks(rows == nowhere)
                    if not len(kept):
                        break
                    if len(kept) < len(rows):
                        rows, tokens, mask, positions = rows[kept], tokens[kept], mask[kept], positions[kept]
                        keep_rows(cache, kept)
                inputs = tokens[:, None]
                positions = positions[:, -1:] + 1
        responses, logprobs, lengths, finished = (found[:nowhere] for found in (responses, logprobs, lengths, finished))
        if not bool(logprobs.isfinite().all()):
            raise TercetError(
                "the policy gave numbers that are not finite while it was sampled; the last checkpoint is kept. Lower "
                "ppo.learning_rate, raise ppo.kl.coef, or set machine.dtype: float32"
            )
        return _assemble(prompts, responses, lengths, finished, logprobs, self.version)

    def _mask_of_steps(self, prompts: Tensor) -> Tensor:
        """The prompts' mask (B, W) and one for each step: (B, 1, 1, W + T) of 0 and -inf, from which a model makes nothing anew at every
        step, tokens to come at -inf; or (B, W + T) of 0 and 1 for one to which that would say too little."""
        if not self._packs_prompts:
            return F.pad(prompts.long(), (0, self._max_new_tokens), value=1)
        zeros = torch.zeros(prompts.shape, dtype=self._policy.compute_dtype, device=prompts.device)
        return F.pad(zeros.masked_fill_(~prompts, -torch.inf), (0, self._max_new_tokens), value=-torch.inf)[:, None, None]

    def _first_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) of the token after each prompt; from the prompts end to end where the model lets them stand so."""
        if not self._packs_prompts:
            return self._next_logits(inputs, mask.long(), positions, cache)
        policy, lengths = self._policy, mask.sum(1)
        packing = Packing.of(lengths, mask.shape[1])
        with policy.autocast():
            states = packing.states(policy.model.base_model, inputs[mask], past_key_values=cache, use_cache=True)
            return policy.logits(states[0, lengths.cumsum(0) - 1])

    def _next_logits(self, inputs: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Logits (B, V) of the token after the last input."""
        policy = self._policy
        extra = {"position_ids": positions} if self._takes_positions else {}
        arguments = {"input_ids": inputs, "attention_mask": mask, "past_key_values": cache, "use_cache": True, **extra}
        with policy.autocast():
            if policy.transform is None:
                return policy.model(**arguments, logits_to_keep=1).logits[:, -1]
            return policy.logits(policy.model.base_model(**arguments).last_hidden_state[:, -1])

    def _ended(self, tokens: Tensor, responses: Tensor, rows: Tensor, step: int) -> Tensor:
        if step < self._truncate_after:
            return torch.zeros_like(tokens, dtype=torch.bool)
        ended = torch.isin(tokens, self._stops)
        if self.stop_texts:
            # A text may be split into tokens in many ways, so the end of the decoded response is looked at, not ids.
            assert self._decode is not None
            longest = max(len(text.encode()) for text in self.stop_texts)
            tails = responses[rows, max(0, step + 1 - longest) : step + 1].tolist()
            before = [tail[:-1] for tail in tails]
            for place, (tail, shorter) in enumerate(zip(tails, before)):
                text, earlier = self._decode(tail), self._decode(shorter)
                if any(text.count(stop) > earlier.count(stop) for stop in self.stop_texts):
                    ended[place] = True
        return ended


def _seen(mask: Tensor, length: int) -> Tensor:
    """The part of a mask of all steps that the step asks for whose token is the `length`-th."""
    if mask.dim() == 2:
        return mask[:, :length]
    mask[..., length - 1] = 0.0
    return mask[..., : room_for(length, mask.shape[-1])]


def _close_ranks(ended: Tensor) -> Tensor:
    """The rows that stay, (n,) int64: all that go on, and of more than 8 as many others as make a multiple of 8, because for each new
    number of rows oneDNN compiles its products again. As many as fit stay where they are, and the last ones take places that are free."""
    going = (~ended).nonzero().squeeze(1)
    size = len(going) if len(going) <= 8 else min(len(ended), -(-len(going) // 8) * 8)
    kept = torch.arange(size, device=ended.device)
    late = going[going >= size]
    kept[ended[:size].nonzero().squeeze(1)[: len(late)]] = late
    return kept


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max((len(prompt) for prompt in prompts), default=1)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[row, width - len(prompt) :] = True
    return ids.to(device), mask.to(device)


def _assemble(
    prompts: list[list[int]], responses: Tensor, lengths: Tensor, finished: Tensor, logprobs: Tensor, version: int
) -> Sequences:
    """Back to the layout of everything outside: right-padded, contiguous."""
    kept = [response[:length] for response, length in zip(responses.tolist(), lengths.tolist())]
    rows = [TokenRow((*prompt, *response), len(prompt)) for prompt, response in zip(prompts, kept)]
    sequences = Sequences.from_rows(rows).to(responses.device)
    sequences.finished = finished
    sequences.sampler_logprobs = logprobs[:, : sequences.max_response]
    sequences.policy_version = version
    return sequences
