"""`make conformance` (`python -m conformance.write_table` in tests/): run the tests of every row and write docs/conformance.md.

The table's results are those of the run's own JUnit report.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conformance.document import replace_section
from conformance.rows import FILES, HERE, NOTEBOOK, PEERS, names_of
from conformance.test_peer_errors import CANNOT_OCCUR

ROOT = HERE.parents[1]


def results() -> dict[tuple[str, str], list[str]]:
    """What each case of each test came to, by (file, function): "pass", "FAIL" or "skipped"."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(HERE / file) for file in FILES]
        pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", f"--junitxml={report}", *files])
        cases = ElementTree.parse(report).getroot().iter("testcase")
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for case in cases:
            file = case.get("classname", "").rpartition(".")[2] + ".py"
            wrong = {"failure", "error"} & {child.tag for child in case}
            skipped = case.find("skipped") is not None
            found[file, case.get("name", "").partition("[")[0]].append("FAIL" if wrong else "skipped" if skipped else "pass")
    return found


def verdict(cases: list[str]) -> str:
    """Of all cases of a row: "pass (3 cases)", or how many did not."""
    passed = cases.count("pass")
    if cases and passed == len(cases):
        return "pass" if passed == 1 else f"pass ({passed} cases)"
    return f"FAIL ({len(cases) - passed} of {len(cases)} cases)"


def lines(file: str, found: dict[tuple[str, str], list[str]]) -> list[str]:
    """The table's lines of one file."""
    table = []
    for row in FILES[file]:
        peer, wrong = PEERS[row] if file == "test_peer_errors.py" else ("the notebook", NOTEBOOK[row])
        names = names_of(file, row)
        cases = [case for name in names for case in found.get((file, name), ["not run"])]
        number = row.removeprefix("row_").lstrip("0") if row.startswith("row_") else "trap"
        result = verdict(cases)
        if number.isdigit() and file == "test_peer_errors.py" and int(number) in CANNOT_OCCUR:
            result = f"cannot occur ({CANNOT_OCCUR[int(number)]}); refused: {result}"
        links = "<br>".join(f"`tests/conformance/{file}::{name}`" for name in names)
        table.append(f"| {number} | {peer} | {wrong} | {links} | {result} |")
    return table


def main() -> int:
    found = results()
    head = ["| row | where | what goes wrong there | our test | result |", "|---|---|---|---|---|"]
    notebook, peers = (lines(file, found) for file in FILES)
    cases = [case for each in found.values() for case in each]
    passed = f"{len(found)} tests in {len(cases)} cases, of which {cases.count('pass')} passed"
    text = [
        f"{len(notebook)} rows of the notebook's errors and {len(peers)} of other trainers': {passed}.",
        "",
        "### Errors of the original notebook",
        "",
        *head,
        *notebook,
        "",
        "### Errors and traps of other trainers",
        "",
        *head,
        *peers,
    ]
    replace_section("table", "\n".join(text))
    return 0 if cases and set(cases) == {"pass"} else 1


if __name__ == "__main__":
    sys.exit(main())
