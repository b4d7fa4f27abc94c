"""Checkpoints tensor by tensor: merged adapters written piece by piece, and half precision read as it is stored."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from model_zoo import ARCHITECTURES, LLAMA_LIKE, SHAPES, bpe_tokenizer, causal_lm, moved, ragged, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from tercet.models import adapters, storage
from tercet.models.adapters import Backbone, Rank
from tercet.models.load import load_causal_lm, load_classifier, save_classifier, save_policy
from tercet.models.precision import round_weights
from tercet.models.roles import Policy, ScoreModel
from tercet.models.storage import stored_in_bfloat16, stored_tensors
from tercet.types import TercetError

NAMED = pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "llama_untied", "qwen3", "opt"])


def backbone_of(source: str, dtype: torch.dtype = torch.float32) -> Backbone:
    return Backbone(source, functools.partial(loaded, load_causal_lm, source), dtype, Rank(2, 6))


def loaded(load: Any, source: str, half: bool) -> Any:
    """As the workshop loads."""
    return load(source, rounded=half)


def save(role: Policy | ScoreModel, folder: Path) -> dict[str, torch.Tensor]:
    """What its merged checkpoint holds."""
    if isinstance(role, Policy):
        save_policy(role.full_precision(), bpe_tokenizer(), folder, temperature=1.0, stop_ids=[0], card="")
    else:
        save_classifier(role.full_precision(), bpe_tokenizer(), folder, card="")
    return load_file(folder / "model.safetensors")


@NAMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_piece_by_piece_it_is_what_the_whole_model_would_be(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = backbone_of(write_checkpoint(tmp_path / "base", causal_lm(architecture)), dtype)
    roles = [moved(backbone.policy(seed=0)), moved(backbone.scorer(seed=1))]
    assert all(next(role.full_precision().parameters()).is_meta for role in roles)
    pieces = [save(role, tmp_path / f"pieces{place}") for place, role in enumerate(roles)]
    monkeypatch.setattr(adapters, "saves_piecewise", lambda *arguments: False)
    assert not any(parameter.is_meta for role in roles for parameter in role.full_precision().parameters())
    wholes = [save(role, tmp_path / f"wholes{place}") for place, role in enumerate(roles)]
    for own, wanted in zip(pieces, wholes):
        assert own.keys() == wanted.keys()
        for name, tensor in wanted.items():
            rows = len(tensor) - (len(tensor) == 289)  # the pad token's row is random there, and never read
            assert own[name].dtype is torch.float32 and own[name].shape == tensor.shape
            assert torch.equal(own[name][:rows], tensor[:rows]), name
    for place, kind in enumerate((AutoModelForCausalLM, AutoModelForSequenceClassification)):
        configs = [json.loads((tmp_path / f"{way}{place}/config.json").read_text()) for way in ("pieces", "wholes")]
        assert configs[0] == configs[1]
        model = kind.from_pretrained(tmp_path / f"pieces{place}")
        assert model.dtype is torch.float32


def test_a_base_models_checkpoint_has_names_without_the_prefix(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "base", causal_lm("gpt2"))
    stored = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in stored.items()}, tmp_path / "base/model.safetensors", {"format": "pt"}
    )
    policy, sequences = moved(backbone_of(source).policy(seed=0)), ragged(SHAPES)
    assert next(policy.full_precision().parameters()).is_meta
    assert save(policy, tmp_path / "out").keys() == stored.keys()
    with torch.no_grad():
        assert torch.allclose(Policy(load_causal_lm(str(tmp_path / "out")))(sequences)[0], policy(sequences)[0], atol=1e-4)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "base", causal_lm("llama_untied"))
    single = load_file(tmp_path / "base/model.safetensors")
    load_causal_lm(source).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base/model.safetensors").unlink(missing_ok=True)
    assert len(set(stored_tensors(source).values())) > 2 and stored_tensors(source).keys() == single.keys()
    found = save(backbone_of(source).policy(seed=0), tmp_path / "out")
    assert found.keys() == single.keys() and all(torch.equal(found[name], tensor) for name, tensor in single.items())


def test_under_other_names_the_whole_model_is_put_together(tmp_path: Path) -> None:
    """As of mixtures of experts, which transformers reorders when it loads them."""
    source = write_checkpoint(tmp_path / "base", causal_lm("llama_tied"))
    backbone = backbone_of(source)
    path = tmp_path / "base/model.safetensors"
    stored = load_file(path)
    path.unlink()  # what the backbone holds are pages of this very file
    save_file({f"other.{name}": tensor for name, tensor in stored.items()}, path, {"format": "pt"})
    backbone._load = lambda half: causal_lm("llama_tied")
    assert not any(parameter.is_meta for parameter in backbone.policy(seed=0).full_precision().parameters())


def test_a_checkpoint_that_has_changed_meanwhile_is_not_merged(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "base", causal_lm("gpt2"))
    policy = backbone_of(source).policy(seed=0)
    stored = {name: tensor.clone() for name, tensor in load_file(tmp_path / "base/model.safetensors").items()}
    stored["transformer.h.1.mlp.c_proj.weight"][3, 4] += 1.0
    (tmp_path / "base/model.safetensors").unlink()
    save_file(stored, tmp_path / "base/model.safetensors", {"format": "pt"})
    with pytest.raises(TercetError, match=r"base: transformer\.h\.1\.mlp\.c_proj\.weight has changed since it was loaded"):
        save(policy, tmp_path / "out")


def test_one_tensor_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read when the one before it has been written."""
    policy = moved(backbone_of(write_checkpoint(tmp_path / "base", causal_lm("gpt2"))).policy(seed=0))
    sizes, read = [], storage._tensor

    def watched(path: Path, name: str) -> torch.Tensor:
        file = tmp_path / "out/model.safetensors"
        sizes.append(file.stat().st_size if file.exists() else 0)
        return read(path, name)

    monkeypatch.setattr(storage, "_tensor", watched)
    found = save(policy, tmp_path / "out")
    assert len(sizes) == len(found) and sizes == sorted(set(sizes))


@NAMED
def test_half_is_what_freezing_leaves(architecture: str, tmp_path: Path) -> None:
    """Of a checkpoint in float32, and of one in bfloat16, which is never made float32."""
    source = write_checkpoint(tmp_path / "wide", causal_lm(architecture))
    for folder, narrow in ((source, False), (str(tmp_path / "narrow"), True)):
        if narrow:
            load_causal_lm(source).bfloat16().save_pretrained(folder)
        assert stored_in_bfloat16(folder) is narrow
        assert {p.dtype for p in load_causal_lm(folder, as_stored=True).parameters()} == {
            torch.bfloat16 if narrow else torch.float32
        }
        for load, kind in ((load_causal_lm, Policy), (lambda f, **o: load_classifier(f, num_labels=1, **o), ScoreModel)):
            torch.manual_seed(0)  # a new head's
            wanted = kind(load(folder), torch.bfloat16)
            torch.manual_seed(0)
            found = kind(loaded(load, folder, half=True), torch.bfloat16)
            wanted.freeze()
            for (name, own), other in zip(found.named_parameters(), wanted.parameters()):
                assert own.dtype is other.dtype, name
                assert torch.equal(own, other) or "score" in name, name
            if kind is Policy:
                found.freeze()
                with torch.no_grad():
                    assert torch.equal(found(ragged(SHAPES))[0], wanted(ragged(SHAPES))[0])
    assert not stored_in_bfloat16(str(tmp_path / "nowhere"))
    mixed = {f"w{i}": torch.ones(2, dtype=dtype) for i, dtype in enumerate((torch.bfloat16, torch.float32))}
    save_file(mixed, tmp_path / "narrow/model.safetensors", {"format": "pt"})
    assert not stored_in_bfloat16(str(tmp_path / "narrow"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_reading_is_rounding_what_transformers_reads(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, buffers and results. GPT-NeoX's checkpoints have other names than its modules: they are left to transformers."""
    source = write_checkpoint(tmp_path, causal_lm(architecture))
    wanted = load_causal_lm(source)
    round_weights(wanted)
    read = AutoModelForCausalLM.from_pretrained
    whole: list[Any] = []
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **options: whole.append(1) or read(*args, **options)
    )  # type: ignore[func-returns-value]
    found = load_causal_lm(source, rounded=True)
    assert (not whole or architecture == "gpt_neox") and not found.training
    own, theirs = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (found, wanted))
    assert own.keys() == theirs.keys()
    for name, tensor in own.items():
        assert tensor.dtype is theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert found.config.to_dict() == wanted.config.to_dict() and found.config.name_or_path == wanted.config.name_or_path
    policies = [Policy(model, torch.bfloat16) for model in (found, wanted)]
    with torch.no_grad():
        assert torch.equal(*(policy(ragged(SHAPES))[0] for policy in policies))


def test_a_rounded_model_holds_nothing_of_the_file(tmp_path: Path) -> None:
    """Each tensor has memory of its own: views would keep the whole file."""
    model = load_causal_lm(write_checkpoint(tmp_path, causal_lm("llama_untied")), rounded=True)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied"])
def test_a_head_of_its_own_stays_where_the_configuration_says_tied(architecture: str, tmp_path: Path) -> None:
    """transformers keeps what a checkpoint has; rounded, and merged with an adapter, too. Equal copies are tied."""
    model = causal_lm(architecture)
    source = write_checkpoint(tmp_path / "base", model)
    path = tmp_path / "base/model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for difference in (1.0, 0.0):
        head = model.get_output_embeddings().weight.detach() + difference * torch.eye(288, 32)
        path.unlink()
        save_file({**tensors, "lm_head.weight": head.clone()}, path, {"format": "pt"})
        wanted = load_causal_lm(source)
        assert torch.equal(wanted.get_output_embeddings().weight, head)
        round_weights(wanted)
        found = load_causal_lm(source, rounded=True)
        assert torch.equal(found.get_output_embeddings().weight, head.bfloat16())
        merged = save(backbone_of(source).policy(seed=0), tmp_path / f"out{difference}")
        assert torch.equal(merged["lm_head.weight"], head) if difference else "lm_head.weight" not in merged


def test_the_single_file_is_read_where_there_is_an_index_too(tmp_path: Path) -> None:
    """As transformers does."""
    causal_lm("gpt2", seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    causal_lm("gpt2", seed=2).save_pretrained(tmp_path / "single")
    (tmp_path / "single/model.safetensors").rename(tmp_path / "model.safetensors")
    wanted = load_causal_lm(str(tmp_path))
    round_weights(wanted)
    for own, other in zip(load_causal_lm(str(tmp_path), rounded=True).parameters(), wanted.parameters(), strict=True):
        assert torch.equal(own, other)


def test_buffers_that_a_checkpoint_has_are_read(tmp_path: Path) -> None:
    model = causal_lm("gpt2")
    model.register_buffer("scale", torch.full((3,), 2.0))
    model.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=False):
        read = AutoModelForCausalLM.from_config(model.config)
        read.register_buffer("scale", torch.zeros(3))
    read.tie_weights()
    assert storage.reads_piecewise(read, str(tmp_path), lambda parameter: torch.float32)
    assert read.scale.tolist() == [2.0, 2.0, 2.0] and torch.equal(read.lm_head.weight, model.lm_head.weight)


def test_rounded_reading_refuses_what_whole_reading_refuses(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, causal_lm("gpt2"))
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for change in ({"transformer.ln_f.weight": None}, {"transformer.ln_f.weight": torch.ones(7)}):
        path.unlink()
        save_file({name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}, path, {"format": "pt"})
        sentences = []
        for rounded in (False, True):
            with pytest.raises(TercetError) as caught:
                load_causal_lm(source, rounded=rounded)
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


def test_norms_and_scaled_embeddings_stay_wide(tmp_path: Path) -> None:
    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", vocab_size=288, **LLAMA_LIKE))
    for model, embedding in ((causal_lm("llama_untied"), torch.bfloat16), (gemma, torch.float32)):
        round_weights(model)
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert {dtype for name, dtype in kinds.items() if "norm" in name} == {torch.float32}
        assert {dtype for name, dtype in kinds.items() if "proj" in name} == {torch.bfloat16}
        assert kinds["model.embed_tokens.weight"] is embedding
