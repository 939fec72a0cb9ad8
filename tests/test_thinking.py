"""Thinking after the answer, and as the model chooses: forms, rewards, columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from clsrl import rewards
from clsrl.prompting import ClassListPrompt
from common.config.composition import validate
from common.data.loading import Loader
from common.forward.label_scores import LabelScorer
from common.models.encoder import PromptEncoder
from common.models.tiny import qwen2_vl
from common.rollout.hf import HFRollout
from common.types import Answers, Prediction, Prompt, Reply, Sample, Split, Task, UserError
from common.vlm.prompting import ask, of_config
from common.vlm.replies import Replies

REPLIES = {
    "think first": "<think>a loop</think><answer>six</answer>",
    "answer first": "<answer>six</answer> <think>a loop, so six</think>",
    "answer alone": "<answer>six</answer>",
    "bare": "six",
    "two answers": "<answer>six</answer><think>or</think><answer>nine</answer>",
    "thoughts twice": "<answer>six</answer><think>a</think><think>b</think>",
    "text behind": "<answer>six</answer><think>a</think> six",
}
FORMED = {
    "think_first": {"think first"},
    "answer_first": {"answer first"},
    "either": {"think first", "answer alone"},
}
RIGHT = {
    rewards.first_answer_reward: {"answer first", "answer alone", "bare"},
    rewards.accuracy_reward: {"think first", "answer alone", "bare"},
}


def samples(label="six"):
    return [Sample(Prompt("1", "?", label, (label, "nine")), reply) for reply in REPLIES.values()]


@pytest.mark.parametrize("form", FORMED)
def test_each_form_is_rewarded_alone(form):
    found = rewards.format_reward(samples(), form=form)
    assert {name for name, value in zip(REPLIES, found, strict=True) if value} == FORMED[form] and set(found) <= {0, 1}
    with pytest.raises(UserError, match="no rule for form=either"):
        rewards.format_reward(samples(), match="official", form="either")


@pytest.mark.parametrize("reward", RIGHT)
def test_the_answer_is_judged_where_it_is_asked_for(reward):
    found = reward(samples())
    assert {name for name, value in zip(REPLIES, found, strict=True) if value} == RIGHT[reward]
    assert not any(reward(samples("nine"))), "two answers are none"


def prompting(instruction):
    return ClassListPrompt(instruction=instruction, seed=1)


@pytest.mark.parametrize(
    ("instruction", "well_formed", "answered"),
    [
        ("think", {"think first"}, {"think first", "answer alone", "bare"}),
        ("think_after", {"answer first"}, {"answer first", "answer alone", "bare"}),
        ("adaptive", {"think first", "answer alone"}, {"think first", "answer alone", "bare"}),
    ],
)
def test_an_evaluation_reads_replies_as_the_rewards_do(instruction, well_formed, answered):
    asked = prompting(instruction)
    assert {name for name, reply in REPLIES.items() if asked.well_formed(reply)} == well_formed
    assert {name for name, reply in REPLIES.items() if asked.answer(reply) == "six"} == answered
    assert asked.label_response("six") == "<answer>six</answer>"


def test_agreement_of_thoughts_and_answer_is_a_column_and_counted():
    said = [
        ("<think>a loop: six</think><answer>six</answer>", "six"),
        ("<think>a loop: nine</think><answer>six</answer>", "six"),
        ("<answer>six</answer><think>round, not a nine</think>", "six"),
        ("<answer>six</answer>", "six"),
    ]
    made = [
        Prediction(str(n), "six", 0, answer, True, True, Reply(text, 5, False, True))
        for n, (text, answer) in enumerate(said)
    ]
    task = Task(Split((), (), "", ""), {"test": Split((), ("six", "nine"), "?", "?")}, None, "", {})
    asked = prompting("adaptive")
    columns = asked.extra_columns(task, "test", made)
    assert columns == {"reasoning_agrees": [True, False, None, None]}
    facts = asked.diagnostics(task, "test", Answers(made, 0.0, columns=columns))
    assert facts == {"reasoning": {"agree": 1, "differ": 1, "reasoning_names_none": 1, "malformed": 1}}
    assert prompting("no_think").extra_columns(task, "test", made) == {}


@pytest.mark.parametrize(
    ("method", "ending"),
    [("think_after_answer", "then the thinking process"), ("adaptive_thinking", "if it helps, or directly")],
)
def test_the_methods_compose_and_have_no_wording_of_the_authors(compose, method, ending):
    config = validate(compose(f"method={method}"))
    arguments = {key: value for key, value in config.method.items() if key not in ("name", "_target_")}
    task = Task(Split((), ("six",), "Which?", "?"), {"test": Split((), ("six",), "Which?", "?")}, None, "", {})
    assert (
        ClassListPrompt(**arguments).train_prompts(task) == [] and ending in ClassListPrompt(**arguments).train_ending
    )
    assert set(config.rewards) == {"format", "accuracy"}
    with pytest.raises(UserError, match="no wording for method.instruction"):
        ClassListPrompt(instruction=arguments["instruction"], seed=1, evaluation_prompt="official")


EMPTY = "<think></think>"


def test_an_empty_thought_begins_the_reply_that_the_model_continues(load_vlm, digits_task):
    """The text is that of transformers' own generate behind the prompt and the thought; so are the scores of names."""
    vlm = load_vlm()
    method = ClassListPrompt(instruction="think", seed=1, prefill=EMPTY)
    asked = ask(method, digits_task)
    assert (
        not any(prompt.begun for prompt in asked.train)
        and asked.hashes() != ask(prompting("think"), digits_task).hashes()
    )
    prompts = asked.evaluation["test"][:2]
    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), None)
    thought = vlm.processor.tokenizer(EMPTY, add_special_tokens=False)["input_ids"]
    encoded, bare = encoder(prompts), encoder([replace(prompt, begun="") for prompt in prompts])
    assert [each.ids.tolist() for each in encoded] == [[*each.ids.tolist(), *thought] for each in bare]
    assert qwen2_vl.meter().tokens(prompts, 32) == [len(each.ids) for each in encoded]

    found = Replies(encoder, LabelScorer(vlm), True, 6, 2)(HFRollout(vlm), asked, "test", prompts, scored=True)
    for row, (prompt, own) in enumerate(zip(prompts, bare, strict=True)):
        ids = torch.cat([own.ids, torch.tensor(thought)])[None]
        images = {"pixel_values": own.pixel_values, "image_grid_thw": own.grid}
        said = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(),
            do_sample=False,
            max_new_tokens=6,
            suppress_tokens=list(vlm.banned),
            **images,
        )
        text = vlm.processor.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
        assert found.predictions[row].reply.text == EMPTY + text
        (expected,) = LabelScorer(vlm)([own], [[f"<answer>{name}</answer>" for name in prompt.choices]], [EMPTY])
        np.testing.assert_allclose(found.probabilities.values[row], expected.normalised, atol=1e-5)


def test_a_thought_in_the_prompt_is_no_part_of_what_is_scored_again(monkeypatch, load_vlm, digits_task):
    """A reply that goes on with an answer: its own reasoning is the thought alone, which the prompt has already."""
    vlm = load_vlm()
    asked = ask(ClassListPrompt(instruction="think", seed=1, prefill=EMPTY), digits_task)
    prompts, begun = asked.evaluation["test"][:1], []

    class Answering(HFRollout):
        def generate(self, requests, group_size, decoding):
            made = super().generate(requests, group_size, decoding)
            return [[replace(each, text="<answer>six</answer>") for each in group] for group in made]

    class Noting(LabelScorer):
        def __call__(self, prompts, responses, starts=None):
            begun.extend(starts)
            return super().__call__(prompts, responses, starts)

    encoder = PromptEncoder(vlm, Loader(digits_task.images, 32), None)
    found = Replies(encoder, Noting(vlm), True, 4, 2)(Answering(vlm), asked, "test", prompts, scored=True)
    assert begun == [""]
    assert found.predictions[0].answer == "six" and found.predictions[0].reply.well_formed


def test_the_preset_takes_a_thought(compose):
    config = validate(compose("method=clsrl", f"method.prefill='{EMPTY}'"))
    assert of_config(config).prefill == EMPTY
