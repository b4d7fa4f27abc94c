"""tercet/models/kernels.py: faster kernels give the numbers of the slow ones."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from tercet.algo import products
from tercet.models import kernels
from tercet.models.kernels import (
    fuse_activations,
    is_linear,
    packed_weights,
    recompute_activations,
    use_fast_adapters,
    use_fast_products,
)

needs_bfloat16 = pytest.mark.skipif(
    not products.onednn_computes(torch.zeros(1).bfloat16()), reason="a processor without bfloat16"
)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (1, 700, 760), (2, 300, 900)])  # the first is too small for oneDNN's kernel
@pytest.mark.parametrize("has_avx512", [True, False])
def test_the_fused_activation_and_its_gradient_are_those_of_float64_up_to_rounding(
    has_avx512: bool, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_has_avx512", lambda: has_avx512)
    asked: list[torch.Tensor] = []
    own = kernels._OneDNNGELU.forward
    monkeypatch.setattr(kernels._OneDNNGELU, "forward", lambda ctx, x: asked.append(x) or own(ctx, x))
    model = gpt2()
    fuse_activations(model)
    fused = model.transformer.h[0].mlp.act
    x = (4 * torch.randn(*shape)).to(dtype).transpose(-1, -2)
    slope = torch.randn(x.shape).to(dtype)
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    for activation, given in zip((fused, NewGELUActivation()), inputs):
        activation(given).backward(slope.to(given.dtype))
    found, wanted = fused(x), NewGELUActivation()(x.double())
    assert bool(asked) is (has_avx512 and x.numel() > 1000 and products.onednn_computes(x))
    assert found.dtype is dtype and found.shape == x.shape
    gradient, exact = inputs[0].grad, inputs[1].grad
    assert gradient is not None and exact is not None
    rounding = 16 * torch.finfo(dtype).eps
    assert (found.double() - wanted).abs().max() <= rounding * wanted.abs().max()
    assert (gradient.double() - exact).abs().max() <= rounding * exact.abs().max()


def layers() -> nn.Sequential:
    """Both kinds of linear layer, wider and narrower than their inputs, with and without bias, in bfloat16."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(40, 24), nn.Linear(40, 16, bias=False), nn.Linear(16, 48), Conv1D(8, 48))
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).bfloat16()
    return model


@pytest.mark.parametrize("rows", [(3, 7), (2, 700)])
def test_fast_products_and_their_gradients_are_those_of_float64_up_to_rounding(rows: tuple[int, int]):
    fast = layers()
    exact = copy.deepcopy(fast).double()
    use_fast_products(fast)
    x = torch.randn(*rows, 24).bfloat16()
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    slope = torch.randn(*rows, 8).bfloat16()
    for model, given in zip((fast, exact), inputs):
        model(given).backward(slope.to(given.dtype))
    with torch.no_grad():
        torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=0.02, atol=0.02)
    for found, wanted in zip((inputs[0], *fast.parameters()), (inputs[1], *exact.parameters())):
        assert found.grad is not None and wanted.grad is not None
        assert found.grad.dtype is torch.bfloat16 and found.grad.stride() == found.stride()
        error = (found.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < 0.01, error


def test_float32_weights_are_rounded_for_the_product_and_get_float32_gradients():
    rounded, wide = layers(), layers().float()
    use_fast_products(rounded)
    use_fast_products(wide)
    x = torch.randn(3, 7, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        for model in (rounded, wide):
            output = model(x)
            output.backward(torch.ones_like(output))
        for half, whole in zip(rounded.parameters(), wide.parameters()):
            assert whole.grad is not None and whole.grad.dtype is torch.float32 and whole.grad.stride() == whole.stride()
            assert torch.equal(half.grad, whole.grad.bfloat16())
        with torch.no_grad(), packed_weights(wide, 21, torch.bfloat16):
            torch.testing.assert_close(wide(x), rounded(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("holds_back", [True, False])
def test_layers_in_float32_take_onednns_product_where_it_is_faster(holds_back: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_mkl_holds_back", lambda: holds_back)
    torch.manual_seed(0)
    plain = nn.Sequential(Conv1D(400, 240), nn.Linear(400, 160, bias=False), Conv1D(80, 160), nn.Linear(80, 4))
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    use_fast_products(fast)
    made: list[int] = []
    own = products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda x, *rest: made.append(len(x)) or own(x, *rest))
    x = torch.randn(2, 700, 240)
    inputs = [x.clone().requires_grad_(), x.double().requires_grad_()]
    slope = torch.randn(2, 700, 4)
    for model, given in zip((fast, exact), inputs):
        model(given).backward(slope.to(given.dtype))
    assert bool(made) is holds_back
    assert holds_back or torch.equal(fast(x), plain(x))
    torch.testing.assert_close(fast(x).double(), exact(x.double()), rtol=1e-4, atol=1e-5)
    for found, wanted in zip((inputs[0], *fast.parameters()), (inputs[1], *exact.parameters())):
        assert found.grad is not None and wanted.grad is not None
        assert found.grad.dtype is torch.float32 and found.grad.stride() == found.stride()
        assert (found.grad.double() - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()


def test_packed_weights_give_the_same_products_and_go_again():
    plain = layers()
    packed = copy.deepcopy(plain)
    x = torch.randn(3, 1, 24).bfloat16()
    with torch.no_grad(), packed_weights(packed, 3, torch.bfloat16):
        assert all("forward" in vars(layer) for layer in packed)
        torch.testing.assert_close(packed(x), plain(x), rtol=0.02, atol=0.02)
        assert packed(x[:2]).shape == (2, 1, 8)
    assert not any("forward" in vars(layer) for layer in packed)


@pytest.mark.parametrize("pays", [True, False])
def test_float32_weights_are_packed_where_that_is_faster(pays: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_mkl_holds_back", lambda: pays)
    model = nn.Sequential(Conv1D(2100, 50), nn.Linear(2100, 60), Conv1D(8, 60))  # the last is small
    x = torch.randn(10, 50)
    wanted = model(x)
    with torch.no_grad(), packed_weights(model, 10, torch.float32):
        assert ["forward" in vars(layer) for layer in model] == [pays, pays, False]
        for rows in (10, 3):
            torch.testing.assert_close(model(x[:rows]), wanted[:rows], rtol=1e-4, atol=1e-5)


def test_a_packed_head_leaves_out_what_its_rows_have_in_common():
    """A softmax does not see it; rounded around -100, logits would have lost up to half of their differences."""
    head, x = nn.Linear(16, 40, bias=False), torch.randn(5, 16)
    with torch.no_grad():
        head.weight.normal_().div_(4)[:, 0] = 1.0
        x[:, 0] = -100.0
        exact = head(x).log_softmax(-1)
        for centred, limit in ((head, 0.03), (None, 0.5)):
            with packed_weights(nn.Sequential(head), 5, torch.bfloat16, centred):
                worst = (head(x).float().log_softmax(-1) - exact).abs().max()
            assert limit / 10 < worst < limit


@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
@pytest.mark.parametrize(
    ("dtype", "by_onednn"),
    [(torch.float32, True), pytest.param(torch.bfloat16, True, marks=needs_bfloat16), (torch.bfloat16, False)],
    ids=str,
)
def test_packed_weights_of_gpt2_activate_what_they_multiply(
    activation: str, dtype: torch.dtype, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(products, "_onednn_has_bfloat16", lambda: by_onednn)
    monkeypatch.setattr(products, "_has_avx512", lambda: True)
    monkeypatch.setattr(kernels, "packing_pays", lambda weight, rows: True)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, activation_function=activation)).eval()
    fuse_activations(model)
    mlp, x = model.transformer.h[0].mlp, 4 * torch.randn(3, 1, 32)
    wanted = mlp(x)
    activated: list[bool] = []
    mlp.act.register_forward_hook(lambda module, inputs, output: activated.append(torch.equal(inputs[0], output)))
    tolerances = {"rtol": 0.02, "atol": 0.05} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        with packed_weights(model, 3, dtype):
            torch.testing.assert_close(mlp(x).float(), wanted, **tolerances)
        torch.testing.assert_close(mlp(x).float(), wanted, **tolerances)
    assert activated == [by_onednn and activation == "gelu_new", False], "as it is, where the product did it"
    assert "forward" not in vars(mlp.act) and "forward" not in vars(mlp.c_fc)


@needs_bfloat16
def test_what_adapters_add_in_gpt2_is_activated_with_the_product(monkeypatch: pytest.MonkeyPatch):
    from peft import LoraConfig, inject_adapter_in_model

    monkeypatch.setattr(products, "_has_avx512", lambda: True)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)).eval()
    fuse_activations(model)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["c_fc", "c_proj"], fan_in_fan_out=True), model)
    for name, parameter in model.named_parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape) if "lora" in name else parameter.data
    use_fast_adapters(model)
    mlp, x = model.transformer.h[0].mlp, 4 * torch.randn(3, 1, 32)
    wanted = mlp(x)
    activated: list[bool] = []
    mlp.act.register_forward_hook(lambda module, inputs, output: activated.append(torch.equal(inputs[0], output)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_weights(model, 3, torch.bfloat16):
        torch.testing.assert_close(mlp(x).float(), wanted, rtol=0.02, atol=0.1)
    assert activated == [True]


def test_packed_weights_are_anew_after_a_step():
    model, x = layers(), torch.randn(2, 24).bfloat16()
    with torch.no_grad():
        with packed_weights(model, 2, torch.bfloat16):
            before = model(x)
        for parameter in model.parameters():
            parameter.mul_(2)
        with packed_weights(model, 2, torch.bfloat16):
            after = model(x)
        torch.testing.assert_close(after, model(x), rtol=0.02, atol=0.05)
    assert not torch.allclose(after, before, rtol=0.1)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(autocast: bool):
    kept, recomputed = gpt2(), gpt2()
    recompute_activations(recomputed)
    ids = torch.randint(0, 50, (3, 11))
    sizes = []
    for model in (kept, recomputed):
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, use_cache=False).logits.float().square().sum()
            forward = sum(saved.values())
            loss.backward()
        sizes.append(forward)
    for one, other in zip(kept.parameters(), recomputed.parameters()):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    assert sizes[1] < 0.6 * sizes[0], "two layers' insides are gone; the head's logits and the weights stay"


def test_recomputing_leaves_sampling_with_a_cache_alone():
    plain, recomputed = gpt2(), gpt2()
    assert recompute_activations(recomputed) and not recompute_activations(nn.Sequential(nn.Linear(2, 2)))
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True) for model in (plain, recomputed)]
    assert outputs[1].past_key_values.get_seq_length() == 3
    assert torch.equal(outputs[0].logits, outputs[1].logits)


def adapted(fast: bool, rank: int = 3) -> nn.Sequential:
    """`layers` in float64 below adapters of that rank that do something."""
    from peft import LoraConfig, inject_adapter_in_model

    model = layers().double()
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=5, target_modules=["0", "1", "2", "3"]), model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).double()
    if fast:
        use_fast_adapters(model)
    return model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fast_adapters_give_the_outputs_and_gradients_of_pefts_own(dtype: torch.dtype):
    exact, model = adapted(fast=False), adapted(fast=True)
    if dtype is torch.bfloat16:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora" in name else parameter.data.bfloat16()
    tolerance = 1e-12 if dtype is torch.float64 else 0.06  # of the first layer's gradients, four layers on
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(2)).bfloat16()
    inputs = [x.double().requires_grad_(), x.to(dtype).requires_grad_()]
    outputs = []
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        for one, given in zip((exact, model), inputs):
            with torch.autocast("cpu", enabled=one is model and dtype is torch.bfloat16):
                outputs.append(one(given))
                outputs[-1].backward(torch.ones_like(outputs[-1]))
        with torch.no_grad():
            assert torch.equal(model(inputs[1]), outputs[1]), "scoring and learning must agree to the bit"
    learned = [(a, b) for a, b in zip(exact.parameters(), model.parameters()) if a.requires_grad]
    assert len(learned) == 8
    found = [(inputs[0].grad, inputs[1].grad), (outputs[0], outputs[1]), *((a.grad, b.grad) for a, b in learned)]
    for wanted, given in found:
        assert (given.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("packed", [False, True])
def test_a_small_adapter_is_not_lost_in_bfloat16(packed: bool):
    """Far below half a unit of the last place of what it is added to: what is lost on some numbers others must gain."""
    model, generator = adapted(fast=True).float(), torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    use_fast_products(model)
    for layer in model:
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x, small = torch.randn(4000, 1, down.shape[1], generator=generator).bfloat16(), up.data * 1e-3
        wanted = layer.scaling["default"] * x.double() @ down.double().t() @ small.double().t()
        outputs = []
        for present in (torch.zeros_like(small), small):
            up.data = present
            copied = packed_weights(model, len(x), torch.bfloat16) if packed else contextlib.nullcontext()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), copied:
                outputs.append(layer(x).double())
        assert wanted.abs().median() < 2**-10 * outputs[0].abs().median()
        kept = ((outputs[1] - outputs[0]) * wanted).sum() / wanted.square().sum()
        assert 0.9 < kept < 1.1


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("rank", [3, 32, 40])
def test_adapters_of_packed_weights_are_packed_with_them(rank: int):
    model = adapted(fast=True, rank=rank).float()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if "lora" in name else parameter.data.bfloat16()
    use_fast_products(model)
    x = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, own = model(x), [vars(layer)["forward"] for layer in model]
        with packed_weights(model, 3, torch.bfloat16):
            assert all(vars(layer)["forward"] is not forward for layer, forward in zip(model, own))
            torch.testing.assert_close(model(x), plain, rtol=0.02, atol=0.05 if rank == 3 else 0.02 * plain.abs().max().item())
        assert [vars(layer)["forward"] for layer in model] == own
        assert torch.equal(model(x), plain)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_frozen_weights_are_copied_only_up_to_a_limit(monkeypatch: pytest.MonkeyPatch):
    """All of them or none; those that learn have to be rounded anyway, and the head loses what its rows have in common."""
    model, head = layers(), nn.Linear(8, 5, dtype=torch.bfloat16)
    size = sum(layer.weight.nbytes for layer in model)
    for limit, packed in ((size, True), (size - 1, False)):
        monkeypatch.setattr(kernels, "MOST_PACKED", limit)
        with torch.no_grad(), packed_weights(nn.Sequential(*model, head), 3, torch.bfloat16, head):
            assert ["forward" in vars(layer) for layer in (*model, head)] == [packed] * len(model) + [True]
    monkeypatch.setattr(kernels, "MOST_PACKED", 0)
    learning, frozen = layers().float(), adapted(fast=True)
    for name, parameter in frozen.named_parameters():
        parameter.data = parameter.data.float() if "lora" in name else parameter.data.bfloat16()
    own = [vars(layer)["forward"] for layer in frozen]
    with torch.no_grad(), packed_weights(learning, 3, torch.bfloat16), packed_weights(frozen, 3, torch.bfloat16):
        assert all("forward" in vars(layer) for layer in learning)
        assert [vars(layer)["forward"] for layer in frozen] == own


def test_layers_that_are_more_than_a_product_stay_as_they_are() -> None:
    """Routers of some mixtures of experts are children of nn.Linear and return pairs."""

    class Router(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x, super().forward(x)

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    found = [is_linear(kind(4, 3)) for kind in (nn.Linear, Own, Router)]
    assert found == [True, True, False] and not is_linear(nn.LayerNorm(4))
