"""The memory calculator: published sizes, arithmetic by hand, what torch really keeps, and peaks of real processes.

docs/memory.md holds its table; to write it anew: python tests/jobs/test_memory.py
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tercet.algo.logprobs import HEAD_CHUNK
from tercet.algo.products import onednn_computes
from tercet.config import load_config
from tercet.jobs.memory import (
    ADAPTER_APART,
    ADAPTER_GAPS,
    GIB,
    MIB,
    PROCESS,
    Load,
    Shape,
    _activations,
    load_of,
    needs,
)
from tercet.models.attention import keeps_weights
from tercet.models.roles import Policy
from tercet.runtime.machine import Machine
from tercet.types import Sequences

DOCUMENT = Path(__file__).parents[2] / "docs/memory.md"
LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 128}
# name -> (architecture, settings of its published config.json, parameters that its model page gives)
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "GPT-2": ("gpt2", {}, 124_439_808),
    "Qwen2.5-0.5B": (
        "qwen2",
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4_864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Llama-3.2-3B": (
        "llama",
        LLAMA
        | {
            "hidden_size": 3_072,
            "intermediate_size": 8_192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
        3_212_749_824,
    ),
    "Llama-3.1-8B": (
        "llama",
        LLAMA
        | {
            "hidden_size": 4_096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
}


def shape_of(name: str) -> Shape:
    architecture, settings, _ = PUBLISHED[name]
    return Shape.of(AutoConfig.for_model(architecture, **settings))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    shape = shape_of(name)
    assert shape.parameters == PUBLISHED[name][2]
    assert shape.tied == (name != "Llama-3.1-8B") and shape.gated == (name != "GPT-2")


def test_the_shape_of_gpt2_by_hand() -> None:
    layer = (768 + 1) * 2304 + (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768
    assert shape_of("GPT-2") == Shape(
        parameters=124_439_808,
        linear=12 * layer,
        head=50_257 * 768,
        tied=True,
        adapter=12 * (768 + 2304 + 768 + 768 + 768 + 3072 + 3072 + 768),
        layers=12,
        width=768,
        heads=12,
        query=768,
        key_value=2 * 768,
        inner=3072,
        gated=False,
        vocabulary=50_257,
    )


def test_keys_and_values_of_grouped_queries_are_narrower() -> None:
    shape = shape_of("Llama-3.2-3B")
    assert (shape.query, shape.key_value, shape.inner) == (24 * 128, 2 * 8 * 128, 8_192)


def test_weights_and_training_state_by_hand() -> None:
    shape, tokens = shape_of("GPT-2"), {"sft": 10, "reward": 10, "ppo": 10, "evaluate": 10}
    p, position_and_norms = 124_439_808, 1024 * 768 + 25 * 2 * 768
    assert shape.parameters - shape.linear - shape.head == position_and_norms
    wide = {need.stage: need for need in needs(shape, Load(torch.float32, None, tokens, tokens, 1, 1))}
    # float32: weights, and for each role that learns two moments; gradients of one role at a time
    assert (wide["sft"].weights, wide["sft"].training) == (4 * p, 12 * p)
    assert (wide["ppo"].weights, wide["ppo"].training) == (2 * 4 * p + 2 * 4 * (p), 2 * 8 * p + 4 * p)
    assert (wide["evaluate"].weights, wide["evaluate"].training, wide["evaluate"].other) == (3 * 4 * p, 0, PROCESS)
    # Logits are kept for each token, and two chunks of them beside; reward models have none.
    assert wide["sft"].working - wide["reward"].working == 4 * (10 * 50_257 + 2 * HEAD_CHUNK)
    half = {need.stage: need for need in needs(shape, Load(torch.bfloat16, None, tokens, tokens, 1, 1))}
    policy = 2 * (shape.linear + shape.head) + 4 * position_and_norms
    # What learns holds float32 weights, what is frozen the rounded ones.
    assert (half["sft"].weights, half["sft"].training) == (4 * p, 12 * p)
    assert (half["ppo"].weights, half["ppo"].training) == (2 * 4 * p + 2 * policy, 2 * 8 * p + 4 * p)
    assert (half["evaluate"].weights, half["evaluate"].training) == (3 * policy, 0)
    shared = {need.stage: need for need in needs(shape, Load(torch.bfloat16, 16, tokens, tokens, 1, 1))}
    adapter = 4 * 16 * shape.adapter
    assert (shared["ppo"].weights, shared["ppo"].training) == (policy + 3 * adapter, 2 * 2 * adapter + adapter)
    merging = 2 * 4 * shape.head
    assert merging > ADAPTER_GAPS * _activations("ppo", shape, Load(torch.bfloat16, 16, tokens, tokens, 1, 1))
    copies = 2 * (shape.linear + shape.head)
    one_row = 12 * 2 * 768 * (4 + 2) // 2 + 50_257 * 4 * 4
    assert shared["ppo"].working == max(merging, one_row + copies) + int(ADAPTER_APART * min(merging, one_row + copies))
    assert shared["reward"].working == max(merging, one_row + copies)
    assert shared["evaluate"].weights == policy
    # Part of the way PPO's policy is in memory twice while it is sampled, the second time in the room of its gradients.
    long, part = (
        {need.stage: need for need in needs(shape, Load(torch.bfloat16, None, tokens, tokens, 1000, 600, interpolated=some))}[
            "ppo"
        ]
        for some in (False, True)
    )
    assert part.working == long.working + copies and (part.weights, part.training) == (long.weights, long.training)
    # Sampling multiplies by copies of the frozen weights, where they are small, and of the output layer.
    rows = Load(torch.bfloat16, 16, tokens, tokens, 1000, 600)
    cache = 1000 * 600 * 12 * 2 * 768 * (4 + 2) // 2 + 1000 * 50_257 * 4 * 4
    small, large = ({need.stage: need for need in needs(shape_of(name), rows)}["ppo"] for name in ("GPT-2", "Llama-3.1-8B"))
    assert small.working == cache + copies + int(ADAPTER_APART * merging)
    large_cache = 1000 * 600 * 32 * 2 * 8 * 128 * (4 + 2) // 2 + 1000 * 128_256 * 4 * 4
    assert large.working == large_cache + 2 * 4_096 * 128_256 + int(ADAPTER_APART * 2 * 4 * 4_096 * 128_256)
    untied = shape_of("Llama-3.1-8B")  # an input embedding of its own beside the output layer, which a scorer lacks
    frozen = {need.stage: need for need in needs(untied, Load(torch.bfloat16, None, tokens, tokens, 1, 1))}["evaluate"]
    rest = untied.parameters - untied.linear - 2 * untied.head
    assert frozen.weights == 2 * (untied.linear + 2 * untied.head) + 4 * rest + 2 * (2 * (untied.linear + untied.head) + 4 * rest)


@pytest.mark.parametrize(("tokens", "rows", "graphs"), [(2_048, 64, 0), (128, 4, 1), (128, 8, 2)])
def test_graphs_that_wait_for_the_first_step_by_hand(tokens: int, rows: int, graphs: int) -> None:
    """128 tokens of GPT-2: 12 layers of 12,288 numbers in and out, in bfloat16, and a quarter: 45 MiB, two of which go into 128, and 12 of
    logits for the policy. Of 4 rows of 32 tokens policy and value model have two, of 8 rows four; the first policy's is there anyway."""
    before, after = (
        needs(shape_of("GPT-2"), Load(torch.bfloat16, None, {"ppo": tokens}, {"ppo": 64}, rows, 32, one_step=one_step))[0]
        for one_step in (False, True)
    )
    logits = 128 * 50_257 * 2 * (graphs == 2)
    assert after.working - before.working == graphs * 128 * 12 * 12_288 * 2 * 5 // 4 + logits


def test_what_evaluations_inside_ppo_need() -> None:
    """The second reward model, and the responses that are sampled together there."""
    asked = Load(torch.bfloat16, None, {"ppo": 512}, {"ppo": 64}, 64, 64, evaluated=4_096)
    plain, looking, judging = (
        needs(shape_of("GPT-2"), dataclasses.replace(asked, looks=looks, judge=judge))[0]
        for looks, judge in ((False, True), (True, False), (True, True))
    )
    matrices, embedding = 85_017_600, 50_257 * 768
    assert judging.weights - looking.weights == 2 * (matrices + embedding) + 4 * (124_439_808 - matrices - embedding)
    assert looking.weights == plain.weights and judging.working == looking.working > 10 * plain.working
    config = load_config(
        {
            "model": {"name": "x"},
            "data": {"comparisons": "c.jsonl"},
            "ppo": {"evaluate_every": 5},
            "evaluation": {"batch_size": 7},
        }
    )
    found = load_of(config, Machine(torch.device("cpu"), torch.float32, 1, 500), {"ppo": 0}, longest_prompt=20)
    assert (found.looks, found.judge, found.evaluated) == (True, True, 7)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [32, 128, 320, 520])
def test_activations_are_what_torch_keeps_for_the_backward_pass(architecture: str, dtype: torch.dtype, length: int) -> None:
    if not onednn_computes(torch.zeros(1, dtype=dtype)):
        pytest.skip("where bfloat16 is emulated attention keeps more; nothing chooses it there")
    if torch.__version__.startswith("2.8.") and architecture != "gpt2" and not keeps_weights(length, dtype):
        pytest.skip("torch 2.8 has no fused kernel on a CPU for queries that share keys, and keeps all weights in float32")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
    if architecture == "gpt2":
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": None}
    config = AutoConfig.for_model(architecture, **{**sizes, "bos_token_id": 0, "eos_token_id": 0})
    policy = Policy(AutoModelForCausalLM.from_config(config).eval(), dtype)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    lens = torch.full((8,), length)
    sequences = Sequences(
        torch.zeros(8, length, dtype=torch.long), torch.ones_like(lens), lens - 1, torch.ones(8, dtype=torch.bool)
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), policy.autocast():
        states = policy.hidden(sequences)
    assert states.requires_grad
    load = Load(dtype, None, {"reward": 8 * length}, {"reward": length}, 1, 1)  # the reward stage: no head in it
    assert _activations("reward", Shape.of(config), load) == pytest.approx(sum(kept.values()), rel=0.1)
    assert 0.6 < policy.kept_bytes(8 * length, 0) / sum(kept.values()) < 1.4
    logits = 64 * min(5, 96) * dtype.itemsize  # of a head that learns as many as its weight has elements
    assert policy.kept_bytes(8 * length, 5) - policy.kept_bytes(8 * length, 0) == logits
    policy.freeze()
    assert policy.kept_bytes(8 * length, 5) == policy.kept_bytes(8 * length, 0)


def test_what_a_run_asks_of_a_model() -> None:
    config = load_config(
        {
            "model": {"name": "x", "adapter": {"rank": 4}},
            "sft": {"batch_size": 8},
            "reward": {"batch_size": 3},
            "ppo": {"rollout_batch_size": 32, "minibatch_size": 4, "max_new_tokens": 10},
        }
    )
    machine = Machine(torch.device("cpu"), torch.float32, 1, 500)
    load = load_of(config, machine, {"sft": 70, "reward": 50, "ppo": 0}, longest_prompt=20)
    # sft: 8 x 70 is more than a micro-batch; reward: two responses a comparison; ppo: 4 x (20 + 10)
    assert load == Load(torch.float32, 4, {"sft": 500, "reward": 300, "ppo": 120}, {"sft": 70, "reward": 50, "ppo": 30}, 32, 30)
    whole = load_config({"model": {"name": "x"}, "ppo": {"rollout_batch_size": 32}})
    assert load_of(whole, machine, {"ppo": 0}, longest_prompt=20).one_step and not load.one_step


def table() -> str:
    """Peaks in GiB, bfloat16, micro-batches of 2,048 tokens (1,280 beside adapters, of 3 B and more 768), 64 responses of at most 512
    tokens sampled together."""
    lines = ["| model | training | SFT | reward model | PPO | evaluation |", "|---|---|---|---|---|---|"]
    for name in PUBLISHED:
        shape, longest = shape_of(name), dict.fromkeys(("sft", "reward", "ppo", "evaluate"), 512)
        beside = 1_280 if PUBLISHED[name][2] < 10**9 else 768
        for kind, rank, size in (("all weights", None, 2_048), ("adapters, rank 16", 16, beside)):
            tokens = dict.fromkeys(longest, size)
            found = [f"{need.total / GIB:.1f}" for need in needs(shape, Load(torch.bfloat16, rank, tokens, longest, 64, 512))]
            lines.append(f"| {name} | {kind} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def test_the_document_has_the_table() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8"), "write it anew, see above"


RUN = """
import sys
from tercet.algo.products import onednn_computes
from tercet.config import load_config
from tercet.pipeline import Pipeline
Pipeline(load_config(sys.argv[1])).run([sys.argv[2]])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
open(sys.argv[3], "w").write(peak.split()[1])
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("adapter", [None, {"rank": 16}], ids=["all weights", "adapters"])
@pytest.mark.parametrize(
    ("layers", "width"),
    [pytest.param(8, 512, marks=pytest.mark.slow, id="51 M"), pytest.param(12, 768, marks=pytest.mark.full, id="GPT-2")],
)
def test_measured_peaks_are_within_15_percent(
    layers: int, width: int, adapter: dict[str, int] | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """GPT-2's shape or a smaller one, random weights, a process a stage, in the precision that this machine chooses."""
    from conftest import write_jsonl
    from transformers import GPT2LMHeadModel
    from transformers.models.gpt2 import GPT2Config

    from tercet.models.load import save_policy, train_tokenizer

    words = [f"word{i}" for i in range(300)]
    texts = [" ".join(words[(7 * i + 3 * j) % 300] for j in range(40)) for i in range(64)]
    shape = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, bos_token_id=0, eos_token_id=0)
    tokenizer = train_tokenizer(texts, 600)
    save_policy(GPT2LMHeadModel(shape), tokenizer, tmp_path / "model", temperature=1.0, stop_ids=[0], card="random")
    data = {
        "sft": write_jsonl(tmp_path / "s.jsonl", ({"prompt": "word1 word2", "response": text} for text in texts)),
        "comparisons": write_jsonl(tmp_path / "c.jsonl", ({"prompt": "a", "chosen": t, "rejected": t[9:]} for t in texts[:32])),
        "prompts": write_jsonl(tmp_path / "p.jsonl", ({"prompt": f"word{i} word{i + 1}"} for i in range(64))),
    }
    values = {
        "output": str(tmp_path / "run"),
        "model": {"name": str(tmp_path / "model"), "adapter": adapter},
        "data": {**{name: str(path) for name, path in data.items()}, "held_out": 0},
        "sft": {"epochs": 1, "batch_size": 32, "max_length": 64},
        "reward": {"epochs": 1, "batch_size": 16, "max_length": 64, "normalise_samples": 8},
        "ppo": {"iterations": 2, "rollout_batch_size": 32, "max_new_tokens": 48, "ppo_epochs": 1},
        "machine": {"device": "cpu", "threads": 1, "microbatch_tokens": 2048},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    (tmp_path / "run.py").write_text(RUN)
    measured = {}
    for stage in ("sft", "reward", "ppo"):
        # Asked of the process itself: what its parent is told includes the parent's own size, from before it became another program.
        command = [sys.executable, tmp_path / "run.py", tmp_path / "run.yaml", stage, tmp_path / "peak"]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=True)
        measured[stage] = int((tmp_path / "peak").read_text()) * 1024
    config = load_config(tmp_path / "run/config.yaml")
    machine = Machine(torch.device("cpu"), getattr(torch, config.machine.dtype), 1, 2048)
    lengths = {"sft": 64, "reward": 64, "ppo": 0}
    expected = {need.stage: need.total for need in needs(Shape.of(shape), load_of(config, machine, lengths, 8))}
    for stage, peak in measured.items():
        print(f"{request.node.callspec.id} {stage}: computed {expected[stage] / MIB:.0f} MiB, measured {peak / MIB:.0f} MiB")
    assert expected == pytest.approx(measured, rel=0.15)


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    start = text.index("| model | training |")
    end = text.index("\n\n", start) + 1
    DOCUMENT.write_text(text[:start] + table() + text[end:], encoding="utf-8")
