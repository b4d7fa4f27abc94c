"""How much memory each stage will need: arithmetic on a model's shape, without its weights.

The rules are those of models/roles.py, models/adapters.py and runtime/optim.py. Measured against real peaks in docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tercet.algo.logprobs import HEAD_CHUNK
from tercet.config import Config
from tercet.models.attention import keeps_weights
from tercet.models.kernels import MOST_PACKED
from tercet.models.load import without_weights
from tercet.models.precision import linear_layers
from tercet.models.roles import kept_bytes
from tercet.runtime.machine import Machine
from tercet.stages.rollout import MOST_KEPT

MIB, GIB = 2**20, 2**30
PROCESS = 500 * MIB  # Python with its libraries, oneDNN's kernels for every shape, gaps in the heap
# Small tensors of adapters come to lie between the activations, so that freed memory is not used again whole (GPT-2: 1.3 to 1.5).
ADAPTER_GAPS = 1.5
# For the same reason a part of what sampling has left free is of no use to the update (GPT-2: 0.2, a model of 0.5 B: 0.4).
ADAPTER_APART = 1 / 3


@dataclass(frozen=True)
class Shape:
    """What the memory of a causal language model follows from.

    parameters: of the whole model; linear: in the linear layers of its trunk; head: in the output layer, which is also the input
    embedding where `tied`; adapter: inputs plus outputs of those linear layers, so that rank * adapter is an adapter's size.
    heads, query, key_value: attention's heads, the width of its queries and that of its keys and values together; inner: width of
    the feed-forward layer, which is `gated` in architectures such as Llama's (three matrices, and RMSNorm) and not in GPT-2's (two,
    and LayerNorm).
    """

    parameters: int
    linear: int
    head: int
    tied: bool
    adapter: int
    layers: int
    width: int
    heads: int
    query: int
    key_value: int
    inner: int
    gated: bool
    vocabulary: int

    @classmethod
    def of(cls, config: Any, *, trust_remote_code: bool = False) -> Shape:
        """The shape of the model that a transformers configuration describes; nothing of its size is allocated."""
        model: Any = without_weights(AutoModelForCausalLM, config, trust_remote_code=trust_remote_code)
        text, head = config.get_text_config(), model.get_output_embeddings()
        modules = linear_layers(model.base_model)
        sizes = [tuple(module.weight.shape) for module in modules]
        inner = max(max(size) for size in sizes)
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            linear=sum(p.numel() for module in modules for p in module.parameters()),
            head=head.weight.numel(),
            tied=head.weight is model.get_input_embeddings().weight,
            adapter=sum(sum(size) for size in sizes),
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=heads,
            query=heads * head_size,
            key_value=2 * (getattr(text, "num_key_value_heads", None) or heads) * head_size,
            inner=inner,
            gated=sum(inner in size for size in sizes) > 2 * text.num_hidden_layers,
            vocabulary=text.vocab_size,
        )


@dataclass(frozen=True)
class Load:
    """What a run asks of a model.

    dtype of matrix products; adapter: its rank, None for full training; tokens: of the largest micro-batch of each stage, padding
    counted; longest: text of each stage, in tokens; rows, row_tokens: responses that are sampled together, and the longest text of
    them; recompute: whether layers keep nothing but their inputs; evaluated: responses that evaluation samples together, where they are
    others; interpolated: whether PPO's policy is in memory twice when it is evaluated, once in the room of its gradients; one_step:
    whether a PPO epoch is one optimizer step; looks: whether PPO evaluates while it trains, and judge: by a second reward model too.
    """

    dtype: torch.dtype
    adapter: int | None
    tokens: Mapping[str, int]
    longest: Mapping[str, int]
    rows: int
    row_tokens: int
    recompute: bool = False
    evaluated: int | None = None
    interpolated: bool = False
    one_step: bool = False
    looks: bool = False
    judge: bool = False


@dataclass(frozen=True)
class Need:
    """Bytes of one stage at its peak.

    weights: of all models that it holds; training: gradients and Adam's moments; working: of a forward and backward pass, or of
    sampling or merging adapters if that is more; other: the process itself, and loading where nothing is trained.
    """

    stage: str
    weights: int
    training: int
    working: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.working + self.other


def needs(shape: Shape, load: Load) -> list[Need]:
    """The peak of each stage of `load.tokens`. Not counted: classifiers of another architecture in ppo.rewards."""
    return [_need(stage, shape, load) for stage in load.tokens]


def _need(stage: str, shape: Shape, load: Load) -> Need:
    adapter = None if stage == "pretrain" else load.adapter
    policies, scorers = {"ppo": (1, 1 + (load.looks and load.judge)), "evaluate": (1, 2)}.get(stage, (0, 0))  # that learn nothing
    trained = {"ppo": 2, "evaluate": 0}.get(stage, 1)
    working = _activations(stage, shape, load) if trained else 0
    if stage == "ppo" and load.one_step:
        working += _first_passes(shape, load)
    evaluated = load.evaluated or load.rows
    rows = evaluated if stage == "evaluate" else max(load.rows, evaluated) if stage == "ppo" and load.looks else load.rows
    sampling = _sampling(shape, load, rows) if stage in ("reward", "ppo", "evaluate") else 0
    if adapter is None:
        learned = _wide(load.dtype) * shape.parameters
        frozen = policies * _frozen(shape, load.dtype, head=True) + scorers * _frozen(shape, load.dtype, head=False)
        weights = frozen + trained * learned
    else:
        learned = _wide(load.dtype) * adapter * shape.adapter
        weights = _frozen(shape, load.dtype, head=True) + (trained + (stage == "ppo")) * learned  # the backbone's, and adapters
        # At the stage's end a merged model is written one tensor at a time; the embedding is the largest.
        working = max(int(ADAPTER_GAPS * working), 2 * 4 * shape.head)
    if sampling and (adapter is not None or not trained or load.interpolated):
        sampling += _packed(shape, load.dtype)
    # Gradients of one role are in memory at a time; two moments for each role that learns.
    training = trained * 2 * learned + (learned if trained else 0)
    if stage == "ppo" and adapter is not None:
        working = max(working, sampling) + int(ADAPTER_APART * min(working, sampling))
    return Need(stage, weights, training, max(working, sampling), PROCESS)


def _wide(dtype: torch.dtype) -> int:
    """Bytes of a number that must not be rounded to half precision."""
    return 8 if dtype is torch.float64 else 4


def _narrow(dtype: torch.dtype) -> int:
    return 2 if dtype is torch.bfloat16 else _wide(dtype)


def _frozen(shape: Shape, dtype: torch.dtype, *, head: bool) -> int:
    """A model that learns nothing: matrices and the embedding in dtype, the rest in float32. A scorer's own head is too small to count."""
    embeddings = shape.head * (1 if shape.tied or not head else 2)  # the input's, and an output layer of its own
    rest = shape.parameters - shape.linear - shape.head * (1 if shape.tied else 2)
    return _narrow(dtype) * (shape.linear + embeddings) + _wide(dtype) * rest


def _activations(stage: str, shape: Shape, load: Load) -> int:
    """What a forward pass keeps for the backward pass, with the logits of a head that learns, and a chunk of logits with its gradients.

    By layer and token: the residual stream, which the norms keep; queries, keys and values (rotated ones in float32 also under
    bfloat16) and attention's weights, or of longer texts what the fused kernel keeps (models/attention.py); the inputs of linear layers;
    the feed-forward's insides. (Gated models whose norms models/fused.py leaves alone, such as Gemma, keep more.)
    """
    wide, narrow = _wide(load.dtype), _narrow(load.dtype)
    if keeps_weights(load.longest[stage], load.dtype):
        rotated = shape.query + shape.key_value // 2 if shape.gated else 0
        attention = wide * rotated + narrow * (shape.query + shape.key_value - rotated + shape.heads * load.longest[stage])
    else:
        attention = wide * (2 * shape.query + shape.key_value)
    layer = wide * 2 * shape.width + attention + narrow * (3 * shape.width + (3 if shape.gated else 2) * shape.inner)
    kept = load.tokens[stage] * (layer + shape.layers * wide * shape.width if load.recompute else shape.layers * layer)
    if stage == "reward":
        return kept
    logits = 0 if load.adapter is not None and stage != "pretrain" else _logits(shape, load.tokens[stage])
    return kept + narrow * (logits + 2 * HEAD_CHUNK)


def _first_passes(shape: Shape, load: Load) -> int:
    """The graphs of the rollout's forward passes that wait for the first optimizer step, beside the one that an update has in memory
    anyway (stages/rollout.py `Room`)."""
    tokens = load.tokens["ppo"]
    value_model = kept_bytes(shape.adapter, tokens, load.dtype)
    policy = value_model + (_logits(shape, tokens) * _narrow(load.dtype) if load.adapter is None else 0)
    waiting = [value_model, policy] * -(-load.rows * load.row_tokens // tokens)
    kept = 0
    for size in waiting[:-1]:  # the first is a policy's, which an update holds anyway
        kept += size if kept + size <= MOST_KEPT else 0
    return kept


def _logits(shape: Shape, tokens: int) -> int:
    """Numbers that a head which learns keeps for its backward pass (algo/logprobs.py)."""
    return min(tokens, shape.width) * shape.vocabulary


def _sampling(shape: Shape, load: Load, rows: int) -> int:
    """The key-value cache of rows that are sampled together (keys in float32 or wider, but with AMX), and one step's logits with their
    exponentials."""
    cache = rows * load.row_tokens * shape.layers * shape.key_value * (_wide(load.dtype) + _narrow(load.dtype)) // 2
    return cache + rows * shape.vocabulary * 4 * _wide(load.dtype)


def _packed(shape: Shape, dtype: torch.dtype) -> int:
    """The copies of frozen weights that sampling multiplies by, and of the output layer. (Of a policy that learns whole they take less
    than its gradients, which are not there while it is sampled.)"""
    copies = _narrow(dtype) * shape.linear
    return (copies if copies <= MOST_PACKED else 0) + _narrow(dtype) * shape.head


def load_of(config: Config, machine: Machine, stages: Mapping[str, int], longest_prompt: int) -> Load:
    """stages: longest text of each supervised stage, in tokens; longest_prompt: of those to sample from."""
    response = longest_prompt + config.ppo.max_new_tokens
    batches = {
        "pretrain": config.pretrain.batch_size,
        "sft": config.sft.batch_size,
        "reward": 2 * config.reward.batch_size,
        "ppo": config.ppo.minibatch,
        "evaluate": config.evaluation_batch,
    }
    longest = {**stages, **{stage: response for stage in ("ppo", "evaluate") if stage in stages}}
    tokens = {stage: max(min(machine.microbatch_tokens, batches[stage] * text), text) for stage, text in longest.items()}
    adapter = config.model.adapter.rank if config.model.adapter is not None else None
    recompute = config.machine.activation_checkpointing
    rows, evaluated = config.ppo.rollout_batch_size, config.evaluation.batch_size
    interpolated = config.ppo.interpolation < 1 and adapter is None
    one_step = config.ppo.minibatch == rows
    looks = config.ppo.evaluate_every > 0
    judge = config.reward.judge and config.reward.use is None and config.data.comparisons is not None
    return Load(
        machine.dtype, adapter, tokens, longest, rows, response, recompute, evaluated, interpolated, one_step, looks, judge
    )
