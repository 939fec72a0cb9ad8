"""Methods of other papers: their rewards by hand, the hole of substrings, and what they compose to."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from clsrl.related import refine_rft, visual_rft
from common.config.composition import validate
from common.report.audit import audit
from common.training.grpo import variants
from common.types import Prompt, Sample


def samples(*replies, label="arctic fox"):
    return [Sample(Prompt("1", "?", label, (label, "owl")), reply) for reply in replies]


def tagged(answer, thoughts="white fur"):
    return f"<think>{thoughts}</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("Arctic Fox", 1, 1),
        ("arctic_fox", 1, 1),
        ("arcticfox", 1, 0),
        ("fox", 1, 0),  # the label contains it
        ("", 1, 0),  # the label contains nothing, too
        ("owl or arctic fox", 1, 0),
        ("owl", 0, 0),
    ],
)
def test_substrings_count_in_both_directions(answer, official, strict):
    made = samples(tagged(answer))
    assert visual_rft.accuracy(made) == [official] and visual_rft.accuracy(made, match="strict") == [strict]
    assert visual_rft.contains_either_way(made[0].completion, "arctic fox") == bool(official)


def test_thoughts_below_ten_characters_earn():
    replies = (
        tagged("owl", ""),
        tagged("owl", "123456789"),
        tagged("owl", "1234567890"),
        "<answer>owl</answer>",
        "owl",
    )
    assert refine_rft.short_thoughts(samples(*replies)) == [1, 1, 0, 0, 0]
    assert refine_rft.short_thoughts(samples(tagged("owl", "1234567890")), characters=11) == [1]


def test_each_reward_is_normalised_in_its_group_alone():
    parts = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    found = variants.mrn(parts, weights, None)
    for n in range(4):
        for g in range(5):
            expected = sum(
                float(w * (part[n, g] - part[n].mean()) / (part[n].std() + 1e-4))
                for w, part in zip(weights, parts, strict=True)
            )
            assert float(found[n, g]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "protocol", "empty", "hedged"),
    [
        ("visual_rft", "official", True, True),
        ("visual_rft", "clean", False, False),
        ("speciarl", "clean", False, False),
        ("dive_k", "clean", False, False),
        ("refine_rft", "official", True, True),
        ("refine_rft", "clean", True, False),  # empty thoughts earn in place of the answer
    ],
)
def test_the_audit_shows_the_holes(compose, tmp_path, method, protocol, empty, hedged):
    cfg = compose(f"method={method}", f"protocol={protocol}", "data=digits")
    OmegaConf.save(cfg, tmp_path / "config.yaml", resolve=True)
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"train": {"names": ["owl", "fox", "ox"]}}}))
    _, found = audit(tmp_path)
    assert ("empty tags" in found, "all names, tagged" in found) == (empty, hedged)


def test_refine_rft_is_the_papers_configuration(compose):
    config = validate(compose("method=refine_rft", "model=qwen2_vl_2b", "gpus=0"))
    assert (config.trainer.group_size, config.trainer.updates, config.trainer.beta) == (8, 200, 0.0)
    assert (config.model.lora.r, config.model.lora.alpha, config.trainer.learning_rate) == (64, 128, 2e-5)
    assert config.trainer.advantages.endswith("variants.mrn") and set(config.rewards) == {
        "format",
        "accuracy",
        "short_thoughts",
    }
    assert config.method["list_share"] == 0.0
