"""Methods of other papers: their rewards by hand, the hole of substrings, and what they compose to."""

from __future__ import annotations

import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from clsrl.related import refine_rft, visual_rft
from common.config.composition import validate
from common.judge.base import JudgeUnavailable
from common.report.audit import audit
from common.training.grpo import variants
from common.types import Prompt, Sample, UserError


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


@pytest.fixture
def grade(tmp_path):
    """Return a reward whose judge is a function of the prompt, and the prompts that it was asked."""

    def make(answer, **own):
        asked = []
        reward = refine_rft.Grade(judge={"backend": "self"}, runtime={"cache_dir": str(tmp_path / "replies")}, **own)
        reward.bind(lambda prompts, limit: asked.extend(prompts) or list(map(answer, prompts)), "weights")
        return reward, asked

    return make


def test_a_grade_is_a_tenth_of_what_the_judge_says(grade):
    grades = {"fox": "4", "owl": "0", "white fox": "**10**/10", "dog": "7-8", "‹b›": "Grade (0-10): 7"}
    replies = samples(*map(tagged, ("fox", "owl", "white fox", "fox", "dog", "<b>", "Arctic_Fox", "")))

    def answer(prompt):
        return next(grade for said, grade in grades.items() if f"\n{said}\n" in prompt)

    reward, asked = grade(answer)
    assert reward(replies) == [0.4, 0.0, 1.0, 0.4, 0.0, 0.7, 1.0, 0.0]
    assert len(asked) == 5, "the answers that are neither empty nor the label, once"
    assert reward.metrics()["judge/unparsed"] == 1 and reward.judge_replies[-2:] == [None, None]
    assert "True name: arctic fox\n" in asked[0] and all(each.count(refine_rft.CLOSE) == 1 for each in asked)
    again, asked = grade(answer, unparsed=0.5)
    assert again(replies)[4] == 0.5 and len(asked) == 1, "only the unreadable one is asked anew"


def test_a_judge_that_stays_away_gives_no_grade(grade):
    def answer(prompt):
        raise JudgeUnavailable("sleeps", [None])

    reward, _ = grade(answer, on_failure="drop")
    found = reward(samples(tagged("a hyena"), tagged("arctic fox")))
    assert math.isnan(found[0]) and found[1] == 1 and reward.metrics()["judge/failed"] == 1
    with pytest.raises(UserError, match="on_failure=stop: the judge sleeps"):
        grade(answer)[0](samples(tagged("a hyena")))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """An untrained BERT whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = {token: number for number, token in enumerate(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"])}
    plain = Tokenizer(models.WordLevel(words, "[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape)).save_pretrained(folder)
    return folder


def test_similarity_is_the_cosine_of_mean_embeddings(bert):
    from transformers import AutoModel, AutoTokenizer

    reward = refine_rft.TextSimilarity(model=str(bert), runtime={"batch_size": 3})
    reward.prepare()
    answers = ("owl", "fox", "Arctic_Fox", "a fox of the arctic", "")
    found = reward(samples(*map(tagged, answers)))
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()

    def mean(text):  # alone, so without padding
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    expected = [float(torch.cosine_similarity(mean("arctic fox"), mean(each), dim=0)) for each in answers[:2]]
    assert found[:2] == pytest.approx(expected, abs=1e-5) and found[2] == pytest.approx(1, abs=1e-5)
    assert found[4] == 0 and len(set(found)) == 5
    assert reward(samples(tagged(""))) == [0.0] and reward([]) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "gte-small"}, "model=gte-small is not a folder; give a model folder or a hub id owner/name"),
        ({"model": "a/b", "runtime": {"gpus": -1}}, "runtime: gpus=-1 must be 0 or more"),
        ({"model": "a/b", "runtime": {"cpus": 1}}, "unexpected keyword argument 'cpus'"),
    ],
)
def test_a_mistake_in_the_similarity_is_named(arguments, said):
    with pytest.raises(UserError, match=said):
        refine_rft.TextSimilarity(**{"runtime": {}, **arguments})


def test_a_model_that_is_no_whole_one_is_refused_before_anything_is_computed(bert, tmp_path):
    with pytest.raises(UserError, match="text_similarity.model=nobody/nothing is neither a local folder nor reachable"):
        refine_rft.TextSimilarity(model="nobody/nothing", runtime={}).prepare()


@pytest.mark.slow
def test_all_rewards_of_refine_rft_compose(compose):
    config = validate(compose("method=refine_rft", "rewards=refine_rft_full"))
    weights = {name: entry["weight"] for name, entry in config.rewards.items()}
    assert weights == {"format": 1, "accuracy": 1, "short_thoughts": 1, "accuracy_mllm": 0.1, "text_similarity": 0.1}
    with pytest.raises(UserError, match="unknown config key rewards.accuracy_mllm.scale"):
        validate(compose("method=refine_rft", "rewards=refine_rft_full", "+rewards.accuracy_mllm.scale=tenths"))
