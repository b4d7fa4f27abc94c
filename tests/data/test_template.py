"""Where the prompt ends and the response begins. Expected ids are read off the hand-written vocabularies below."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tercet.data.template import Template, response_text, seam
from tercet.types import Message, TercetError, TokenRow

VOCAB = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|start|>": 3, "<|end|>": 4, "\n": 5, "user": 6, "assistant": 7}
VOCAB |= {"What": 10, " is": 11, " rain": 12, "?": 13, " Water": 14, "Water": 15, ".": 16, "system": 17, "Kind": 18, " ": 19}
CHATML = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ASK = (Message("system", "Kind"), Message("user", "What is rain?"))


def word_tokenizer(around: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """One id a word (its leading space included) or mark; `around` says what the tokenizer adds: "<s> $A" adds BOS."""
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<s>", "</s>", "<|start|>", "<|end|>"])
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    special = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, **{name: token for name, token in special.items() if token})


def chat_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding with one merge, a + b -> ab, that crosses the seam of "a" and "b"."""
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    core.add_special_tokens(["</s>"])
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space (as ▁) before every text, as SentencePiece models do."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "▁a": 4, "a": 5, "\n": 6, "▁b": 7, "b": 8}
    core = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [("a", "b", " "), ("a ", "b", ""), ("a", " b", ""), ("a\n", "b", ""), ("a", "\tb", ""), ("", "b", ""), ("a", "", "")],
)
def test_the_seam_gets_a_space_only_where_neither_side_has_whitespace(prompt: str, response: str, expected: str) -> None:
    assert seam(prompt, response) == expected


def test_plain_text_with_bos_separator_and_eos() -> None:
    encoded = Template(word_tokenizer("<s> $A")).encode("What is rain?", "Water.")
    assert encoded.row == TokenRow((1, 10, 11, 12, 13, 14, 16, 2), prompt_len=5, finished=True)
    assert not encoded.truncated and not encoded.prompt_cut


@pytest.mark.parametrize(("around", "bos"), [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])])
def test_bos_is_added_exactly_as_the_tokenizer_does_and_eos_never_to_a_prompt(around: str, bos: list[int]) -> None:
    template = Template(word_tokenizer(around))
    assert template.prompt_ids("What is rain?").ids == [*bos, 10, 11, 12, 13]
    assert list(template.encode("What", " Water").row.ids) == [*bos, 10, 14, 2]


def test_a_prompt_that_brings_its_own_bos_gets_no_second_one() -> None:
    assert Template(word_tokenizer("<s> $A")).prompt_ids("<s>What").ids == [1, 10]


def test_parts_are_tokenised_apart_where_a_merge_crosses_the_seam() -> None:
    template = Template(merging_tokenizer(), separator="")
    assert template.tokenizer("ab").input_ids == [2]  # what measuring the prompt inside the whole would see
    assert template.encode("a", "b").row == TokenRow((0, 1, 3), prompt_len=1)


@given(prompt=st.text("ab", min_size=1, max_size=8), response=st.text("ab", min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_ids_decode_to_the_text_and_begin_with_the_prompts_own(prompt: str, response: str) -> None:
    template = Template(merging_tokenizer(), separator="")
    row = template.encode(prompt, response).row
    assert list(row.ids[: row.prompt_len]) == template.prompt_ids(prompt).ids
    assert template.tokenizer.decode(row.ids[: row.prompt_len]) == prompt
    assert template.tokenizer.decode(row.ids[row.prompt_len : -1]) == response


def test_a_tokenizer_that_prefixes_a_space_puts_none_into_the_middle() -> None:
    template = Template(prefixing_tokenizer())
    assert template.encode("a", " b").row == TokenRow((1, 4, 7, 2), prompt_len=2)  # not (1, 4, ▁, ▁b, 2)
    assert template.encode("a", "b").row.ids == (1, 4, 7, 2)
    assert Template(prefixing_tokenizer(), separator="").encode("a", "b").row.ids == (1, 4, 8, 2)


def test_truncated_text_has_no_eos_and_is_not_finished() -> None:
    template = Template(word_tokenizer())
    whole = template.encode("What is", "Water.")  # 10 11 14 16 2
    assert template.encode("What is", "Water.", max_length=5) == whole
    cut = template.encode("What is", "Water.", max_length=4)  # room for the text, none for its EOS
    assert cut.row == TokenRow((10, 11, 14, 16), prompt_len=2, finished=False) and cut.truncated
    nothing_left = template.encode("What is", "Water.", max_length=1)
    assert nothing_left.row == TokenRow((10,), prompt_len=1, finished=False)


def test_eos_inside_a_prompt_stays_and_counts_as_prompt() -> None:
    row = Template(word_tokenizer()).encode("What</s>\nWhat", "Water.").row
    assert row == TokenRow((10, 2, 5, 10, 14, 16, 2), prompt_len=4)


@pytest.mark.parametrize("response", ["Water.</s>", "Water.</s>\n", "Water.</s></s>", "Water."])
def test_exactly_one_eos_whatever_the_text_ends_in(response: str) -> None:
    assert Template(word_tokenizer()).encode("What", response).row.ids == (10, 14, 16, 2)


def test_an_eos_in_the_middle_of_a_response_does_not_end_it() -> None:
    assert Template(word_tokenizer()).encode("What", "Water</s>Water").row.ids == (10, 14, 2, 15, 2)


def test_long_prompts_keep_their_end_and_their_bos() -> None:
    template = Template(word_tokenizer("<s> $A"), max_prompt_length=3)
    assert template.prompt_ids("What is rain?") == ([1, 12, 13], True)
    assert template.prompt_ids("What is") == ([1, 10, 11], False)
    encoded = template.encode("What is rain?", "Water.")
    assert encoded.row == TokenRow((1, 12, 13, 14, 16, 2), prompt_len=3) and encoded.prompt_cut and not encoded.truncated
    assert Template(word_tokenizer(), max_prompt_length=2).prompt_ids("What is rain?") == ([12, 13], True)
    assert Template(word_tokenizer("<s> $A"), max_prompt_length=1).prompt_ids("What is rain?") == ([1], True)


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_plain_text_for_language_modelling_counts_its_first_token_as_prompt(kind: str) -> None:
    assert Template(chat_tokenizer(), kind).encode("", "What is rain?").row == TokenRow((10, 11, 12, 13, 2), prompt_len=1)
    with_bos = word_tokenizer("<s> $A")
    with_bos.chat_template = CHATML
    assert Template(with_bos, kind).encode("", "What").row == TokenRow((1, 10, 2), prompt_len=1)


def test_chat_ends_at_the_turn_end_and_drops_the_newline_after_it() -> None:
    system, user, opening = (3, 17, 5, 18, 4, 5), (3, 6, 5, 10, 11, 12, 13, 4, 5), (3, 7, 5)
    template = Template(chat_tokenizer(), "chat", stop_ids=[4])
    row = template.encode(ASK, "Water.").row
    assert row == TokenRow((*system, *user, *opening, 15, 16, 4), prompt_len=18)  # no separator, no </s>, no newline
    assert template.prompt_ids(ASK).ids == [*system, *user, *opening]
    assert template.prompt_ids("What is rain?").ids == [*user, *opening]  # a plain text is one user turn


def test_chat_without_the_turn_end_among_the_stops_gets_eos() -> None:
    assert Template(chat_tokenizer(), "chat").encode("What", "Water").row.ids[-4:] == (15, 4, 5, 2)


def test_chat_template_writes_the_bos_itself() -> None:
    tokenizer = word_tokenizer("<s> $A")
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    template = Template(tokenizer, "chat", max_prompt_length=4, stop_ids=[4])
    assert template.prompt_ids("What is rain?") == ([1, 3, 7, 5], True)
    assert template.encode("What", "Water").row.ids.count(1) == 1


def test_truncated_chat_has_no_end() -> None:
    encoded = Template(chat_tokenizer(), "chat", stop_ids=[4]).encode("What", "Water.", max_length=10)
    assert encoded.row == TokenRow((3, 6, 5, 10, 4, 5, 3, 7, 5, 15), prompt_len=9, finished=False)


def test_errors_name_the_way_out() -> None:
    with pytest.raises(TercetError, match="no end-of-sequence token.*eos_token"):
        Template(word_tokenizer(eos_token=""))
    with pytest.raises(TercetError, match="no chat template.*'plain'"):
        Template(word_tokenizer(), "chat")
    with pytest.raises(TercetError, match="a.jsonl:3: the prompt is a conversation.*'chat'"):
        Template(word_tokenizer()).prompt_ids(ASK, "a.jsonl:3")
    # The finished conversation writes "final" where the prompt wrote "assistant".
    unextended = CHATML.replace("m['role']", "(m['role'] if m['role'] != 'assistant' else 'final')")
    with pytest.raises(TercetError, match="a.jsonl:3: the chat template .* does not begin with its own prompt"):
        Template(chat_tokenizer(unextended), "chat").encode("What", "Water", origin="a.jsonl:3")
    refusing = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(TercetError, match="turns system, user .no system turns here"):
        Template(chat_tokenizer(refusing), "chat").prompt_ids(ASK)


def test_wrong_arguments_are_our_own_bugs() -> None:
    with pytest.raises(ValueError, match="kind"):
        Template(word_tokenizer(), "chatml")
    with pytest.raises(ValueError, match="max_prompt_length"):
        Template(word_tokenizer(), max_prompt_length=0)
    with pytest.raises(ValueError, match="max_length"):
        Template(word_tokenizer()).encode("What", "Water", max_length=0)


def test_response_text_drops_special_tokens_and_ids_without_a_token() -> None:
    tokenizer = word_tokenizer()
    assert response_text([14, 8, 16, 2], tokenizer) == " Water."  # 8 is a hole in the vocabulary
    assert response_text([10**6, 14, 2**40, -1], tokenizer) == " Water"
    assert response_text([], tokenizer) == ""


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("make", [lambda: word_tokenizer("<s> $A"), prefixing_tokenizer])
def test_many_at_once_are_as_one_by_one(make: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that come twice, texts without a prompt, and more texts than the tokenizer is given at once."""
    tokenizer = make()
    tokenizer.chat_template = CHATML
    longest = {"plain": 4, "chat": 64}[kind]
    template = Template(tokenizer, kind, max_prompt_length=longest)
    asked = ["a", "What is rain?", "", "a", " b", "What", "", "a b", "What is rain?"]
    texts = [
        (prompt, response, f"f:{i}") for i, (prompt, response) in enumerate(zip(asked, ["b", "Water.", "a", "a a", "b"] * 2))
    ]
    one_by_one = [template.encode(prompt, response, max_length=longest + 4, origin=origin) for prompt, response, origin in texts]
    assert len({one.row for one in one_by_one}) > 6
    prompts = [template.prompt_ids(prompt, origin) for prompt, _, origin in texts]
    for at_once in (1, 2, 100):
        monkeypatch.setattr("tercet.data.template.AT_ONCE", at_once)
        assert list(template.encode_all(iter(texts), max_length=longest + 4)) == one_by_one
        assert list(template.prompt_ids_all((prompt, origin) for prompt, _, origin in texts)) == prompts
    assert list(template.encode_all([])) == [] == list(template.prompt_ids_all([]))
