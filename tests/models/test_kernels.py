"""tercet/models/kernels.py: faster kernels give the numbers of the slow ones."""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import NewGELUActivation

from tercet.models.kernels import fuse_activations, use_float32_attention


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=32)).eval()


def test_the_fused_activation_gives_the_same_logits_and_no_slow_one_is_left():
    slow = gpt2().double()
    fast = copy.deepcopy(slow)
    fuse_activations(fast)
    ids = torch.randint(0, 50, (3, 11))
    torch.testing.assert_close(fast(input_ids=ids).logits, slow(input_ids=ids).logits, rtol=1e-12, atol=1e-12)
    assert any(isinstance(module, NewGELUActivation) for module in slow.modules())
    assert not any(isinstance(module, NewGELUActivation) for module in fast.modules())


def test_float32_attention_changes_nothing_outside_autocast():
    for model in (
        gpt2(),
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=50,
            )
        ).eval(),
    ):
        ids = torch.randint(0, 50, (2, 9))
        mask = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
        with torch.no_grad():
            before = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
            use_float32_attention(model)
            assert model.config._attn_implementation != "sdpa"
            after = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask).logits]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_under_autocast_it_is_closer_to_float32_than_bfloat16_attention_is():
    exact, rounded = gpt2(), gpt2()
    ids = torch.randint(0, 50, (4, 30))
    with torch.no_grad():
        wanted = exact(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            coarse = (rounded(input_ids=ids).logits.float() - wanted).abs().mean()
            use_float32_attention(rounded)
            fine = (rounded(input_ids=ids).logits.float() - wanted).abs().mean()
    assert fine <= coarse * 1.05
