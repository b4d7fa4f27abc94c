"""docs/conformance.md: two of its sections are generated, each between two comment lines."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"


def _parts(name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: generated, begin -->\n", f"<!-- {name}: generated, end -->"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, first, rest = text.partition(begin)
    inside, second, after = rest.partition(end)
    assert first and second, f"{DOCUMENT} has no section {name}"
    return before + begin, inside, end + after


def read_section(name: str) -> str:
    """The text of a generated section."""
    return _parts(name)[1].strip()


def replace_section(name: str, content: str) -> None:
    """Write a generated section anew."""
    before, _, after = _parts(name)
    DOCUMENT.write_text(before + content.strip() + "\n" + after, encoding="utf-8")
