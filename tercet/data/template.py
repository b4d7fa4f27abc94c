"""Record to token ids: THE place that decides where the prompt ends and the response begins.

Prompt and response are tokenised apart and their ids concatenated. Measuring a prompt inside the tokenised whole shifts the
boundary wherever a merge crosses it (docs/conformance.md, traps of other trainers, row 23), and in PPO the response comes as
ids that follow the prompt's own ids: the three stages must see the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tercet.data.batches import TokenStore, in_parts
from tercet.types import Message, TercetError, Text, TokenRow

AT_ONCE = 1_000  # texts that a tokenizer is given together: what else it returns of them does not fill the memory
_IDS_ALONE = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}


class PromptIds(NamedTuple):
    """Token ids of a prompt; `was_cut`: its beginning did not fit."""

    ids: list[int]
    was_cut: bool


class Encoded(NamedTuple):
    """One tokenised text; `truncated`: its end did not fit, so no EOS; `prompt_cut`: the prompt's beginning did not fit."""

    row: TokenRow
    truncated: bool
    prompt_cut: bool


def seam(prompt: str, response: str, separator: str = " ") -> str:
    """What belongs between two plain texts: `separator`, only where neither side has whitespace at the seam."""
    if not prompt or not response or prompt[-1].isspace() or response[0].isspace():
        return ""
    return separator


def require_response(row: TokenRow, stage: str, max_length: int, origin: str) -> None:
    """TercetError if the prompt has left no token of the response."""
    if len(row.ids) <= row.prompt_len:
        raise TercetError(
            f"{origin}: no token of the response is left: the prompt alone has {row.prompt_len} tokens and {stage}.max_length is "
            f"{max_length}; raise it, lower data.max_prompt_length, or remove the record"
        )


def tokenise(template: Template, texts: Sequence[tuple[Text, str, str]], stage: str, max_length: int) -> tuple[TokenStore, int]:
    """The token rows of (prompt, response, origin), and how many of them lost their end; `stage` is the section that says max_length.

    Raises as Template.encode and require_response.
    """
    cut = 0

    def rows() -> Iterator[TokenRow]:
        nonlocal cut
        for (_, _, origin), encoded in zip(texts, template.encode_all(texts, max_length=max_length)):
            require_response(encoded.row, stage, max_length, origin)
            cut += encoded.truncated
            yield encoded.row

    return TokenStore.build(rows()), cut


def response_text(ids: Iterable[int], tokenizer: Any) -> str:
    """The text of sampled ids, without special tokens; ids that have no token (padded embedding rows) give no text."""
    known = [int(i) for i in ids if _has_token(int(i), tokenizer)]
    return str(tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _has_token(token_id: int, tokenizer: Any) -> bool:
    try:
        return token_id >= 0 and tokenizer.convert_ids_to_tokens(token_id) is not None
    except (IndexError, KeyError, OverflowError):  # tokenizers differ in how they say no
        return False


class Template:
    """Turns prompts and responses into ids for one tokenizer.

    kind "plain": texts as they stand, BOS once at the start if the tokenizer adds one. kind "chat": the tokenizer's chat
    template, whose text carries its own BOS; a prompt that is a plain text is one user turn. A text record (prompt "") is plain
    under both. max_prompt_length: tokens, BOS included; of a longer prompt the last ones are kept. separator: see `seam`, plain
    only. stop_ids: ids that end a response besides the tokenizer's EOS (chat models list several in their generation config).

    Raises TercetError if the tokenizer has no EOS, or no chat template for kind "chat".
    """

    _prefixes_space = True  # until a look at the tokenizer says otherwise

    def __init__(
        self,
        tokenizer: Any,
        kind: str = "plain",
        max_prompt_length: int | None = None,
        separator: str = " ",
        stop_ids: Collection[int] = (),
    ) -> None:
        if kind not in ("plain", "chat"):
            raise ValueError(f"kind must be 'plain' or 'chat', not {kind!r}")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be at least 1, not {max_prompt_length}")
        name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        if tokenizer.eos_token_id is None:
            raise TercetError(
                f"{name}: the tokenizer has no end-of-sequence token, so no response could end; set one that the model knows "
                "(tokenizer.eos_token = ...), save the tokenizer beside the model and use that folder"
            )
        if kind == "chat" and not getattr(tokenizer, "chat_template", None):
            raise TercetError(
                f"{name}: the tokenizer has no chat template; use the template 'plain', or a model whose tokenizer has one "
                "(instruction-tuned models do)"
            )
        self.tokenizer, self.kind, self.name = tokenizer, kind, name
        self.max_prompt_length, self.separator = max_prompt_length, separator
        self.eos_id = int(tokenizer.eos_token_id)
        self.stop_ids = frozenset({self.eos_id, *map(int, stop_ids)})
        # Decided by what the tokenizer does, not by what it declares: GPT-2 has a BOS and adds none; some add EOS as well.
        bos_id = tokenizer.bos_token_id
        self.bos_id = bos_id if list(tokenizer("a").input_ids)[:1] == [bos_id] else None
        # SentencePiece-like tokenizers put a space before every text that they get, also before one that continues another.
        self._prefixes_space = self._continued(["a"]) != self._ids(["a"])

    def prompt_ids(self, prompt: Text, origin: str = "") -> PromptIds:
        """The ids that a response continues. `origin` ("file:row") goes into error messages.

        Raises TercetError for a conversation under "plain" and for a conversation that the chat template refuses.
        """
        return next(self.prompt_ids_all([(prompt, origin)]))

    def prompt_ids_all(self, prompts: Iterable[tuple[Text, str]]) -> Iterator[PromptIds]:
        """The same for many (prompt, origin), in order: many times faster, as the tokenizer works on a thousand at once on all cores."""
        for some in in_parts(prompts, AT_ONCE):
            yield from self._prompts([self._prompt_text(prompt, origin) for prompt, origin in some])

    def encode(self, prompt: Text, response: str, *, max_length: int | None = None, origin: str = "") -> Encoded:
        """prompt ids + response ids + EOS, cut to `max_length` tokens; a cut text has no EOS and finished False.

        A response that ends by a stop token already gets no second one, and whitespace that a chat template writes after it is
        dropped. A text record (prompt "") counts its first token, BOS or not, as the prompt. Where the prompt alone fills
        max_length, no response token is left (prompt_len == len(ids)). Raises as prompt_ids, and if the chat template does not
        begin the whole conversation with the prompt's own text.
        """
        return next(self.encode_all([(prompt, response, origin)], max_length=max_length))

    def encode_all(self, texts: Iterable[tuple[Text, str, str]], *, max_length: int | None = None) -> Iterator[Encoded]:
        """The same for many (prompt, response, origin), in order: many times faster, see prompt_ids_all."""
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        for some in in_parts(texts, AT_ONCE):
            asked = [self._prompt_text(prompt, origin) for prompt, _, origin in some]
            responses = [self._response_text(*one, before) for one, (before, _) in zip(some, asked)]
            first = iter(self._ids([text for text, continues in responses if not continues]))
            later = iter(self._continued([text for text, continues in responses if continues]))
            for (prompt_ids, prompt_cut), (_, continues) in zip(self._prompts(asked), responses):
                ids = prompt_ids + self._end(next(later if continues else first))
                truncated = max_length is not None and len(ids) > max_length
                ids = ids[:max_length] if truncated else ids
                prompt_len = min(max(1, len(prompt_ids)), len(ids))
                yield Encoded(TokenRow(tuple(ids), prompt_len, not truncated), truncated, prompt_cut)

    def _prompt_text(self, prompt: Text, origin: str) -> tuple[str, bool]:
        """What stands before a response, and whether BOS is ours to add: a chat template's text has its own."""
        if self.kind == "chat" and prompt != "":
            return self._render(_turns(prompt), origin, add_generation_prompt=True), False
        if not isinstance(prompt, str):
            where = f"{origin}: " if origin else ""
            raise TercetError(
                f"{where}the prompt is a conversation, which the template 'plain' cannot write; set the template to 'chat'"
            )
        return prompt, True

    def _prompts(self, texts: Sequence[tuple[str, bool]]) -> list[PromptIds]:
        """Ids of what _prompt_text gives."""
        distinct = list(dict.fromkeys(text for text, _ in texts))
        found = dict(zip(distinct, self._ids(distinct)))
        return [self._fit(self._begun(found[text]) if begins else found[text]) for text, begins in texts]

    def _response_text(self, prompt: Text, response: str, origin: str, before: str) -> tuple[str, bool]:
        """A response as it stands after its prompt's text `before`, and whether there is a prompt that it continues."""
        if prompt == "":
            return response, False
        if self.kind == "plain":
            return seam(str(prompt), response, self.separator) + response, True
        turns = [*_turns(prompt), {"role": "assistant", "content": response}]
        whole = self._render(turns, origin, add_generation_prompt=False)
        if not whole.startswith(before):
            where = f"{origin}: " if origin else ""
            raise TercetError(
                f"{where}the chat template of {self.name} writes a finished conversation that does not begin with its own prompt "
                f"(which ends in {before[-40:]!r}), so the response's beginning is unknown; use the template 'plain' or correct "
                "the chat template"
            )
        return whole[len(before) :], True

    def _begun(self, ids: list[int]) -> list[int]:
        """With the BOS that the tokenizer would put at the start, once."""
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _end(self, response_ids: list[int]) -> list[int]:
        """Exactly one end: nothing but whitespace after the last stop token is dropped; without one there, EOS is appended."""
        stops = [i for i, token in enumerate(response_ids) if token in self.stop_ids]
        if stops and not str(self.tokenizer.decode(response_ids[stops[-1] + 1 :])).strip():
            first = stops[-1]
            while first - 1 in stops:  # "...</s></s>": the text came with an end of its own, and the template added one
                first -= 1
            return response_ids[: first + 1]
        return [*response_ids, self.eos_id]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return list(self.tokenizer(list(texts), **_IDS_ALONE).input_ids) if texts else []

    def _continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue another one.

        Tokenizers that put a space before every text are asked for it after a newline, whose own ids are taken off; for all others a
        text alone gives the same ids.
        """
        alone = self._ids(texts)
        if not self._prefixes_space:
            return alone
        (anchor,), both = self._ids(["\n"]), self._ids(["\n" + text for text in texts])
        follows = [bool(anchor) and ids[: len(anchor)] == anchor for ids in both]
        return [ids[len(anchor) :] if known else own for known, ids, own in zip(follows, both, alone)]

    def _fit(self, ids: list[int]) -> PromptIds:
        """The last max_prompt_length tokens, a BOS at the start kept."""
        limit = self.max_prompt_length
        if limit is None or len(ids) <= limit:
            return PromptIds(ids, False)
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return PromptIds(head + ids[len(ids) - (limit - len(head)) :], True)

    def _render(self, turns: list[dict[str, str]], origin: str, *, add_generation_prompt: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False))
        except Exception as error:  # templates are programs: they refuse roles, orders, a missing jinja2, each in its own way
            where = f"{origin}: " if origin else ""
            roles = ", ".join(turn["role"] for turn in turns)
            raise TercetError(
                f"{where}the chat template of {self.name} refuses a conversation with the turns {roles} ({error}); "
                "write the turns as this template wants them, or use the template 'plain' with text prompts"
            ) from error


def _turns(prompt: Text) -> list[dict[str, str]]:
    messages = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return [{"role": message.role, "content": message.content} for message in messages]
