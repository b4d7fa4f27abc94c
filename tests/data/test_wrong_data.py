"""Wrong data, one line each: the message must name the place, what was found, and the way out; nothing else may come out."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.data import files
from tercet.data.records import Records, fingerprint, read_comparisons, read_demonstrations, read_prompts
from tercet.types import TercetError

Reader = Callable[..., Records[Any]]
SFT, PAIRS, PPO = read_demonstrations, read_comparisons, read_prompts
GOOD_SFT = '{"prompt": "p", "response": "r"}'
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
HH = "\n\nHuman: Hi\n\nAssistant:"
PACKED = gzip.compress(("\n".join([GOOD_SFT] * 500)).encode())


def parquet(columns: dict[str, list[Any]]) -> bytes:
    import datasets

    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns).to_parquet(buffer)
    return buffer.getvalue()


def line(**record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def after(good: str, bad: bytes) -> bytes:
    """The bad row stands in line 2."""
    return good.encode() + b"\n" + bad


# name -> reader, file name, its bytes, what the message must contain (besides the file's name and "expected")
FILES: dict[str, tuple[Reader, str, bytes, list[str]]] = {
    "empty file": (SFT, "a.jsonl", b"", ["empty, no records", '"response"']),
    "only blank lines": (SFT, "a.jsonl", b"\n \n\n", ["empty, no records"]),
    "empty gzip": (PPO, "a.jsonl.gz", b"", ["empty, no records"]),
    "truncated gzip": (SFT, "a.jsonl.gz", PACKED[:-20], ["gzip file is truncated", "download it again"]),
    "damaged gzip": (SFT, "a.jsonl.gz", PACKED[:30] + b"\xff" * 20 + PACKED[50:], ["not a sound gzip file"]),
    "plain text named gz": (SFT, "a.jsonl.gz", GOOD_SFT.encode(), ["not a sound gzip file", "take .gz off"]),
    "gzip without gz": (SFT, "a.jsonl", PACKED, ["is gzip data", "a.jsonl.gz"]),
    "latin-1": (SFT, "a.jsonl", after(GOOD_SFT, '{"prompt": "caf\xe9"}'.encode("latin-1")), ["a.jsonl:2", "not UTF-8", "iconv"]),
    "utf-16": (SFT, "a.jsonl", GOOD_SFT.encode("utf-16"), ["UTF-16", "UTF-8"]),
    "utf-16 without mark": (SFT, "a.jsonl", GOOD_SFT.encode("utf-16-le"), ["a.jsonl:1", "NUL byte"]),
    "byte order mark": (SFT, "a.jsonl", b"\xef\xbb\xbf" + GOOD_SFT.encode(), ["byte order mark", "without BOM"]),
    "nul byte": (SFT, "a.jsonl", after(GOOD_SFT, b'{"prompt": "a\0"}'), ["a.jsonl:2", "NUL byte"]),
    "nul escape": (PPO, "a.jsonl", rb'{"prompt": "a\u0000b"}', ["a.jsonl:1", "'prompt'", "NUL character"]),
    "nul escape in a turn": (PPO, "a.jsonl", rb'{"messages": [{"role": "user", "content": "\u0000b"}]}', ["messages[0].content"]),
    "half a surrogate": (PPO, "a.jsonl", rb'{"prompt": "a\ud800b"}', ["a.jsonl:1", "half of a character"]),
    "not json": (SFT, "a.jsonl", after(GOOD_SFT, b"prompt: p"), ["a.jsonl:2", "not JSON", "prompt: p", '"response"']),
    "cut off json": (SFT, "a.jsonl", after(GOOD_SFT, b'{"prompt": "p", "respo'), ["a.jsonl:2", "not JSON"]),
    "cut off before its value": (
        SFT,
        "a.jsonl",
        after(GOOD_SFT, b'{"prompt": "p", "response": \n'),
        ["a.jsonl:2", "at line 1, column"],
    ),
    "two records in a line": (SFT, "a.jsonl", (GOOD_SFT * 2).encode(), ["a.jsonl:1", "Extra data"]),
    "single quotes": (PPO, "a.jsonl", b"{'prompt': 'p'}", ["a.jsonl:1", "double quotes"]),
    "duplicate key": (PPO, "a.jsonl", b'{"prompt": "p", "prompt": "q"}', ["a.jsonl:1", '"prompt" stands twice']),
    "NaN": (PPO, "a.jsonl", b'{"prompt": "p", "x": NaN}', ["a.jsonl:1", "NaN is not a JSON number"]),
    "minus infinity": (PPO, "a.jsonl", b'{"prompt": "p", "x": -Infinity}', ["a.jsonl:1", "-Infinity"]),
    "huge number": (PPO, "a.jsonl", b'{"prompt": "p", "x": 1e999}', ["a.jsonl:1", "1e999", "too large"]),
    "endless integer": (PPO, "a.jsonl", b'{"prompt": "p", "x": ' + b"9" * 5000 + b"}", ["a.jsonl:1", "not JSON"]),
    "deep nesting": (PPO, "a.jsonl", b'{"prompt": ' + b"[" * 200_000, ["a.jsonl:1"]),
    "row is a list": (PPO, "a.jsonl", b'[{"prompt": "p"}]', ["a.jsonl:1", "JSON object", "named .json"]),
    "row is a string": (PPO, "a.jsonl", b'{"prompt": "p"}\n"p"', ["a.jsonl:2", 'the row is "p"', "JSON object"]),
    "row is null": (PPO, "a.jsonl", b"null", ["a.jsonl:1", "the row is null"]),
    "object in .json": (PPO, "a.json", b'{"prompt": "p"}', ["JSON list", "named .jsonl"]),
    "empty list": (PPO, "a.json", b"[]", ["empty, no records"]),
    "broken .json": (PPO, "a.json", b'[{"prompt": "p"},]', ["not JSON", "line 1, column"]),
    "number in .json": (PPO, "a.json", b'[{"prompt": "p"}, 3]', ["a.json:2", "the row is 3"]),
    "unknown extension": (SFT, "a.txt", b"text", ['".txt"', ".jsonl", ".parquet"]),
    "no extension": (SFT, "data", GOOD_SFT.encode(), ["unknown extension", ".jsonl"]),
    "csv of ragged rows": (SFT, "a.csv", b"prompt,response\np,r\np,r,s\n", ["a.csv:2", "3 cells under 2 columns"]),
    "csv header twice": (SFT, "a.csv", b"prompt,prompt\np,r\n", ['"prompt" stands twice']),
    "csv header alone": (SFT, "a.csv", b"prompt,response\n", ["empty, no records"]),
    "csv open quote": (SFT, "a.csv", b'prompt,response\np,"r\n', ["not CSV"]),
    "csv with semicolons": (SFT, "a.csv", b"prompt;response\np;r\n", ["a.csv:1", "'prompt' is missing", "prompt;response"]),
    "csv ranks in words": (
        PAIRS,
        "a.csv",
        b'prompt,responses,ranks\np,"[""a"",""b""]",one two\n',
        ["a.csv:1", '"ranks"', "not JSON"],
    ),
    "csv empty cell": (SFT, "a.csv", b"prompt,response\np,\n", ["a.csv:1", "'response'", "only whitespace"]),
    "not parquet": (SFT, "a.parquet", b"PAR1 no", ["not a readable Parquet file"]),
    "missing response": (SFT, "a.jsonl", line(prompt="p"), ["a.jsonl:1", "'response' is missing", '"prompt"']),
    "misspelt field": (SFT, "a.jsonl", line(prompt="p", completion="r"), ["'response' is missing", '"completion"']),
    "text beside a prompt": (SFT, "a.jsonl", line(prompt="p", text="t"), ["'response' is missing", '"text"']),
    "no field at all": (SFT, "a.jsonl", b"{}", ["a.jsonl:1", "is missing", "fields found: none"]),
    "comparisons as demonstrations": (SFT, "a.jsonl", line(prompt="p", chosen="a", rejected="b"), ["'response' is missing"]),
    "demonstrations as comparisons": (PAIRS, "a.jsonl", line(prompt="p", response="b"), ["'chosen' is missing", '"rejected"']),
    "null response": (SFT, "a.jsonl", after(GOOD_SFT, line(prompt="p", response=None)), ["a.jsonl:2", "'response' is null"]),
    "number as prompt": (SFT, "a.jsonl", line(prompt=7, response="r"), ["a.jsonl:1", "'prompt' is 7", "a text"]),
    "empty response": (SFT, "a.jsonl", line(prompt="p", response=""), ["a.jsonl:1", "'response'", "empty or only whitespace"]),
    "blank response": (SFT, "a.jsonl", line(prompt="p", response=" \n\t"), ["'response'", "only whitespace", "drop the record"]),
    "blank prompt": (SFT, "a.jsonl", line(prompt="  ", response="r"), ["'prompt'", "only whitespace"]),
    "blank text": (SFT, "a.jsonl", line(text=" "), ["a.jsonl:1", "'text'", "only whitespace"]),
    "mixed schemas": (
        SFT,
        "a.jsonl",
        after(GOOD_SFT, line(text="t")),
        ["a.jsonl:2", "text", "began with prompt, response", "split it"],
    ),
    "mixed comparisons": (
        PAIRS,
        "a.jsonl",
        after('{"prompt": "p", "chosen": "a", "rejected": "b"}', line(prompt="p", responses=["a", "b"], ranks=[1, 2])),
        ["a.jsonl:2", "prompt, responses, ranks", "began with prompt, chosen, rejected"],
    ),
    "messages not a list": (SFT, "a.jsonl", line(messages="Hi"), ["'messages' is \"Hi\"", "list of messages"]),
    "no messages": (SFT, "a.jsonl", line(messages=[]), ["'messages' is []"]),
    "message not an object": (SFT, "a.jsonl", line(messages=["Hi", ANSWER]), ["'messages[0]' is \"Hi\"", '"role"']),
    "unknown role": (
        SFT,
        "a.jsonl",
        line(messages=[{"role": "bot", "content": "x"}, ANSWER]),
        ["messages[0].role", '"bot"', "user"],
    ),
    "role is a list": (SFT, "a.jsonl", line(messages=[{"role": [], "content": "x"}, ANSWER]), ["messages[0].role"]),
    "null content": (
        SFT,
        "a.jsonl",
        line(messages=[USER, {"role": "assistant", "content": None}]),
        ["messages[1].content", "null"],
    ),
    "blank answer": (SFT, "a.jsonl", line(messages=[USER, {"role": "assistant", "content": " "}]), ["messages[1].content"]),
    "ends with a user": (SFT, "a.jsonl", line(messages=[USER]), ["ends with a user turn", "assistant turn"]),
    "only an answer": (SFT, "a.jsonl", line(messages=[ANSWER]), ["without its last turn", "the last turn is missing"]),
    "two answers": (SFT, "a.jsonl", line(messages=[USER, ANSWER, ANSWER]), ["the last turn is assistant", "user turn"]),
    "prompt ends with an answer": (PPO, "a.jsonl", line(messages=[USER, ANSWER]), ["'messages'", "the last turn is assistant"]),
    "blank question": (PPO, "a.jsonl", line(messages=[{"role": "user", "content": " "}]), ["messages[0].content", "whitespace"]),
    "prompt of no turns": (PPO, "a.jsonl", line(prompt=[]), ["'prompt' is []"]),
    "null prompt": (PPO, "a.jsonl", line(prompt=None), ["a.jsonl:1", "'prompt' is null"]),
    "prompt misspelt": (PPO, "a.jsonl", line(Prompt="p"), ["'prompt' is missing", '"Prompt"']),
    "chosen is rejected": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected="a"), ["same text", "drop the record"]),
    "null rejected": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected=None), ["'rejected' is null"]),
    "empty rejected": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected=""), ["'rejected'", "whitespace"]),
    "blank prompt of a pair": (PAIRS, "a.jsonl", line(prompt="\n", chosen="a", rejected="b"), ["'prompt'", "whitespace"]),
    "list against text": (PAIRS, "a.jsonl", line(prompt="p", chosen=[USER, ANSWER], rejected="b"), ["'chosen' is [{"]),
    "pair without prompt": (
        PAIRS,
        "a.jsonl",
        line(chosen="good", rejected="bad"),
        ["'chosen' is \"good\"", "'prompt'", "Human:"],
    ),
    "negative margin": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected="b", margin=-1), ["'margin' is -1", ">= 0"]),
    "immense margin": (
        PAIRS,
        "a.jsonl",
        line(prompt="p", chosen="a", rejected="b", margin=1e30),
        ["'margin' is 1e+30", "<= 100"],
    ),
    "margin in words": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected="b", margin="1"), ["'margin' is \"1\""]),
    "null margin": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected="b", margin=None), ["'margin' is null"]),
    "margin true": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected="b", margin=True), ["'margin' is true"]),
    "margin beyond a float": (PAIRS, "a.jsonl", line(prompt="p", chosen="a", rejected="b", margin=10**400), ["'margin' is 1000"]),
    "ranks too short": (PAIRS, "a.jsonl", line(prompt="p", responses=["a", "b"], ranks=[1]), ["'ranks' has 1 entries for 2"]),
    "ranks in words": (
        PAIRS,
        "a.jsonl",
        line(prompt="p", responses=["a", "b"], ranks=[1, "2"]),
        ["'ranks[1]' is \"2\"", "number"],
    ),
    "ranks one number": (PAIRS, "a.jsonl", line(prompt="p", responses=["a", "b"], ranks=1), ["'ranks' is 1", "a list"]),
    "one response": (PAIRS, "a.jsonl", line(prompt="p", responses=["a"], ranks=[1]), ["'responses' has 1 entries", "at least 2"]),
    "responses repeated": (PAIRS, "a.jsonl", line(prompt="p", responses=["a", "b", "a"], ranks=[1, 2, 3]), ['"a" twice', "drop"]),
    "blank among responses": (PAIRS, "a.jsonl", line(prompt="p", responses=["a", " "], ranks=[1, 2]), ["'responses[1]'"]),
    "responses not texts": (PAIRS, "a.jsonl", line(prompt="p", responses=["a", 3], ranks=[1, 2]), ["'responses[1]' is 3"]),
    "no ranks": (PAIRS, "a.jsonl", line(prompt="p", responses=["a", "b"]), ["'ranks' is missing"]),
    "same conversation": (PAIRS, "a.jsonl", line(chosen=[USER, ANSWER], rejected=[USER, ANSWER]), ["same conversation", "drop"]),
    "other conversation": (
        PAIRS,
        "a.jsonl",
        line(chosen=[USER, ANSWER], rejected=[{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "No"}]),
        ["'chosen' and 'rejected' differ before their last turn"],
    ),
    "conversation ends with a user": (
        PAIRS,
        "a.jsonl",
        line(chosen=[USER], rejected=[USER, ANSWER]),
        ["'chosen' ends with a user"],
    ),
    "conversations without a prompt": (
        PAIRS,
        "a.jsonl",
        line(chosen=[ANSWER], rejected=[{"role": "assistant", "content": "No"}]),
        ["the last turn is missing"],
    ),
    "prompt of another conversation": (
        PAIRS,
        "a.jsonl",
        line(prompt="Ho", chosen=[USER, ANSWER], rejected=[USER, {"role": "assistant", "content": "No"}]),
        ["'prompt' is none of the turns"],
    ),
}
UNUSABLE = {
    "same transcripts": (line(chosen=HH + " a", rejected=HH + " a"), "1 because chosen and rejected are the same text"),
    "empty reply": (line(chosen=HH + " a", rejected=HH), "1 because a transcript ends without a response"),
    "no common turn": (line(chosen=HH + " a", rejected=HH.replace("Hi", "Ho") + " b"), "do not begin with the same turns"),
    "parted early": (line(chosen=HH + " a" + HH + " b", rejected=HH + " c" + HH + " b"), "a response holds another turn"),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_file(case: str, tmp_path: Path) -> None:
    reader, name, content, needed = FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TercetError) as caught:
        reader(str(path))
    message = str(caught.value)
    missing = [part for part in [name, "expected", *needed] if part not in message]
    assert not missing, f"{missing} not in: {message}"
    assert len(message) < 800 and "\n" not in message
    message.encode("utf-8")  # can be printed
    assert path.read_bytes() == content


@pytest.mark.parametrize("case", UNUSABLE)
def test_nothing_usable_is_an_error_with_the_reasons(case: str, tmp_path: Path) -> None:
    content, reason = UNUSABLE[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(TercetError, match=f"a.jsonl: no usable record: .*{reason}.*A right record"):
        read_comparisons(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("columns", "needed"),
    [
        ({"prompt": ["p", "q"], "response": ["r", None]}, ["a.parquet:2", "'response' is missing"]),
        ({"prompt": ["p"], "response": [3]}, ["a.parquet:1", "'response' is 3"]),
        ({"prompt": ["p"], "responses": [["a", "b"]], "ranks": [[1.0, float("nan")]]}, ["a.parquet:1", "'ranks[1]' is NaN"]),
    ],
)
def test_wrong_parquet(columns: dict[str, list[Any]], needed: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(columns))
    with pytest.raises(TercetError) as caught:
        (read_comparisons if "ranks" in columns else read_demonstrations)(tmp_path / "a.parquet")
    assert all(part in str(caught.value) for part in needed), str(caught.value)


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(TercetError, match="gone.jsonl: no such file or folder.*owner/name"):
        read_prompts(tmp_path / "gone.jsonl")
    (tmp_path / "README.md").write_text("no data")
    for read in (read_prompts, fingerprint):
        with pytest.raises(TercetError, match="no data files .it holds README.md.*jsonl"):
            read(tmp_path)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(TercetError, match="this is a folder of datasets' save_to_disk.*to_parquet or to_json"):
        read_prompts(tmp_path)
    with pytest.raises(TercetError, match="the path is empty"):
        read_prompts("")
    for name in ("a\0b.jsonl", "x" * 5000, "a\nb"):
        with pytest.raises(TercetError, match="^[^\n]* no such file or folder"):
            read_prompts(name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_no_permission(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:  # as root every file can be read, so the refusal itself is played
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_text("{}")
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(files.gzip, "open", refuse)
    with pytest.raises(TercetError, match=f"{name}: no permission to read the file.*chmod"):
        read_prompts(tmp_path / name)


def test_a_hub_name_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    with pytest.raises(TercetError, match='somebody/data: no such path.*split "test".*reach the Hub.*local file'):
        read_prompts("somebody/data", split="test")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
NAMES = st.sampled_from(
    ["prompt", "response", "chosen", "rejected", "responses", "ranks", "messages", "text", "margin", "role", "content"]
)
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "bot"]), "content": SCALARS}), max_size=3)
VALUES = st.recursive(
    SCALARS | TURNS | st.sampled_from(["a", HH + " a", HH + " b", HH]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(NAMES, VALUES, max_size=5) | VALUES, max_size=3)
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def only_our_errors(path: Path) -> None:
    for reader in (SFT, PAIRS, PPO):
        try:
            assert len(reader(path)) > 0
        except TercetError as error:
            assert path.name in str(error)
            str(error).encode("utf-8")


@given(
    content=st.binary(max_size=60),
    start=st.sampled_from([b"", b"{", b'{"prompt": "p"}\n', b"prompt,text\n", b"\x1f\x8b\x08", b"["]),
)
@FUZZ
def test_any_bytes_give_only_our_errors(content: bytes, start: bytes, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a.csv", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(start + content)
        only_our_errors(tmp_path / name)


@given(records=RECORDS)
@FUZZ
def test_any_json_gives_only_our_errors(records: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.json").write_text(json.dumps(records))
    only_our_errors(tmp_path / "a.jsonl")
    only_our_errors(tmp_path / "a.json")
