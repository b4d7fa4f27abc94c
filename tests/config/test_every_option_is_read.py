"""Every field of every section has one default and is read by something outside tercet/config."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tercet
from tercet.config.load import Config, _section_of
from tercet.config.section import Section

PACKAGE = Path(tercet.__file__).parent

# How a section is called where its fields are read: the last name before the field in `config.ppo.gamma`, `term.kind`.
# PPOConfig arrives in the stages as `config`, and so do the supervised stages' sections.
CALLED = {
    "Config": {"config", "loaded"},
    "ModelConfig": {"model"},
    "ScratchConfig": {"scratch"},
    "AdapterConfig": {"adapter"},
    "DataConfig": {"data"},
    "PretrainConfig": {"config", "pretrain"},
    "SFTConfig": {"config", "sft"},
    "RewardConfig": {"config", "reward"},
    "PPOConfig": {"config", "ppo"},
    "KLConfig": {"config", "kl"},
    "RewardTerm": {"term"},
    "EvaluationConfig": {"evaluation"},
    "CheckpointConfig": {"checkpoint"},
    "MachineConfig": {"machine", "settings"},
}
# Files in which a section arrives under the bare name `config`.
BARE = {
    "Config": {"jobs", "pipeline.py", "sampler.py", "quickstart.py", "doctor.py"},
    "PretrainConfig": {"stages/sft.py", "stages/supervised.py"},
    "SFTConfig": {"stages/sft.py", "stages/supervised.py"},
    "RewardConfig": {"stages/reward.py", "stages/supervised.py"},
    "PPOConfig": {"stages/ppo.py", "stages/rollout.py", "stages/update.py", "jobs"},
    "KLConfig": {"stages/ppo.py"},
}


def sections(section: type[Section] = Config) -> Iterator[type[Section]]:
    """Every section class, the outermost first."""
    yield section
    for info in section.model_fields.values():
        inner = _section_of(info, inside_containers=True)
        if inner is not None:
            yield from sections(inner)


@cache
def reads() -> set[tuple[str, str, str]]:
    """(file, owner, field) of every attribute access `owner.field` outside tercet/config."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("config/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                called = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                found.add((name, called, node.attr))
    return found


def is_read(section: type[Section], field: str) -> bool:
    owners, bare = CALLED[section.__name__], BARE.get(section.__name__, set())
    return any(
        attribute == field
        and owner in owners
        and (owner != "config" or any(file == place or file.startswith(f"{place}/") for place in bare))
        for file, owner, attribute in reads()
    )


ALL = sorted({(section.__name__, name) for section in sections() for name in section.model_fields})
BY_CLASS = {section.__name__: section for section in sections()}


@pytest.mark.parametrize(("section", "field"), ALL, ids=[f"{section}.{field}" for section, field in ALL])
def test_something_reads_it(section: str, field: str) -> None:
    read = "minibatch" if field == "minibatch_size" else field  # through the property PPOConfig.minibatch
    assert is_read(BY_CLASS[section], read), f"nothing outside tercet/config reads {section}.{field}"


def test_a_field_that_nothing_reads_is_found() -> None:
    assert not is_read(BY_CLASS["PPOConfig"], "entropy_coef")
    assert not is_read(BY_CLASS["EvaluationConfig"], "gamma"), "another section's field of that name must not count"


def test_defaults_are_in_the_configuration_alone() -> None:
    """No `getattr(config, name, default)` and no `config.get(name, default)` anywhere else: those would be second defaults."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "getattr"
                and len(node.args) == 3
            ):
                owner = ast.unparse(node.args[0])
                names = (
                    "config.ppo",
                    "config.sft",
                    "config.reward",
                    "config.data",
                    "config.evaluation",
                    "self.config",
                    "shop.config",
                )
                assert not owner.startswith(names), f"{path}:{node.lineno}"


def test_every_field_has_an_explanation_and_only_the_model_is_required() -> None:
    for section in sections():
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name}"
            assert not info.is_required() or (section is Config and name == "model"), f"{section.__name__}.{name}"
