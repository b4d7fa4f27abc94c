"""What tests of the report's pages share: a parser that checks nesting, and text that means harm."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = (
    '</pre></script><script>document.title="owned"</script>'
    "<img src=x onerror='document.title=\"owned\"'>{{ 7*7 }}\u202e\ud800\x00雨"
)
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags in order, and whether every one that opens is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(1 for name, _ in self.tags if name == tag)


def hostile(folder: Path) -> Path:
    """The same hostile text wherever a run folder has text."""
    keys = ("prompt", "group", "base", "sft", "ppo")
    rows = [{key: HOSTILE for key in keys} | {"sft_score": 0.0, "ppo_score": float(i)} for i in range(3)]
    (folder / "evaluation/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"device": HOSTILE, HOSTILE: HOSTILE, f"win_rate[{HOSTILE}]": 0.5, f"gold.{HOSTILE}[x]": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation/policies.json").write_text(json.dumps({HOSTILE: {"score": 1.0}, "ppo": {"score": 2.0}}))
    (folder / "evaluation/wins.json").write_text(json.dumps({HOSTILE: {"win_rate": 0.2, "low": 0.1, "high": 0.3, "n": 9}}))
    (folder / "config.yaml").write_text(HOSTILE.replace("\ud800", ""), encoding="utf-8")
    return folder
