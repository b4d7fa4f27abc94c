"""tercet/models/attention.py: texts laid end to end get the states and gradients that each gets alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, SHAPES, causal_lm, ragged
from torch import Tensor

from tercet.models import attention
from tercet.models.decoding import attend
from tercet.models.kernels import recompute_activations
from tercet.models.packing import Packing, active_packing
from tercet.models.roles import Policy, ScoreModel
from tercet.types import Sequences

LENGTHS = [25, 7, 20, 1, 5, 24, 11]
PACKED = [name for name in ARCHITECTURES if name != "gemma2"]  # caps attention, too


def texts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids (B, L) with rubbish at pads, and lengths (B,)."""
    lens = torch.tensor(lengths)
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    return ids, lens


def echo(input_ids: Tensor, position_ids: Tensor) -> SimpleNamespace:
    """A trunk whose states are the ids."""
    assert position_ids.shape == input_ids.shape
    return SimpleNamespace(last_hidden_state=input_ids[..., None])


def test_a_packing_gives_each_token_its_place_and_back():
    ids, lens = texts(LENGTHS)
    packing = Packing.of(lens, 30)
    wide = torch.nn.functional.pad(ids, (0, 5))
    packed = packing.states(echo, wide.flatten()[packing.tokens])[0, :, 0]
    assert len(packed) % 32 == 0 and len(packed) >= sum(LENGTHS)
    assert packed[: sum(LENGTHS)].tolist() == [token for row, length in zip(ids.tolist(), LENGTHS) for token in row[:length]]
    assert packing.positions[: sum(LENGTHS)].tolist() == [place for length in LENGTHS for place in range(length)]
    unpacked = packing.unpack(packed[None, :, None].float())[..., 0]
    assert unpacked.shape == (7, 30)
    for row, length in enumerate(LENGTHS):
        assert unpacked[row, :length].tolist() == ids[row, :length].tolist() and not unpacked[row, length:].any()


def test_groups_hold_every_token_once_and_few_pads():
    _, lens = texts(LENGTHS)
    packing = Packing.of(lens, 25)
    assert [(group.rows, group.length) for group in packing.groups] == [(3, 32), (1, 16), (1, 8), (1, 8), (1, 8)]
    assert packing.pads.sum() == 3 * 32 + 16 + 3 * 8 - sum(LENGTHS)
    marks = torch.arange(4.0 * len(packing.positions)).view(-1, 2, 2)
    heads_first, within = (marks.transpose(0, 1), marks.transpose(1, 2))
    padded = torch.nn.functional.pad(marks, (0, 1))[..., :2]
    for lie in (marks, heads_first.contiguous().transpose(0, 1), within.contiguous().transpose(1, 2), padded):
        there = packing.by_head(lie)
        tokens = [*range(25), *[24] * 7]
        assert there[:32].tolist() == [[4.0 * token, 4.0 * token + 1] for token in tokens], "the longest text's first head"
        assert there[32:64].tolist() == [[4.0 * token + 2, 4.0 * token + 3] for token in tokens]
        back = packing.together(there, 2)
        assert torch.equal(back[: sum(LENGTHS)], marks[: sum(LENGTHS)]) and not back[sum(LENGTHS) :].any()
        assert packing.clear_pads(there, 2).count_nonzero() == 4 * sum(LENGTHS) - 1, "the first mark is 0"


def test_batches_of_other_lengths_have_the_same_shapes():
    """oneDNN keeps half a megabyte for each product of a new shape."""
    groups = Packing.of(torch.tensor([40] * 10 + [20] * 15), 40).groups
    assert [(group.rows, group.length) for group in groups] == [(12, 40), (13, 24)], (
        "two shorter texts fill the first; all are left"
    )
    assert [len(Packing.of(torch.tensor([100] * rows), 100).positions) for rows in (20, 21, 41)] == [2016, 2112, 4224]


@pytest.mark.parametrize("short", [256, 0], ids=["by hand", "fused"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["all", "grouped", "one key"])
def test_attention_of_packed_texts_is_the_definition(short: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SHORT", short)
    generator = torch.Generator().manual_seed(0)
    packing = Packing.of(torch.tensor(LENGTHS), 25)
    count = len(packing.positions)
    query, key, value = (
        torch.randn(1, number, count, size, dtype=torch.float64, generator=generator).requires_grad_()
        for number, size in ((heads[0], 8), (heads[1], 8), (heads[1], 8))
    )
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, heads[0] // heads[1]
    with packing.active():
        found, _ = attention._attention(module, query, key, value, None, scaling=0.3)
    wanted, start = torch.zeros(count, heads[0], 8, dtype=torch.float64), 0
    for length in LENGTHS:
        for head in range(heads[0]):
            own = head // (heads[0] // heads[1])
            q, k, v = query[0, head], key[0, own], value[0, own]
            for place in range(start, start + length):
                weights = (0.3 * k[start : place + 1] @ q[place]).softmax(0)
                wanted[place, head] = weights @ v[start : place + 1]
        start += length
    torch.testing.assert_close(found[0, :start], wanted[:start], rtol=0, atol=1e-12)
    slope = torch.randn(start, heads[0], 8, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((states[:start] * slope).sum(), (query, key, value)) for states in (found[0], wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("has_bfloat16", [True, False], ids=["oneDNN has bfloat16", "or not"])
@pytest.mark.parametrize("values_alone", [True, False])
def test_attention_of_packed_texts_in_bfloat16_is_that_of_float64_up_to_rounding(
    has_bfloat16: bool, values_alone: bool, monkeypatch: pytest.MonkeyPatch
):
    """Weights as of scores around 90, which bfloat16 would round to halves; of a Llama queries and keys come in float32."""
    monkeypatch.setattr(attention, "onednn_computes", lambda x: has_bfloat16)
    generator = torch.Generator().manual_seed(0)
    packing = Packing.of(torch.tensor(LENGTHS), 25)
    count = len(packing.positions)
    inputs = [torch.randn(1, 4, count, 8, generator=generator).bfloat16() for _ in range(3)]
    inputs[0][..., 0], inputs[1][..., 0] = 30.0, 10.0  # the same for all keys: no softmax sees it
    slope = torch.randn(count, 4, 8, generator=generator).bfloat16()
    slope[sum(LENGTHS) :] = 0.0
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    found = []
    for dtypes in ([torch.float32 if values_alone else torch.bfloat16] * 2 + [torch.bfloat16], [torch.float64] * 3):
        given = [x.to(dtype).requires_grad_() for x, dtype in zip(inputs, dtypes)]
        with packing.active():
            mixed = attention._attention(module, *given, None, scaling=0.3)[0][0]
        assert mixed.dtype is dtypes[2]
        gradients = torch.autograd.grad((mixed * slope.to(mixed)).sum(), given)
        gradients[1][..., 0] = 0.0  # cancels but for rounding
        found.append([mixed.detach()[: sum(LENGTHS)], *gradients])
    for one, exact in zip(*found):
        assert (one.double() - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize(
    "length, dtype, kept", [(256, torch.float32, True), (257, torch.float32, False), (512, torch.bfloat16, True)]
)
def test_weights_are_kept_as_long_as_they_are_small(length: int, dtype: torch.dtype, kept: bool):
    assert attention.keeps_weights(length, dtype) is kept and not attention.keeps_weights(513, dtype)


def padded(role: Policy | ScoreModel, ids: Tensor) -> Tensor:
    """What the model gives without packing."""
    return role.model.base_model(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("architecture", PACKED)
@pytest.mark.parametrize("short", [256, 0], ids=["by hand", "fused"])
def test_states_and_gradients_are_those_of_the_padded_layout(architecture: str, short: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "SHORT", short)
    policy, sequences = Policy(causal_lm(architecture), torch.float64), ragged(SHAPES)
    real = torch.arange(sequences.input_ids.shape[1]) < sequences.lengths[:, None]
    slope = torch.randn(*real.shape, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = []
    for states in (policy.hidden(sequences), padded(policy, sequences.input_ids)):
        policy.zero_grad()
        (states * slope)[real].sum().backward()
        gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        both.append((states.detach()[real], gradients))
    rounding = 1e-5 if architecture == "cohere" else 1e-9  # its norms are computed in float32 whatever the model is in
    torch.testing.assert_close(*both, rtol=rounding, atol=rounding / 100)
    assert any(gradient.abs().max() > 1e-3 for gradient in both[0][1].values())


def test_packing_is_what_happens_and_costs_no_pads():
    policy = Policy(causal_lm("llama_tied"))
    rows: list[int] = []
    policy.model.base_model.layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[:2].numel()))
    ids, lens = texts([60, 2, 2, 2])
    policy.hidden(Sequences(ids, torch.ones_like(lens), lens - 1, torch.ones(4, dtype=torch.bool)))
    assert rows == [96]  # 66 tokens, not 240 places
    assert active_packing() is None


def test_texts_beyond_a_sliding_window_are_not_packed():
    model = causal_lm("mistral")
    model.config.sliding_window = 8
    policy, sequences = Policy(model, torch.float64), ragged(SHAPES)
    assert sequences.input_ids.shape[1] > 8
    with torch.no_grad():
        torch.testing.assert_close(policy.hidden(sequences), padded(policy, sequences.input_ids), rtol=0, atol=0)


def test_a_model_that_carries_states_past_attention_is_not_packed():
    from transformers import BloomConfig, BloomForCausalLM, Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    for model in (
        BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=300)),  # positions are in its mask
        Lfm2ForCausalLM(  # convolutions over neighbours, between layers of attention
            Lfm2Config(
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_hidden_layers=2,
                layer_types=["conv", "full_attention"],
                vocab_size=300,
            )
        ),
    ):
        policy, sequences = Policy(model.eval()), ragged(SHAPES)
        with torch.no_grad():
            torch.testing.assert_close(policy.hidden(sequences), padded(policy, sequences.input_ids), rtol=0, atol=0)


def test_recomputed_layers_see_the_packing_again():
    sequences, gradients = ragged(SHAPES), []
    for recompute in (False, True):
        policy = Policy(causal_lm("llama_tied"), torch.float64)
        if recompute:
            recompute_activations(policy.model)
        policy(sequences)[0].sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def roomy(x: Tensor) -> Tensor:
    """The same as a cache holds it, rubbish behind each head's tokens."""
    return torch.cat([x, torch.full_like(x[:, :, :3], torch.nan)], 2)[:, :, : x.shape[2]]


def across(x: Tensor) -> Tensor:
    """The same as projections leave it: heads beside each other."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def window(x: Tensor) -> Tensor:
    """The same as a layer gives it that forgets: the last tokens of a longer text, at the very end of memory."""
    return torch.cat([torch.full_like(x[:, :, :2], torch.nan), x], 2)[:, :, 2:]


@pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "no tiles"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["all", "grouped"])
@pytest.mark.parametrize("masked", [torch.bfloat16, torch.bool, "by head", None], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16,) * 3,
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32,) * 3,
    ],
    ids=["bfloat16", "keys cached in float32", "a Llama's", "float32"],
)
def test_one_query_a_row_is_the_definition(
    tiles: bool,
    heads: tuple[int, int],
    masked: torch.dtype | str | None,
    dtypes: tuple[torch.dtype, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    """Decoding, however keys and values lie in memory; with tiles and in bfloat16 by torch's own kernel."""
    monkeypatch.setattr(attention, "_has_tiles", lambda: tiles)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(5, number, length, size, generator=generator).bfloat16().to(dtype)
        for number, length, size, dtype in zip((heads[0], heads[1], heads[1]), (1, 9, 9), (16, 16, 24), dtypes)
    )
    half = dtypes[0] is torch.bfloat16
    mask = torch.zeros(5, 1, 1, 9, dtype=dtypes[0])
    mask[1, ..., :4] = mask[3, ..., :8] = -torch.inf
    module: Any = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, heads[0] // heads[1]
    every = [x.float().repeat_interleave(heads[0] // heads[1], 1) for x in (key, value)]
    scores = query.float() @ every[0].transpose(2, 3) * 0.3 + (mask.float() if masked is not None else 0.0)
    given = {torch.bfloat16: mask, torch.bool: mask == 0, "by head": mask.repeat(1, heads[0], 1, 1), None: None}[masked]
    wanted = (scores.softmax(-1) @ every[1]).transpose(1, 2)
    asked: set[torch.dtype] = set()
    sdpa = attention._sdpa
    monkeypatch.setattr(attention, "_sdpa", lambda dtype, *inputs, **kwargs: asked.add(dtype) or sdpa(dtype, *inputs, **kwargs))
    found = []
    for lies, values_lie in ((torch.clone, torch.clone), (roomy, roomy), (across, roomy), (window, across)):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            found.append(attention._attention(module, query, lies(key), values_lie(value), given, scaling=0.3)[0].clone())
    bound = 2e-6 if dtypes[2] is torch.float32 else 0.02
    assert all(one.dtype is dtypes[0] and (one.float() - wanted).abs().max() < bound for one in found)
    assert asked == ({torch.bfloat16} if tiles and half else {torch.float32} if masked == "by head" else set()), (
        "torch's own kernel"
    )
    if not asked:
        assert all(torch.equal(one, found[0]) for one in found)


def test_a_row_alone_decodes_to_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 4, length, 16, generator=generator) for length in (1, 9, 9))
    together = attend(query, key, value, None, 0.25)
    assert together.shape == (5, 1, 4, 16)
    for row in range(5):
        part = slice(row, row + 1)
        assert torch.equal(attend(query[part], key[part], value[part], None, 0.25), together[part])


def test_keys_are_cached_in_float32_where_scores_are_of_float32(monkeypatch: pytest.MonkeyPatch):
    own, other = causal_lm("gpt2"), causal_lm("gpt2")
    assert attention.use_packed_attention(own)
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    for tiles, wanted in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(attention, "_has_tiles", lambda tiles=tiles: tiles)
        assert attention.cached_keys_dtype(own, half) is wanted and attention.cached_keys_dtype(own, single) is torch.float32
        assert attention.cached_keys_dtype(other, half) is torch.bfloat16, (
            "its attention has not been asked for keys of another dtype"
        )


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied"])
def test_long_texts_in_bfloat16_attend_in_float32(architecture: str, monkeypatch: pytest.MonkeyPatch):
    """Also where rotary tables make queries and keys float32 and leave values in bfloat16: autocast would round all three again, and torch's
    backward pass in bfloat16 takes nine times as long."""
    seen: set[Any] = set()
    kernel = attention.sdpa_attention_forward

    def watched(module: Any, *states: torch.Tensor, **kwargs: Any) -> Any:
        seen.add((*(x.dtype for x in states[:3]), torch.is_autocast_enabled("cpu")))
        return kernel(module, *states, **kwargs)

    monkeypatch.setattr(attention, "sdpa_attention_forward", watched)
    monkeypatch.setattr(attention, "SHORT", 0)
    policy = Policy(causal_lm(architecture), torch.bfloat16)
    policy(ragged(SHAPES))[0].sum().backward()
    assert seen == {(torch.float32, torch.float32, torch.float32, False)}


def test_bfloat16_stays_close_to_float32_in_both_layouts():
    exact = causal_lm("gpt2")
    sequences = ragged(SHAPES)
    mask = sequences.response_mask
    with torch.no_grad():
        wanted = Policy(copy.deepcopy(exact))(sequences)[0][mask]
        found = Policy(exact, torch.bfloat16)(sequences)[0][mask]
    assert (found - wanted).abs().max() < 0.06 and not torch.equal(found, wanted)


def test_without_a_packing_attention_is_that_of_transformers():
    for name in ("gpt2", "llama_tied"):
        model = causal_lm(name).eval()
        ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
        with torch.no_grad():
            before = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
            assert attention.use_packed_attention(model) and model.config._attn_implementation == "tercet"
            after = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
