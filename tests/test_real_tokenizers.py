"""The real tokenizers of Qwen2-VL and Gemma 3, where they are at hand: what is scored and trained is what a model says."""

from __future__ import annotations

import json

import pytest
import torch

from alert.prompting import AlertPrompting
from clsrl.prompting import ClassListPrompt
from common.forward.label_scores import LabelScorer
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain
from common.models import vlm
from common.models.encoder import EncodedPrompt
from common.training.sft import target
from common.vlm.replies import reasoning
from tests.conftest import TOKENIZERS

pytestmark = pytest.mark.slow  # real vocabularies take seconds to build

FAMILIES = {"qwen2_vl": 56, "gemma3": 896}  # and the size of a picture
SPLITS = TOKENIZERS.parent / "coop_splits"
NAMES = ("Abyssinian", "707-320", "McDonnell Douglas MD-90", "crème brûlée", "2012 Audi A5 Coupe", "tiger cat's eye")
REPLIES = {
    "nothing between": "<think>Why? Round ears.</think><answer>cat</answer>",
    "a blank": "<think>Why? Round ears.</think> <answer>cat</answer>",
    "a line": "<think>\nRound ears\n</think>\n<answer>cat</answer>",
    "no full stop, accents": "<think>crème</think><answer>cat</answer>",
}


@pytest.fixture(scope="module")
def loaded(real_vocabulary):
    """`loaded(family)`: a model with the real vocabulary."""
    from common.config.schema import ModelConfig

    models = {}

    def load(family):
        if family not in models:
            path = str(real_vocabulary(family))
            size = FAMILIES[family]
            config = ModelConfig(
                name="narrow", family=family, path=path, dtype="float32", image_size=size, max_prompt_tokens=4096
            )
            models[family] = vlm.load(real_vocabulary(family), config, torch.device("cpu"))
        return models[family]

    return load


def ids(model, text):
    return model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def before(model, tokens, text):
    """How many tokens end within a text: the longest run of them that decodes into its beginning."""
    decoded = [model.processor.tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
    return max(count for count, each in enumerate(decoded) if text.startswith(each) and len(each) <= len(text))


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
@pytest.mark.parametrize("method", ["clsrl", "alert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_after_reasoning_are_scored_as_tokens_of_the_whole_reply(loaded, family, method, reply):
    """`</think><answer>` holds one token `><`, which the two halves apart never give."""
    model = loaded(family)
    asks = AlertPrompting(seed=1) if method == "alert" else ClassListPrompt(instruction="think", seed=1)
    question = torch.tensor(ids(model, "What is in the photo? Think, then answer."))
    blocks = model.family.blocks(question, model.model.config)
    encoded = [EncodedPrompt(question, model.family.positions(question, None, model.model.config), blocks=blocks)]
    begun = reasoning(asks, reply)
    assert begun.startswith("<think>")
    wholes = [ids(model, begun + asks.label_response(name)) for name in NAMES]
    if reply == REPLIES["nothing between"]:
        assert all("><" in model.processor.tokenizer.convert_ids_to_tokens(whole) for whole in wholes)
        apart = [[*ids(model, begun), *ids(model, asks.label_response(name))] for name in NAMES]
        assert all(a != b for a, b in zip(wholes, apart, strict=True)), "else this test shows nothing"
    given = [before(model, whole, begun) for whole in wholes]
    replies = tuple(torch.tensor([*whole, model.end_of_turn]) for whole in wholes)
    scorer = PolicyScorer(model, temperature=1.0, chunk=256).eval()
    with torch.no_grad():
        logps, _ = scorer(pack_plain([PromptGroup(encoded[0], replies)], model.family, model.pad, model.device))
    parts = logps.split([len(each) for each in replies])
    expected = torch.stack([part[skip:].double().sum() for part, skip in zip(parts, given, strict=True)])
    (found,) = LabelScorer(model)(encoded, [[asks.label_response(name) for name in NAMES]], [begun])
    assert float(expected.std()) > 0.5, "flat logits would prove nothing"
    assert found.logps.tolist() == pytest.approx(expected.tolist(), abs=2e-4)
    assert found.lengths.tolist() == [len(each) - skip for each, skip in zip(replies, given, strict=True)]


def class_names():
    """The names of the field's split files, as they stand in prompts."""
    names = set()
    for path in sorted(SPLITS.glob("split_zhou_*.json")):
        rows = json.loads(path.read_text("utf-8"))["test"]
        names |= {name.replace("_", " ") for _, _, name in rows}
    return sorted(names)


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the field's split files are not there")
@pytest.mark.parametrize("loss", ["answer", "everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_of_supervised_training_are_the_tokens_of_the_whole_conversation(loaded, family, loss):
    """What the chat template writes of question and reply, tokenised in one go, is the prompt and then the target."""
    model = loaded(family)
    question = {"role": "user", "content": [{"type": "text", "text": "What is in the photo?"}]}
    render = model.processor.apply_chat_template
    prompt = render([question], tokenize=False, add_generation_prompt=True)
    names = class_names()
    assert len(names) > 300
    for name in names:
        for reply in (name, f"<answer>{name}</answer>"):
            answer = {"role": "assistant", "content": [{"type": "text", "text": reply}]}
            whole = render([question, answer], tokenize=False, add_generation_prompt=loss == "everything")
            expected = ids(model, whole)
            found = [*ids(model, prompt), *target(model, reply, loss).tolist()]
            # behind the end of the turn the template writes a new line, which no reply has
            assert found == (expected if loss == "everything" else expected[: len(found)]), name
            assert len(expected) - len(found) <= 1
