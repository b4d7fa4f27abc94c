"""The decode loop against transformers' own forward and generate, alone and in every kind of batch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_zoo import ARCHITECTURES, bpe_tokenizer, causal_lm, write_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from tercet.generation import cache
from tercet.generation.cache import RoomyLayer, _widened, cache_for
from tercet.generation.native import NativeGenerator, _close_ranks
from tercet.generation.sampling import uniforms
from tercet.models.load import load_causal_lm
from tercet.models.roles import Policy
from tercet.runtime.distributed import World
from tercet.runtime.optim import Optimizer
from tercet.types import Sequences, TercetError, TokenRow

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
LENGTHS = (5, 1, 12, 2, 30, 7)
VECTORS = json.loads((Path(__file__).parents[1] / "reference_vectors.json").read_text())


def some_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 288, (length,), generator=generator).tolist() for length in LENGTHS]


def numbers(count: int = len(LENGTHS), steps: int = 24) -> Tensor:
    return uniforms(0, "rollout", 0, range(count), steps)


def generator_of(policy: Policy, **options: Any) -> NativeGenerator:
    return NativeGenerator(policy, **{"stop_ids": [], "max_new_tokens": 12, **options})


def responses_of(sequences: Sequences) -> list[list[int]]:
    return [ids[:length] for ids, length in zip(sequences.response_ids.tolist(), sequences.response_lens.tolist())]


def scripted_policy(script: list[int]) -> Policy:
    """A GPT-2 that writes script[t] at position t, whatever stands before: for prompts of one token."""
    model = causal_lm("gpt2", 64, n_layer=1, n_embd=64, tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        for position, token in enumerate(script):
            model.transformer.wpe.weight[position, token] = 1.0
        model.lm_head.weight.copy_(10 * torch.eye(64))
    return Policy(model)


# What is sampled


@pytest.mark.skipif(not hasattr(DynamicCache, "has_previous_state"), reason="transformers caches states from 5.5 on")
def test_rows_leave_a_model_whose_layers_carry_states() -> None:
    """Linear attention beside attention: the convolutions' and recurrent states lose the rows too."""
    heads = {f"linear_num_{kind}_heads": count for kind, count in (("key", 2), ("value", 4))}
    heads |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes |= {"head_dim": 16, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "vocab_size": 40}
    config = AutoConfig.for_model("qwen3_next", **sizes, **heads)
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config).eval())
    prompts = [[9, 10, 11], [12], [13, 14, 15, 16, 17], *([20 + i] for i in range(9))]
    sequences = generator_of(policy, stop_ids=list(range(3, 9))).sample(prompts, numbers(len(prompts)))
    assert len(set(sequences.response_lens.tolist())) > 3, "they leave at different steps"
    with torch.no_grad():
        wanted, _ = policy(sequences)
    torch.testing.assert_close(sequences.sampler_logprobs, wanted, rtol=0, atol=1e-5)


@EVERY
def test_greedy_in_a_padded_batch_is_generate_of_each_row_alone(architecture: str) -> None:
    model = causal_lm(architecture)
    sequences = generator_of(Policy(model)).sample(some_prompts(), None)
    for row, prompt in enumerate(some_prompts()):
        ids = torch.tensor([prompt])
        wanted = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
        assert sequences.input_ids[row, : len(prompt) + 12].tolist() == wanted[0].tolist()


@EVERY
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_the_reported_logprobs_are_the_training_forwards(architecture: str, temperature: float, tmp_path: Path) -> None:
    """Whatever a checkpoint's generation_config suggests: repetition_penalty and top_k leak into the probabilities of peers."""
    hostile = {
        "do_sample": True,
        "top_k": 50,
        "top_p": 0.8,
        "temperature": 0.3,
        "repetition_penalty": 1.8,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
    }
    source = write_checkpoint(tmp_path, causal_lm(architecture), **hostile)
    # Logits of 7 divided by 0.6: float32's rounding is up to 1.6e-5, which of several kernels a processor gets decides.
    for dtype, tolerance in ((torch.float32, 4e-5), (torch.float64, 1e-10)):
        policy, prompts = Policy(load_causal_lm(source), dtype), some_prompts()
        if architecture == "gemma2" and dtype is torch.float64:  # its attention's softmax is float32, and a pad's mask in float64
            prompts, tolerance = [prompt[:5] for prompt in prompts if len(prompt) >= 5], 1e-6
        sequences = generator_of(policy, temperature=temperature, stop_ids=range(5)).sample(prompts, numbers())
        with torch.no_grad():
            logprobs, _ = policy(sequences, temperature=temperature)
        assert sequences.sampler_logprobs is not None and sequences.sampler_logprobs.dtype == dtype
        gap = torch.where(sequences.response_mask, sequences.sampler_logprobs - logprobs, 0.0).abs().max().item()
        assert gap < tolerance
        assert (logprobs[sequences.response_mask] < -0.5).any()  # samples, not the likeliest tokens only


@EVERY
def test_tokens_are_those_of_the_definition(architecture: str) -> None:
    """For each token a whole forward of transformers' model, a cumulative sum, the first token beyond the number."""
    dtype = torch.float32 if architecture == "gemma2" else torch.float64
    model = causal_lm(architecture).to(dtype)
    sequences = generator_of(Policy(model, dtype), temperature=0.8).sample(some_prompts()[:4], numbers())
    for row, prompt in enumerate(some_prompts()[:4]):
        ids = list(prompt)
        for t in range(12):
            with torch.no_grad():
                cumulative = (model(input_ids=torch.tensor([ids])).logits[0, -1].double() / 0.8).softmax(-1).cumsum(-1)
            ids.append(int((cumulative <= numbers()[row, t]).sum()))
        assert sequences.input_ids[row, : len(ids)].tolist() == ids


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_depend_on_neither_batch_nor_order_nor_split(architecture: str, dtype: torch.dtype) -> None:
    if architecture == "gemma2":
        dtype = torch.float32
    prompts, generator = some_prompts(), generator_of(Policy(causal_lm(architecture), dtype), stop_ids=range(20))
    whole = responses_of(generator.sample(prompts, numbers()))
    assert len({len(response) for response in whole}) > 1  # rows do leave the batch at different times
    for rows in ([0], [1], [2], [3], [4], [5], [5, 4, 3, 2, 1, 0], [4, 1], [0, 2, 3, 5]):
        part = generator.sample([prompts[row] for row in rows], numbers()[rows])
        assert responses_of(part) == [whole[row] for row in rows]


def test_all_tokens_of_the_vocabulary_can_be_sampled() -> None:
    """top_k = 50, the default of transformers, would show here as 50 distinct tokens."""
    policy = Policy(causal_lm("gpt2", 101))
    with torch.no_grad():
        policy.model.transformer.wte.weight.mul_(0.1)
    drawn = generator_of(policy, max_new_tokens=1).sample([[7]] * 3000, uniforms(0, "rollout", 0, range(3000), 1))
    assert len(set(drawn.response_ids[:, 0].tolist())) == 101


# Where responses end


@pytest.mark.parametrize("kind", ["", "eos_"])
def test_truncation_of_the_reference_vectors(kind: str) -> None:
    given, wanted = VECTORS["truncation"]["in"], VECTORS["truncation"]["out"]
    stop = given["eos" if kind else "truncate_token"] % 64
    for row, response in enumerate(given[f"{kind}responses"]):
        script = [token % 64 for token in response]
        generator = generator_of(
            scripted_policy(script),
            stop_ids=[stop],
            max_new_tokens=len(script),
            truncate_after=0 if kind else given["truncate_after"],
        )
        for draws in (None, numbers(1)):
            sequences = generator.sample([[1]], draws)
            assert sequences.response_lens.tolist() == [wanted[f"{kind}n_real"][row]]
            assert sequences.finished.tolist() == [wanted["eos_passes" if kind else "passes_filter"][row]]
            assert responses_of(sequences) == [script[: wanted[f"{kind}n_real"][row]]]


@pytest.mark.parametrize("copies", [1, 7], ids=["one by one", "of many rows eight at a time"])
def test_rows_end_at_the_first_stop_id_and_leave_the_batch(copies: int) -> None:
    policy, prompts, stops = Policy(causal_lm("llama_tied")), some_prompts() * copies, set(range(25))
    drawn = numbers(len(prompts))
    endless = responses_of(generator_of(policy).sample(prompts, drawn))
    wanted, finished = [], []
    for response in endless:
        end = next((i + 1 for i, token in enumerate(response) if token in stops), len(response))
        wanted.append(response[:end])
        finished.append(response[end - 1] in stops)
    assert {True, False} == set(finished)
    sizes: list[int] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda module, arguments, named: sizes.append(named["input_ids"].shape[0]), with_kwargs=True
    )
    sequences = generator_of(policy, stop_ids=sorted(stops)).sample(prompts, drawn)
    assert responses_of(sequences) == wanted and sequences.finished.tolist() == finished
    assert sequences.prompt_lens.tolist() == list(LENGTHS) * copies
    active = [sum(len(response) > step for response in wanted) for step in range(max(map(len, wanted)))]
    held = [count if count <= 8 else min(len(prompts), -(-count // 8) * 8) for count in active]
    assert (held == active) is (copies == 1)
    assert sizes == [1, *held[1:]], "the prompts lie end to end, then each row has one token"
    for row, (prompt, response) in enumerate(zip(prompts, wanted)):
        assert sequences.input_ids[row].tolist() == prompt + response + [0] * (
            sequences.input_ids.shape[1] - len(prompt) - len(response)
        )
    assert sequences.sampler_logprobs is not None and sequences.sampler_logprobs.shape == sequences.response_mask.shape
    assert bool((sequences.sampler_logprobs[~sequences.response_mask] == 0).all())


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied"])
def test_a_cache_that_is_taken_all_at_once_gives_the_same_responses(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is given of it has gaps between the rows."""
    policy, prompts = Policy(causal_lm(architecture)), some_prompts() * 3
    generator = generator_of(policy, stop_ids=list(range(25)))
    wanted = generator.sample(prompts, numbers(len(prompts)))
    monkeypatch.setattr(RoomyLayer, "_allocated", lambda layer, room: layer._capacity)
    grown: list[int] = []
    monkeypatch.setattr(cache, "_widened", lambda storage, room: grown.append(room) or widened(storage, room))  # type: ignore[func-returns-value]
    widened = _widened
    found = generator.sample(prompts, numbers(len(prompts)))
    assert torch.equal(found.input_ids, wanted.input_ids) and found.sampler_logprobs is not None
    assert torch.allclose(found.sampler_logprobs, wanted.sampler_logprobs, atol=1e-5)
    assert set(grown) == {max(LENGTHS) + generator._max_new_tokens}, "once, to the full length"


def test_immediate_eos_and_the_length_limit() -> None:
    at_once = generator_of(scripted_policy([9, 9, 9]), stop_ids=[9], max_new_tokens=3).sample([[1], [2]], numbers(2))
    assert at_once.response_lens.tolist() == [1, 1] and at_once.finished.tolist() == [True, True]
    assert at_once.response_mask.tolist() == [[True], [True]]
    never = generator_of(scripted_policy([8, 8, 8]), stop_ids=[9], max_new_tokens=3).sample([[1]], numbers(1))
    assert never.response_lens.tolist() == [3] and never.finished.tolist() == [False]
    in_time = generator_of(scripted_policy([8, 8, 9]), stop_ids=[9], max_new_tokens=3).sample([[1]], numbers(1))
    assert in_time.response_lens.tolist() == [3] and in_time.finished.tolist() == [True]
    one = generator_of(scripted_policy([8]), stop_ids=[9], max_new_tokens=1).sample([[1]], numbers(1))
    assert one.response_lens.tolist() == [1] and one.finished.tolist() == [False]


def letters() -> PreTrainedTokenizerFast:
    """<eos> is 0; single letters, and merges that cross the borders of the text THE END."""
    pieces = ["<eos>", *"ABDEHNTXYZ.", "Ġ", "TH", "THE", "EN", "END", "ND", "Ċ", "ĠE", "D.", "ND.", "XT", "Ã", "©"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.mark.parametrize(
    ("pieces", "stops", "truncate_after", "length"),
    [
        (["A", "THE", "Ġ", "END", "B"], ["THE END"], 0, 4),
        (["A", "T", "H", "E", "ĠE", "N", "D", "B"], ["THE END"], 0, 7),
        (["XT", "H", "E", "ĠE", "ND.", "B"], ["THE END"], 0, 5),  # begins and ends inside tokens
        (["THE", "Ġ", "EN", "B", "D"], ["THE END"], 0, None),  # interrupted
        (["A", "Ċ", "Ċ", "B"], ["\n\n"], 0, 3),
        (["A", "Ċ", "B", "Ċ"], ["\n\n"], 0, None),
        (["A", "D.", "B"], ["."], 0, 2),  # inside a longer token
        (["A", "Ã", "©", "B"], ["é"], 0, 3),  # one character in two tokens
        (["A", "Ã", "A", "©"], ["é"], 0, None),
        (["A", ".", "B", ".", "A"], ["."], 2, 4),  # the one before truncate_after does not count
        (["A", ".", "B", "A", "A"], ["."], 2, None),
        (["A", "THE", "Ġ", "END", "B"], ["X", "THE END"], 0, 4),  # any of several
        (["A", "B", "X", "END"], ["X", "THE END"], 0, 3),
    ],
)
def test_stop_texts(pieces: list[str], stops: list[str], truncate_after: int, length: int | None) -> None:
    tokenizer = letters()
    script = [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]
    assert len(tokenizer) < 64 and None not in script
    generator = generator_of(
        scripted_policy(script),
        stop_ids=[0],
        stop_texts=stops,
        truncate_after=truncate_after,
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        max_new_tokens=len(script),
    )
    sequences = generator.sample([[1]], numbers(1))
    assert sequences.finished.tolist() == [length is not None]
    assert responses_of(sequences) == [script[: length or len(script)]]


def test_a_stop_text_in_the_prompt_does_not_count() -> None:
    tokenizer = letters()
    dot, letter = tokenizer.convert_tokens_to_ids("."), tokenizer.convert_tokens_to_ids("A")
    generator = generator_of(
        scripted_policy([letter] * 3), stop_texts=["."], decode=lambda ids: tokenizer.decode(ids), max_new_tokens=3
    )
    assert generator.sample([[dot]], None).response_lens.tolist() == [3]


# The engine


def test_the_version_is_that_of_the_last_sync() -> None:
    generator = generator_of(Policy(causal_lm("gpt2")), max_new_tokens=1)
    for version in (0, 1, 7):
        generator.sync(version)
        assert generator.sample([[1, 2]], None).policy_version == version


@pytest.mark.parametrize("architecture", ["gpt2", "llama_untied", "gemma2"])
def test_a_bfloat16_policy_is_sampled_with_the_weights_of_its_last_step(architecture: str) -> None:
    policy = Policy(causal_lm(architecture), torch.bfloat16)
    optimizer = Optimizer(policy, weight_decay=0.0, max_grad_norm=1.0, world=World())
    generator = generator_of(policy)
    before = generator.sample(some_prompts(), numbers())
    policy(before)[0].sum().backward()
    optimizer.step(0.3)
    fresh = generator.sample(some_prompts(), numbers())
    assert responses_of(fresh) != responses_of(before)
    with torch.no_grad():
        logprobs, _ = policy(fresh)
    assert (fresh.sampler_logprobs - logprobs).abs().max() < 0.5


def test_a_cap_sees_what_all_logits_share_also_in_bfloat16() -> None:
    """Without it, which changes no other softmax, these would be the log-probabilities of another model."""
    model = causal_lm("gemma2", final_logit_softcapping=5.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.5)
    policy = Policy(model, torch.bfloat16)
    sequences = generator_of(policy).sample(some_prompts(), numbers())
    with torch.no_grad():
        logprobs, _ = policy(sequences)
        exact, _ = Policy(copy.deepcopy(model))(sequences)
    assert sequences.sampler_logprobs is not None
    for found in (sequences.sampler_logprobs, logprobs):
        assert (found - exact).abs().max() < 0.3


def test_a_float32_policy_is_sampled_as_it_stands() -> None:
    policy = Policy(causal_lm("gpt2"))
    generator = generator_of(policy)
    before = generator.sample(some_prompts(), numbers())
    with torch.no_grad():
        for parameter, other in zip(policy.parameters(), causal_lm("gpt2", seed=1).parameters()):
            parameter.copy_(other)
    generator.sync(1)
    wanted = generator_of(Policy(causal_lm("gpt2", seed=1))).sample(some_prompts(), numbers())
    assert responses_of(generator.sample(some_prompts(), numbers())) == responses_of(wanted) != responses_of(before)


def test_close_ranks_moves_the_last_rows_into_the_places_of_those_that_ended() -> None:
    ended = torch.tensor([False, True, False, True, False, False])
    assert _close_ranks(ended).tolist() == [0, 4, 2, 5]
    assert _close_ranks(torch.tensor([False, False, True])).tolist() == [0, 1]
    assert _close_ranks(torch.tensor([True, True, False])).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["gpt2", "llama_untied", "mistral"])
def test_the_roomy_cache_is_the_cache_of_transformers(architecture: str, dtype: torch.dtype) -> None:
    """The same logits to the last bit as with the cache that concatenates, while rows leave the batch."""
    model = causal_lm(architecture).to(dtype)
    roomy, plain = cache_for(model, 9), DynamicCache(config=model.config)
    inputs = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 1, 2]])
    for kept in (None, torch.tensor([0, 3, 2]), None, torch.tensor([2]), None):
        with torch.no_grad():
            found, wanted = (model(input_ids=inputs, past_key_values=cache, use_cache=True).logits for cache in (roomy, plain))
        assert torch.equal(found, wanted)
        inputs = found[:, -1:].argmax(-1)
        if kept is not None:
            inputs = inputs[kept]
            for cache in (roomy, plain):
                cache.batch_select_indices(kept)


def test_the_roomy_cache_gives_each_of_the_texts_that_lie_end_to_end_its_row() -> None:
    mask = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    layer = RoomyLayer(5, mask, lambda states: torch.float64)
    keys = torch.arange(1.0, 17).view(1, 2, 8, 1)  # two heads of six tokens, and two tokens that belong to no text
    assert all(torch.equal(given, back) for given, back in zip((keys, -keys), layer.update(keys, -keys)))
    first = [[0, 1, 2], [3, 4, 5], [0, 0, 6]]
    second = [[0, 9, 10], [11, 12, 13], [0, 0, 14]]
    assert layer.keys[..., 0].tolist() == [list(rows) for rows in zip(first, second)]
    assert torch.equal(layer.values, -layer.keys.float()) and layer.keys.dtype is torch.float64, (
        "keys as asked for, values as given"
    )
    step = torch.full((3, 2, 1, 1), 20.0)
    keys, _ = layer.update(step, step)
    assert layer.get_seq_length() == 4 and keys[0, :, :, 0].tolist() == [[0, 1, 2, 20, 0], [0, 9, 10, 20, 0]], "with what is free"


def test_the_room_grows_by_steps_and_keeps_what_is_there() -> None:
    layer = RoomyLayer(40, torch.ones(2, 15, dtype=torch.bool), lambda states: states.dtype)
    layer.update(torch.arange(1.0, 31).view(1, 1, 30, 1), torch.arange(1.0, 31).view(1, 1, 30, 1))
    rooms = []
    for number in range(16, 41):
        step = torch.full((2, 1, 1, 1), float(number))
        keys, values = layer.update(step, -step)
        assert keys[0, 0, :, 0].tolist() == [*range(1, number + 1)] + [0] * (keys.shape[2] - number)
        assert values[1, 0, 15:number, 0].tolist() == [-float(n) for n in range(16, number + 1)]
        rooms.append(keys.shape[2])
    assert rooms == [16] + [32] * 16 + [40] * 8


def test_numbers_that_are_not_finite_are_an_error_not_a_sample() -> None:
    """Also Gemma-2 in float64: transformers' eager softmax is float32, where the mask of a pad is minus infinity."""
    broken = Policy(causal_lm("llama_tied"))
    with torch.no_grad():
        broken.model.model.norm.weight[3] = float("nan")
    oldest = transformers.__version__.startswith("5.0.")  # gives finite numbers
    for policy in (broken, *([] if oldest else [Policy(causal_lm("gemma2"), torch.float64)])):
        with pytest.raises(TercetError, match=r"not finite.*ppo\.learning_rate.*float32"):
            generator_of(policy).sample(some_prompts(), numbers())


def test_sampling_leaves_no_trace(tmp_path: Path) -> None:
    policy = Policy(load_causal_lm(write_checkpoint(tmp_path, causal_lm("gpt2")))).train()
    state = torch.get_rng_state()
    generator_of(policy).sample(some_prompts(), numbers())
    assert torch.equal(torch.get_rng_state(), state) and policy.training
    assert all(p.grad is None for p in policy.parameters())


def test_no_prompts_and_empty_prompts() -> None:
    generator = generator_of(Policy(causal_lm("gpt2")))
    nothing = generator.sample([], numbers(0))
    assert len(nothing) == 0 and nothing.sampler_logprobs is not None and nothing.sampler_logprobs.shape == (0, 1)
    with pytest.raises(ValueError, match="without a token"):
        generator.sample([[1], []], None)


def test_rows_without_a_token_are_sampled_and_kept() -> None:
    """Padded vocabularies: an embedding row without a token may be drawn; it is a token like any other, and text skips it."""
    tokenizer, model = bpe_tokenizer(), causal_lm("gpt2", 300, tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[295].fill_(5.0)
    generator = generator_of(
        Policy(model), stop_ids=[0], stop_texts=["THE END"], max_new_tokens=2, decode=lambda ids: tokenizer.decode(ids)
    )
    sequences = generator.sample([[1]], None)
    assert responses_of(sequences) == [[295, 295]] and tokenizer.decode([295]) == ""


def test_what_sampling_keeps_can_be_trained_on() -> None:
    """It runs in inference mode, whose tensors autograd refuses: neither the sequences nor a mask made on the way may be such."""
    policy = Policy(causal_lm("gpt2").eval())
    sequences = NativeGenerator(policy, stop_ids=[], max_new_tokens=3).sample([[5] * 11, [6] * 11], torch.rand(2, 3).double())
    kept = [value for value in vars(sequences).values() if isinstance(value, torch.Tensor)]
    assert len(kept) == 5 and not any(value.is_inference() for value in kept)
    prompts = Sequences.from_rows([TokenRow((5,) * 11, 1), TokenRow((6,) * 11, 1)])  # the mask is that of the sampled prompts
    for texts in (sequences, prompts):
        policy(texts)[0].sum().backward()
    assert policy.head.weight.grad is not None
