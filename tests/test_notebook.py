"""examples/rlhf.ipynb runs from top to bottom with the embedded model."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples/rlhf.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_samples_of_both_policies(tmp_path, monkeypatch):
    monkeypatch.setenv("TERCET_NOTEBOOK_RUN", str(tmp_path))
    monkeypatch.delenv("TERCET_MODEL", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert shown.count("sft ") >= 2 and shown.count("ppo ") >= 2
    assert (tmp_path / "run/ppo/model/model.safetensors").exists()


def test_the_notebook_is_committed_without_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)
