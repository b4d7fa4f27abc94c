"""The list of mutants fits the code and the document; with -m full every one of them is run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mutants import run
from mutants.mutants import MUTANTS, Mutant


def test_every_target_is_there_exactly_once_and_breaks_into_python() -> None:
    for mutant in MUTANTS:
        source = (run.ROOT / mutant.file).read_text(encoding="utf-8")
        assert run.mutated(mutant, source) != source, mutant.name
        for test in mutant.tests:
            file, _, name = test.partition("::")
            assert f"def {name}(" in (run.ROOT / file).read_text(encoding="utf-8") if name else (run.ROOT / file).is_file(), test


def test_there_are_enough_and_none_twice() -> None:
    assert len(MUTANTS) >= 60
    for count in (Counter((m.file, m.name) for m in MUTANTS), Counter((m.file, m.original, m.replacement) for m in MUTANTS)):
        assert max(count.values()) == 1, count.most_common(1)


@pytest.mark.parametrize("source", ["a = 1\n", "a = b\na = b\n"])
def test_a_target_that_is_not_found_once_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match="not once"):
        run.mutated(Mutant("name", "file.py", "a = b", "a = c", ()), source)


def test_the_document_lists_exactly_these_mutants_and_no_survivor() -> None:
    """Out of date? `make mutants` writes it anew."""
    verdicts = run.written()
    assert list(verdicts) == [f"{m.file}: {m.name}" for m in MUTANTS]
    assert set(verdicts.values()) <= {"killed", "timeout", "equivalent"}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_mutant_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the verdicts this shows that the tests pass on the unbroken copy (run_all checks that first)."""
    monkeypatch.chdir(Path(run.ROOT, "tests"))
    verdicts = run.run_all(MUTANTS)
    assert len(verdicts) == len(MUTANTS) and "survived" not in verdicts.values()
