"""Whole runs with low-rank adapters on one backbone: the same folders and checkpoints as without."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tercet.config import load_config
from tercet.jobs import workshop
from tercet.jobs.workshop import adapter_folder
from tercet.pipeline import Pipeline
from tercet.runtime.machine import release_free_memory
from tercet.runtime.stage import Interrupt
from tercet.types import TercetError


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, finished_run: Path) -> Path:
    from end_to_end.conftest import Runs

    runs = Runs(tmp_path_factory.mktemp("adapted"), tiny_data, finished_run / "sft/model")
    return runs.run(model={"adapter": {"rank": 4, "alpha": 8}}, ppo={"iterations": 3, "learning_rate": 0.01})


def test_merged_checkpoints_are_base_plus_adapter_as_peft_reads_it(adapted: Path) -> None:
    """peft on the backbone and the merged checkpoint give the same numbers; the adapter has moved the policy."""
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        backbone = AutoModelForCausalLM.from_pretrained(adapted / "sft/model")
        before = backbone(input_ids=ids).logits
        policy = PeftModel.from_pretrained(backbone, str(adapter_folder(adapted / "ppo/model")))
        merged = AutoModelForCausalLM.from_pretrained(adapted / "ppo/model")
        assert merged.dtype is torch.float32
        assert torch.allclose(policy(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)
        assert (merged(input_ids=ids).logits - before).abs().max() > 1e-3
        for name in ("reward/model", "ppo/value"):
            merged_scorer = AutoModelForSequenceClassification.from_pretrained(adapted / name)
            trunk = AutoModelForSequenceClassification.from_pretrained(adapted / "sft/model", num_labels=1)
            scorer = PeftModel.from_pretrained(trunk, str(adapter_folder(adapted / name)))
            scorer.config.pad_token_id = merged_scorer.config.pad_token_id
            assert torch.allclose(scorer(input_ids=ids).logits, merged_scorer(input_ids=ids).logits, atol=1e-4)


def test_what_is_evaluated_is_the_adapter_on_the_backbone(adapted: Path) -> None:
    """In bfloat16 the merged checkpoint, rounded, may be the backbone again."""
    shop = Pipeline(load_config(adapted / "config.yaml")).workshop(Interrupt())
    policy = shop.load_policy(str(adapted / "ppo/model"), frozen=True)
    held = {p.data_ptr() for p in shop.load_policy(shop.sft_source, frozen=True).parameters()}
    own = [name for name, p in policy.named_parameters() if p.data_ptr() not in held]
    assert own and all(".lora_" in name for name in own) and not any(p.requires_grad for p in policy.parameters())
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(adapted / "ppo/model")
        assert torch.allclose(policy.model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4)


def test_the_backbone_of_a_stage_is_gone_when_the_next_ones_is_read(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Pipeline(load_config(adapted / "config.yaml")).workshop(Interrupt())
    policy = shop.load_policy(shop.base)
    before = weakref.ref(shop.backbone(shop.base).reference.model.base_model)
    del policy
    monkeypatch.setattr("tercet.runtime.machine.peak_memory_mb", lambda: 4096.0)
    release_free_memory()  # as the pipeline does between two stages
    alive: list[bool] = []
    read = workshop.load_causal_lm
    monkeypatch.setattr(
        workshop, "load_causal_lm", lambda *args, **options: alive.append(before() is not None) or read(*args, **options)
    )  # type: ignore[func-returns-value]
    shop.load_policy(shop.sft_source)
    assert alive == [False]


def test_evaluation_holds_one_model_at_a_time(adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the base model nor another run's policy is in memory beside the backbone of SFT, PPO and the judges."""
    before = {name: (adapted / f"evaluation/{name}").read_bytes() for name in ("policies.json", "samples.jsonl")}
    shutil.copytree(adapted, tmp_path / "run")
    values = yaml.safe_load((adapted / "config.yaml").read_text()) | {"output": str(tmp_path / "run")}
    values["evaluation"]["policies"] = {"other": values["model"]["name"]}
    monkeypatch.setattr("tercet.runtime.machine.peak_memory_mb", lambda: 4096.0)
    read, seen, alive = workshop.load_causal_lm, [], []

    def counted(*args: Any, **options: Any) -> Any:
        alive.append(sum(model() is not None for model in seen))
        model = read(*args, **options)
        seen.append(weakref.ref(model.base_model))
        return model

    monkeypatch.setattr(workshop, "load_causal_lm", counted)
    Pipeline(load_config(values)).run(["evaluate"], "evaluate")
    assert alive == [0, 0, 0, 0], "the base model, the other policy, the backbone, and the base model once more"
    policies = json.loads((tmp_path / "run/evaluation/policies.json").read_text())
    assert {name: figures for name, figures in policies.items() if name != "other"} == json.loads(before["policies.json"])
    assert {k: v for k, v in policies["other"].items() if "win" not in k} == {
        k: v for k, v in policies["base"].items() if "win" not in k
    }


def test_an_adapters_configuration_does_not_depend_on_the_process(adapted: Path) -> None:
    for name in ("sft/model", "reward/model", "ppo/model", "ppo/value"):
        layers = json.loads((adapter_folder(adapted / name) / "adapter_config.json").read_text())["target_modules"]
        assert layers == sorted(layers) and len(layers) > 1


def test_the_run_has_the_figures_of_any_other(adapted: Path, finished_run: Path) -> None:
    own, other = (json.loads((folder / "summary.json").read_text()) for folder in (adapted, finished_run))
    assert {"reward.eval_accuracy", "ppo.score", "ppo.kl", "win_rate"} <= own.keys() & other.keys()
    rows = [json.loads(line) for line in (adapted / "ppo/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0.0 and rows[-1]["kl"] != 0.0 and rows[0]["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_what_adapters_cannot_be_combined_with_is_said(runs: Any) -> None:
    with pytest.raises(TercetError, match=r"ppo.policy is a model of its own, but with model.adapter all roles share one"):
        load_config(runs.settings(model={"adapter": {}}, ppo={"policy": str(runs.model)}))
    with pytest.raises(TercetError, match=r"set sft.dropout: 0"):
        load_config(runs.settings(model={"adapter": {}}, sft={"dropout": 0.1}))
