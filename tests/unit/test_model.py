"""The decoder against `transformers`, loss and attention against their definitions."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchxihe.config.options import Model
from torchxihe.errors import UserError
from torchxihe.kernels import float8_swiglu, select
from torchxihe.kernels import linear_cross_entropy as lce
from torchxihe.kernels.attention import sdpa
from torchxihe.kernels.select import select_attention, select_swiglu
from torchxihe.model.decoder import Decoder
from torchxihe.model.flops import palm_flops_per_token, parameter_counts, training_flops
from torchxihe.model.hf import hf_config, hf_name

XIHE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 128,
    "intermediate_size": 2048,
    "vocab_size": 50304,
    "qk_norm": True,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Shape:
    """A small model: hidden, heads, key-value heads, head dimension, QK-norm, tied head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm: bool
    tied: bool


SHAPES = [
    Shape(64, 4, 4, 16, False, True),
    Shape(64, 4, 2, 16, False, False),
    Shape(48, 4, 1, 32, False, True),  # head_dim is not hidden / heads
    Shape(64, 4, 4, 16, True, False),
    Shape(40, 6, 3, 24, True, True),
]


def model_config(shape: Shape) -> Model:
    return Model(
        hidden_size=shape.hidden,
        num_hidden_layers=3,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=96,
        vocab_size=131,
        qk_norm=shape.qk_norm,
        tie_word_embeddings=shape.tied,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.1,  # large, so that a wrong term is detected
    )


def build(config: Model, seq_len: int = 64, seed: int = 0) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config, seq_len=seq_len, dtype=torch.float32)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: Shape) -> None:
    transformers = pytest.importorskip("transformers")
    config = model_config(shape)
    model = build(config)
    with torch.no_grad():  # norm weights other than one, so that a missing one is detected
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(1 + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    described = hf_config(config, seq_len=64, vocab_size=131, eos_id=0, bos_id=-1)
    hf_class = getattr(transformers, described["architectures"][0])
    hf = hf_class(transformers.AutoConfig.for_model(**described)).eval().float()
    missing, unexpected = hf.load_state_dict({hf_name(n): p for n, p in model.named_parameters()}, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if shape.tied else [])
    hf.tie_weights()
    tokens = torch.randint(0, 131, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(tokens) - hf(tokens).logits).abs().max().item()
    assert difference < 1e-4


def test_documents_do_not_attend_to_each_other() -> None:
    model = build(model_config(SHAPES[1]))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 131, (2, 20), generator=generator)
    cu_seqlens = torch.tensor([0, 7, 20, 33, 40], dtype=torch.int32)  # two documents per row
    logits = model(tokens, None, cu_seqlens)
    for row, start, end in [(0, 0, 7), (0, 7, 20), (1, 0, 13), (1, 13, 20)]:
        alone = model(tokens[row : row + 1, start:end])
        torch.testing.assert_close(logits[row, start:end], alone[0], atol=2e-5, rtol=1e-5)


def test_sdpa_with_documents_equals_softmax_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 5, 12, 15, 24, 24], dtype=torch.int32)
    owner = torch.tensor([0] * 5 + [1] * 7 + [2] * 3 + [3] * 9).view(2, 12)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sdpa(q, k, v, cu_seqlens)
    expected = torch.zeros_like(out)
    for b in range(2):
        for h in range(4):
            scores = q[b, :, h] @ k[b, :, h // 2].T / 8**0.5
            allowed = (owner[b][:, None] == owner[b][None]) & torch.ones(12, 12, dtype=torch.bool).tril()
            expected[b, :, h] = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[b, :, h // 2]
    torch.testing.assert_close(out, expected)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def cross_entropy_inputs(dtype: torch.dtype, rows: int = 77) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 32, generator=generator).to(dtype).requires_grad_()
    w = (0.3 * torch.randn(101, 32, generator=generator)).requires_grad_()
    targets = torch.randint(0, 101, (rows,), generator=generator)
    targets[::5] = lce.IGNORE_INDEX
    return x, w, targets


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_linear_cross_entropy_equals_definition(
    dtype: torch.dtype, tolerance: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lce, "CHUNK_LOGITS", 20 * 101)
    monkeypatch.setattr(lce, "ROWS_MULTIPLE", 6)  # 77 rows in chunks of 24, 24, 24 and 5
    x, w, targets = cross_entropy_inputs(dtype)
    function = torch.compile(lce.linear_cross_entropy, fullgraph=True) if compiled else lce.linear_cross_entropy
    loss, losses = function(x, w, targets)
    reference, terms = lce.linear_cross_entropy_reference(x, w, targets)
    assert abs(loss - reference) <= (1e-5 if dtype == torch.float32 else 1e-2) * abs(reference)
    assert losses.dtype == torch.float32 and not losses.requires_grad and not losses[::5].any()
    torch.testing.assert_close(losses, terms, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)
    scale = 1 / 61
    for ours, theirs in zip(
        torch.autograd.grad(loss * scale, (x, w)), torch.autograd.grad(reference * scale, (x, w)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= tolerance * theirs.float().norm()


def test_both_gradients_have_the_same_scale() -> None:
    """A mean over 65,300 tokens, a number that bfloat16 rounds to 65,536. Seen to fail with a bfloat16 scale for dX."""
    x, w, targets = cross_entropy_inputs(torch.bfloat16)
    whole = torch.autograd.grad(lce.linear_cross_entropy(x, w, targets)[0], (x, w))
    mean = torch.autograd.grad(lce.linear_cross_entropy(x, w, targets)[0] / 65300, (x, w))
    for sum_gradient, gradient in zip(whole, mean, strict=True):
        ratio = gradient.double().norm() / sum_gradient.double().norm()
        assert abs(ratio * 65300 - 1) < 2e-3


def test_linear_cross_entropy_of_ignored_rows_alone_is_zero() -> None:
    x, w, targets = cross_entropy_inputs(torch.float32)
    loss, losses = lce.linear_cross_entropy(x, w, torch.full_like(targets, lce.IGNORE_INDEX))
    loss.backward()
    assert loss == 0 and not losses.any()
    assert x.grad is not None and not x.grad.any() and w.grad is not None and not w.grad.any()


def test_model_loss_equals_cross_entropy_of_its_logits() -> None:
    model = build(model_config(SHAPES[0]))
    tokens = torch.randint(0, 131, (3, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = lce.IGNORE_INDEX
    expected = F.cross_entropy(model(tokens).transpose(1, 2), targets, reduction="none").sum(1)
    loss, by_row = model(tokens, targets)
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(by_row, expected)
    assert loss.requires_grad and not by_row.requires_grad


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = build(Model(**{**XIHE, "num_hidden_layers": 2, "vocab_size": 5000}))
    tokens = torch.randint(0, 5000, (2, 65), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[0] / 128
    assert abs(loss.item() - torch.tensor(5000.0).log().item()) < 0.3


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    config = model_config(SHAPES[0])
    a, b, c = build(config), build(config), build(config, seed=1)
    deeper = build(config.model_copy(update={"initializer_range": 0.1, "tie_word_embeddings": False}))
    for name, p in a.named_parameters():
        assert torch.equal(p, b.get_parameter(name)) and torch.equal(p, deeper.get_parameter(name))
        assert p.ndim == 1 or not torch.equal(p, c.get_parameter(name))


def test_counts_of_xihe_120m() -> None:
    config = Model(**XIHE)
    with torch.device("meta"):
        model = Decoder(config, seq_len=1024, dtype=torch.float32)
    total, multiplying = parameter_counts(config)
    assert total == sum(p.numel() for p in model.parameters()) == 123_590_400
    assert multiplying == 84_934_656 + 50304 * 768  # the blocks' matrices, and the table as the head
    assert palm_flops_per_token(config, 1024) == pytest.approx(855e6, rel=2e-3)


def test_flops_are_those_of_the_operations() -> None:
    """Against torch's FlopCounterMode, which counts every (query, key) pair, masked or not."""
    config = model_config(SHAPES[0])
    model, tokens = build(config), torch.randint(0, config.vocab_size, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens)[0].backward()
    assert counter.get_total_flops() == training_flops(config, 2 * 16, 2 * 16 * 16)
    assert palm_flops_per_token(config, 16) == training_flops(config, 1, 16)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameter_count_equals_the_model(shape: Shape) -> None:
    config = model_config(shape)
    assert parameter_counts(config)[0] == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize(
    ("capability", "extra", "head_dim", "documents", "chosen"),
    [
        ((9, 0), True, 128, True, "fa4"),
        ((9, 0), True, 20, True, "sdpa"),  # 40 bytes: not aligned to 16
        ((9, 0), True, 80, True, "varlen"),
        ((9, 0), True, 192, True, "varlen"),
        ((9, 0), False, 64, True, "varlen"),
        ((8, 6), False, 64, False, "sdpa"),
        ((7, 5), False, 64, True, "sdpa"),
        ((8, 6), False, 512, True, "sdpa"),
    ],
)
def test_auto_attention_is_one_that_works(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    extra: bool,
    head_dim: int,
    documents: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(select, "compute_capability", lambda device: capability)
    monkeypatch.setattr(select, "has_flash_attention_4", lambda device: extra)
    model = Model.model_validate(XIHE | {"head_dim": head_dim})
    device = torch.device("cuda")
    assert select_attention(model, device, torch.bfloat16, documents).__name__ == chosen
    assert select_attention(model, device, torch.float32, documents).__name__ == "sdpa"
    if chosen != "fa4":
        with pytest.raises(UserError, match='model.attention: "fa4" needs a Hopper'):
            select_attention(model.model_copy(update={"attention": "fa4"}), device, torch.bfloat16, documents)


@pytest.mark.parametrize(
    ("capability", "recipe", "width", "mlp", "chosen"),
    [
        ((9, 0), "tensorwise", 2048, "auto", "swiglu_float8"),
        ((8, 9), "tensorwise", 14336, "auto", "swiglu_float8"),
        ((8, 0), "tensorwise", 2048, "auto", "swiglu_reference"),
        ((9, 0), "tensorwise", 2048, "torch", "swiglu_reference"),
        ((9, 0), "rowwise", 2048, "auto", "swiglu_reference"),
        ((9, 0), "tensorwise", 2056, "auto", "swiglu_reference"),  # torchao does not convert such a matrix either
        ((9, 0), "tensorwise", 28672, "auto", "swiglu_reference"),
        ((9, 0), "", 2056, "auto", "swiglu_quack"),
        ((9, 0), "", 2056, "torch", "swiglu_reference"),
    ],
)
def test_auto_mlp_is_one_that_works(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], recipe: str, width: int, mlp: str, chosen: str
) -> None:
    monkeypatch.setattr(float8_swiglu, "compute_capability", lambda device: capability)
    monkeypatch.setattr(select, "has_quack", lambda device: True)
    monkeypatch.setattr(float8_swiglu, "compile_obstacle", lambda: "")
    model = Model.model_validate(XIHE | {"intermediate_size": width, "mlp": mlp})
    device = torch.device("cuda")
    assert select_swiglu(model, device, torch.bfloat16, recipe).__name__ == chosen
    assert select_swiglu(model, device, torch.float32, recipe).__name__ == "swiglu_reference"
    if recipe:
        with pytest.raises(UserError, match='model.mlp: "quack" needs .* no float8.recipe'):
            select_swiglu(model.model_copy(update={"mlp": "quack"}), device, torch.bfloat16, recipe)
