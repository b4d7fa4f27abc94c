"""docs/conformance.md names the tests that exist, every row has one, and no row failed when it was written."""

from __future__ import annotations

import re

from conformance.document import read_section
from conformance.rows import FILES, NOTEBOOK, PEERS, names_in, names_of


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert [row for row in NOTEBOOK if row.startswith("row_")] == [f"row_{n:02d}" for n in range(1, 14)]
    assert [row for row in PEERS if row.startswith("row_")] == [f"row_{n:02d}" for n in range(1, 29)]
    for file, rows in FILES.items():
        assert all(names_of(file, row) for row in rows)
        assert sorted(name for row in rows for name in names_of(file, row)) == sorted(names_in(file))


def test_the_committed_table_names_exactly_the_tests_that_exist() -> None:
    """Out of date? `make conformance` writes it anew."""
    named = re.findall(r"`tests/conformance/(\w+\.py)::(\w+)`", read_section("table"))
    assert sorted(named) == sorted((file, name) for file in FILES for name in names_in(file))


def test_no_row_of_the_committed_table_failed() -> None:
    rows = [line for line in read_section("table").splitlines() if line.startswith("|") and "::" in line]
    assert len(rows) == len(NOTEBOOK) + len(PEERS)
    assert all(re.search(r"\| (pass|cannot occur .*refused: pass)( \(\d+ cases\))? \|$", line) for line in rows)
