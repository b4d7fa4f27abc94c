"""Numbers and data as text for a reader."""

from __future__ import annotations

import json
import math

MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


def short(value: float) -> str:
    """Three significant digits; whole numbers from 100 up, with thousands separated. A true minus sign."""
    if not math.isfinite(value):
        return "not a number"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        text = f"{size:.1e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("e-", f"e{MINUS}")
    elif size >= 100 or size == int(size):
        text = f"{size:,.0f}".replace(",", THIN)
    else:
        text = f"{size:.3g}" if size < 1 else f"{size:.2f}" if size < 10 else f"{size:.1f}"
    return text if value >= 0 or not any(digit in text for digit in "123456789") else MINUS + text


def percent(share: float) -> str:
    """0.861 -> "86.1 %"; whole numbers without decimals."""
    value = round(100 * share, 1)
    return f"{value:g}{THIN}%".replace("-", MINUS)


def tenths(share: float) -> str:
    """0.41 -> "41.0 %": always one decimal, so that a column lines up."""
    return f"{100 * share:.1f}{THIN}%".replace("-", MINUS)


def curly(words: str) -> str:
    """The page's own sentences: typographic apostrophes, and no line break inside "95 % interval"."""
    return words.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}").replace("95 % ", f"95{THIN}%\N{NO-BREAK SPACE}")


def signed(value: float) -> str:
    """With + or a true minus sign."""
    text = short(value)
    return text if text.startswith(MINUS) or value == 0 else "+" + text


def show_count(count: int, noun: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f}{THIN}s" if seconds < 10 else f"{seconds:.0f}{THIN}s"
    minutes = round(seconds / 60)
    return f"{minutes}{THIN}min" if minutes < 60 else f"{minutes // 60}{THIN}h {minutes % 60}{THIN}min"


def plain(value: object, limit: int) -> str:
    """A field of the data as text that any browser shows as it is.

    Chats become "role: content" lines, other values JSON. Lone surrogates (legal in JSON, not in UTF-8) become "?", control
    characters their visible pictures, and what is longer than `limit` characters is cut, which is said.
    """
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        value = "\n".join(f"{turn.get('role', '?')}: {turn['content']}" for turn in value)
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    more = len(text) - limit
    text = text[:limit].encode("utf-8", "replace").decode("utf-8")
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text.replace("\r\n", "\n"))
    return f"{text} … [{short(more)} more characters]" if more > 0 else text
