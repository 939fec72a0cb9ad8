"""How long a prompt may be: what the questions take and the model holds, or a limit that is given by hand."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from clsrl.prompting import ClassListPrompt
from common.config import composition
from common.config.composition import validate
from common.models import meter
from common.models.tiny import qwen2_vl
from common.predict.trained_model import TrainedModel, config_of
from common.sweep.plan import decides
from common.types import Item, Prompt, Split, Task, UserError
from common.vlm import check, learner
from tests.conftest import REPOSITORY

SHARED = REPOSITORY.parent / "shared" / "data"
CARS = SHARED / "coop_splits" / "split_zhou_StanfordCars.json"
TOKENIZER = SHARED / "tokenizers" / "qwen2_5" / "tokenizer.json.gz"  # Qwen2-VL has the same vocabulary and merges
real = pytest.mark.skipif(not (CARS.is_file() and TOKENIZER.is_file()), reason="the real tokenizer is not here")
REAL = {"vision_config": {"patch_size": 14, "spatial_merge_size": 2}, "max_position_embeddings": 32768}
EVERY = 200  # of the test images: forty prompts


@pytest.fixture(scope="module")
def qwen():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(gzip.decompress(TOKENIZER.read_bytes()).decode())
    return meter.PromptMeter("qwen2_vl", REAL, tokenizer, qwen2_vl.CHAT_TEMPLATE)


def cars(instruction):
    """What some test images of StanfordCars are asked."""
    parts = json.loads(CARS.read_text())
    names = {label: name for _, label, name in parts["train"]}
    items = tuple(Item(*entry) for entry in parts["test"][::EVERY])
    split = Split(items, tuple(names[label] for label in range(196)), "What type of object is in the photo?", "", {})
    task = Task(split, {"test": split}, None, "", {})
    return ClassListPrompt(instruction=instruction, seed=1).evaluation_prompts(task, "test")


@real
def test_lengths_of_the_prompts_of_cars(qwen):
    think, direct = (qwen.tokens(cars(instruction), 384) for instruction in ("think", "no_think"))
    assert 1113 <= min(think) < max(think) <= 1196 and 1095 <= min(direct) < max(direct) <= 1178
    assert {a - b for a, b in zip(think, direct, strict=True)} == {18}, "the instruction is all that differs"


@real
@pytest.mark.slow
@pytest.mark.parametrize("setting", ["few_shot", "base_to_new", "cross_dataset"])
@pytest.mark.parametrize("data", ["dtd", "stanford_cars"])
def test_cars_may_be_asked_whatever_was_trained(compose, qwen, setting, data):
    chosen = ["method=clsrl", f"data={data}", f"setting={setting}", "model=qwen2_vl_2b", "shots=4"]
    asked = [cars("think")]
    check.check_lengths(validate(compose(*chosen)), asked, qwen)
    with pytest.raises(UserError, match=r"has 1[12]\d\d tokens, but model.max_prompt_tokens=1024; prompts are never"):
        check.check_lengths(validate(compose(*chosen, "model.max_prompt_tokens=1024")), asked, qwen)


def of_length(text):
    return Prompt("7.png", text, "seven", ("seven", "two"))


def lengths(limit=None, completion=64, context=None):
    """`check_lengths` of a long and a short prompt under these bounds, with the tokenizer of the tiny model."""
    measure = qwen2_vl.meter()
    measure.config = {**measure.config, "text_config": {"max_position_embeddings": context}}
    prompts = [of_length("short"), of_length("x y z " * 250), of_length("x" * 20)]
    config = SimpleNamespace(
        model=SimpleNamespace(name="mine", max_prompt_tokens=limit, image_size=32),
        rollout=SimpleNamespace(max_completion_tokens=completion),
    )
    check.check_lengths(config, [prompts], measure)
    return max(measure.tokens(prompts, 32))


def test_a_prompt_is_bounded_by_the_model_and_by_a_limit_that_is_given():
    longest = lengths()
    assert longest > 700
    assert lengths(limit=longest) == lengths(context=longest + 64) == longest
    with pytest.raises(UserError, match=f"image 7.png has {longest} tokens, but model.max_prompt_tokens={longest - 1}"):
        lengths(limit=longest - 1)
    with pytest.raises(UserError) as error:
        lengths(context=longest + 63)
    assert f"image 7.png has {longest} tokens" in str(error.value) and f"the {longest + 63} that" in str(error.value)
    assert "rollout.max_completion_tokens=64" in str(error.value) and "setting.list_share" in str(error.value)


def test_only_texts_that_could_be_too_long_are_tokenized(monkeypatch):
    measure, seen = qwen2_vl.meter(), []
    monkeypatch.setattr(
        measure, "tokens", lambda prompts, size: seen.extend(prompts) or type(measure).tokens(measure, prompts, size)
    )
    short, long = of_length("short"), of_length("x y z " * 250)
    assert measure.over([short, long, replace(short, image="8.png")], 32, 100)[1] is long
    assert [prompt.text[:5] for prompt in seen[1:]] == ["x y z"], "the first one measures the template"
    assert measure.over([short, long], 32, 10_000) is None and measure.over([], 32, 10) is None


def test_category_embeddings_count_as_much_as_an_image():
    measure = qwen2_vl.meter()
    category = qwen2_vl.ARCHITECTURE["vision"]
    assert category["patch_size"] == 8  # 32 x 32 pixels: 4 tokens
    many = replace(of_length("short"), categories=tuple(range(100)))
    (length,) = measure.tokens([many], 32)
    assert measure.over([of_length("short"), many], 32, length - 1) == (length, many)
    assert measure.over([of_length("short"), many], 32, length) is None


# ---- what follows from the limit


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["few_shot", "cross_dataset"])
def test_a_limit_by_hand_is_the_same_run(compose, setting):
    chosen = ["method=clsrl", "data=dtd", f"setting={setting}", "model=qwen2_vl_2b"]
    values = [composition.plain(compose(*chosen, *more)) for more in ((), ("model.max_prompt_tokens=4096",))]
    assert composition.signature(values[0]) == composition.signature(values[1])
    assert not decides("model.max_prompt_tokens") and decides("model.image_size"), "so numbers stay comparable"


def test_questions_about_new_pictures_may_be_longer(compose, tmp_path):
    """Where nobody knows the truth, all names are listed."""
    values = composition.plain(compose("rollout=vllm", "model.max_prompt_tokens=100"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = config_of(TrainedModel.of(tmp_path))
    assert config.model.max_prompt_tokens is None and config.rollout.options["prompt_tokens"] is None


def test_an_engine_gets_room_for_the_questions(compose):
    config = validate(compose("rollout=vllm"))
    assert config.rollout.options["prompt_tokens"] is None
    asked = SimpleNamespace(train=[of_length("short")], evaluation={"test": [of_length("x y z " * 100)]})
    assert learner.backend_options(config, asked)["prompt_tokens"] == 1024
    longer = SimpleNamespace(train=[], evaluation={"test": [of_length("x y z " * 250)]})
    (length,) = qwen2_vl.meter().tokens(longer.evaluation["test"], 32)
    assert 1024 < length < 2048 - 40 == learner.backend_options(config, longer)["prompt_tokens"]
    given = validate(compose("rollout=vllm", "model.max_prompt_tokens=777"))
    assert learner.backend_options(given, asked)["prompt_tokens"] == 777
