"""The same configuration gives the same results as when golden.json was written; if it should not, bump fingerprint.VERSIONS.

In float64, where rounding differs between machines by far less than the tolerance, and from weights of our own: transformers' random
ones differ between its versions. To write it anew after a wanted change: python tests/test_golden.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config, write_tiny_data
from model_zoo import bpe_tokenizer, causal_lm, write_checkpoint

from tercet.fingerprint import VERSIONS

GOLDEN = Path(__file__).with_name("golden.json")
WATCHED = {
    "sft": ("loss", "grad_norm"),
    "reward": ("loss", "accuracy", "grad_norm"),
    "ppo": ("score", "kl", "value_loss", "grad_norm"),
}


def results(folder: Path) -> dict[str, Any]:
    """The watched metrics of every step of a fresh tiny run in float64, and the evaluation's figures."""
    import tercet

    write_tiny_data(folder / "data")
    start = write_checkpoint(folder / "start", causal_lm("gpt2"), bpe_tokenizer())
    config = tiny_config(folder / "data", folder / "run")
    machine = {**config["machine"], "dtype": "float64"}
    run = tercet.run({**config, "model": {"name": start}, "machine": machine})
    found: dict[str, Any] = {}
    for stage, names in WATCHED.items():
        rows = [json.loads(line) for line in (run.folder / stage / "metrics.jsonl").open()]
        found[stage] = [[row[name] for name in names] for row in rows]
    found["evaluate"] = [run.summary[name] for name in ("sft.score", "ppo.score", "ppo.kl", "ppo.length")]
    return found


@pytest.mark.parametrize("stage", [*WATCHED, "evaluate"])
def test_the_results_of_each_stage_are_those_of_its_version(stage, tmp_path_factory, request):
    cache = request.config.stash.setdefault(_KEY, {})
    if not cache:
        cache.update(results(tmp_path_factory.mktemp("golden")))
    golden = json.loads(GOLDEN.read_text())
    assert golden["versions"][stage] == VERSIONS[stage], "write golden.json anew, see above"
    flat, wanted = _flat(cache[stage]), _flat(golden["results"][stage])
    assert flat == pytest.approx(wanted, rel=1e-6, abs=1e-9), (
        f"{stage} gives other results: was that wanted? Then bump its version"
    )


_KEY: pytest.StashKey[dict[str, Any]] = pytest.StashKey()


def _flat(rows: list[Any]) -> list[float]:
    return [value for row in rows for value in (row if isinstance(row, list) else [row])]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps({"versions": VERSIONS, "results": results(Path(name))}, indent=1) + "\n")
    sys.exit(0)
