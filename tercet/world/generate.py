"""Write the data files of the embedded world: the same seed and sizes give the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tercet.world.annotator import Annotator
from tercet.world.answers import LABELLED, MIXED, PRETRAINING, write_answer, write_from
from tercet.world.language import PROMPT_FORMS, TOPICS, Topic

Ask = tuple[str, Topic]


@dataclass(frozen=True)
class Sizes:
    """Records a file; the numbers of prompts are upper limits, since there are 15 forms x 48 topics."""

    pretrain: int = 14_000
    demonstrations: int = 2_400
    comparisons: int = 20_000
    rankings: int = 500
    eval_known: int = 5_000
    eval_new: int = 400
    eval_prompts_known: int = 160
    eval_prompts_new: int = 40


def prompts(seed: int) -> dict[str, list[Ask]]:
    """All prompts with their topics, in groups: "train", "known" (held out, known topics), "new" (held out, new topics).

    Of each known topic's 15 prompts four are held out: those whose hash with the seed is smallest.
    """
    groups: dict[str, list[Ask]] = {"train": [], "known": [], "new": []}
    for topic in TOPICS.values():
        texts = [form.format(topic=topic.name) for form in PROMPT_FORMS]
        held = set() if topic.new else set(sorted(texts, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())[:4])
        for prompt in texts:
            groups["new" if topic.new else "known" if prompt in held else "train"].append((prompt, topic))
    return groups


def _pairs(rng: Random, annotator: Annotator, asks: list[Ask], count: int) -> Iterator[dict[str, Any]]:
    """`count` comparisons in which a choice was made; ties are dropped. `p` = the probability of the recorded choice."""
    while count:
        prompt, topic = rng.choice(asks)
        a, b = write_from(rng, topic, LABELLED), write_from(rng, topic, LABELLED)
        choice = 0 if a == b else annotator.compare(prompt, a, b)
        if choice:
            chosen, rejected = (a, b) if choice > 0 else (b, a)
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "p": annotator.probability(prompt, chosen, rejected)}
            count -= 1


def _rankings(rng: Random, annotator: Annotator, asks: list[Ask], count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        prompt, topic = rng.choice(asks)
        responses = [write_from(rng, topic, LABELLED) for _ in range(4)]
        yield {"prompt": prompt, "responses": responses, "ranks": annotator.rank(prompt, responses)}


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _ceiling(pairs: list[dict[str, Any]]) -> float:
    return sum(max(pair["p"], 1 - pair["p"]) for pair in pairs) / len(pairs) if pairs else 0.0


def _ask_records(rng: Random, asks: list[Ask], count: int, group: str) -> list[dict[str, Any]]:
    chosen = rng.sample(asks, min(count, len(asks)))
    return [{"prompt": prompt, "topic": topic.key, "group": group} for prompt, topic in chosen]


def generate(folder: str | Path, seed: int = 0, sizes: Sizes | None = None) -> dict[str, Any]:
    """Write the world's files into `folder` (made if missing, files overwritten) and return what world.json says.

    Training: pretrain.jsonl {text}, demonstrations.jsonl {prompt, response}, comparisons.jsonl {prompt, chosen, rejected},
    rankings.jsonl {prompt, responses, ranks}, prompts.jsonl {prompt, topic}. Held out: eval_comparisons.jsonl {prompt, chosen,
    rejected, p} on new prompts about topics of training, where p is the annotator's probability of the recorded choice;
    eval_comparisons_new.jsonl, the same on topics that no training file names; and eval_prompts.jsonl {prompt, topic, group},
    where group is "known" or "new" in this sense.
    world.json: seed, sizes, the annotator's settings, and the ceiling of agreement on each set of pairs.
    """
    sizes = sizes or Sizes()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "world.json").unlink(missing_ok=True)  # written last: with it the files are all of one seed
    asks = prompts(seed)
    train = asks["train"]
    streams = {name: Random(f"{seed}/{name}") for name in ("pretrain", "demonstrations", "comparisons", "rankings", "eval")}
    annotator = Annotator(seed=seed)

    rng = streams["pretrain"]
    drawn = (rng.choice(train) for _ in range(sizes.pretrain))
    _write(folder / "pretrain.jsonl", ({"text": f"{prompt} {write_from(rng, topic, PRETRAINING)}"} for prompt, topic in drawn))

    rng = streams["demonstrations"]
    drawn = (rng.choice(train) for _ in range(sizes.demonstrations))
    shown = ({"prompt": prompt, "response": write_answer(rng, topic, MIXED)} for prompt, topic in drawn)
    _write(folder / "demonstrations.jsonl", shown)

    pairs = list(_pairs(streams["comparisons"], annotator, train, sizes.comparisons))
    _write(folder / "comparisons.jsonl", ({key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs))
    _write(folder / "rankings.jsonl", _rankings(streams["rankings"], annotator, train, sizes.rankings))
    _write(folder / "prompts.jsonl", ({"prompt": prompt, "topic": topic.key} for prompt, topic in train))

    rng = streams["eval"]
    known = list(_pairs(rng, annotator, asks["known"], sizes.eval_known))
    new = list(_pairs(rng, annotator, asks["new"], sizes.eval_new))
    _write(folder / "eval_comparisons.jsonl", known)
    _write(folder / "eval_comparisons_new.jsonl", new)
    held = _ask_records(rng, asks["known"], sizes.eval_prompts_known, "known")
    held += _ask_records(rng, asks["new"], sizes.eval_prompts_new, "new")
    _write(folder / "eval_prompts.jsonl", held)

    world = {
        "seed": seed,
        "sizes": asdict(sizes) | {"prompts": len(train), "eval_prompts": len(held)},
        "annotator": {"temperature": annotator.temperature, "tie_band": annotator.tie_band, "tie_rate": annotator.tie_rate},
        "ceiling": {"comparisons": _ceiling(pairs), "known": _ceiling(known), "new": _ceiling(new)},
    }
    (folder / "world.json").write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")
    return world
