"""Probabilities of class names: the shared forward against plain ones, whatever shares a row with what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clsrl.prompting import ClassListPrompt
from common import parsing
from common.data import digits
from common.data.loading import Loader
from common.evaluation import evaluate
from common.forward.label_scores import LabelScorer, rows
from common.forward.logprobs import PolicyScorer
from common.forward.packing import PromptGroup, pack_plain
from common.models.encoder import PromptEncoder
from common.rollout.base import Completion
from common.rollout.hf import HFRollout
from common.vlm.prompting import TaskPrompts
from common.vlm.replies import Replies
from tests.conftest import NEWER

NAMES = ("cat", "caterpillar", "six", "nine", "Ägyptian mau", "a very long name of a class", "cat's eye", "seven")


@pytest.fixture
def setup(load_vlm, digits_task, think, no_think):
    """A model, prompts of two lengths, and replies of many."""
    vlm = load_vlm()
    methods = [think, no_think, no_think]
    prompts = [method.train_prompts(digits_task)[place] for method, place in zip(methods, (0, 17, 33), strict=True)]
    responses = [[method.label_response(name) for name in NAMES] for method in methods]
    responses[2] = responses[2][:3]
    return vlm, PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(prompts), responses


def reply_ids(vlm, text):
    ids = vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, vlm.processor.tokenizer.eos_token_id])


def one_by_one(vlm, prompt, texts):
    """Each reply in a forward of its own, with the model's stock positions and attention."""
    found = []
    for text in texts:
        reply = reply_ids(vlm, text)
        ids = torch.cat([prompt.ids, reply])[None]
        with torch.no_grad():
            logits = vlm.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=prompt.pixel_values,
                image_grid_thw=prompt.grid,
                mm_token_type_ids=(ids == vlm.model.config.image_token_id).int(),
            ).logits[0, len(prompt.ids) - 1 : -1]
        logits[:, list(vlm.banned)] = -torch.inf
        found.append(logits.log_softmax(-1).gather(-1, reply[:, None]).sum(dtype=torch.double))
    return torch.stack(found)


def largest_difference(found, expected):
    return max(float((a.logps - b).abs().max()) for a, b in zip(found, expected, strict=True))


def test_equal_to_one_name_at_a_time(setup):
    vlm, prompts, responses = setup
    found = LabelScorer(vlm)(prompts, responses)
    expected = [one_by_one(vlm, prompt, texts) for prompt, texts in zip(prompts, responses, strict=True)]
    assert float(expected[0].std()) > 0.5, "flat logits would prove nothing"
    assert largest_difference(found, expected) <= 1e-5
    assert found[1].lengths.tolist() == [len(reply_ids(vlm, name)) for name in NAMES]


def test_equal_to_the_plain_layout(setup):
    vlm, prompts, responses = setup
    found = LabelScorer(vlm)(prompts, responses)
    scorer = PolicyScorer(vlm, temperature=1.0, chunk=1024).eval()
    for prompt, texts, scores in zip(prompts, responses, found, strict=True):
        replies = tuple(reply_ids(vlm, text) for text in texts)
        with torch.no_grad():
            logps, _ = scorer(pack_plain([PromptGroup(prompt, replies)], vlm.family, vlm.pad, vlm.device))
        expected = torch.stack(
            [part.sum(dtype=torch.double) for part in logps.split([len(reply) for reply in replies])]
        )
        assert largest_difference([scores], [expected]) <= 1e-5


@pytest.mark.parametrize("budget", [1, 150, 400, 1000])
def test_chunks_do_not_matter(setup, budget):
    vlm, prompts, responses = setup
    whole = LabelScorer(vlm, budget=10**6)(prompts, responses)
    lengths = [[len(reply_ids(vlm, text)) for text in texts] for texts in responses]
    forwards = len(list(rows([len(p.ids) for p in prompts], lengths, budget)))
    assert forwards > 1 and (budget > 1 or forwards == 8 + 8 + 3)
    cut = LabelScorer(vlm, budget)(prompts, responses)
    assert largest_difference(cut, [scores.logps for scores in whole]) <= 1e-5
    for a, b in zip(cut, whole, strict=True):
        assert a.normalised == pytest.approx(b.normalised, abs=1e-5) and a.raw == pytest.approx(b.raw, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", *NEWER, "gemma3"])
def test_a_name_after_reasoning_is_the_end_of_one_long_reply(load_vlm, digits_task, think, family):
    vlm = load_vlm(family=family)
    prompts = PromptEncoder(vlm, Loader(digits_task.images, 32), 512)(think.train_prompts(digits_task)[:2])
    thoughts = ["<think>a loop below</think> ", ""]
    responses = [[think.label_response(name) for name in NAMES]] * 2
    found = LabelScorer(vlm)(prompts, responses, thoughts)
    bare = LabelScorer(vlm)(prompts, responses)
    assert float((found[1].logps - bare[1].logps).abs().max()) <= 1e-5, "nothing begun, nothing changed"
    assert float((found[0].logps - bare[0].logps).abs().min()) > 1e-3
    thought = torch.tensor(vlm.processor.tokenizer(vlm.lead + thoughts[0], add_special_tokens=False)["input_ids"])
    ends = [vlm.processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in responses[0]]
    replies = tuple(torch.tensor([*thought.tolist(), *end, vlm.end_of_turn]) for end in ends)
    scorer = PolicyScorer(vlm, temperature=1.0, chunk=1024).eval()
    with torch.no_grad():
        logps, _ = scorer(pack_plain([PromptGroup(prompts[0], replies)], vlm.family, vlm.pad, vlm.device))
    own = [part[len(thought) :].double().sum() for part in logps.split([len(reply) for reply in replies])]
    assert float((found[0].logps - torch.stack(own)).abs().max()) <= 1e-5
    assert found[0].lengths.tolist() == [len(end) + 1 for end in ends]


def test_order_of_names_does_not_matter(setup):
    vlm, prompts, responses = setup
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    (straight,) = LabelScorer(vlm)(prompts[:1], responses[:1])
    (mixed,) = LabelScorer(vlm)(prompts[:1], [[responses[0][place] for place in order]])
    assert mixed.normalised == pytest.approx([straight.normalised[place] for place in order], abs=1e-6)
    assert mixed.raw == pytest.approx([straight.raw[place] for place in order], abs=1e-6)


def test_probabilities_are_shares_of_the_choices(setup):
    vlm, prompts, responses = setup
    for scores in LabelScorer(vlm)(prompts, responses):
        raw = [float(logp.exp()) for logp in scores.logps]
        assert sum(scores.raw) == pytest.approx(1, abs=1e-6) and sum(scores.normalised) == pytest.approx(1, abs=1e-6)
        assert scores.raw == pytest.approx([p / sum(raw) for p in raw])
        mean = [float(logp / length) for logp, length in zip(scores.logps, scores.lengths, strict=True)]
        assert max(range(len(mean)), key=mean.__getitem__) == scores.normalised.index(max(scores.normalised))


def test_scoring_leaves_the_training_mode(setup):
    vlm, prompts, responses = setup
    vlm.model.train()
    found = LabelScorer(vlm)(prompts, responses)
    assert vlm.model.training and not found[0].logps.requires_grad


def test_long_class_lists_are_cut_within_the_budget():
    lengths = [[3 + place % 5 for place in range(1000)]]
    found = list(rows([700], lengths, budget=2**15))
    size = 2**15 // 707  # the widest reply takes 700 + 7 keys
    assert found == [[(0, start, min(start + size, 1000))] for start in range(0, 1000, size)]


def test_a_name_as_a_reply_is_answered_and_right(think, no_think):
    for method in (think, no_think):
        for name in NAMES:
            assert parsing.matches_strictly(method.label_response(name), name)
    assert think.label_response("six") == "<answer>six</answer>" and no_think.well_formed(
        no_think.label_response("six")
    )


class Nowhere:
    """A recorder that keeps nothing."""

    def kept(self, phase, split):
        return None

    def keep(self, phase, split, answers):
        assert answers.predictions and answers.seconds > 0


class Asked(evaluate.Predictor):
    """A model with its prompts, as the evaluation sees a learner."""

    def __init__(self, replies, rollout, prompts):
        self.replies, self.rollout, self.prompts, self.task = replies, rollout, prompts, prompts.task

    def predict(self, split, limit=None):
        prompts = evaluate.evenly_spaced(self.prompts.evaluation[split], limit)
        return self.replies(self.rollout, self.prompts, split, prompts, scored=limit is None)

    def all_splits(self, phase="after", cache=None):
        return evaluate.all_splits(self, phase, cache or Nowhere())

    def during_training(self, limit):
        return evaluate.during_training(self, limit)

    def diagnostics(self, split, answers):
        return self.prompts.prompting.diagnostics(self.task, split, answers)


@pytest.fixture
def evaluator(load_vlm, digits_task, no_think):
    vlm = load_vlm()
    test = digits_task.evaluation["test"]
    task = replace(digits_task, evaluation={"test": replace(test, items=test.items[:12])})
    encoder = PromptEncoder(vlm, Loader(task.images, 32), 512)

    def make(scored=True, method=no_think, rollout=None, reasoned=True):
        prompts = method.evaluation_prompts(task, "test")
        prompts[5:] = [replace(prompt, choices=()) for prompt in prompts[5:]]  # the second half as open questions
        asked = TaskPrompts(task, method, [], {"test": prompts})
        labels = LabelScorer(vlm) if scored else None
        replies = Replies(encoder, labels, reasoned, max_tokens=4, batch=5)
        return Asked(replies, rollout or HFRollout(vlm), asked)

    return make


def test_evaluation_scores_the_offered_names(evaluator, digits_task):
    found = evaluator().all_splits()
    answers = found.answers["test"]
    table, labels = answers.probabilities, [p.label for p in answers.predictions]
    assert table.names == digits.NAMES
    assert all(sorted(row) == list(range(10)) for row in table.classes.tolist())
    assert all(row != list(range(10)) for row in table.classes[:5].tolist()), "in the order of the prompt"
    assert all(row == list(range(10)) for row in table.classes[5:].tolist()), "an open question offers all names"
    assert table.values.sum(1) == pytest.approx(1) and table.raw.sum(1) == pytest.approx(1)
    summary = found.summary["test"]
    best = [digits.NAMES[row[p.argmax()]] for row, p in zip(table.classes, table.values, strict=True)]
    right = sum(name == label for name, label in zip(best, labels, strict=True))
    assert summary.probability.top1 == pytest.approx(right / 12) and summary.probability.seconds > 0
    assert [p.label_index for p in answers.predictions] == [digits.NAMES.index(label) for label in labels]
    assert found.scalars == {
        **{
            f"eval/test/{key}": getattr(summary, key)
            for key in ("accuracy", "accuracy_macro", "accuracy_official", "n")
        },
        "eval/test/probability_accuracy": summary.probability.top1,
        "eval/test/top5_accuracy": summary.probability.top5,
        "eval/test/ece": summary.probability.ece,
        "eval/test/brier": summary.probability.brier,
    }


class Says:
    """A sampler that says the same to everybody."""

    def __init__(self, text):
        self.reply = Completion(torch.tensor([1]), torch.tensor([0.0]), text, truncated=False)

    def generate(self, requests, group_size, decoding):
        return [[self.reply] for _ in requests]


@pytest.mark.parametrize(
    ("said", "reasoned", "begun"),
    [
        ("<think>round</think><answer>six</answer>", True, "<think>round</think>"),
        ("<think>round</think><answer>six</answer>", False, ""),
        ("<think>round</think><answer>six", True, ""),
    ],
    ids=["after it", "direct", "malformed"],
)
def test_names_are_scored_after_the_reasoning_that_was_given(evaluator, think, said, reasoned, begun):
    asked = evaluator(method=think, rollout=Says(said), reasoned=reasoned)
    (prompt,), names = asked.prompts.evaluation["test"][:1], asked.prompts.evaluation["test"][0].choices
    table = asked.all_splits().answers["test"].probabilities
    responses = [think.label_response(name) for name in names]
    (expected,) = asked.replies.labels(asked.replies.encoder([prompt]), [responses], [begun])
    assert tuple(table.names[index] for index in table.classes[0]) == names
    assert table.values[0] == pytest.approx(expected.normalised, abs=1e-6)
    assert table.raw[0] == pytest.approx(expected.raw, abs=1e-6)


def test_label_scoring_changes_no_answer_and_can_be_left_out(evaluator):
    scored, plain, during = evaluator().all_splits(), evaluator(False).all_splits(), evaluator().during_training(7)
    answers = scored.answers["test"].predictions
    assert answers == plain.answers["test"].predictions
    assert [answers[i * 12 // 7] for i in range(7)] == during.answers["test"].predictions
    for found in (plain, during):
        assert found.summary["test"].probability is None and not any("ece" in name for name in found.scalars)


def test_a_kept_split_is_summed_up_with_the_columns_that_were_kept(evaluator):
    class Saying(ClassListPrompt):
        def extra_columns(self, task, split, predictions):
            return {"mark": ["now"] * len(predictions)}

        def diagnostics(self, task, split, answers):
            return {"marks": answers.columns["mark"]}

    class Keeper(Nowhere):
        def kept(self, phase, split):
            return replace(first, columns={"mark": ["then"] * 12}) if phase == "after" else None

        def keep(self, phase, split, answers):
            nonlocal first
            first = answers

    first, asked = None, evaluator(False, Saying(instruction="no_think", seed=1))
    keeper = Keeper()
    marks = [asked.all_splits(phase, keeper).summary["test"].facts["marks"] for phase in ("before", "after")]
    assert marks == [["now"] * 12, ["then"] * 12]
    assert asked.during_training(7).summary["test"].facts["marks"] == ["now"] * 7
