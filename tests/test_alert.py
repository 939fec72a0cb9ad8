"""ALERT: the bank, the prompts, and whole runs on an untrained model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from alert import bank
from alert.method import Alert
from common import task
from common.config import validate
from common.types import CATEGORY, Item, UserError
from tests import data_tree
from tests.faults import Kill

ITEMS = [Item(f"{label}-{i}", label, str(label)) for label in range(3) for i in range(2)]


class Squares:
    """A vision tower of two patches whose projection is not linear: it squares."""

    batch = 32

    def hidden(self, keys):
        return torch.tensor([[[float(key[0]), float(key[2])], [1.0, 2.0]] for key in keys])

    def project(self, hidden):
        return hidden**2


def test_initialisations_by_hand():
    # category 2: images (2, 0) and (2, 1) in the first patch; their mean (2, 0.5), squared (4, 0.25); the mean of the
    # squares is (4, 0.5); the mean of both (4, 0.375). The second patch is (1, 2) always, so (1, 4).
    found = {how: bank.initial(Squares(), ITEMS, 3, how, seed=1) for how in bank.INITIALISATIONS}
    assert found["proposed"][2].tolist() == [[4.0, 0.25], [1.0, 4.0]]
    assert found["averaging"][2].tolist() == [[4.0, 0.375], [1.0, 4.0]]
    assert found["one_shot"][2].tolist() in ([[4.0, 0.0], [1.0, 4.0]], [[4.0, 1.0], [1.0, 4.0]])
    assert found["random"].shape == (3, 2, 2) and float(found["random"].abs().max()) < 0.1
    assert torch.equal(found["random"], bank.initial(Squares(), ITEMS, 3, "random", seed=1))


def test_a_category_without_images_is_named():
    with pytest.raises(UserError, match="category 3 has no training image"):
        bank.initial(Squares(), ITEMS, 4, "proposed", seed=1)


def test_a_bank_comes_back_as_it_was(tmp_path):
    entries, begun = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    bank.export(tmp_path / "bank", entries, begun, ["a", "b", "c"])
    found = bank.read(tmp_path / "bank", ("a", "b", "c"))
    assert torch.equal(found[0], entries) and torch.equal(found[1], begun)
    with pytest.raises(UserError, match="bank of other categories: it has no 'd'"):
        bank.read(tmp_path / "bank", ("a", "b", "d"))
    bank.export(tmp_path / "other", begun, begun, ["a", "b", "c"])
    (tmp_path / "other" / "bank.safetensors").rename(tmp_path / "bank" / "bank.safetensors")
    with pytest.raises(UserError, match="is damaged"):
        bank.read(tmp_path / "bank", ("a", "b", "c"))
    with pytest.raises(UserError, match="is no bank"):
        bank.read(tmp_path / "nowhere", ("a",))


def test_nearest_categories():
    entries = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 2.0]]])
    indices, cosines = bank.nearest(entries)
    assert indices.tolist() == [1, 2, 1] and cosines.tolist() == pytest.approx([0.6, 0.8, 0.8])


def questions(compose, *overrides):
    return task.build(validate(compose("method=alert", "data=digits", "method.instruction=short", *overrides)))


def seen(method, digits_task):
    """As after `look`, with similarities that make neighbours alike."""
    import numpy as np

    places = np.arange(10)
    method.similarities = 1 - abs(places[:, None] - places[None]) / 10
    return method


def test_training_prompts_change_with_the_epoch(digits_task):
    method = seen(Alert(seed=1, instruction="short"), digits_task)
    first, again, second = (method.train_prompts(digits_task, epoch) for epoch in (0, 0, 1))
    assert first == again and first != second
    for prompt, item in zip(first, digits_task.train.items, strict=True):
        assert item.label in prompt.categories and 2 <= len(prompt.categories) <= 8
        assert prompt.choices == tuple(digits_task.train.names[label] for label in prompt.categories)
        assert prompt.text.count(CATEGORY) == len(prompt.categories) and prompt.image_last
    assert {len(prompt.categories) for prompt in first} == set(range(2, 9))


def test_prompts_before_the_pictures_are_the_longest(digits_task):
    method = Alert(seed=1, instruction="short")
    longest = max(len(prompt.text) for prompt in method.train_prompts(digits_task))
    drawn = seen(method, digits_task)
    assert longest >= max(len(p.text) for epoch in range(20) for p in drawn.train_prompts(digits_task, epoch))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.initialisation=best"], "method.initialisation=best: choose one of proposed"),
        (["method.draft=file"], "method.draft=file needs method.draft_file"),
        (["method.smallest=9"], "2 <= smallest <= largest"),
        (["method.k=11"], "method.k=11, but 'test' has 10 class names"),
        (["setting=base_to_new"], "ALERT knows only categories with training images.*first: 'five'"),
    ],
    ids=["initialisation", "draft", "references", "k", "new classes"],
)
def test_bad_values_are_one_line(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        questions(compose, *overrides)


def test_paper_configuration(compose):
    c = validate(compose("method=alert", "data=imagenet", "shots=16"))
    assert (c.model.path, c.model.load_in_8bit, c.model.freeze_vision) == ("google/gemma-3-4b-it", True, True)
    t = c.trainer
    assert (t.learning_rate, t.schedule, t.warmup_ratio, t.weight_decay, t.betas) == (
        5e-6,
        "cosine",
        0.01,
        0.1,
        [0.9, 0.99],
    )
    assert (t.epochs, t.group_size) == (4, 6)
    assert (c.rollout.temperature, c.rollout.max_completion_tokens) == (0.9, 512)
    assert (c.method["tau"], c.method["smallest"], c.method["largest"], c.method["k"]) == (0.1, 2, 8, 2)
    weights = {name: entry["weight"] for name, entry in c.rewards.items()}
    assert weights == {"format": 0.5, "soft_format": 0.5, "accuracy": 2.0, "reasoning": 1.0}


@pytest.fixture(scope="module")
def job(untrained_folders):
    """Four updates of an untrained tiny model, with a reward that it can earn, and the judge that it cannot please."""
    return [
        "method=alert",
        f"model.path={untrained_folders['gemma3']}",
        "model.dtype=float32",
        "model.image_size=32",
        "model.load_in_8bit=false",
        "model.gradient_checkpointing=false",
        "gpus=0",
        "method.instruction=short",
        "trainer.updates=4",
        "trainer.prompts_per_forward=4",
        "trainer.learning_rate=1e-3",
        "trainer.embedding_learning_rate=1e-2",
        "rollout.max_completion_tokens=8",
        "rollout.evaluation_batch=64",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
        "label_scoring=false",
        "checkpoint.every=2",
        "data=digits",
        "shots=170",
        "tracking=none",
    ]


FULL = ["model.lora.r=0", "model.freeze_vision=false"]
LORA = ["model.lora.r=4", "model.lora.alpha=8"]  # as in the paper, only adapters and bank are trained


@pytest.fixture(scope="module")
def undisturbed(job, runner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alert") / "run"
    assert runner(folder, [*job, *FULL, f"cache_dir={folder.parent}"]) == 0
    return folder


@pytest.fixture(scope="module")
def adapted(job, runner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted") / "run"
    assert runner(folder, [*job, *LORA, f"cache_dir={folder.parent}"]) == 0
    return folder


@pytest.mark.slow
def test_a_run_moves_the_bank_and_accounts_for_its_answers(undisturbed):
    saved = load_file(undisturbed / "model" / "embeddings" / "bank.safetensors")
    moved = bank.drift(saved["entries"], saved["begun"])
    assert moved.shape == (10,) and float(moved.min()) > 0, "all ten categories are referred to"
    draft = json.loads((undisturbed / "metrics.json").read_text())["eval"]["test"]["draft"]
    assert draft["recall@1"] <= draft["recall@2"] == draft["presence"] < draft["recall@8"]
    lines = (undisturbed / "timings.jsonl").read_text().splitlines()
    assert all("judge/calls" in json.loads(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        Kill("common.grpo.trainer:GRPOTrainer._update", 4),
        Kill("alert.judge:ContrastiveReasoning._ask", 3),
        Kill("common.engine:Engine.save", 2, after=True),
    ],
    ids=["update", "judging", "checkpoint"],
)
def test_a_killed_run_ends_as_if_nothing_had_happened(kill, undisturbed, job, runner, tmp_path):
    arguments = [*job, *FULL, f"cache_dir={tmp_path}"]
    assert runner(tmp_path / "run", arguments, kill) == -9
    assert runner(tmp_path / "run", arguments) == 0
    for name in ("metrics.jsonl", "model/model.safetensors", "model/embeddings/bank.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.slow
def test_frozen_bank_and_base_stay_as_they_are(job, runner, tmp_path, untrained_folders):
    lora = ["model.lora.r=4", "model.lora.alpha=8", "method.trainable=false", f"cache_dir={tmp_path}"]
    assert runner(tmp_path / "run", [*job, *lora]) == 0
    saved = load_file(tmp_path / "run" / "model" / "embeddings" / "bank.safetensors")
    assert torch.equal(saved["entries"], saved["begun"])
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists(), (
        "the base is not written: it has not changed"
    )


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["undisturbed", "adapted"])
def test_an_exported_bank_gives_the_same_answers(trained, request, job, runner, tmp_path):
    folder = request.getfixturevalue(trained)
    replaced = [a for a in job if not a.startswith(("method=", "model.path", "trainer.", "+rewards", "checkpoint"))]
    again = [f"model.path={folder / 'model'}", f"method.bank={folder / 'model' / 'embeddings'}"]
    arguments = ["method=alert_zeroshot", *replaced, *again, f"cache_dir={tmp_path}"]
    assert runner(tmp_path / "run", arguments) == 0
    import pyarrow.parquet

    columns = ["image", "completion"]
    read = {
        name: pyarrow.parquet.read_table(folder / "predictions.parquet").to_pandas()
        for name, folder in (("before", folder), ("after", tmp_path / "run"))
    }
    before = read["before"][read["before"].phase == "eval"][columns].reset_index(drop=True)
    assert before.equals(read["after"][columns].reset_index(drop=True))
    begun = read["before"][read["before"].phase == "zero_shot"][columns].reset_index(drop=True)
    assert not before.equals(begun), "the training changed some"


@pytest.mark.slow
def test_every_path_of_imagenet(job, runner, tmp_path):
    root = data_tree.build(tmp_path / "data")
    arguments = [*[a for a in job if not a.startswith(("data=", "shots="))], *FULL, f"cache_dir={tmp_path}"]
    arguments += ["data=imagenet", f"data.root={root}", "shots=2", "setting=shift", "setting.test_on=[imagenet_v2]"]
    assert runner(tmp_path / "run", arguments) == 0
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"test", "imagenet_v2"} == set(found["eval"]) and found["eval"]["imagenet_v2"]["draft"]["n"] > 0


def test_a_bank_can_be_looked_at(tmp_path, capsys):
    from alert import inspect

    begun = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 2.0]]])
    entries = begun.clone()
    entries[2, 0, 1] = 2.5
    bank.export(tmp_path, entries, begun, ["a", "b", "c"])
    found = inspect.rows(tmp_path)
    assert found[0] == ("c", 2.5, 0.25, "b", pytest.approx(0.8)) and [row[2] for row in found[1:]] == [0, 0]
    inspect.main([str(tmp_path)])
    assert (tmp_path / "bank.png").stat().st_size > 1000 and "25.00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no bank"):
        inspect.main([str(tmp_path / "nowhere")])


def test_a_category_without_images_is_refused_before_the_model_loads(digits_task):
    from dataclasses import replace

    rest = tuple(item for item in digits_task.train.items if item.label != 4)
    task = replace(digits_task, train=replace(digits_task.train, items=rest))
    with pytest.raises(UserError, match="but 1 have none, first: 'four'"):
        Alert(seed=1).train_prompts(task)


def test_accuracy_of_alert_needs_the_tags():
    from common.rewards import accuracy
    from common.types import Prompt, Sample

    samples = [
        Sample(Prompt("0", "?", "six"), text) for text in ("six", "<answer>six</answer>", "<answer>one</answer>")
    ]
    assert accuracy(samples, tags=True) == [0.0, 1.0, 0.0] and accuracy(samples) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("missing", [True, False], ids=["may be missing", "must be there"])
def test_only_a_reward_that_may_be_missing_is_left_out(missing):
    import math

    from common.grpo.batch import score_groups
    from common.rewards import Reward
    from common.rollout.base import Completion
    from common.types import Prompt

    class Judge:
        may_be_missing = missing

        def __call__(self, samples):
            return [math.nan, 1.0, 0.5, 0.25]

    rewards = {"judge": Reward(2.0, Judge()), "length": Reward(1.0, lambda samples: [1.0, 0.0, 1.0, 0.0])}
    reply = Completion(torch.tensor([1]), torch.tensor([0.0]), "six", truncated=False)
    found = score_groups([Prompt("0", "?", "six")] * 2, [[reply, reply], [reply, reply]], rewards)
    if missing:
        assert found.parts["judge"] == [0.0, 0.0, 0.5, 0.25] and found.total == [1.0, 0.0, 2.0, 0.5]
    else:
        assert math.isnan(found.parts["judge"][0]) and math.isnan(found.total[0]) and found.total[1] == 2.0
