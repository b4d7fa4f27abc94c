"""Four models in the memory of one: the roles of a run as low-rank adapters (LoRA, Hu 2021) on one frozen backbone.

Each role is a module tree of its own whose frozen parameters are the very tensors of the backbone, so nothing is ever switched on
or off: the reference is the tree without adapters. What a role learns (its adapter and its head) belongs to it alone.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tercet.models.kernels import is_linear, use_fast_adapters
from tercet.models.load import without_weights
from tercet.models.roles import Policy, ScoreModel, init_score_head, score_head
from tercet.models.storage import saves_piecewise
from tercet.types import TercetError

_WEIGHTS, _OFFSET = "adapter_model.safetensors", "tercet.json"


@dataclass(frozen=True)
class Rank:
    """The size of an adapter: W x + (alpha / rank) B A x, with A (rank, in) random and B (out, rank) zero at first."""

    rank: int
    alpha: int


class Backbone:
    """A frozen causal language model that roles stand on. `load(half=...)` reads its checkpoint, named `source`, in float32 or as
    `round_weights` leaves it."""

    def __init__(
        self,
        source: str,
        load: Callable[..., PreTrainedModel],
        compute_dtype: torch.dtype,
        size: Rank,
        *,
        trust_remote_code: bool = False,
    ):
        self.source = source
        self.reference = Policy(load(half=compute_dtype is torch.bfloat16), compute_dtype)
        self.reference.freeze()
        self._load = load
        self._size = size
        self._without_weights = functools.partial(without_weights, trust_remote_code=trust_remote_code)

    def policy(self, folder: Path | None = None, *, seed: int = 0) -> Policy:
        """The policy of an adapter's folder, or one that starts as the reference."""
        model = _sharing(self.reference.model)
        self._adapt(model, seed)
        if folder is not None:
            _read(model, folder)
        policy = Policy(model, self.reference.compute_dtype)
        policy.merge = lambda: self._merged(policy)
        return policy

    def scorer(self, folder: Path | None = None, *, seed: int = 0) -> ScoreModel:
        """A reward or value model: that of an adapter's folder, or a new one that scores 0."""
        config = copy.deepcopy(self.reference.model.config)
        config.num_labels = 1
        model = self._without_weights(AutoModelForSequenceClassification, config)
        trunk = _sharing(self.reference.model.base_model)
        setattr(model, model.base_model_prefix, trunk)
        head = score_head(model).to_empty(device=self.reference.device)
        nn.Module.to(head, torch.float64 if self.reference.compute_dtype is torch.float64 else torch.float32)
        init_score_head(head, None)
        self._adapt(model, seed)
        if folder is not None:
            _read(model, folder)
            offset = json.loads((folder / _OFFSET).read_text(encoding="utf-8"))["score_offset"]
            model.config.score_offset = offset
        scorer = ScoreModel(model, self.reference.compute_dtype)
        scorer.merge = lambda: self._merged(scorer)
        return scorer

    def save(self, role: Policy | ScoreModel, folder: Path) -> None:
        """Write the role's adapter as PeftModel.from_pretrained reads it."""
        from peft import LoraConfig

        is_policy = isinstance(role, Policy)
        about = LoraConfig(
            r=self._size.rank,
            lora_alpha=self._size.alpha,
            target_modules=sorted(name.removesuffix(".lora_A.default") for name in _adapters(role.model)),
            fan_in_fan_out=_is_transposed(self.reference.model),
            modules_to_save=None if is_policy else [_head_name(role.model)],
            task_type="CAUSAL_LM" if is_policy else "SEQ_CLS",
            base_model_name_or_path=self.source,
        )
        about.inference_mode = True
        about.save_pretrained(str(folder))
        path = folder / "adapter_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        written["target_modules"].sort()  # peft writes a set, in an order that differs from process to process
        path.write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")
        named = {name: parameter.data for name, parameter in role.model.named_parameters() if parameter.requires_grad}
        tensors = {
            f"base_model.model.{name.replace('.default', '')}": value.float().contiguous() for name, value in named.items()
        }
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
        if isinstance(role, ScoreModel):
            (folder / _OFFSET).write_text(json.dumps({"score_offset": role.offset}), encoding="utf-8")

    def _adapt(self, model: PreTrainedModel, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        trunk, prefix = model.base_model, model.base_model_prefix
        linear = [name for name, module in trunk.named_modules() if is_linear(module)]
        settings = LoraConfig(
            r=self._size.rank,
            lora_alpha=self._size.alpha,
            target_modules=[f"{prefix}.{name}" for name in linear],
            fan_in_fan_out=_is_transposed(model),
        )
        trained = {id(p) for p in model.parameters() if p.requires_grad}  # a scorer's head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(settings, model)
            except ValueError as error:  # it knows layers of some architectures that must be left alone
                raise TercetError(
                    f"{self.source}: adapters cannot be added to {type(model).__name__} ({str(error).strip().splitlines()[0]}): train this "
                    "model without model.adapter"
                ) from None
        for name, module in model.named_modules():  # of some mixtures of experts peft wraps a layer's fused weights instead
            if hasattr(module, "lora_A") and not is_linear(module.base_layer):
                raise TercetError(
                    f"{self.source}: adapters cannot be added to {name}, which is no linear layer: train this model without model.adapter"
                )
        use_fast_adapters(model)
        wide = torch.float64 if self.reference.compute_dtype is torch.float64 else torch.float32
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name or id(parameter) in trained)
            if parameter.requires_grad:
                parameter.data = parameter.data.to(wide)

    def _merged(self, role: Policy | ScoreModel) -> PreTrainedModel:
        """An ordinary float32 model that computes what backbone and adapter do together, to be saved; of a role that learns. Its weights
        are put together one by one while that is done, or here where the checkpoint has other names than transformers."""
        kind = AutoModelForCausalLM if isinstance(role, Policy) else AutoModelForSequenceClassification
        model = self._without_weights(kind, copy.deepcopy(role.model.config))
        own = {} if isinstance(role, Policy) else {f"{_head_name(role.model)}.weight": role.head.weight}
        if saves_piecewise(model, self.source, functools.partial(self._added, role), own):
            return model
        whole = self._load(half=False)
        for name, parameter in whole.base_model.named_parameters(prefix=whole.base_model_prefix):
            parameter.data = self._added(role, name, parameter.data)
        if isinstance(role, Policy):
            return whole
        setattr(model, model.base_model_prefix, whole.base_model)
        score_head(model).to_empty(device=role.device).weight.data.copy_(role.head.weight)
        return model

    @torch.no_grad()
    def _added(self, role: Policy | ScoreModel, name: str, stored: Tensor) -> Tensor:
        """A tensor of the checkpoint with what the role's adapter adds to it, in float32."""
        layer, _, last = name.rpartition(".")
        held = getattr(self.reference.model.get_submodule(layer), last)
        if not torch.equal(stored.to(held), held):
            raise TercetError(
                f"{self.source}: {name} has changed since it was loaded: the adapters belong to what stood there before"
            )
        module: Any = role.model.get_submodule(layer)
        if last != "weight" or not hasattr(module, "lora_A"):
            return stored.float()
        return stored.to(held.device, torch.float32) + module.get_delta_weight("default").float()


def _sharing(model: Any) -> Any:
    """Another tree of modules over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _adapters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith(".lora_A.default")]


def _is_transposed(model: nn.Module) -> bool:
    """Whether weights are (in, out), as GPT-2's are."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _head_name(model: PreTrainedModel) -> str:
    head = score_head(model)
    return next(name for name, module in model.named_modules() if module is head)


@torch.no_grad()
def _read(model: PreTrainedModel, folder: Path) -> None:
    found = load_file(folder / _WEIGHTS)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in wanted.items():
        key = f"base_model.model.{name.replace('.default', '')}"
        if key not in found or found[key].shape != parameter.shape:
            raise TercetError(
                f"{folder}: no weights {key} of shape {list(parameter.shape)}: the adapter was trained with another model or another "
                "model.adapter.rank; run `tercet run` with --from reward"
            )
        parameter.copy_(found[key])
