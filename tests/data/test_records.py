"""Right data in every form and container, the splits, and the real files where they are at hand."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tercet.data.records import fingerprint, held_out, judge_split, read_comparisons, read_demonstrations, read_prompts, split
from tercet.types import Comparison, Demonstration, Message, Prompt

SHARED = Path(__file__).parents[3] / "shared" / "data"
USER, ANSWER, OTHER = Message("user", "Hi"), Message("assistant", "Yes"), Message("assistant", "No")
RECORDS = [{"prompt": "p", "response": "r"}, {"prompt": "q\n,\"'", "response": "s\u2028 é"}]


def turns(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


def containers(folder: Path) -> list[Path]:
    """The same two records in every container."""
    import csv

    import datasets

    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)
    (folder / "a.jsonl").write_text(text.replace("\n", "\r\n\n"), encoding="utf-8", newline="")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "c.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    datasets.Dataset.from_list(RECORDS).to_parquet(folder / "d.parquet")
    with open(folder / "e.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(RECORDS)
    return sorted(folder.iterdir())


def test_every_container_gives_the_same_records(tmp_path: Path) -> None:
    expected = [("p", "r"), ("q\n,\"'", "s\u2028 é")]
    paths = containers(tmp_path)
    assert len(paths) == 5
    for path in paths:
        records = read_demonstrations(path)
        assert [(record.prompt, record.response) for record in records] == expected, path
        second = 3 if path.suffix == ".jsonl" else 2  # the .jsonl file has an empty line between its two records
        assert [record.origin for record in records] == [f"{path}:1", f"{path}:{second}"]
    (tmp_path / "README.md").write_text("passed over")
    (tmp_path / ".hidden.jsonl").write_text("passed over")
    whole = read_demonstrations(str(tmp_path))
    assert [(record.prompt, record.response) for record in whole] == expected * 5
    assert whole[2].origin.endswith("b.jsonl.gz:1") and whole.dropped == {}


def test_a_hub_data_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"prompt": "p", "response": "r", "margin": None}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_demonstrations("somebody/data") == [Demonstration("p", "r", "somebody/data:1")]
    assert read_prompts("somebody/data", split="test")[0].fields == {"response": "r"}  # a null column is an absent field
    assert asked == [("somebody/data", "train"), ("somebody/data", "test")]
    assert fingerprint("somebody/data").keys() == {"somebody/data"}


def test_forms_of_demonstrations(tmp_path: Path) -> None:
    system = Message("system", "")
    path = write(
        tmp_path / "chat.jsonl",
        {"messages": turns(system, USER, ANSWER), "id": 3},
        {"messages": turns(USER, ANSWER, USER, OTHER)},
    )
    first, second = read_demonstrations(path)
    assert first == Demonstration((system, USER), "Yes", f"{path}:1")
    assert second == Demonstration((USER, ANSWER, USER), "No", f"{path}:2")
    assert read_demonstrations(write(tmp_path / "text.jsonl", {"text": " t"}))[0] == Demonstration(
        "", " t", f"{tmp_path}/text.jsonl:1"
    )
    mixed = write(tmp_path / "prompt.jsonl", {"prompt": turns(USER), "response": " r"}, {"prompt": "p", "response": "r"})
    assert [record.prompt for record in read_demonstrations(mixed)] == [(USER,), "p"]


def test_forms_of_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": 4, "tags": ["x"]})
    assert read_prompts(path) == [Prompt("p", {"answer": 4, "tags": ["x"]}, f"{path}:1")]
    path = write(tmp_path / "b.jsonl", {"messages": turns(USER, ANSWER, USER), "answer": None})
    assert read_prompts(path) == [Prompt((USER, ANSWER, USER), {"answer": None}, f"{path}:1")]


def test_pairs_and_rankings(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": " a", "rejected": " b"}
    path = write(tmp_path / "a.jsonl", pair | {"source": "s"}, pair | {"margin": 2})
    assert read_comparisons(path) == [
        Comparison("p", (" a", " b"), (0.0, 1.0), 0.0, {"source": "s"}, f"{path}:1"),
        Comparison("p", (" a", " b"), (0.0, 1.0), 2.0, {}, f"{path}:2"),
    ]
    path = write(tmp_path / "b.jsonl", {"prompt": turns(USER), "responses": ["a", "b", "c"], "ranks": [2, 1.5, 2], "by": "x"})
    assert read_comparisons(path) == [Comparison((USER,), ("a", "b", "c"), (2.0, 1.5, 2.0), 0.0, {"by": "x"}, f"{path}:1")]
    (tmp_path / "c.csv").write_text(
        'prompt,responses,ranks,margin\np,"[""a"", ""b""]","[1, 2]",0.5\nq,"[""a"", ""b""]","[1, 1]",\n'
    )
    assert [(c.responses, c.ranks, c.margin) for c in read_comparisons(tmp_path / "c.csv")] == [
        (("a", "b"), (1.0, 2.0), 0.5),
        (("a", "b"), (1.0, 1.0), 0.0),
    ]


def test_conversations_in_csv_cells(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"

    def cells(*texts: str) -> str:
        return ",".join('"' + text.replace('"', '""') + '"' for text in texts) + "\n"

    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    literal = ['[{"role": "user"}]', "[{x}] is a set", '[{"role": "user", "content": "Hi"}', "[]", '["a"]', "[1] says so"]
    path.write_text("prompt\n" + cells(json.dumps([user])) + cells(json.dumps([user], indent=1)) + "".join(map(cells, literal)))
    message = Message("user", "Hi")
    assert [prompt.prompt for prompt in read_prompts(path)] == [(message,), (message,), *literal]
    path.write_text("chosen,rejected\n" + cells(json.dumps([user, answer]), json.dumps([user, answer | {"content": "No"}])))
    assert [(c.prompt, c.responses) for c in read_comparisons(path)] == [((message,), ("Hello", "No"))]
    path.write_text("prompt,response\n" + cells(json.dumps([user]), "Hello"))
    assert [(d.prompt, d.response) for d in read_demonstrations(path)] == [((message,), "Hello")]


def test_transcripts_are_cut_at_the_last_turn_they_share(tmp_path: Path) -> None:
    opening = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
    useless = {"chosen": opening + " x", "rejected": opening + " x"}
    parted = {"chosen": opening + " x", "rejected": opening.replace("Hello", "Oh") + " x"}
    path = write(
        tmp_path / "a.jsonl", {"chosen": opening + " So it is.", "rejected": opening + " So it"}, useless, useless, parted
    )
    records = read_comparisons(path)
    assert records == [Comparison(opening, (" So it is.", " So it"), (0.0, 1.0), 0.0, {}, f"{path}:1")]
    assert sorted(records.dropped.values()) == [1, 2] and records.dropped["chosen and rejected are the same text"] == 2


def test_conversation_pairs(tmp_path: Path) -> None:
    whole = {"chosen": turns(USER, ANSWER), "rejected": turns(USER, OTHER)}
    answers = {"prompt": turns(USER), "chosen": turns(ANSWER), "rejected": turns(OTHER)}
    for number, record in enumerate([whole, whole | {"prompt": "Hi"}, whole | {"prompt": turns(USER)}, answers]):
        path = write(tmp_path / f"{number}.jsonl", record | {"score": 1})
        assert read_comparisons(path) == [Comparison((USER,), ("Yes", "No"), (0.0, 1.0), 0.0, {"score": 1}, f"{path}:1")]


def test_held_out_is_the_same_everywhere() -> None:
    def by_hand(text: str) -> float:
        return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12

    assert held_out("What is rain?") == by_hand("\nWhat is rain?")
    assert held_out("What is rain?", "judge") == by_hand("judge\nWhat is rain?")
    assert held_out(" What is rain?\n") == held_out("What is rain?") == held_out((Message("user", "What is rain?"),))
    assert held_out((USER, ANSWER, USER)) != held_out((USER,)) != held_out((Message("system", "Hi"), USER))
    values = [held_out(f"prompt {i}") for i in range(4000)]
    assert min(values) >= 0 and max(values) < 1
    assert abs(sum(value < 0.1 for value in values) - 400) < 80  # 4 standard deviations


def test_one_prompt_is_on_one_side_in_all_three_files() -> None:
    names = [f"prompt {i}" for i in range(400)]
    demonstrations = [Demonstration(name, "r") for name in names]
    comparisons = [Comparison(name, ("a", "b"), (0, 1)) for name in names for _ in range(2)]
    prompts = [Prompt((Message("user", name),)) for name in reversed(names)]
    texts = [Demonstration("", name) for name in names]
    train, out = split(demonstrations)
    assert len(train) + len(out) == 400 and 20 < len(out) < 70
    held = {record.prompt for record in out}
    assert {c.prompt for c in split(comparisons)[1]} == held
    assert {p.prompt[0].content for p in split(prompts)[1]} == held  # type: ignore[union-attr]
    assert {t.response for t in split(texts)[1]} == held
    assert [r.prompt for r in train] == [name for name in names if name not in held]  # order kept


def test_tiny_data_is_not_split() -> None:
    few = [Prompt(f"prompt {i}") for i in range(400) if held_out(f"prompt {i}") < 0.1]
    assert len(few) >= 20
    assert split(few[:19]) == (few[:19], [])
    assert split(few) == (few, [])  # all would be held out, nothing left to train on
    assert split([]) == ([], [])
    nineteen = [Prompt(f"prompt {i}") for i in range(200)]
    assert split(nineteen, minimum=201)[1] == [] and split(nineteen, minimum=200)[1]


def test_the_judges_share_is_independent_of_the_held_out_one() -> None:
    comparisons = [Comparison(f"prompt {i // 2}", ("a", "b"), (0, 1)) for i in range(4000)]
    first, judge = judge_split(comparisons)
    assert len(first) + len(judge) == 4000 and abs(len(judge) - 800) < 120
    assert not {c.prompt for c in first} & {c.prompt for c in judge}
    inside = sum(held_out(c.prompt) < 0.1 for c in judge) / len(judge)
    assert 0.05 < inside < 0.15  # with one salt for both it would be 0.5
    assert judge_split(comparisons[:499]) == (comparisons[:499], [])
    assert judge_split(comparisons[:500])[1]


def test_fingerprints_name_contents_not_places(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    path = write(tmp_path / "one" / "a.jsonl", RECORDS[0])
    print_of = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fingerprint(path) == fingerprint(tmp_path / "one") == {"a.jsonl": print_of}
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint(tmp_path / "two" / "a.jsonl") == {"a.jsonl": print_of}
    write(tmp_path / "two" / "a.jsonl", RECORDS[1])
    assert fingerprint(tmp_path / "two")["a.jsonl"] != print_of


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data is not at hand")
def test_real_files_load_untouched() -> None:
    raw = read_comparisons(SHARED / "hh_harmless" / "raw.jsonl.gz")
    # Five transcripts hold a turn inside their last response; counted by a search over the file.
    assert len(raw) == 2049 and list(raw.dropped.values()) == [5]
    cut = {int(c.origin.rsplit(":", 1)[1]): c for c in read_comparisons(SHARED / "hh_harmless" / "preferences.jsonl.gz")}
    for comparison in raw:  # the same data, cut by other hands
        other = cut[int(comparison.origin.rsplit(":", 1)[1])]
        assert (comparison.prompt, comparison.responses) == (other.prompt, other.responses)
    ranked = read_comparisons(SHARED / "instructions" / "ranked.jsonl")
    assert len(ranked) == 191 and {len(c.responses) for c in ranked} == {2, 3, 4, 5, 6, 8, 9}
    prompts = read_prompts(SHARED / "instructions" / "ranked_by_source.jsonl.gz")
    assert len(prompts) == 2266 and prompts[0].fields.keys() == {"responses", "by", "source"}


def test_an_existing_folder_comes_before_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "a.jsonl", RECORDS[0])
    monkeypatch.chdir(tmp_path)
    assert read_demonstrations("owner/name") == [Demonstration("p", "r", "owner/name/a.jsonl:1")]
