"""Bytes to rows: opens data files and data sets, and says exactly where one is broken.

A row's number counts from 1: the line in a .jsonl file, the item in a .json list, the record (header not counted) in .csv and
.parquet. Columnar sources (.parquet, hub data sets) can say "absent" only by null, so a null there is the same as no field.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from tercet.types import TercetError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
# A .csv cell is text; the fields that hold lists or numbers in the other formats hold JSON there.
CSV_JSON_FIELDS = ("messages", "responses", "ranks", "margin")
CSV_TEXTS_OR_MESSAGES = ("prompt", "chosen", "rejected")  # likewise where the cell is a list of messages, else a text


@dataclass(frozen=True)
class Row:
    """One record as it stands in its file, and the example that an error message about it shows."""

    file: str
    number: int
    values: dict[str, Any]
    example: str = ""

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.number}"

    def refuse(self, problem: str, expected: str, example: str = "") -> NoReturn:
        """Stop with where, what was found, what was expected and a right record."""
        _refuse(self.origin, problem, expected, example or self.example)


class _BadJson(ValueError):
    """Raised inside the JSON hooks, which do not know the row."""


def show(value: Any, limit: int = 60) -> str:
    """A value as JSON on one line, shortened to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode("utf-8")
    except (RecursionError, TypeError):
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_rows(source: str | os.PathLike[str], split: str = "train", example: str = "") -> Iterator[Row]:
    """Every row of a file, of a folder's data files in order of name, or of a hub data set's split.

    Raises TercetError for whatever cannot be read: no such file, folder without data files, unknown extension, no permission,
    damaged gzip, wrong encoding, BOM, NUL, broken JSON, duplicate keys, NaN, rows that are not objects.
    """
    if _is_hub_name(os.fspath(source)):
        yield from _columnar(os.fspath(source), _hub_dataset(os.fspath(source), split), example)
        return
    for path in data_files(source):
        name = str(path)
        kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        if kind == "jsonl":
            yield from _jsonl(path, example)
        elif kind == "json":
            yield from _json_list(path, example)
        elif kind == "csv":
            yield from _csv(path, example)
        else:
            yield from _columnar(name, _parquet(path), example)


def data_files(source: str | os.PathLike[str]) -> list[Path]:
    """The file itself, or a folder's data files sorted by name (hidden files and other extensions are passed over)."""
    path = Path(source)
    known = ", ".join(SUFFIXES)
    if not os.fspath(source):  # Path("") would be the working folder
        _refuse("data", "the path is empty", "the path of a file or folder, or a Hugging Face data set's name")
    if os.path.isdir(path):
        try:
            entries = sorted(path.iterdir(), key=lambda entry: entry.name)
        except OSError as error:
            _refuse(str(path), f"the folder cannot be listed ({error.strerror})", "a folder that this user may read")
        if {"dataset_info.json", "state.json"} <= {entry.name for entry in entries}:
            way_out = "data files such as datasets' own to_parquet or to_json writes"
            _refuse(str(path), "this is a folder of datasets' save_to_disk", way_out)
        found = [e for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith(".") and e.is_file()]
        if not found:
            held = ", ".join(e.name for e in entries[:5]) or "nothing"
            _refuse(str(path), f"the folder has no data files (it holds {held})", f"at least one file ending in {known}")
        return found
    if not os.path.exists(path):
        way_out = "the path of a file or folder, or the name of a Hugging Face data set written as owner/name"
        _refuse(
            show(str(path), 10_000)[1:-1][-300:], "no such file or folder", f"{way_out}; relative paths start at {os.getcwd()}"
        )
    if not os.path.isfile(path):
        _refuse(str(path), "this is neither a file nor a folder", f"a file ending in {known}")
    if not path.name.lower().endswith(SUFFIXES):
        _refuse(str(path), f"unknown extension {show(''.join(path.suffixes[-2:]))}", f"a file ending in {known}")
    return [path]


def fingerprint(source: str | os.PathLike[str], split: str = "train") -> dict[str, str]:
    """File name -> sha256 of the file's bytes (hexadecimal); names without folders, so that a moved file keeps its fingerprint.

    For a hub data set: its name -> sha256 over its rows, whatever file they were stored in.
    """
    name = os.fspath(source)
    if _is_hub_name(name):
        digest = hashlib.sha256()
        for row in read_rows(name, split):
            digest.update(json.dumps(row.values, sort_keys=True, default=repr).encode("utf-8") + b"\n")
        return {name: digest.hexdigest()}
    prints = {}
    for path in data_files(source):
        try:
            with open(path, "rb") as file:
                prints[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            _refuse(str(path), f"the file cannot be read ({error.strerror})", "a file that this user may read")
    return prints


def _refuse(where: str, problem: str, expected: str, example: str = "") -> NoReturn:
    tail = f" A right record: {example}" if example else ""
    raise TercetError(f"{where}: {problem}; expected {expected}.{tail}")


def _open(path: Path) -> BinaryIO:
    """The file's decompressed bytes."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their line ends; refuses what is not plain UTF-8 text from its first bytes on, and damaged archives."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    _check_start(path, line)
                if b"\0" in line:
                    _refuse(
                        f"{path}:{number}", "a NUL byte", "UTF-8 text (the file is binary, UTF-16 or damaged: write it again)"
                    )
                yield line
    except PermissionError:
        _refuse(str(path), "no permission to read the file", "a file that this user may read (chmod u+r)")
    except EOFError:
        _refuse(str(path), "the gzip file is truncated", "a whole file: copy or download it again")
    except (gzip.BadGzipFile, zlib.error) as error:
        _refuse(
            str(path), f"not a sound gzip file ({error})", "gzip data: write it again, or take .gz off the name of a plain file"
        )
    except OSError as error:
        _refuse(str(path), f"the file cannot be read ({error.strerror or error})", "a readable file")


def _check_start(path: Path, line: bytes) -> None:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        _refuse(str(path), "the text is UTF-16", "UTF-8: save it again with the encoding UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if line.startswith(b"\xef\xbb\xbf"):
        _refuse(str(path), "the file begins with a byte order mark (BOM)", "UTF-8 without BOM: save it again as plain UTF-8")
    if line.startswith(b"\x1f\x8b"):
        _refuse(str(path), "the file is gzip data", f"plain text, or the name {path.name}.gz")


def _decode(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = show(line[max(0, error.start - 20) : error.start + 1].decode("latin-1"))
        _refuse(f"{path}:{number}", f"the bytes at {found} are not UTF-8", "UTF-8: save it again (iconv -f LATIN1 -t UTF-8)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadJson(f"the key {show(twice)} stands twice in one object")
    return values


def _constant(name: str) -> NoReturn:
    raise _BadJson(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _BadJson(f"the number {show(digits, 20)} is too large")
    return value


# One for all rows: json.loads would make one for each.
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _strict_json(where: str, text: str, example: str) -> Any:
    """One JSON value: unique keys, finite numbers, whole Unicode characters."""
    try:
        value = _STRICT.decode(text)
        if _SURROGATE.search(text):  # only an escape can smuggle in half of a surrogate pair, which no tokenizer can encode
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        _refuse(where, "an escape such as \\ud800 is half of a character", "whole Unicode characters", example)
    except RecursionError:
        _refuse(where, "brackets nested too deep", "one flat JSON object", example)
    except json.JSONDecodeError as error:
        near = show(text[max(0, error.pos - 20) : error.pos + 20])
        _refuse(
            where, f"not JSON ({error.msg} at line {error.lineno}, column {error.colno}, near {near})", "strict JSON", example
        )
    except ValueError as error:  # _BadJson, and integers with thousands of digits
        _refuse(where, f"not JSON ({error})", "strict JSON", example)


def _row(path: Path, number: int, value: Any, example: str) -> Row:
    if not isinstance(value, dict):
        hint = " (a list of records belongs in a file named .json)" if isinstance(value, list) else ""
        _refuse(f"{path}:{number}", f"the row is {show(value)}", f"a JSON object{hint}", example)
    return Row(str(path), number, value, example)


def _jsonl(path: Path, example: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        text = _decode(path, number, line)
        if text.strip():
            yield _row(path, number, _strict_json(f"{path}:{number}", text.rstrip("\r\n"), example), example)


def _json_list(path: Path, example: str) -> Iterator[Row]:
    text = "".join(_decode(path, number, line) for number, line in enumerate(_lines(path), start=1))
    if not text.strip():
        return
    if not text.lstrip().startswith("["):
        found = f"the file begins with {show(text.lstrip()[:20])}"
        _refuse(str(path), found, "one JSON list (one record a line belongs in a file named .jsonl)", f"[{example}, ...]")
    for number, value in enumerate(_strict_json(str(path), text, f"[{example}, ...]"), start=1):
        yield _row(path, number, value, example)


def _csv(path: Path, example: str) -> Iterator[Row]:
    text = "".join(_decode(path, number, line) for number, line in enumerate(_lines(path), start=1))
    csv.field_size_limit(1 << 30)  # the default refuses cells over 128 KiB, which a long text may reach
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    expected = "a header line with the fields' names, then one cell for each name"
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = [name for name in header if header.count(name) > 1]
        if twice:
            _refuse(str(path), f"the column {show(twice[0])} stands twice in the header", expected, example)
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(header):
                _refuse(f"{path}:{number}", f"{len(cells)} cells under {len(header)} columns ({show(cells)})", expected, example)
            values: dict[str, Any] = dict(zip(header, cells, strict=True))
            for name in CSV_JSON_FIELDS:
                if name in values and not values[name].strip():
                    del values[name]
                elif name in values:
                    values[name] = _strict_json(f"{path}:{number}: field {show(name)}", values[name], example)
            for name in CSV_TEXTS_OR_MESSAGES:
                if name in values and _is_messages(values[name]):
                    values[name] = _strict_json(f"{path}:{number}: field {show(name)}", values[name], example)
            yield Row(str(path), number, values, example)
    except csv.Error as error:
        _refuse(str(path), f"not CSV ({error}, near line {reader.line_num})", "comma-separated, double-quoted text", example)


def _is_messages(cell: str) -> bool:
    """Whether a cell is the JSON of a conversation; a text may well begin with a bracket."""
    if not cell.lstrip().startswith("["):
        return False
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and x.keys() >= {"role", "content"} for x in value)


def _columnar(name: str, records: Iterable[dict[str, Any]], example: str) -> Iterator[Row]:
    for number, record in enumerate(records, start=1):
        yield Row(name, number, {key: value for key, value in record.items() if value is not None}, example)


def _datasets() -> Any:
    import datasets  # takes a second: only for those who need it

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said once, by us
    datasets.disable_progress_bars()
    return datasets


def _parquet(path: Path) -> list[dict[str, Any]]:
    datasets = _datasets()
    try:
        with open(path, "rb"), tempfile.TemporaryDirectory() as cache:  # its Arrow copy is not worth keeping
            return list(datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True))
    except PermissionError:
        _refuse(str(path), "no permission to read the file", "a file that this user may read (chmod u+r)")
    except Exception as error:  # the library's errors share no base class
        cause = show(str(error.__cause__ or error), 160)
        _refuse(str(path), f"not a readable Parquet file ({cause})", "Parquet as written by pandas, pyarrow or datasets")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as a .parquet file, with values that JSON cannot hold; a field that a row has not is null in it."""
    names = dict.fromkeys(name for row in rows for name in row)
    _datasets().Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}).to_parquet(str(path))
    return path


def _is_hub_name(source: str) -> bool:
    """owner/name, where no such path exists and the end does not look like a data file."""
    looks = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    return looks and not os.path.exists(source) and not source.lower().endswith(SUFFIXES)


def _hub_dataset(name: str, split: str) -> Iterable[dict[str, Any]]:
    datasets = _datasets()
    try:
        return cast(Iterable[dict[str, Any]], datasets.load_dataset(name, split=split))
    except Exception as error:  # no network, offline mode, unknown name or split, needs a login: no common base class
        cause = show(f"{type(error).__name__}: {error}", 160)
        way_out = (
            "an existing path, or a data set that this machine can download or has in its cache (offline: give a local file)"
        )
        _refuse(name, f"no such path, and the Hugging Face data set's split {show(split)} cannot be loaded ({cause})", way_out)
