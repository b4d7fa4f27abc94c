"""Log-probabilities, entropies, values and scores of every architecture against transformers' own forward, row by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import ARCHITECTURES, CLASSIFIERS, SHAPES, TRANSFORMS, bert, causal_lm, classifier, ragged, word_tokenizer
from torch import Tensor, nn

from tercet.algo.logprobs import LogitTransform
from tercet.models.load import load_causal_lm
from tercet.models.roles import Policy, ScoreModel, _logit_transform, init_score_head
from tercet.runtime.distributed import World
from tercet.runtime.optim import Optimizer
from tercet.types import Sequences, TercetError

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES)
DOUBLE = torch.float64


def by_hand(model: Any, sequences: Sequences, row: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one row's response, from transformers' logits of that text alone."""
    start, length = int(sequences.prompt_lens[row]), int(sequences.lengths[row])
    ids = sequences.input_ids[row, :length]
    logits = model(input_ids=ids[None]).logits[0].double() / temperature
    logprobs, entropies = [], []
    for index in range(start, length):
        weights = torch.exp(logits[index - 1] - logits[index - 1].max())
        p = weights / weights.sum()
        logprobs.append(torch.log(p[ids[index]]))
        entropies.append(-(p * torch.log(p)).sum())
    return torch.stack(logprobs), torch.stack(entropies)


@EVERY
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_transformers(architecture: str, temperature: float) -> None:
    model = causal_lm(architecture)
    plain = copy.deepcopy(model).double().eval()
    policy = Policy(model, DOUBLE)
    sequences = ragged(SHAPES)
    with torch.no_grad():
        logprobs, entropy = policy(sequences, temperature=temperature, with_entropy=True)
        assert logprobs.dtype == DOUBLE and logprobs.shape == (6, 10)
        for row, (_, length) in enumerate(SHAPES):
            assert bool((logprobs[row, length:] == 0).all()) and bool((entropy[row, length:] == 0).all())
            if length:
                wanted, wanted_entropy = by_hand(plain, sequences, row, temperature)
                torch.testing.assert_close(logprobs[row, :length], wanted, rtol=0, atol=1e-10)
                torch.testing.assert_close(entropy[row, :length], wanted_entropy, rtol=0, atol=1e-10)


@EVERY
def test_rows_do_not_depend_on_padding_or_neighbours(architecture: str) -> None:
    policy, sequences = Policy(causal_lm(architecture), DOUBLE), ragged(SHAPES)
    junk = copy.deepcopy(sequences)
    for row, length in enumerate(sequences.lengths.tolist()):
        junk.input_ids[row, length:] = 77
    with torch.no_grad():
        together, _ = policy(sequences)
        poisoned, _ = policy(junk)
        assert torch.equal(together, poisoned)
        for row in range(len(sequences)):
            alone, _ = policy(sequences.select([row]))
            torch.testing.assert_close(alone[0], together[row, : alone.shape[1]], rtol=0, atol=1e-11)


@EVERY
def test_two_forwards_in_training_mode_are_bitwise_equal(architecture: str, tmp_path: Any) -> None:
    causal_lm(architecture).save_pretrained(tmp_path)  # GPT-2's own configuration has a dropout of 0.1, OPT drops whole layers
    policy, sequences = Policy(load_causal_lm(str(tmp_path))).train(), ragged(SHAPES)
    first, _ = policy(sequences)
    for _ in range(3):
        assert torch.equal(policy(sequences)[0], first)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
def test_what_models_make_of_their_logits_is_found(architecture: str, dtype: torch.dtype) -> None:
    found, wanted = Policy(causal_lm(architecture), dtype).transform, TRANSFORMS.get(architecture, LogitTransform())
    assert found is not None and (found.cap is None) == (wanted.cap is None)
    assert (found.scale, found.cap or 0.0) == pytest.approx((wanted.scale, wanted.cap or 0.0), rel=1e-12)


@pytest.mark.parametrize("vocabulary", [2, 8])
def test_a_cap_is_noticed_while_the_logits_are_still_small(vocabulary: int) -> None:
    model = causal_lm("gemma2", vocabulary, final_logit_softcapping=30.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)  # as of a model just made: the cap moves logits of this size by less than rounding
    transform = Policy(model).transform
    assert transform is not None and transform.cap == pytest.approx(30.0)


@EVERY
def test_gradients_are_those_of_transformers(architecture: str) -> None:
    model, sequences = causal_lm(architecture), ragged(SHAPES)
    plain, policy = copy.deepcopy(model).double().eval(), Policy(model, DOUBLE)
    policy(sequences, temperature=0.7)[0].sum().backward()
    for row, (_, length) in enumerate(SHAPES):
        if length:
            by_hand(plain, sequences, row, 0.7)[0].sum().backward()
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    assert any(gradient is not None and gradient.abs().max() > 1e-2 for gradient in wanted.values())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def test_states_that_a_model_brings_into_the_heads_precision_are_the_same_states() -> None:
    """As Mamba's and others' do: a frozen head in bfloat16 gets rounded ones."""
    policy = Policy(causal_lm("llama_untied"), torch.bfloat16)
    policy.freeze()
    head = policy.head
    head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    with policy.autocast():
        assert _logit_transform(policy.model) == LogitTransform()


ODD: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "a bias after the head": lambda module, inputs, output: output + torch.arange(output.shape[-1]) / 100,
    "another cap": lambda module, inputs, output: output.clamp(-3.0, 3.0),
    "the other sign": lambda module, inputs, output: -output,
    "none": lambda module, inputs, output: 0 * output,
}


@pytest.mark.parametrize("way", [*ODD, "the states are scaled before"])
def test_a_model_whose_logits_are_of_no_known_kind_computes_them_itself(way: str) -> None:
    model = causal_lm("llama_untied")
    if way in ODD:
        forward = model.forward

        def odd(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            found.logits = ODD[way](model, args, found.logits)
            return found

        model.forward = odd
    else:
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] / 3,))
    policy, sequences = Policy(model), ragged(SHAPES)
    assert policy.transform is None
    with torch.no_grad():
        logprobs, entropy = policy(sequences, temperature=0.7, with_entropy=True)
        for row, (_, length) in enumerate(SHAPES):
            if length:
                wanted, wanted_entropy = by_hand(model, sequences, row, 0.7)
                torch.testing.assert_close(logprobs[row, :length].double(), wanted, rtol=0, atol=1e-4)
                assert entropy is not None
                torch.testing.assert_close(entropy[row, :length].double(), wanted_entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_values_are_read_before_each_token_and_scores_at_the_last(architecture: str) -> None:
    model = classifier(architecture)
    model.config.score_offset = 0.75
    trunk = copy.deepcopy(model.base_model).double().eval()
    weight = model.score.weight.detach().double()[0].clone()
    sequences = ragged(SHAPES)
    scorer = ScoreModel(model, DOUBLE)
    rounding = 1e-6 if architecture == "gemma2" else 1e-10  # its norms are computed in float32 whatever the model is in
    with torch.no_grad():
        scores, values = scorer(sequences), scorer(sequences, per_token=True)
        for row, (prompt_len, length) in enumerate(SHAPES):
            ids = sequences.input_ids[row : row + 1, : prompt_len + length]
            every = trunk(input_ids=ids).last_hidden_state[0] @ weight + 0.75
            assert scores[row].item() == pytest.approx(every[-1].item(), abs=rounding)
            for t in range(length):
                assert values[row, t].item() == pytest.approx(every[prompt_len - 1 + t].item(), abs=rounding)
            assert bool((values[row, length:] == 0).all())


@pytest.mark.parametrize("architecture", ["gpt2", "llama_untied"])
def test_score_is_transformers_own_plus_offset_and_reads_eos(architecture: str) -> None:
    model = classifier(architecture)
    plain = copy.deepcopy(model).eval()
    model.config.score_offset = -1.5
    scorer = ScoreModel(model)
    unfinished = ragged([(4, 3)])
    ids = torch.cat([unfinished.input_ids, torch.zeros(1, 1, dtype=torch.long)], 1)  # id 0 is EOS here, and pads' id too
    finished = Sequences(ids, unfinished.prompt_lens, unfinished.response_lens + 1, torch.tensor([True]))
    with torch.no_grad():
        for sequences in (unfinished, finished):
            assert scorer(sequences).item() == pytest.approx(plain(input_ids=sequences.input_ids).logits.item() - 1.5, abs=1e-5)
        assert abs(scorer(finished) - scorer(unfinished)).item() > 1e-3
        both = Sequences(ids.repeat(2, 1), torch.tensor([4, 4]), torch.tensor([3, 4]), torch.tensor([False, True]))
        torch.testing.assert_close(scorer(both), torch.cat([scorer(unfinished), scorer(finished)]))


def test_normalise_moves_scores_as_asked_and_is_stored() -> None:
    scorer, sequences = ScoreModel(classifier("gpt2"), DOUBLE), ragged(SHAPES)
    scorer.set_offset(0.5)
    with torch.no_grad():
        before = scorer(sequences)
        scorer.normalise(2.0, -3.0)
        torch.testing.assert_close(scorer(sequences), 2.0 * before - 3.0)
    assert scorer.model.config.score_offset == 2.0 * 0.5 - 3.0


def test_normalise_scales_a_head_with_a_bias() -> None:
    model = classifier("gpt2")
    bias = nn.Linear(32, 1)
    model.score = bias
    scorer, sequences = ScoreModel(model, DOUBLE), ragged(SHAPES)
    with torch.no_grad():
        bias.bias.fill_(4.0)
        before = scorer(sequences)
        scorer.normalise(0.5, 1.0)
        torch.testing.assert_close(scorer(sequences), 0.5 * before + 1.0)


def test_new_heads() -> None:
    head = nn.Linear(768, 1, bias=False)
    init_score_head(head, None)
    assert bool((head.weight == 0).all())
    wide = nn.Linear(768, 400, bias=False)  # many columns: the standard deviation is known to 0.2 %
    init_score_head(wide, torch.Generator().manual_seed(0))
    assert wide.weight.std().item() == pytest.approx(0.0360609222987, rel=0.006)
    assert abs(wide.weight.mean().item()) < 4 * 0.036 / math.sqrt(768 * 400)
    again = nn.Linear(768, 400, bias=False)
    init_score_head(again, torch.Generator().manual_seed(0))
    assert torch.equal(wide.weight, again.weight)


def test_a_value_model_with_a_zero_head_starts_at_zero() -> None:
    scorer = ScoreModel(classifier("llama_tied"))
    init_score_head(scorer.head, None)
    with torch.no_grad():
        assert bool((scorer(ragged(SHAPES), per_token=True) == 0).all())


def test_gradients_reach_every_parameter_and_only_from_response_tokens() -> None:
    policy = Policy(causal_lm("llama_untied"), DOUBLE)
    sequences = ragged([(3, 4), (6, 2)])
    logprobs, _ = policy(sequences)
    logprobs.sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in policy.parameters())
    nothing = ragged([(7, 0)])
    assert policy(nothing)[0].tolist() == [[0.0]]


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "gemma2"])
def test_bfloat16_roles_agree_whether_frozen_or_not(architecture: str) -> None:
    """Both compute with weights in bfloat16, the policy keeps float32 originals besides: the KL must be exactly 0."""
    sequences = ragged(SHAPES)
    policy, reference = (Policy(causal_lm(architecture), torch.bfloat16) for _ in range(2))
    reference.freeze()
    assert any(p.dtype is torch.bfloat16 for p in reference.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        ours, theirs = policy(sequences)[0], reference(sequences)[0]
        exact, _ = Policy(causal_lm(architecture))(sequences)
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().max() < 0.5


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "llama_untied"])
def test_a_policy_that_learns_keeps_float32_weights_and_a_frozen_one_the_rounded(architecture: str) -> None:
    original, policy, sequences = causal_lm(architecture), Policy(causal_lm(architecture), torch.bfloat16), ragged(SHAPES)
    saved = policy.full_precision()
    assert all(torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(saved.parameters(), original.parameters()))
    with torch.no_grad():
        before = policy(sequences)[0]
        policy.freeze()
        assert torch.equal(policy(sequences)[0], before), "products round the float32 weights as freezing does"
    assert {p.dtype for p in policy.parameters()} == {torch.float32, torch.bfloat16}
    assert policy.head.weight.dtype is torch.bfloat16


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """At 1 bfloat16 is spaced by 1/128 or 1/256; AdamW's steps with a constant gradient are of size `rate`."""
    policy, sequences = Policy(causal_lm("llama_untied"), torch.bfloat16), ragged(SHAPES)
    weight = policy.model.model.layers[0].mlp.down_proj.weight
    weight.data.fill_(1.0)
    adam = Optimizer(policy, weight_decay=0.0, max_grad_norm=1e9, world=World())
    with torch.no_grad():
        before = policy(sequences)[0]
    for count in range(1, 11):
        for parameter in policy.parameters():
            parameter.grad = (parameter == weight).float() if parameter is weight else None
        adam.step(1e-3)
        assert weight.dtype is torch.float32
        assert torch.allclose(weight, torch.full_like(weight, 1 - count * 1e-3), rtol=1e-5)
    with torch.no_grad():
        assert not torch.equal(policy(sequences)[0], before)


@pytest.mark.parametrize("architecture", ["gpt2", "llama_tied", "llama_untied"])
def test_gradients_under_bfloat16_are_float32_and_near_those_in_float32(architecture: str) -> None:
    """Micro-batches are added in float32: 257 times the same gradient is not 256 times it, as it would be in bfloat16."""
    sequences, found = ragged(SHAPES), []
    for dtype, times in ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 257)):
        policy = Policy(causal_lm(architecture), dtype)
        for _ in range(times):
            policy(sequences)[0].sum().backward()
        found.append({name: p.grad.to_dense() for name, p in policy.named_parameters() if p.grad is not None})
    exact, half, many = found
    for name, wanted in exact.items():
        assert half[name].dtype is torch.float32
        assert (half[name] - wanted).norm() < 0.1 * wanted.norm() + 1e-3, name
        torch.testing.assert_close(many[name], 257 * half[name], rtol=1e-4, atol=1e-4 * float(many[name].abs().max()))


def test_a_tied_embedding_in_bfloat16_leaves_the_residual_stream_in_float32() -> None:
    policy = Policy(causal_lm("llama_tied"), torch.bfloat16)
    assert policy.model.get_input_embeddings()(torch.tensor([1])).dtype is torch.float32


def test_a_float64_role_is_saved_in_float32() -> None:
    policy = Policy(causal_lm("gpt2"), DOUBLE)
    assert policy.full_precision().dtype is torch.float32
    assert policy.model.dtype is DOUBLE


def test_flops_by_hand() -> None:
    """GPT-2: 12 d^2 weights a layer, the head V d; two operations for each weight and token."""
    policy, value = Policy(causal_lm("gpt2")), ScoreModel(classifier("gpt2"))
    config = policy.model.config
    trunk = 12 * config.n_embd**2 * config.n_layer
    assert policy.flops(10, 4) == 2 * (trunk * 10 + config.vocab_size * config.n_embd * 4)
    assert value.flops(10, 4) == 2 * (trunk * 10 + config.n_embd * 4)


def test_several_labels_or_an_encoder_cannot_be_a_reward_model() -> None:
    with pytest.raises(TercetError, match=r"has 3 labels, a reward model has one.*label"):
        ScoreModel(classifier("gpt2", num_labels=3))
    with pytest.raises(TercetError, match="does not read its score at the last token.*kind: classifier"):
        ScoreModel(bert(word_tokenizer()))
    with pytest.raises(TercetError, match="no linear head"):
        ScoreModel(causal_lm("gpt2"))


@EVERY
def test_the_zoo_is_random_enough_for_the_comparisons_above_to_mean_something(architecture: str) -> None:
    with torch.no_grad():
        logits = causal_lm(architecture)(input_ids=ragged([(9, 0)]).input_ids).logits
    assert logits.std() > 0.2


def test_models_given_in_training_mode_are_probed_without_their_dropout() -> None:
    model = causal_lm("gpt2").train()  # dropout 0.1
    assert Policy(model).transform == LogitTransform() and model.training
    assert ScoreModel(classifier("gpt2").train()).model.training
