"""Roles on one backbone: shared tensors, LoRA by its formula, merging, adapter folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import SHAPES, causal_lm, ragged
from transformers import AutoModelForCausalLM, FalconConfig, MambaConfig

from tercet.models import adapters
from tercet.models.adapters import Backbone, Rank
from tercet.models.roles import Policy, ScoreModel
from tercet.runtime.distributed import World
from tercet.runtime.optim import Optimizer
from tercet.types import TercetError

SOME = pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "llama_untied", "gemma2"])


def backbone_of(architecture: str, dtype: torch.dtype = torch.float64, rank: int = 2) -> Backbone:
    return Backbone("some/base", lambda half: causal_lm(architecture), dtype, Rank(rank, 6))


def move(role: Policy | ScoreModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in role.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype))


@SOME
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_new_policy_is_the_reference_and_a_new_scorer_gives_zero(architecture: str, dtype: torch.dtype) -> None:
    backbone, sequences = backbone_of(architecture, dtype), ragged(SHAPES)
    assert torch.equal(backbone.policy(seed=0)(sequences)[0], backbone.reference(sequences)[0])
    assert backbone.scorer(seed=0)(sequences).tolist() == [0.0] * len(sequences)


@SOME
def test_what_is_frozen_is_held_once(architecture: str) -> None:
    backbone = backbone_of(architecture)
    roles = [backbone.policy(seed=0), backbone.policy(seed=1), backbone.scorer(seed=2), backbone.scorer(seed=3)]
    shared = {p.data_ptr() for p in backbone.reference.parameters()}
    for role in roles:
        frozen = [p for p in role.parameters() if not p.requires_grad]
        assert frozen and all(p.data_ptr() in shared for p in frozen)
        own = {p.data_ptr() for p in role.parameters() if p.requires_grad}
        assert own and not own & shared
    trained = [{p.data_ptr() for p in role.parameters() if p.requires_grad} for role in roles]
    assert sum(len(some) for some in trained) == len(set().union(*trained))


def test_one_role_learns_and_the_others_stand_still() -> None:
    backbone, sequences = backbone_of("gpt2"), ragged(SHAPES)
    policy, value = backbone.policy(seed=0), backbone.scorer(seed=1)
    reference, before = backbone.reference(sequences)[0], value(sequences)
    move(policy)
    assert not torch.allclose(policy(sequences)[0], reference)
    assert torch.equal(backbone.reference(sequences)[0], reference) and torch.equal(value(sequences), before)


def test_an_adapter_adds_alpha_over_rank_times_b_a() -> None:
    """By hand on one layer of GPT-2, whose weights are (in, out)."""
    policy = backbone_of("gpt2").policy(seed=0)
    move(policy)
    layer = policy.model.transformer.h[0].mlp.c_fc
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    inputs = torch.randn(3, a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = inputs @ layer.base_layer.weight + layer.base_layer.bias + 6.0 / 2 * (inputs @ a.T) @ b.T
    assert torch.allclose(layer(inputs), wanted, rtol=1e-12)


@SOME
def test_merged_it_is_an_ordinary_model_with_the_same_numbers(architecture: str) -> None:
    backbone, sequences = backbone_of(architecture, torch.float32), ragged(SHAPES)
    policy, scorer = backbone.policy(seed=0), backbone.scorer(seed=1)
    move(policy)
    move(scorer)
    model, classifier = policy.full_precision(), scorer.full_precision()
    with torch.no_grad():
        assert model.dtype is classifier.dtype is torch.float32 and not any("lora" in name for name in model.state_dict())
        assert torch.allclose(Policy(model)(sequences)[0], policy(sequences)[0], atol=1e-4)
        assert torch.allclose(ScoreModel(classifier)(sequences), scorer(sequences), atol=1e-4)


def test_a_scorer_comes_back_from_its_folder(tmp_path: Path) -> None:
    backbone, sequences = backbone_of("llama_untied"), ragged(SHAPES)
    scorer = backbone.scorer(seed=0)
    move(scorer)
    scorer.set_offset(0.75)
    backbone.save(scorer, tmp_path)
    again = backbone.scorer(tmp_path, seed=9)
    assert torch.allclose(again(sequences), scorer(sequences), atol=1e-5) and again.offset == 0.75
    with pytest.raises(TercetError, match=r"another model or another model.adapter.rank; run `tercet run` with --from reward"):
        backbone_of("llama_untied", rank=3).scorer(tmp_path)


def test_an_optimizer_holds_and_saves_the_adapter_and_the_head_alone() -> None:
    backbone = backbone_of("gpt2")
    for role, heads in ((backbone.policy(seed=0), 0), (backbone.scorer(seed=0), 1)):
        names = list(Optimizer(role, weight_decay=0.0, max_grad_norm=1.0, world=World()).weights())
        assert sum(".lora_A." in name for name in names) == sum(".lora_B." in name for name in names) == (len(names) - heads) / 2


def test_the_seed_decides_the_random_factor() -> None:
    backbone = backbone_of("gpt2")
    torch.manual_seed(1)
    first = backbone.policy(seed=4)
    torch.manual_seed(2)
    same, other = backbone.policy(seed=4), backbone.policy(seed=5)

    def factor(policy: Policy) -> torch.Tensor:
        return next(p for name, p in policy.named_parameters() if "lora_A" in name)

    assert torch.equal(factor(first), factor(same)) and not torch.equal(factor(first), factor(other))


@pytest.mark.parametrize("trusted", [True, False])
def test_a_repositorys_own_code_is_run_only_where_it_is_trusted(trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    build = adapters.AutoModelForSequenceClassification.from_config

    def watched(config: Any, **options: Any) -> Any:
        asked.append(options["trust_remote_code"])
        return build(config, **options)

    monkeypatch.setattr(adapters.AutoModelForSequenceClassification, "from_config", watched)
    backbone = Backbone("some/base", lambda half: causal_lm("gpt2"), torch.float64, Rank(2, 6), trust_remote_code=trusted)
    scorer = backbone.scorer(seed=0)
    assert scorer.merge is not None and scorer.merge() is not None
    assert asked == [trusted, trusted]


def test_what_is_added_to_in_place() -> None:
    """Falcon adds its attention's output onto that of its feed-forward, in place."""
    config = FalconConfig(
        vocab_size=288, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    base, sequences = AutoModelForCausalLM.from_config(config).eval(), ragged(SHAPES)
    policy = Backbone("falcon", lambda half: base, torch.float32, Rank(2, 4)).policy(seed=0)
    policy(sequences)[0].sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_a_policy_comes_back_from_its_folder(tmp_path: Path) -> None:
    backbone, sequences = backbone_of("gpt2"), ragged(SHAPES)
    policy = backbone.policy(seed=0)
    move(policy)
    tmp_path.joinpath("a").mkdir()
    backbone.save(policy, tmp_path / "a")
    again = backbone.policy(tmp_path / "a", seed=4)
    torch.testing.assert_close(again(sequences)[0], policy(sequences)[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(again(sequences)[0], backbone.reference(sequences)[0])


def test_layers_that_peft_leaves_alone_are_one_sentence() -> None:
    """A Mamba's output layers go into a kernel of its own, past any adapter."""
    config = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4, conv_kernel=3)
    backbone = Backbone("some/mamba", lambda half: AutoModelForCausalLM.from_config(config), torch.float32, Rank(2, 6))
    with pytest.raises(
        TercetError, match=r"^some/mamba: adapters cannot be added to MambaForCausalLM \(.*train this model without"
    ):
        backbone.policy(seed=0)
