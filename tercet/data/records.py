"""Files to typed records; every wrong record is named by file, row and field, with what was expected and a right one.

What is refused and what is dropped. A row that breaks the form, or that its author wrote field by field and got wrong (missing,
null or mistyped field, empty response, chosen == rejected, ...), raises TercetError: it is a mistake that the author can and
should see. Whole transcripts (chosen/rejected without a prompt, as in Anthropic's HH data) come from logs, and it is we who cut
them: there a pair that turns out to hold no usable comparison (same text, nothing after the last turn, different conversations)
is dropped and counted by reason in `Records.dropped`. If nothing is left, that too is an error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tercet.data.files import Row, fingerprint, read_rows, show
from tercet.types import Comparison, Demonstration, Message, Prompt, TercetError, Text

__all__ = [
    "Records",
    "fingerprint",
    "held_out",
    "judge_split",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "split",
]

R = TypeVar("R")
AnyRecord = TypeVar("AnyRecord", Demonstration, Comparison, Prompt)
ROLES = ("system", "user", "assistant")
_LARGEST_MARGIN = 100  # in log-odds: beyond it nothing but the margin would be learned
TURN = re.compile(r"\n\n(?:Human|Assistant):")
ASSISTANT_TURN = re.compile(r"\n\nAssistant:")

# Form -> (the fields it takes, a right record). The first form whose fields are all there is the row's form.
Forms = dict[str, tuple[tuple[str, ...], str]]
SFT_FORMS: Forms = {
    "prompt, response": (("prompt", "response"), '{"prompt": "What is rain?", "response": "Water that falls from clouds."}'),
    "messages": (
        ("messages",),
        '{"messages": [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water from clouds."}]}',
    ),
    "text": (("text",), '{"text": "Rain is water that falls from clouds."}'),
}
COMPARISON_FORMS: Forms = {
    "prompt, chosen, rejected": (
        ("prompt", "chosen", "rejected"),
        '{"prompt": "What is rain?", "chosen": "Water that falls from clouds.", "rejected": "Rain is rain."}',
    ),
    "prompt, responses, ranks": (
        ("prompt", "responses", "ranks"),
        '{"prompt": "What is rain?", "responses": ["Water from clouds.", "Rain is rain.", "No."], "ranks": [1, 2, 2]}',
    ),
    "chosen, rejected": (
        ("chosen", "rejected"),
        r'{"chosen": "\n\nHuman: What is rain?\n\nAssistant: Water.", "rejected": "\n\nHuman: What is rain?\n\nAssistant: No."}',
    ),
}
PROMPT_FORMS: Forms = {
    "prompt": (("prompt",), '{"prompt": "What is rain?"}'),
    "messages": (("messages",), '{"messages": [{"role": "user", "content": "What is rain?"}]}'),
}


class Records(list[R]):
    """The records of a source, in order; `dropped` counts the unusable ones by reason (see the module's docstring)."""

    def __init__(self, items: Iterable[R] = (), dropped: Mapping[str, int] | None = None) -> None:
        super().__init__(items)
        self.dropped: dict[str, int] = dict(dropped or {})


class _Useless(Exception):
    """A well-formed transcript pair that holds no comparison; the message is the reason it is counted under."""


def read_demonstrations(source: str | os.PathLike[str], split: str = "train") -> Records[Demonstration]:
    """Stage 1. Forms: prompt, response | messages (the last turn is the assistant's: the response) | text (prompt "").

    `source`: a .jsonl, .json, .csv (each also .gz) or .parquet file, a folder of them, or a hub data set's name, whose `split`
    is read. `prompt` is a text or a message list that ends with a user turn. Raises TercetError.
    """
    return _read(source, split, SFT_FORMS, _demonstration)


def read_comparisons(source: str | os.PathLike[str], split: str = "train") -> Records[Comparison]:
    """Stage 2. Forms: prompt, chosen, rejected | prompt, responses, ranks (smaller is better, equal is a tie) | chosen, rejected
    as whole transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ...") or message lists: their common turns are the prompt.

    `margin` (0 to 100) is optional; all other fields go to Comparison.fields. Sources and errors as in read_demonstrations.
    """
    return _read(source, split, COMPARISON_FORMS, _comparison)


def read_prompts(source: str | os.PathLike[str], split: str = "train") -> Records[Prompt]:
    """Stage 3. Forms: prompt | messages (must end with a user turn); all other fields go to Prompt.fields.

    Sources and errors as in read_demonstrations.
    """
    return _read(source, split, PROMPT_FORMS, _prompt_record)


def _read(source: str | os.PathLike[str], split: str, forms: Forms, parse: Callable[[Row, str], R]) -> Records[R]:
    items: list[R] = []
    dropped: Counter[str] = Counter()
    first_form: dict[str, str] = {}
    example = next(iter(forms.values()))[1]
    for row in read_rows(source, split, example):
        form = _form(row, forms)
        row = Row(row.file, row.number, row.values, forms[form][1])
        expected = first_form.setdefault(row.file, form)
        if form != expected:
            row.refuse(
                f"a record with {form} in a file that began with {expected}", "one form in a file: split it", forms[expected][1]
            )
        try:
            items.append(parse(row, form))
        except _Useless as reason:
            dropped[str(reason)] += 1
    if not items and dropped:
        counts = ", ".join(f"{count} because {reason}" for reason, count in dropped.items())
        raise TercetError(f"{source}: no usable record: {counts}. A right record: {example}")
    if not items:
        raise TercetError(f"{source}: empty, no records; expected at least one. A right record: {example}")
    return Records(items, dropped)


def _form(row: Row, forms: Forms) -> str:
    """The first form whose fields are all there; otherwise refuse, naming what the nearest form lacks."""
    have = row.values.keys()
    for form, (names, _) in forms.items():
        stray = form == "text" and "prompt" in have  # a prompt beside a text would be lost without a word
        if have >= set(names) and not stray:
            return form
    nearest = max(forms, key=lambda form: len(have & set(forms[form][0])))
    lacks = next((name for name in forms[nearest][0] if name not in have), "response")
    found = ", ".join(show(name) for name in list(have)[:8]) or "none"
    row.refuse(f"field '{lacks}' is missing (fields found: {found})", " | ".join(forms), forms[nearest][1])


def _demonstration(row: Row, form: str) -> Demonstration:
    if form == "text":
        return Demonstration("", _text(row, "text", row.values["text"]), row.origin)
    if form == "messages":
        messages = _messages(row, "messages", row.values["messages"])
        if messages[-1].role != "assistant":
            row.refuse(
                f"field 'messages' ends with a {messages[-1].role} turn", "an assistant turn at the end, the response to learn"
            )
        response = _text(row, f"messages[{len(messages) - 1}].content", messages[-1].content)
        return Demonstration(_ends_with_user(row, "messages (without its last turn)", messages[:-1]), response, row.origin)
    return Demonstration(_prompt(row), _text(row, "response", row.values["response"]), row.origin)


def _prompt_record(row: Row, form: str) -> Prompt:
    if form == "messages":
        prompt: Text = _ends_with_user(row, "messages", _messages(row, "messages", row.values["messages"]))
    else:
        prompt = _prompt(row)
    return Prompt(prompt, _others(row, (form,)), row.origin)


def _comparison(row: Row, form: str) -> Comparison:
    if form == "prompt, responses, ranks":
        responses, ranks = _ranked(row)
        prompt = _prompt(row)
    else:
        chosen, rejected = row.values["chosen"], row.values["rejected"]
        if isinstance(chosen, list) and isinstance(rejected, list):
            prompt, *pair = _message_pair(row, form)
        elif form == "chosen, rejected":
            prompt, *pair = _transcript_pair(row, _text(row, "chosen", chosen), _text(row, "rejected", rejected))
        else:
            prompt, *pair = _prompt(row), _text(row, "chosen", chosen), _text(row, "rejected", rejected)
            if pair[0] == pair[1]:
                way_out = "two different texts: drop the record (nothing can be learned from it)"
                row.refuse(f"fields 'chosen' and 'rejected' are the same text {show(chosen)}", way_out)
        responses, ranks = (pair[0], pair[1]), (0.0, 1.0)
    margin = _number(row, "margin", row.values.get("margin", 0.0))
    if not 0 <= margin <= _LARGEST_MARGIN:
        row.refuse(
            f"field 'margin' is {margin:g}", f"a number >= 0 and <= {_LARGEST_MARGIN}: how much better the chosen response is"
        )
    used = (*COMPARISON_FORMS[form][0], "margin")
    return Comparison(prompt, responses, ranks, margin, _others(row, used), row.origin)


def _ranked(row: Row) -> tuple[tuple[str, ...], tuple[float, ...]]:
    texts, ranks = row.values["responses"], row.values["ranks"]
    for name, value in (("responses", texts), ("ranks", ranks)):
        if not isinstance(value, list):
            row.refuse(f"field '{name}' is {show(value)}", "a list, one entry for each response")
    if len(texts) < 2:
        row.refuse(f"field 'responses' has {len(texts)} entries", "at least 2 responses to rank")
    if len(ranks) != len(texts):
        row.refuse(
            f"field 'ranks' has {len(ranks)} entries for {len(texts)} responses", "one rank for each response, smaller is better"
        )
    responses = tuple(_text(row, f"responses[{i}]", text) for i, text in enumerate(texts))
    if len(set(responses)) < len(responses):
        twice = next(text for text in responses if responses.count(text) > 1)
        row.refuse(f"field 'responses' holds {show(twice)} twice", "different responses: drop the repeated one and its rank")
    return responses, tuple(_number(row, f"ranks[{i}]", rank) for i, rank in enumerate(ranks))


def _transcript_pair(row: Row, chosen: str, rejected: str) -> tuple[Text, str, str]:
    """Two HH transcripts: the prompt is what they share up to the last "\\n\\nAssistant:" that both have, itself included."""
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not ASSISTANT_TURN.search(text):
            expected = r"a field 'prompt' beside them, or whole transcripts: \n\nHuman: ...\n\nAssistant: ..."
            row.refuse(f"field '{name}' is {show(text)}, which has no assistant turn", expected)
    if chosen == rejected:
        raise _Useless("chosen and rejected are the same text")
    ends = [turn.end() for turn in ASSISTANT_TURN.finditer(chosen) if rejected.startswith(chosen[: turn.end()])]
    if not ends:
        raise _Useless("the two transcripts do not begin with the same turns")
    prompt, responses = chosen[: ends[-1]], (chosen[ends[-1] :], rejected[ends[-1] :])
    if any(TURN.search(response) for response in responses):
        raise _Useless("a response holds another turn (the transcripts part before the last one)")
    if not all(response.strip() for response in responses):
        raise _Useless("a transcript ends without a response")
    return prompt, *responses


def _message_pair(row: Row, form: str) -> tuple[Text, str, str]:
    """Two message lists that share all turns but the last; a `prompt` beside them is their beginning, or one shared turn."""
    chosen, rejected = _messages(row, "chosen", row.values["chosen"]), _messages(row, "rejected", row.values["rejected"])
    prompt = _prompt(row) if form != "chosen, rejected" else None
    if isinstance(prompt, tuple) and chosen[: len(prompt)] != prompt:
        chosen, rejected = prompt + chosen, prompt + rejected
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1].role != "assistant":
            row.refuse(f"field '{name}' ends with a {messages[-1].role} turn", "an assistant turn at the end")
        _text(row, f"{name}[last].content", messages[-1].content)
    shared = chosen[:-1]
    if rejected[:-1] != shared:
        row.refuse(
            "fields 'chosen' and 'rejected' differ before their last turn",
            "the same turns, then one different assistant turn each",
        )
    if chosen == rejected:
        row.refuse("fields 'chosen' and 'rejected' are the same conversation", "two different last turns: drop the record")
    if isinstance(prompt, str) and prompt not in [message.content for message in shared]:
        row.refuse(
            "field 'prompt' is none of the turns that 'chosen' and 'rejected' share",
            "the same prompt in both, or no field 'prompt'",
        )
    return _ends_with_user(row, "chosen (without its last turn)", shared), chosen[-1].content, rejected[-1].content


def _prompt(row: Row) -> Text:
    value = row.values["prompt"]
    if isinstance(value, list):
        return _ends_with_user(row, "prompt", _messages(row, "prompt", value))
    return _text(row, "prompt", value, "a text that is not empty, or a list of messages")


def _ends_with_user(row: Row, name: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    last = messages[-1].role if messages else "missing"
    if last != "user":
        row.refuse(f"field '{name}': the last turn is {last}", "a conversation that ends with a user turn")
    _text(row, f"{name}[{len(messages) - 1}].content", messages[-1].content)
    return messages


def _messages(row: Row, name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        row.refuse(f"field '{name}' is {show(value)}", "a list of messages, each with role and content")
    messages = []
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            row.refuse(f"field '{name}[{i}]' is {show(item)}", 'a message such as {"role": "user", "content": "What is rain?"}')
        if item.get("role") not in ROLES:
            row.refuse(f"field '{name}[{i}].role' is {show(item.get('role'))}", "one of " + ", ".join(ROLES))
        content = item.get("content")
        if not isinstance(content, str) or "\0" in content:
            row.refuse(f"field '{name}[{i}].content' is {show(content)}", "a text")
        messages.append(Message(item["role"], content))
    return tuple(messages)


def _text(row: Row, name: str, value: Any, expected: str = "a text that is not empty") -> str:
    if not isinstance(value, str):
        row.refuse(f"field '{name}' is {show(value)}", expected)
    if not value.strip():
        row.refuse(f"field '{name}' is {show(value)}, empty or only whitespace", f"{expected}: complete or drop the record")
    if "\0" in value:
        row.refuse(
            f"field '{name}' holds a NUL character ({show(value)})", "a text without control codes: clean or drop the record"
        )
    return value


def _number(row: Row, name: str, value: Any) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float's range
        pass
    row.refuse(f"field '{name}' is {show(value)}", "a finite number")


def _others(row: Row, used: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in row.values.items() if name not in used}


def held_out(prompt: Text, salt: str = "") -> float:
    """A number in [0, 1) that depends on the prompt's text alone: the same in every file, process and version.

    Whitespace around a text does not count; a conversation of one user turn counts as that turn's text.
    """
    if isinstance(prompt, tuple):
        if [message.role for message in prompt] == ["user"]:
            prompt = prompt[0].content
        else:
            prompt = json.dumps([[message.role, message.content] for message in prompt], ensure_ascii=False)
    digest = hashlib.sha256(f"{salt}\n{prompt.strip()}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # 48 bits: exact in a float, so never rounded up to 1


def split(records: Sequence[AnyRecord], fraction: float = 0.1, minimum: int = 20) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """(train, held out), by the prompt's hash: one prompt is on the same side in all three files (a text record: by its text).

    Nothing is held out below `minimum` records, nor where that would leave nothing to train on.
    """
    return _by_hash(records, fraction, minimum, "")


def sides(
    read: Callable[[str], Records[AnyRecord]], source: str, held_out: str | None, fraction: float
) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """(train, held out): of two files, or of one that `split` divides."""
    records = read(source)
    return (list(records), list(read(held_out))) if held_out else split(records, fraction)


def judge_split(
    comparisons: Sequence[Comparison], fraction: float = 0.2, minimum: int = 500
) -> tuple[list[Comparison], list[Comparison]]:
    """(for the reward model, for the judge that scores it), by prompt, independent of `split`; no judge below `minimum`."""
    return _by_hash(comparisons, fraction, minimum, "judge")


def _by_hash(records: Sequence[AnyRecord], fraction: float, minimum: int, salt: str) -> tuple[list[AnyRecord], list[AnyRecord]]:
    sides: tuple[list[AnyRecord], list[AnyRecord]] = ([], [])
    for record in records:
        key = record.response if isinstance(record, Demonstration) and record.prompt == "" else record.prompt
        sides[held_out(key, salt) < fraction].append(record)
    return sides if len(records) >= minimum and sides[0] else (list(records), [])
