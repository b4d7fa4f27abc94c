from mutants import run
from mutants.mutants import MUTANTS
def test_probe():
    got = run.run_all(MUTANTS[:2])
    assert set(got.values()) == {"killed"}
