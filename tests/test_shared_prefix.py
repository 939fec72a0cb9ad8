"""The shared-prefix forward against the plain one: log-probabilities and gradients."""

from __future__ import annotations

from types import MethodType

import pytest
import torch

from common.grpo.logprobs import PolicyScorer
from common.grpo.packing import Encoded, Group, pack_plain, pack_shared
from common.models.families import Qwen2VL
from common.models.vlm import Encoder
from common.schema import Lora

LORA = Lora(r=4, alpha=8, targets=r".*language_model.*\.(q_proj|v_proj|down_proj)")


def rms_norm_in_input_dtype(self, hidden_states):
    """The model's RMSNorm computes in fp32 whatever it is given; for fp64 parity it must not."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def groups(vlm, prompts, encoder, sizes, lengths, image):
    """Groups with random completions; `lengths` cycles over the completions of all groups."""
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([i for i in range(len(vlm.processor.tokenizer)) if i not in vlm.banned])
    encoded = encoder(prompts[: len(sizes)])
    if not image:
        keep = [~torch.isin(e.ids, torch.tensor(vlm.banned)) for e in encoded]
        encoded = [
            Encoded(e.ids[k], Qwen2VL.positions(e.ids[k], None, vlm.model.config), None, None)
            for e, k in zip(encoded, keep, strict=True)
        ]
    made, count = [], 0
    for prompt, size in zip(encoded, sizes, strict=True):
        completions = []
        for _ in range(size):
            length = lengths[count % len(lengths)]
            completions.append(allowed[torch.randint(len(allowed), (length,), generator=generator)])
            count += 1
        made.append(Group(prompt, tuple(completions)))
    return made


def scores_and_gradient(scorer, packed):
    scorer.zero_grad(set_to_none=True)
    logps, entropy = scorer(packed)
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)  # different for every token
    (logps * weights).sum().backward()
    # norms in fp64, whatever the model computes in
    gradient = {n: p.grad.double() for n, p in scorer.named_parameters() if p.grad is not None}
    return logps.detach(), entropy, gradient


def relative_l2(a, b):
    assert a.keys() == b.keys()
    difference = sum(float((a[n] - b[n]).pow(2).sum()) for n in a) ** 0.5
    return difference / sum(float(b[n].pow(2).sum()) for n in b) ** 0.5


CASES = {
    "G2": ([2], [1, 4]),
    "G5 equal lengths": ([5], [3]),
    "G8 unequal": ([8], [1, 7, 2, 11, 5]),
    "three prompts": ([3, 2, 4], [2, 9, 1, 5]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("lora", [Lora(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("sizes", "lengths"), CASES.values(), ids=CASES.keys())
def test_shared_equals_plain(load_vlm, digits_task, think, no_think, dtype, image, lora, sizes, lengths):
    torch.manual_seed(0)
    vlm = load_vlm(lora=lora)
    encoder = Encoder(vlm, digits_task.open, 32, 512)
    # two instructions: prompts of different lengths in one row
    prompts = [
        think.train_prompts(digits_task)[0],
        no_think.train_prompts(digits_task)[20],
        think.train_prompts(digits_task)[40],
    ]
    vlm.model.to(dtype)
    if lora.r > 0:
        for name, parameter in vlm.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)  # zero-initialised: the adapter would do nothing
    if dtype == torch.float64:
        for module in vlm.model.modules():
            if type(module).__name__ == "Qwen2VLRMSNorm":
                module.forward = MethodType(rms_norm_in_input_dtype, module)
    batch = groups(vlm, prompts, encoder, sizes, lengths, image)
    if image:
        batch = [
            Group(
                Encoded(g.prompt.ids, g.prompt.positions, g.prompt.pixel_values.to(dtype), g.prompt.grid), g.completions
            )
            for g in batch
        ]
    scorer = PolicyScorer(vlm.model, vlm.banned, temperature=0.9, chunk=7)
    shared = scores_and_gradient(scorer, pack_shared(batch, vlm.family, vlm.device))
    plain = scores_and_gradient(scorer, pack_plain(batch, vlm.pad, vlm.device))
    limit = 1e-5 if dtype == torch.float32 else 1e-9
    assert shared[0].dtype == dtype and float(plain[0].std()) > 0.5, "flat logits would prove nothing"
    assert float((shared[0] - plain[0]).abs().max()) <= limit
    assert float((shared[1] - plain[1]).abs().max()) <= 10 * limit
    assert relative_l2(shared[2], plain[2]) <= limit


def test_gradient_checkpointing_changes_nothing(load_vlm, digits_task, think):
    results = []
    for checkpointing in (False, True):
        vlm = load_vlm(gradient_checkpointing=checkpointing)
        vlm.model.train()
        encoder = Encoder(vlm, digits_task.open, 32, 512)
        batch = groups(vlm, think.train_prompts(digits_task), encoder, [4], [3, 6], image=True)
        scorer = PolicyScorer(vlm.model, vlm.banned, temperature=1.0, chunk=1024)
        results.append(scores_and_gradient(scorer, pack_shared(batch, vlm.family, vlm.device)))
    assert float((results[0][0] - results[1][0]).abs().max()) <= 1e-6
    assert relative_l2(results[0][2], results[1][2]) <= 1e-6


def test_completions_do_not_see_each_other(load_vlm, digits_task, think):
    vlm = load_vlm()
    encoder = Encoder(vlm, digits_task.open, 32, 512)
    group = groups(vlm, think.train_prompts(digits_task), encoder, [3], [5, 2, 4], image=True)[0]
    scorer = PolicyScorer(vlm.model, vlm.banned, temperature=1.0, chunk=1024)
    changed = Group(group.prompt, (group.completions[0], group.completions[1].flip(0), group.completions[2]))
    with torch.no_grad():
        before, _ = scorer(pack_shared([group], vlm.family, vlm.device))
        after, _ = scorer(pack_shared([changed], vlm.family, vlm.device))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[7:], after[7:])
    assert not torch.allclose(before[5:7], after[5:7])


def test_docstring_example_of_packing():
    prompt = Encoded(torch.tensor([10, 11, 12]), torch.arange(3).expand(3, -1), None, None)
    group = Group(prompt, (torch.tensor([20, 21]), torch.tensor([22])))
    shared = pack_shared([group], Qwen2VL, torch.device("cpu"))
    assert shared.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21, 22]]
    assert shared.inputs["position_ids"][0].tolist() == [[0, 1, 2, 3, 4, 3]]
    assert (shared.predictors.tolist(), shared.targets.tolist(), shared.owner.tolist()) == (
        [2, 3, 2],
        [20, 21, 22],
        [0, 0, 1],
    )
    plain = pack_plain([group], pad=0, device=torch.device("cpu"))
    assert plain.inputs["input_ids"].tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 22, 0]]
    assert plain.predictors.tolist() == [2, 3, 7]
    assert (shared.tokens, plain.tokens) == (6, 10)
