"""Policies part of the way: each weight by hand, an adapter's merged weights, and the trained ones back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_zoo import SHAPES, causal_lm, moved, ragged, write_checkpoint

from tercet.models.adapters import Backbone, Rank
from tercet.models.interpolation import interpolated
from tercet.models.load import load_causal_lm
from tercet.models.roles import Policy
from tercet.models.storage import parameters_of

WEIGHT = 0.25


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "llama_untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_weight_is_a_quarter_of_the_way_and_its_own_again_afterwards(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = write_checkpoint(tmp_path / "base", causal_lm(architecture))
    before = weights(load_causal_lm(source))
    policy, sequences = moved(Policy(load_causal_lm(source), dtype)), ragged(SHAPES)
    trained, logprobs = weights(policy.model), policy(sequences)[0]
    start = parameters_of(policy.model, source)
    assert start is not None
    with pytest.raises(KeyboardInterrupt), interpolated(policy, lambda: start, WEIGHT):
        for name, parameter in policy.model.named_parameters():
            wanted = before[name].double() + WEIGHT * (trained[name].double() - before[name].double())
            assert torch.allclose(parameter.double(), wanted, rtol=1e-6, atol=1e-7), name
            assert not torch.equal(parameter, trained[name]), name
        assert not torch.allclose(policy(sequences)[0], logprobs, atol=1e-3)
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, trained[name]) for name, parameter in policy.model.named_parameters())
    assert torch.equal(policy(sequences)[0], logprobs) and all(p.requires_grad for p in policy.parameters())


def test_all_the_way_nothing_is_read(tmp_path: Path) -> None:
    policy = moved(Policy(causal_lm("gpt2")))
    trained = weights(policy.model)

    def start(name: str) -> torch.Tensor:
        raise AssertionError(name)

    with interpolated(policy, lambda: start, 1.0):
        assert all(torch.equal(parameter, trained[name]) for name, parameter in policy.model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adapter_is_a_quarter_of_what_it_adds(dtype: torch.dtype, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "base", causal_lm("gpt2"))
    backbone = Backbone(source, lambda half: load_causal_lm(source, rounded=half), dtype, Rank(2, 6))
    policy = moved(backbone.policy(seed=0))
    trained = weights(policy.model)

    def merged() -> dict[str, torch.Tensor]:
        policy.full_precision().save_pretrained(tmp_path / "merged")
        return weights(load_causal_lm(str(tmp_path / "merged")))

    before, all_the_way = weights(load_causal_lm(source)), merged()
    with interpolated(policy, lambda: before.__getitem__, WEIGHT):
        part = merged()
    for name, first in before.items():
        assert torch.allclose(part[name], first + WEIGHT * (all_the_way[name] - first), atol=1e-6), name
    assert any(not torch.equal(part[name], first) for name, first in before.items())
    assert all(torch.equal(parameter, trained[name]) for name, parameter in policy.model.named_parameters())


def test_a_checkpoint_with_other_names_gives_no_parameters(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "base", causal_lm("gpt2"))
    assert parameters_of(causal_lm("llama_tied"), source) is None
