"""Completions attend to prompt and self: side by side or merged, against every token's softmax written out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from common.config.schema import ModelConfig
from common.forward import attention, merged_attention
from common.forward.attention import merges, shared_prefix_attention
from common.forward.merged_attention import CPU, EFFICIENT, FLASH, PLAIN, Block
from common.forward.packing import ALIGNED, PromptGroup, Seen, pack_shared
from common.models.encoder import EncodedPrompt
from common.models.families import Gemma3, Qwen2VL
from common.types import UserError

LAYER = torch.nn.Module()
LAYER.is_causal = True


def drawn(generator, low, high):
    return int(torch.randint(low, high, (1,), generator=generator))


def packed(prompts, completions, blocks=None):
    """The layout of prompts of these lengths, each with completions of those; `blocks`: of image tokens, per prompt."""
    made = []
    for number, (length, own) in enumerate(zip(prompts, completions, strict=True)):
        block = None if blocks is None else blocks[number]
        prompt = EncodedPrompt(torch.zeros(length, dtype=torch.long), torch.arange(length)[None], blocks=block)
        made.append(PromptGroup(prompt, tuple(torch.zeros(size, dtype=torch.long) for size in own)))
    family = Qwen2VL if blocks is None else Gemma3
    return pack_shared(made, family, torch.device("cpu")).inputs["shared_prefix"]


def written_out(query, key, value, prompts, completions, blocks, window, scaling):
    """Every token of the row by itself: which rows it sees, by counting, and the softmax over them."""
    repeat = query.shape[1] // key.shape[1]
    seen_rows, start = [], 0
    for number, (length, own) in enumerate(zip(prompts, completions, strict=True)):
        rows = list(range(start, start + length))
        block = None if blocks is None else blocks[number].tolist()
        for i in range(length):
            before = [j for j in range(length) if j <= i or (block and block[i] == block[j] >= 0)]
            seen_rows.append([rows[j] for j in before if window is None or j > i - window])
        start += length
        for size in own:
            for i in range(size):
                line = rows + list(range(start, start + i + 1))
                seen_rows.append(line if window is None else line[-window:])
            start += size
    out = []
    for row, seen in enumerate(seen_rows):
        keys, values = (x[0, :, seen].repeat_interleave(repeat, 0) for x in (key, value))  # [H, seen, D]
        scores = scaling * (keys @ query[0, :, row, :, None])[..., 0]
        out.append((scores.softmax(-1)[:, None] @ values)[:, 0])
    return torch.stack(out)[None]  # [1, L, H, D]


def case(seed):
    """Sizes, and tensors of them in fp64: one to three prompts, windows, images, grouped heads, all by chance."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 + seed % 3
    prompts = [drawn(generator, 4, 24) for _ in range(count)]
    sizes = [drawn(generator, 1, 5) for _ in range(count)] if seed % 2 else [3] * count
    completions = [[drawn(generator, 1, 9) for _ in range(size)] for size in sizes]
    window = (None, 3, 6, 40)[seed % 4]
    blocks = [torch.full((length,), -1) for length in prompts] if seed % 5 == 0 else None
    for block in blocks or []:
        block[1:3] = 0
    heads, keys = ((4, 2), (6, 1), (2, 2))[drawn(generator, 0, 3)]
    rows = sum(prompts) + sum(map(sum, completions))
    draw = [torch.randn(1, n, rows, 8, generator=generator, dtype=torch.float64) for n in (heads, keys, keys)]
    weights = torch.randn(1, rows, heads, 8, generator=generator, dtype=torch.float64)
    return (prompts, completions, blocks), window, [x.requires_grad_() for x in draw], weights


def with_gradients(out, tensors, weights):
    return out, *torch.autograd.grad((out * weights).sum(), tensors)


@pytest.mark.parametrize("seed", range(12))
def test_copies_and_merging_are_the_written_out_attention(seed, monkeypatch):
    sizes, window, tensors, weights = case(seed)
    layout = packed(*sizes)
    expected = with_gradients(written_out(*tensors, *sizes, window, 0.4), tensors, weights)
    choices = {
        "cpu": lambda block: CPU,
        "plain": lambda block: PLAIN,
        "gpu": lambda block: EFFICIENT if block.bias is not None else FLASH,
    }
    for how, device in (("copy", "cpu"), ("merge", "cpu"), ("merge", "plain"), ("merge", "gpu")):
        monkeypatch.setattr(merged_attention, "kernel", choices[device])
        monkeypatch.setattr(merged_attention, "aten", like_on_a_gpu() if device == "gpu" else torch.ops.aten)
        out, _ = shared_prefix_attention(LAYER, *tensors, None, 0.4, window, layout, how=how)
        for found, right in zip(with_gradients(out, tensors, weights), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def like_on_a_gpu():
    """The kernels of GPUs in plain steps, with what they demand of the tensors and do not check."""

    def flash(query, key, value, dropout, causal, *, scale):
        assert dropout == 0
        return *PLAIN.forward(Block(query, key, value, None, causal, scale)), *[None] * 7

    def flash_backward(grad, query, key, value, out, lse, of_queries, of_keys, queries, keys, *others, scale):
        dropout, causal, _, _ = others
        assert dropout == 0 and of_queries is of_keys is None and (queries, keys) == (query.shape[2], key.shape[2])
        assert lse.is_contiguous()
        return PLAIN.backward(Block(query, key, value, None, causal, scale), grad, out, lse)

    def whole(query, key, bias):
        assert query.shape[1] == key.shape[1] and query.stride(-1) == key.stride(-1) == 1
        if bias is not None:
            assert bias.shape == (*query.shape[:3], key.shape[2]) and bias.dtype == query.dtype
            assert bias.stride(-1) == 1 and all(step % ALIGNED == 0 for step in bias.stride()[:-1])

    def forward(query, key, value, bias, lse, dropout, causal, *, scale):
        whole(query, key, bias)
        assert lse is True and dropout == 0
        out, lse = PLAIN.forward(Block(query, key, value, bias, causal, scale))
        filled = torch.full((*lse.shape[:2], math.ceil(lse.shape[2] / 32) * 32), torch.inf, dtype=lse.dtype)
        filled[..., : lse.shape[2]] = lse
        return out, filled, None, None

    def backward(grad, query, key, value, bias, out, lse, *others, scale):
        *_, dropout, wanted, causal = others
        whole(query, key, bias)
        assert dropout == 0 and wanted == [True, True, True, False]
        assert lse.is_contiguous() and lse.shape[2] % 32 == 0 and bool(lse[..., query.shape[2] :].isinf().all())
        assert out.transpose(1, 2).is_contiguous()
        block = Block(query, key, value, bias, causal, scale)
        return *PLAIN.backward(block, grad, out, lse[..., : query.shape[2]]), None

    return SimpleNamespace(
        _scaled_dot_product_flash_attention=flash,
        _scaled_dot_product_flash_attention_backward=flash_backward,
        _scaled_dot_product_efficient_attention=forward,
        _scaled_dot_product_efficient_attention_backward=backward,
    )


@pytest.mark.parametrize(("kernel", "biased"), [(FLASH, False), (EFFICIENT, False), (EFFICIENT, True)])
def test_kernels_of_gpus_take_what_they_are_given(kernel, biased):
    """Their real signatures and shapes, on tensors without numbers."""
    empty = torch.empty(2, 4, 40, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(2, 2, 24, 64, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(2, 1, 40, 32, dtype=torch.bfloat16, device="meta")[..., :24] if biased else None
    block = Block(empty, key, key, bias, False, 0.1)
    out, lse = kernel.forward(block)
    assert out.shape == empty.shape and lse.shape == (2, 4, 40)
    gradients = kernel.backward(block, out, out, lse)
    assert [gradient.shape for gradient in gradients] == [empty.shape, key.shape, key.shape]


def test_a_kernel_is_refused_aloud(caplog):
    merged_attention._say_once.cache_clear()
    other = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32, shape=(1, 2, 3, 8))
    blocks = [Block(other, None, None, None, False, 1.0)] * 2
    assert [merged_attention.kernel(block) for block in blocks] == [PLAIN, PLAIN]
    (line,) = caplog.messages
    assert "mps" in line and "model.attention=copy" in line


def test_a_prompt_out_of_sight_counts_nothing():
    """A query that sees no key of the prompt is its own block's, to the bit, and gives the prompt no gradient."""
    draw = torch.Generator().manual_seed(3)
    query, own, prompt = (torch.randn(1, 2, n, 8, generator=draw).requires_grad_() for n in (4, 4, 5))
    hidden = torch.full((1, 1, 1, 5), -1e30)
    seen = Seen(1, hidden, None, None)
    out = merged_attention.merged_attention(query, (prompt, prompt), (own, own), seen, 0.3)
    assert torch.equal(out, CPU.forward(Block(query, own, own, None, True, 0.3))[0])
    assert torch.equal(torch.autograd.grad(out.sum(), prompt)[0], torch.zeros_like(prompt))


def test_a_bf16_block_rounds_no_more_than_copies_do():
    sizes, window, tensors, _ = case(1)
    tensors = [x.detach() for x in tensors]
    exact = written_out(*tensors, *sizes, window, 0.4)
    half = [x.bfloat16() for x in tensors]
    errors = {}
    for how in ("copy", "merge"):
        out, _ = shared_prefix_attention(LAYER, *half, None, 0.4, window, packed(*sizes), how=how)
        errors[how] = float((out - exact).abs().mean())
    assert out.dtype == torch.bfloat16 and errors["merge"] < 1.5 * errors["copy"] < 0.02


@pytest.mark.parametrize(
    ("prompt", "completion", "group", "size", "merging"),
    [
        (700, 6, 4, 2 * 12 * 128 * 2, True),  # Qwen2-VL-2B on a GPU, a direct answer
        (400, 256, 4, 2 * 12 * 128 * 2, True),  # thinking
        (1200, 512, 8, 2 * 8 * 256 * 2, True),  # Gemma 3 4B
        (80, 40, 8, 2 * 32 * 4, False),  # the tiny model: its copies fit into a cache
        (400, 400, 2, 2 * 12 * 128 * 2, False),  # few copies beside all else
    ],
)
def test_auto_merges_where_copies_are_much(prompt, completion, group, size, merging):
    assert merges(group * (prompt + completion), prompt + group * completion, size) is merging


@pytest.mark.parametrize("how", ["copy", "merge"])
def test_the_configuration_says_how(how, monkeypatch):
    """It goes before what was installed, stays when sampler and scorer install theirs, and reaches the layers."""
    text = SimpleNamespace(_attn_implementation="sdpa")
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    for each in (None, how, None):
        attention.install(model, each)
    calls = []
    monkeypatch.setattr(attention, "merged_attention", lambda query, *_: calls.append("merge") or query)
    tensors = [torch.randn(1, 2, 10, 8) for _ in range(3)]
    attention.AttentionInterface()[text._attn_implementation](
        LAYER, *tensors, None, shared_prefix=packed([4], [[3, 3]])
    )
    assert calls == ["merge"] * (how == "merge")
    with pytest.raises(UserError, match="model.attention=glue"):
        ModelConfig("m", "qwen2_vl", path="x", image_size=32, attention="glue")
