"""`tercet quickstart`: the embedded world, a tiny model from scratch, all stages, one report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console

from tercet.config import load_config
from tercet.errors import TercetError
from tercet.folder import has_begun, require_no_others_files
from tercet.pipeline import Pipeline, RunResult
from tercet.table import print_summary
from tercet.world import generate


def run_quickstart(output: Path, settings: Sequence[str] = (), from_stage: str | None = None) -> RunResult:
    """Write the world's data beside the run, then run all stages with the packaged configuration."""
    output = output.resolve()
    settings = [f"output={json.dumps(str(output), ensure_ascii=False)}", *settings]  # in quotes: YAML takes a path literally
    text = resources.files("tercet").joinpath("quickstart.yaml").read_text(encoding="utf-8")
    require_no_others_files(output)
    own = output / "quickstart.yaml"
    ours = (output / "data/world.json").exists() or has_begun(output) or own.is_file() and own.read_text("utf-8") == text
    taken = next((name for name in ("quickstart.yaml", "data") if (output / name).exists()), None)
    if taken and not ours:
        raise TercetError(f"{output} has {taken!r} already, which is not the quickstart's: choose another place with --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        own.write_text(text, encoding="utf-8")
        config = load_config(own, settings)
        world_file = output / "data/world.json"
        world = json.loads(world_file.read_text(encoding="utf-8")) if world_file.exists() else None
        if world is None or world["seed"] != config.seed:
            world = generate(output / "data", seed=config.seed)
    except OSError as error:
        raise TercetError(f"{output} cannot be written ({error.strerror}): choose another place with --output") from None
    config = load_config(own, settings)  # now its data files exist
    result = Pipeline(config).run(from_stage=from_stage)
    print_summary(result)
    Console(highlight=False).print(f"the annotator's own ceiling of agreement on such pairs: {world['ceiling']['known']:.3f}")
    return result
