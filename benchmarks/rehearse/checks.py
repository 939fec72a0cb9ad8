"""Check a learner in one process: weights, prompts, sampling and scoring against processor and model of transformers.

The reference is the unchanged processor and forward of transformers, in fp32 arithmetic on the same weights
(`common.forward.logprobs`). Correct results differ by 1e-5 nats, wrong ones by a thousand times that, at every depth.

Shapes: P prompt tokens, R tokens of a reply.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks import grpo_step, setup
from benchmarks.rehearse import composed
from benchmarks.rehearse.checkpoint import PUBLISHED, SPREAD, hub_name
from benchmarks.rehearse.lines import Line, timed, within
from benchmarks.rehearse.stock import stock_attention, stock_inputs, stock_logps, stock_positions, without_categories
from common.config.schema import Config
from common.data import task
from common.forward.label_scores import LabelScorer
from common.forward.logprobs import PolicyScorer, exact
from common.forward.packing import PromptGroup, pack_shared
from common.learner import learner_class
from common.models.adapters import without_adapters
from common.models.families import Qwen2VL
from common.models.files import lineage, weight_files
from common.models.meter import of_folder
from common.models.vlm import VLM
from common.rollout.base import Decoding, Request, Rollout, requests, sampling_mode
from common.run.checkpoint import Checkpoints
from common.runtime.group import init_process_group
from common.training import agreement
from common.vlm.learner import VLMLearner, sampling

TOKENS, GROUP, COMPARED = 6, 3, 1  # tokens per completion; completions; how many are compared with transformers
TRL_CASES = (setup.Case(700, 6, 4), setup.Case(700, 150, 4))  # CLS-RL on ImageNet: direct answers, with thinking
KERNELS = ("sdpa", "eager", "flash_attention_2")  # attention implementations of transformers
REASONING = "<think>Why? Round ears.</think>"


def loading(learner: VLMLearner) -> Iterator[Line]:
    """Check that every weight equals that of the files bit for bit, under its name there."""
    folder = lineage(Path(learner.weights["path"]))[0]
    held = _held(learner.policy)
    known, differing = 0, []
    for file in weight_files(folder):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118  # it is no dict
                if name not in held:
                    differing.append(f"{name} is not in the model")
                elif held[name].is_floating_point():  # whole numbers: quantised by bitsandbytes
                    known += 1
                    same = torch.equal(held[name].cpu(), shard.get_tensor(name).to(held[name].dtype))
                    differing += [] if same else [f"{name} has another value"]
    tied = learner.policy.model.get_output_embeddings().weight.shape
    seen = differing[0] if differing else f"{known} weights equal the files'; the vocabulary has {tied[0]} rows"
    yield Line("weights", "failed" if differing else "ok", seen, "model.path", {"equal": known})


def _held(policy: VLM) -> dict[str, torch.Tensor]:
    """Return the weights in memory, by their names in transformers and on the hub."""
    base = without_adapters(policy.model)
    published = next(p for p in PUBLISHED.values() if p.read("config.json")["model_type"] == policy.family.model_type)
    inside = {
        name.replace(".base_layer", "").replace("embed_tokens.embedding.", "embed_tokens."): weight
        for name, weight in base.named_parameters()
    }
    return inside | {hub_name(published, name): weight for name, weight in inside.items()}


def prompts(learner: VLMLearner, each: int = 2) -> Iterator[Line]:
    """Check that ids, pixels and positions equal those of transformers, and lengths those of the prompt meter."""
    policy = learner.policy
    meter = of_folder(Path(learner.weights["path"]), learner.config.model.family)
    asked = {"train": learner.prompts.train, **learner.prompts.evaluation}
    chosen = [prompt for own in asked.values() for prompt in own[:each]]
    counted = meter.tokens(chosen, learner.config.model.image_size)
    wrong: dict[str, str] = {}
    for prompt, encoded, length in zip(chosen, learner.encoder(chosen), counted, strict=True):
        stock = stock_inputs(policy, prompt, learner.encoder.load_images([prompt.image])[0])
        ids, categories = without_categories(encoded.ids, policy)
        same = {
            "ids": torch.equal(ids, stock["input_ids"][0]) and categories == prompt.categories,
            "pixels": encoded.pixel_values is None  # replaced by features of a frozen tower
            or torch.equal(encoded.pixel_values, stock["pixel_values"].to(encoded.pixel_values.dtype)),
            "positions": torch.equal(encoded.positions, stock_positions(policy, encoded.ids, stock)),
            "length": length == len(encoded.ids),
        }
        wrong |= {what: prompt.image for what, right in same.items() if not right}
    seen = f"{len(chosen)} prompts of {min(counted)} to {max(counted)} tokens as the stock processor's"
    if wrong:
        seen = "not the stock processor's: " + ", ".join(f"{what} of {image}" for what, image in wrong.items())
    fix = "model.family, model.image_size; the model's processor"
    yield Line("prompts", "failed" if wrong else "ok", seen, fix, {"prompts": len(chosen), "longest": max(counted)})


def stock_group(policy: VLM, group: PromptGroup, temperature: float) -> torch.Tensor:
    """Return `stock_logps` of the first completions of a group, concatenated. Shape: [T]."""
    return torch.cat([stock_logps(policy, group.prompt, ids, temperature) for ids in group.completions[:COMPARED]])


@torch.no_grad()
def forwards(learner: VLMLearner) -> Iterator[Line]:
    """Check that sampler and shared, plain and stock forwards agree in exact arithmetic; report rounding errors."""
    policy, size = learner.policy, GROUP
    with learner._sampling():
        request, completions = sampled(learner, learner.rollout, size)
    decoding = decoding_of(learner)
    group = PromptGroup(request.encoded, tuple(completion.ids for completion in completions))
    scorer = PolicyScorer(policy, decoding.temperature, 128).to(policy.device)
    # log-probabilities of the group, computed in several ways
    own = None if getattr(learner.rollout, "has_weight_copy", False) else learner.rollout
    found = agreement.measure(scorer, policy, group, own, request, decoding)
    trained = scorer(pack_shared([group], policy.family, policy.device), entropy=False)[0].cpu()
    drawn = torch.cat([completion.logps for completion in completions])
    with stock_attention(policy), exact(policy.model):
        stock = stock_group(policy, group, decoding.temperature)
    with exact(policy.model):
        right = scorer.eval()(pack_shared([group], policy.family, policy.device), entropy=False)[0].cpu()
    # differences between them
    gap, allowed = agreement.difference(trained, drawn), found.allowed_of_sampler
    yield within("shared against plain forward", "differ by", found.shared, found.allowed, "trainer.impl=plain")
    yield within(
        "forward against transformers",
        "differ by",
        agreement.difference(right[: len(stock)], stock),
        found.allowed,
        "model.family",
    )
    merged = "merged attention and gradients"
    yield within(merged, "relative error", found.merged, found.allowed_merged, "model.attention=copy")
    if found.replay is not None:
        yield within("sampler, exact", "differs by", found.replay, found.allowed, "rollout=hf")
    fix = "trainer.importance_correction=sequence_mask or model.dtype=float32"
    yield within("sampler against trainer", "differs by", gap, allowed, fix, wrong="off")
    lengths = [len(completion.ids) for completion in completions]
    distinct = len({tuple(completion.ids.tolist()) for completion in completions})
    yield Line(
        "sampled group",
        "ok" if distinct > 1 else "off",
        f"{distinct} of {size} completions differ, {min(lengths)} to {max(lengths)} tokens; rounding of"
        f" {policy.model.dtype} {found.rounding:.1e} nats, by batch {found.noise:.1e}",
        "rollout.temperature",
        {"rounding": found.rounding, "noise": found.noise},
    )
    for kind in KERNELS:
        yield kernel(policy, group, right, kind, max(found.rounding, 1e-5), decoding.temperature)


def kernel(
    policy: VLM, group: PromptGroup, exact: torch.Tensor, kind: str, rounding: float, temperature: float
) -> Line:
    """Compare an attention kernel of transformers, in the number format of training, with our exact forward."""
    if kind.startswith("flash") and find_spec("flash_attn") is None:
        return Line(f"kernel {kind}", "ok", "is not installed; nothing here asks for it")
    with stock_attention(policy, kind):
        logps = stock_group(policy, group, temperature)
    allowed = agreement.MULTIPLE * rounding
    return within(
        f"kernel {kind}", "rounds by", agreement.difference(exact[: len(logps)], logps), allowed, "model.dtype", "off"
    )


def decoding_of(learner: VLMLearner) -> Decoding:
    """Return sampling parameters with the run's temperature, few tokens, and no top_k or top_p."""
    return Decoding(sampling(learner.config.rollout).temperature, 0, 1.0, TOKENS)


def sampled(learner: VLMLearner, rollout: Rollout, size: int) -> tuple[Request, list[Any]]:
    """Sample a group for the first training prompt."""
    (request,) = requests(learner.encoder, learner.prompts.train[:1], ["rehearsal"])
    (completions,) = rollout.generate([request], size, decoding_of(learner))
    return request, completions


def labels(learner: VLMLearner) -> Iterator[Line]:
    """Check label scores, without and after reasoning, against the stock forward of the whole text."""
    policy, asks = learner.policy, learner.prompting
    prompt = learner.prompts.train[0]
    (encoded,) = learner.encoder([prompt])
    names = next(iter(learner.task.evaluation.values())).choices[:2]
    scorer, tokenizer = LabelScorer(policy), policy.processor.tokenizer
    worst, noise, count = 0.0, 0.0, 0
    for begun in ("", REASONING):
        texts = [asks.label_response(name) if not begun else f"<answer>{name}</answer>" for name in names]
        with exact(policy.model):
            (found,), (apart,) = (each([encoded], [texts], [begun]) for each in (scorer, LabelScorer(policy, budget=1)))
        noise = max(noise, float(((found.logps - apart.logps) / found.lengths).abs().max()))  # in 8 bits, by the batch
        for number, text in enumerate(texts):
            # tokenized in one piece; the tokens that end after the reasoning count for the name
            whole = tokenizer(begun + text, add_special_tokens=False)["input_ids"]
            stops = range(1, len(whole) + 1)
            ends = [len(tokenizer.decode(whole[:stop], clean_up_tokenization_spaces=False)) for stop in stops]
            reply = torch.tensor([*whole, policy.end_of_turn])
            with stock_attention(policy), exact(policy.model):
                logps = stock_logps(policy, encoded, reply)
            counts = torch.tensor([end > len(begun) for end in ends] + [True])
            worst = max(worst, abs(float((logps * counts).sum()) - float(found.logps[number])) / int(counts.sum()))
            count += 1
    allowed = max(agreement.EXACT[policy.model.dtype], agreement.MULTIPLE * noise)
    yield within("label scores", f"{count} names differ per token by", worst, allowed, "label_scoring=false")


def update(learner: VLMLearner) -> Iterator[Line]:
    """Make one update as in a run, self-checks included; check that gradients are not zero and weights change."""
    trainer = learner.make_trainer()
    learner.trainer = trainer
    policy = learner.policy
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    step = trainer.step(0)
    moved = {name: float((p.detach() != before[name]).float().mean()) for name, p in learned(policy)}
    still = [name for name, share in moved.items() if share == 0]
    norm = step.metrics["grad_norm"]
    share = sum(moved.values()) / len(moved)
    figures = {name: value for name, value in step.metrics.items() if name in ("loss", "grad_norm", "reward")}
    figures |= {"moved": share, **{f"seconds/{phase}": seconds for phase, seconds in step.seconds.items()}}
    seen = f"gradient norm {norm:.3g}, {len(moved) - len(still)} of {len(moved)} trained weights moved"
    right = 0 < norm < float("inf") and len(still) < len(moved)
    yield Line("one update", "ok" if right else "failed", seen, "trainer.learning_rate, rewards", figures)
    frozen = [name for name, p in policy.model.named_parameters() if not p.requires_grad and p.grad is not None]
    yield Line(
        "frozen weights",
        "failed" if frozen else "ok",
        frozen[0] if frozen else "none has a gradient",
        "model.freeze_vision",
    )


def learned(policy: VLM) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the trained weights with their names."""
    return [(name, p) for name, p in policy.model.named_parameters() if p.requires_grad]


@torch.no_grad()
def push(learner: VLMLearner, other: Rollout | None = None) -> Iterator[Line]:
    """Check that a sampler with its own weights agrees with the trainer, also after the weights have changed."""
    policy, rollout = learner.policy, other or learner.rollout
    temperature = decoding_of(learner).temperature
    scorer = PolicyScorer(policy, temperature, 128).to(policy.device).eval()
    own = learned(policy)
    begun = [p.detach().clone() for _, p in own]

    def gap(version: int) -> tuple[float, PromptGroup]:
        with sampling_mode(rollout, version):
            request, completions = sampled(learner, rollout, GROUP)
        group = PromptGroup(request.encoded, tuple(completion.ids for completion in completions))
        scored = scorer(pack_shared([group], policy.family, policy.device), entropy=False)[0].cpu()
        return agreement.difference(scored, torch.cat([completion.logps for completion in completions])), group

    first, group = gap(0)
    packed = pack_shared([group], policy.family, policy.device)
    rounded = scorer(packed, entropy=False)[0]
    with exact(policy.model):
        right = scorer(packed, entropy=False)[0]
    allowed = max(agreement.SAMPLER[policy.model.dtype], agreement.MULTIPLE * agreement.difference(rounded, right))
    yield within("sampler of its own", "differs by", first, allowed, "rollout=hf", "failed")
    for _, parameter in own:
        # a change of the weights that the sampler must take over
        spread = float(parameter.float().std(correction=0)) or 0.02
        parameter.add_(torch.randn_like(parameter) * spread * 0.3)
    change = agreement.difference(scorer(packed, entropy=False)[0], rounded)
    second, _ = gap(1)
    for (_, parameter), value in zip(own, begun, strict=True):
        parameter.copy_(value)
    with sampling_mode(rollout, 2):
        pass
    line = within(
        "weights pushed", "after them it differs by", second, allowed, "rollout.options.sleep_level=0; rollout=hf"
    )
    yield line if change > 2 * allowed else Line("weights pushed", "off", f"the change itself is only {change:.1e}")


def against_trl(learner: VLMLearner) -> Iterator[Line]:
    """Compare scoring, loss and backward of a group with TRL's trainer, which computes the same; Qwen2-VL only."""
    folder, policy = lineage(Path(learner.weights["path"]))[0], learner.policy
    place = setup.Place(policy.device, learner.config.model.dtype)
    allowed = (1e-4, 1e-3) if place.dtype == "float32" else (0.1, 0.3)
    for case in TRL_CASES if policy.family is Qwen2VL else ():
        with tempfile.TemporaryDirectory() as workdir:
            sides = {side: grpo_step.build(side, folder, case, Path(workdir), place) for side in ("ours", "trl")}
            grpo_step.assert_same_work(case, sides, allowed)
            seconds = setup.alternate(sides, 3, place.seconds)
        ours, theirs = seconds["ours"].median, seconds["trl"].median
        seen = f"{ours:.3f} s a group, TRL {theirs:.3f} s: {theirs / ours:.2f} times"
        figures = {"ours": list(seconds["ours"].values), "trl": list(seconds["trl"].values)}
        yield Line(f"TRL, {case.name}", "ok" if ours < theirs else "off", seen, "trainer.impl=plain", figures)


def arithmetic(device: torch.device) -> Iterator[Line]:
    """Check that linear layers in bf16 add up in fp32 and round once, as on GPUs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1536, generator=generator).bfloat16().to(device)
    weight = (torch.randn(512, 1536, generator=generator) * SPREAD).bfloat16().to(device)
    exact = x.float() @ weight.float().T
    errors = [float((each.float() - exact).abs().mean()) for each in (x @ weight.T, exact.bfloat16())]
    seen = f"an error of {errors[0] / errors[1]:.3f} times that of one rounding"
    right = errors[0] < 1.05 * errors[1]
    yield Line("bf16 arithmetic", "ok" if right else "off", seen, "model.dtype=float32", {"errors": errors})


CHECKS: dict[str, Callable[[VLMLearner], Iterator[Line]]] = {
    "prompts": prompts,
    "forwards": forwards,
    "labels": labels,
    "update": update,
    "push": push,
    "trl": against_trl,
}


def checked(config: Config, folder: Path, names: Sequence[str]) -> list[Line]:
    """Build the learner of a configuration and check it.

    Args:
        config: Configuration of a run, which is not started.
        folder: Run folder, where the hashes of its prompts are written; created if it is missing.
        names: Names of checks in CHECKS.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    folder.mkdir(parents=True, exist_ok=True)
    device = init_process_group(config.gpus)
    lines, learners = timed(lambda: arithmetic(device), "bf16 arithmetic", device), []

    def loads() -> Iterator[Line]:
        made = learner_class(config)(config, task.build(config), device, folder, Checkpoints(folder / "checkpoints", 1))
        assert isinstance(made, VLMLearner)
        learners.append(made)
        return loading(learners[0])

    lines += timed(loads, "weights", device)
    for name in names if learners else ():
        lines += timed(partial(CHECKS[name], learners[0]), name, device)
    return lines


if __name__ == "__main__":  # arguments: output file, run folder, checks separated by commas, overrides
    found = checked(composed(sys.argv[4:]), Path(sys.argv[2]), sys.argv[3].split(","))
    Path(sys.argv[1]).write_text(json.dumps([asdict(line) for line in found]), encoding="utf-8")
