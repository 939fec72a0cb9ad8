"""DiVE-k: candidates, options and letters by hand, what the learner mines, and whole runs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch

from clsrl.related import dive_k, dive_k_learner
from clsrl.related.dive_k import DiveKPrompt, chosen_option, most_frequent, options, right_option
from clsrl.related.dive_k_learner import DiveKLearner
from common import Classifier
from common.config.composition import validate
from common.data.digits import Digits
from common.export import __main__ as export
from common.forward.label_scores import LabelScores
from common.rollout.base import Completion, Decoding
from common.types import Answers, Item, Prediction, Prompt, Reply, Sample, Split, Task, UserError
from common.vlm.replies import Replies, grade
from tests.faults import Kill
from tests.test_predict import expected

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def tagged(answer):
    return f"<think>a loop</think><answer>{answer}</answer>"


def test_the_most_frequent_names_are_candidates_and_nothing_else():
    said = ["six", None, "eight", "six", "sixty", "nine", "eight", "two", "nine", "nine"]
    assert most_frequent(said, DIGITS, 5) == ("nine", "six", "eight", "two")
    assert most_frequent(said, DIGITS, 2) == ("nine", "six"), "of two equals the one that was said first"
    assert most_frequent(["arctic fox"], ["Arctic_Fox", "Owl"], 5) == ("Arctic_Fox",)
    assert most_frequent([None, "?"], DIGITS, 5) == ()


@pytest.mark.parametrize(
    ("candidates", "truth", "kept"),
    [
        (("six", "two", "one", "five", "four"), "two", {"six", "two", "one", "five", "four"}),
        (("six", "two", "one", "five", "four"), "nine", {"six", "two", "one", "five", "nine"}),  # in place of the last
        (("six", "two"), "nine", {"six", "two", "nine"}),
        (("six", "two"), None, {"six", "two"}),
    ],
)
def test_the_label_is_among_the_options_of_a_training_question(candidates, truth, kept):
    made = options(candidates, DIGITS, 5, 1, "a.png", truth)
    assert set(made) == kept and len(made) == len(kept)
    orders = {options(candidates, DIGITS, 5, 1, f"{n}.png", truth) for n in range(40)}
    assert len({order.index(candidates[0]) for order in orders}) == len(kept), "every place"
    assert made == options(candidates, DIGITS, 5, 1, "a.png", truth)
    assert {options(candidates, DIGITS, 5, seed, "a.png", truth) for seed in range(9)} != {made}


def test_fewer_than_two_candidates_are_joined_by_others():
    for n in range(30):
        assert len(set(options((), DIGITS, 5, 1, str(n)))) == 2
        one = options(("six",), DIGITS, 5, 1, str(n))
        assert "six" in one and len(set(one)) == 3
        both = options(("six",), DIGITS, 5, 1, str(n), "nine")
        assert {"six", "nine"} < set(both) and len(both) == len(set(both)) in (3, 4)
        assert set(options(("six",), DIGITS, 2, 1, str(n), "nine")) == {"six", "nine"}
    assert set(options((), ("a", "b"), 5, 1, "x")) == {"a", "b"} and options((), ("a",), 5, 1, "x") == ("a",)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (tagged("B"), "six"),
        (tagged("b."), "six"),
        (tagged("(B) six"), "six"),
        (tagged("B: Six"), "six"),
        (tagged("six"), "six"),
        (tagged("A. six"), "a. six"),  # of two minds
        (tagged("A or B"), "a or b"),
        (tagged("D"), "d"),  # there are three
        (tagged("AB"), "ab"),
        ("<answer>A</answer><answer>B</answer>", None),
        ("B", "six"),
        ("", ""),
    ],
)
def test_letters_are_read_strictly(reply, answer):
    assert chosen_option(reply, ("nine", "Six", "one")) == answer
    for label, value in (("Six", answer == "six"), ("nine", False)):
        assert right_option([Sample(Prompt("1", "?", label, ("nine", "Six", "one")), reply)]) == [value]


def test_a_letter_goes_before_a_class_of_that_name():
    assert chosen_option(tagged("B"), ("b", "a")) == "a" and chosen_option(tagged("A"), ("b", "a")) == "b"


def made(**arguments):
    split = Split(
        (Item("1", 6, "six"), Item("2", 9, "nine")), DIGITS, "Which of the list?", "Which digit?", {"six": ("VI",)}
    )
    return DiveKPrompt(seed=1, **arguments), Task(split, {"test": split}, None, "", {})


def test_the_first_question_lists_all_names_and_the_second_one_the_candidates():
    prompting, task = made()
    first, second = prompting.evaluation_prompts(task, "test"), prompting.train_prompts(task)
    assert not prompting.final
    assert sorted(first[0].choices) == sorted(DIGITS) and "<think>" in first[0].text
    assert {*second[0].choices} == {"three", "seven", "eight", "five", "nine"}, "the longest names"
    prompting.mined = {"1": ["eight", "nine", "two", "four", "one"], "2": ["nine"]}
    six, nine = prompting.train_prompts(task)
    assert prompting.final and {*six.choices} == {"six", "eight", "nine", "two", "four"} and len(nine.choices) == 3
    rows = "".join(f"\n {letter}. {name}" for letter, name in zip("ABCDE", six.choices, strict=True))
    assert six.text == f"Which digit?{dive_k.MOST_LIKELY}{rows}{dive_k.LETTER}" and six.aliases == ("VI",)
    assert prompting.train_prompts(task, epoch=3) == [six, nine]
    assert prompting.evaluation_prompts(task, "test") == first


def test_other_wordings():
    prompting, task = made(ask_for="name", mining="scores", list_share=0.0)
    prompting.mined = {"1": ["six", "nine"], "2": ["nine", "six"]}
    (asked, _), (first, _) = prompting.train_prompts(task), prompting.first_prompts(task.train)
    assert f"list [ {', '.join(asked.choices)}]." in asked.text and asked.text.startswith("Which of the list?")
    assert first.choices == () and first.text == "Which digit?\n Please directly output the answer."
    assert prompting.responses(asked, asked.choices) == [f"<answer>{name}</answer>" for name in asked.choices]
    letters, _ = made()
    assert letters.responses(asked, asked.choices) == ["<answer>A</answer>", "<answer>B</answer>"]
    assert letters.responses(first, ("six",)) == ["<answer>six</answer>"]
    assert letters.read(asked, tagged("A")) == asked.choices[0]


def test_an_evaluation_reads_and_scores_letters():
    prompting, task = made()
    prompt = prompting.second_prompt(task.train, task.train.items[0], "six", ("nine", "six"))
    for said, correct in (("B", True), ("A", False), ("six", True)):
        reply = Completion(torch.tensor([1]), torch.zeros(1), tagged(said), False)
        found = grade(prompting, prompt, 6, reply)
        assert (found.correct, found.answer) == (correct, "six" if correct else "nine")
    asked = []
    replies = Replies(None, None, reasoned=False, max_tokens=5, batch=1)
    request = SimpleNamespace(encoded=None)
    replies._scores(lambda *given: asked.extend(given[1]), prompting, DIGITS, [prompt], [request], [found])
    assert asked == [["<answer>A</answer>", "<answer>B</answer>"]]


def test_what_an_evaluation_reports():
    prompting, task = made(k=3)
    prompting.found = {"test": {"1": ["six", "nine"], "2": ["two", "one", "nine"], "3": [], "4": ["six"]}}
    labels = {"1": "six", "2": "nine", "3": "two", "4": ""}
    predictions = [
        Prediction(image, label, 0, "six", False, False, Reply(tagged("six"), 5, False, True))
        for image, label in labels.items()
    ]
    columns = prompting.extra_columns(task, "test", predictions)
    assert columns["candidates"] == list(prompting.found["test"].values())
    prompting.found = {}  # a resumed run has the columns alone
    assert prompting.diagnostics(task, "test", Answers(predictions, 0.0, columns=columns))["mining"] == {
        "recall@1": pytest.approx(1 / 3),
        "recall@2": pytest.approx(1 / 3),
        "recall@3": pytest.approx(2 / 3),
        "majority_vote": pytest.approx(1 / 3),
        "candidates": pytest.approx(5 / 3),
    }
    assert dive_k.mining_facts([["six"]], [""], 2) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mining": "beams"}, "method.mining=beams: choose one of sampled, scores"),
        ({"ask_for": "number"}, "method.ask_for=number"),
        ({"k": 1}, "method.k=1: a question has from 2 to 26 options"),
        ({"k": 27}, "method.k=27"),
        ({"samples": 0}, "method.samples=0 must be above 0"),
        ({"top_p": 1.5}, "method.top_p=1.5 must be at most 1"),
        ({"list_share": 0.4}, "method.list_share=0.4: the first question lists all names"),
    ],
)
def test_impossible_values_are_refused(arguments, said):
    with pytest.raises(UserError, match=said):
        DiveKPrompt(seed=1, **arguments)


def a_learner(**arguments):
    """A learner without a model."""
    learner = object.__new__(DiveKLearner)
    learner.prompting, task = made(**arguments)
    rollout = SimpleNamespace(evaluation_batch=1, max_completion_tokens=7)
    learner.config = SimpleNamespace(rollout=rollout)
    return learner, task.train


def test_samples_become_candidates(monkeypatch):
    learner, split = a_learner(samples=4, k=2, temperature=0.7, top_p=0.9)
    replies = {"1": ["six", "nine", "six", "two"], "2": ["one", "x", "", "one"]}
    asked = []

    def generate(wanted, group_size, decoding):
        asked.extend((each, group_size, decoding) for each in wanted)
        groups = [[tagged(said) for said in replies[each[0]]] for each in wanted]
        return [[Completion(torch.tensor([1]), torch.zeros(1), text, False) for text in group] for group in groups]

    learner.rollout, learner.encoder = SimpleNamespace(generate=generate), None
    monkeypatch.setattr(
        dive_k_learner,
        "requests",
        lambda _, prompts, seeds: [(p.image, s) for p, s in zip(prompts, seeds, strict=True)],
    )
    found = learner.mine(split, learner.prompting.first_prompts(split), "test")
    assert found == {"1": ["six", "nine"], "2": ["one"]}
    assert asked == [((image, f"mining-1-{image}"), 4, Decoding(0.7, 0, 0.9, 7)) for image in ("1", "2")]


def test_probabilities_become_candidates():
    learner, split = a_learner(mining="scores", k=3)
    scores = torch.full((10,), -9.0, dtype=torch.double)
    scores[[4, 7, 1]] = torch.tensor([-2.0, -1.0, -2.0], dtype=torch.double)
    asked = []

    def labels(encoded, responses):
        asked.extend(responses)
        return [LabelScores(scores, torch.ones(10))] * len(encoded)

    learner.encoder, learner.replies = list, SimpleNamespace(labels=labels)
    found = learner.mine(split, learner.prompting.first_prompts(split), "test")
    assert found == {"1": ["seven", "one", "four"], "2": ["seven", "one", "four"]} and asked == [list(DIGITS)] * 2


def test_what_was_mined_is_read_again(tmp_path):
    path = tmp_path / "mined.json"
    path.write_text('{"1": ["six"], "2": []}')
    assert dive_k_learner.read(path, ["1", "2"]) == {"1": ["six"], "2": []}
    with pytest.raises(UserError, match="the candidates of other images"):
        dive_k_learner.read(path, ["2", "1"])
    path.write_text("{")
    with pytest.raises(UserError, match="mined.json is damaged"):
        dive_k_learner.read(path, ["1", "2"])


@pytest.mark.slow
def test_it_is_the_papers_configuration(compose):
    config = validate(compose("method=dive_k", "model=qwen2_5_vl_7b", "gpus=0"))
    method = config.method
    assert (method["samples"], method["temperature"], method["top_p"], method["k"]) == (20, 1.0, 0.95, 5)
    assert (method["mining"], method["ask_for"], method["list_share"]) == ("sampled", "letter", 1.0)
    assert (config.trainer.group_size, config.trainer.epochs, set(config.rewards)) == (4, 1.5, {"format", "option"})


RUN = [
    *["method=dive_k", "data=digits", "tracking=none", "trainer.evaluate_every=0", "validation=held_out"],
    *["setting.test_per_class=20"],
]


@pytest.mark.faults
@pytest.mark.parametrize("mining", ["sampled", "scores"])
def test_it_learns_and_answers_alike_afterwards(runner, tmp_path, mining):
    run, folder = tmp_path / "run", tmp_path / "exported"
    updates = {"sampled": 3, "scores": 40}[mining]
    assert runner(run, [*RUN, f"method.mining={mining}", "method.samples=6", f"trainer.updates={updates}"]) == 0
    result = json.loads((run / "metrics.json").read_text())
    before, after = (result[phase]["test"] for phase in ("before", "after"))
    for facts in (before, after):
        assert facts["mining"]["recall@1"] <= facts["mining"]["recall@5"] and facts["accuracy"] > 0.4
    if mining == "scores":
        assert after["accuracy"] > before["accuracy"] + 0.08
        assert after["accuracy"] <= after["mining"]["recall@5"]
    assert export.main([str(run), str(folder)]) == 0
    tested, digits = expected(run)[:20], Digits()
    for place in (run, folder):
        classifier = Classifier.load(place)
        answers = classifier({row["image"]: digits.open(row["image"]) for row in tested})
        assert [answer.reply for answer in answers] == [row["completion"] for row in tested]
        assert [answer.label for answer in answers] == [row["answer"] or None for row in tested]
        assert [list(answer.candidates) for answer in answers] == [row["candidates"] for row in tested]
        classifier.close()


@pytest.mark.faults
def test_killed_and_resumed_it_is_the_same(runner, tmp_path):
    short = [*RUN, "method.mining=sampled", "method.samples=4", "trainer.updates=6", "checkpoint.every=2"]
    short += ["setting.test_per_class=5", "shots=4", "label_scoring=false"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runner(whole, short) == 0
    mining = "clsrl.related.dive_k_learner:DiveKLearner._sampled"
    assert runner(killed, short, Kill(mining, 1)) == -9 and not (killed / "mined.json").exists()
    assert runner(killed, short, Kill("common.training.engine:Engine.step", 5)) == -9
    before = (killed / "mined.json").stat().st_mtime_ns
    assert runner(killed, short) == 0
    assert (killed / "mined.json").stat().st_mtime_ns == before, "not mined again"
    for name in ("mined.json", "prompts.json", "metrics.jsonl", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    tables = [pyarrow.parquet.read_table(folder / "predictions.parquet") for folder in (whole, killed)]
    assert tables[0].equals(tables[1])
    two = tmp_path / "two"
    assert runner.ranks(2, two, [*short, "trainer.updates=1"]) == [0, 0]
    assert (two / "mined.json").read_bytes() == (whole / "mined.json").read_bytes()
    others = [folder / "predictions.parquet" for folder in (whole, two)]
    first, second = (
        [row for row in pyarrow.parquet.read_table(path).to_pylist() if row["phase"] == "before"] for path in others
    )
    assert [row["candidates"] for row in first] == [row["candidates"] for row in second]
