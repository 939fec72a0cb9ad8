"""ALERT: the bank, the prompts, and whole runs on an untrained model."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from alert import draft as draft_module
from alert import references as reference
from alert.bank import embeddings as bank
from alert.bank import file as bank_file
from alert.learner import begin, name_candidates
from alert.prompting import INITIALISATIONS, AlertPrompting, check, check_images
from common import rewards
from common.config.composition import validate
from common.data import digits, manifest, task
from common.few_shot import candidates
from common.rollout.base import Completion
from common.types import CATEGORY, Answers, Item, Prediction, Prompt, Reply, Sample, Split, Task, UserError
from common.vlm.replies import grade
from tests import data_tree
from tests.faults import Kill
from tests.judge_server import JudgeServer

ITEMS = [Item(f"{label}-{i}", label, str(label)) for label in range(3) for i in range(2)]


class Squares:
    """A vision tower of two patches whose projection is not linear: it squares."""

    batch, architecture = 1, "squares"

    def hidden(self, keys):
        return torch.tensor([[[float(key[0]), float(key[2])], [1.0, 2.0]] for key in keys])

    def project(self, hidden):
        return hidden**2


def test_initialisations_by_hand():
    # category 2: images (2, 0) and (2, 1) in the first patch; their mean (2, 0.5), squared (4, 0.25); the mean of the
    # squares is (4, 0.5); the mean of both (4, 0.375). The second patch is (1, 2) always, so (1, 4).
    found = {how: bank.see(Squares(), ITEMS, 3, how, seed=1)[1] for how in INITIALISATIONS}
    assert found["proposed"][2].tolist() == [[4.0, 0.25], [1.0, 4.0]]
    assert found["averaging"][2].tolist() == [[4.0, 0.375], [1.0, 4.0]]
    assert found["one_shot"][2].tolist() in ([[4.0, 0.0], [1.0, 4.0]], [[4.0, 1.0], [1.0, 4.0]])
    assert found["random"].shape == (3, 2, 2) and float(found["random"].abs().max()) < 0.1
    assert torch.equal(found["random"], bank.see(Squares(), ITEMS, 3, "random", seed=1)[1])


def test_one_look_gives_the_class_means_too():
    for how in (*INITIALISATIONS, None):
        means, entries = bank.see(Squares(), ITEMS, 3, how, seed=1)
        assert means.tolist() == [[0.5, 1.25], [1.0, 1.25], [1.5, 1.25]] and (entries is None) == (how is None)
        assert bank.see(Squares(), ITEMS, 3, how, seed=1, patches=True)[0][2].tolist() == [2.0, 0.5, 1.0, 2.0]


class Counting(Squares):
    def __init__(self):
        self.seen = []

    def hidden(self, keys):
        self.seen += keys
        return super().hidden(keys)


def looked(method, place=None, items=ITEMS):
    """`begin` with ITEMS, two of them as test images; how often the tower saw each image, and the embeddings."""
    names = ("a", "b", "c")
    train, test = (Split(tuple(part), names, "?", "?") for part in (items, [Item("2-5", 2, "c"), Item("0-7", 0, "a")]))
    vision = Counting()
    vision.vectors = lambda keys, patches: vision.hidden(keys).mean(1)
    problem = Task(train, {"test": test}, None, "", {"x": "own"})
    entries, means = begin(method, vision, problem, place)
    means.candidates(vision, 1, None, problem, "test")
    return vision.seen, entries


def test_the_tower_sees_every_image_once():
    seen, _ = looked(AlertPrompting(seed=1, k=1))
    # one of them shows the size of an embedding
    assert sorted(seen[1:]) == sorted([item.image for item in ITEMS] + ["2-5", "0-7"])


def test_a_continued_run_takes_its_first_bank_from_the_disk(tmp_path):
    _, entries = looked(AlertPrompting(seed=1, k=1), tmp_path)
    saved = bank_file.read_begun(tmp_path)
    assert torch.equal(saved, entries)
    bank_file.export_begun(tmp_path, saved + 1)
    assert torch.equal(looked(AlertPrompting(seed=1, k=1), tmp_path)[1], saved + 1)
    assert torch.equal(bank_file.read_begun(tmp_path), saved + 1), "written once"
    (tmp_path / "begun.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"begun\.safetensors is damaged .*; of an unfinished run, delete it"):
        looked(AlertPrompting(seed=1, k=1), tmp_path)
    (tmp_path / "begun.safetensors").unlink()
    assert torch.equal(looked(AlertPrompting(seed=1, k=1), tmp_path)[1], entries), "computed again"
    bank_file.export_begun(tmp_path, saved[:, :1])
    with pytest.raises(UserError, match=r"begun\.safetensors holds .*\[3, 1, 2\] instead of .*another run_name"):
        looked(AlertPrompting(seed=1, k=1), tmp_path)


def test_the_first_bank_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, replace_file = [], os.replace

    def checked(source, target):
        assert os.stat(source).st_ino in synced
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", checked)
    bank_file.export_begun(tmp_path, torch.ones(3, 2, 2))
    assert torch.equal(bank_file.read_begun(tmp_path), torch.ones(3, 2, 2))


@pytest.mark.parametrize(
    ("shape", "architecture", "message"),
    [
        (
            (3, 2, 4),
            "squares",
            r"of shape \[3, 2, 4\] instead of \[3, 2, 2\] .*2 tokens.*width 2\); give a bank of this model",
        ),
        ((3, 1, 2), "squares", r"of shape \[3, 1, 2\] instead"),
        ((3, 2, 2), "gemma3", "was made for gemma3, not for squares"),
    ],
    ids=["width", "tokens", "architecture"],
)
def test_a_bank_of_another_model_is_refused(tmp_path, shape, architecture, message):
    bank_file.export(tmp_path, torch.ones(shape), ("a", "b", "c"), architecture)
    with pytest.raises(UserError, match=f"^method.bank: {tmp_path} .*{message}"):
        looked(AlertPrompting(seed=1, k=1, bank=str(tmp_path)))
    bank_file.export(tmp_path, torch.ones(3, 2, 2), ("a", "b", "c"), "squares")
    assert torch.equal(looked(AlertPrompting(seed=1, k=1, bank=str(tmp_path)))[1], torch.ones(3, 2, 2))


@pytest.mark.parametrize("draft", ["class_means", "oracle_recall"])
@pytest.mark.parametrize("features", ["mean", "patches"])
def test_images_are_ranked_by_the_batch_as_they_were_all_at_once(draft, features, monkeypatch):
    generator, names = np.random.default_rng(1), tuple("abcdefgh")
    seen = {f"{i}": generator.normal(size=(2, 3)).astype(np.float32) for i in range(31)}
    train = Split(tuple(Item(f"{i}", i % 8, names[i % 8]) for i in range(16)), names, "?", "?")
    shown = tuple(reversed(names))[1:]  # a target may have other classes in another order
    test = Split(tuple(Item(f"{i}", i % 7, shown[i % 7]) for i in range(16, 31)), shown, "?", "?")
    asked = []

    class Vision(Squares):
        batch = 4

        def hidden(self, keys):
            return torch.tensor(np.stack([seen[key] for key in keys]))

        def vectors(self, keys, patches):
            asked.append(len(keys))
            return self.hidden(keys).flatten(1) if patches else self.hidden(keys).mean(1)

    ranks, parts = iter(range(2)), []
    monkeypatch.setattr("alert.draft.share_of", lambda items: items[next(ranks) :: 2])
    monkeypatch.setattr("alert.draft.gather", lambda part: parts.append(part) or parts)
    problem = Task(train, {"x": test}, None, "", {"d": "own", "x": "own"})
    method = AlertPrompting(seed=1, features=features, draft=draft, k=3)
    means = np.stack([np.mean([seen[f"{i}"], seen[f"{i + 8}"]], 0, np.float64) for i in range(8)])
    flat = [v.reshape(len(v), -1) if features == "patches" else v.mean(1) for v in (np.stack([*seen.values()]), means)]
    whole = draft_module.class_mean_logits(flat[0][16:], reference.class_means(flat[1], range(8), 8)[6::-1])
    images, truths = [item.image for item in test.items], [item.label for item in test.items]
    origin = candidates.Origin("class_means", "x", 2, 1)
    ranked = candidates.rank(images, whole, shown, origin)
    if draft == "oracle_recall":
        ranked = draft_module.oracle_recall(images, whole, truths, 3, shown, origin)
    with pytest.raises(KeyError):  # the other rank's images are missing yet
        name_candidates(method, begin(method, Vision(), problem, None)[1], Vision(), problem)
    name_candidates(method, begin(method, Vision(), problem, None)[1], Vision(), problem)
    found = method.drafted["x"]
    assert sorted(asked) == [3, 4, 4, 4] and found.images == ranked.images and found.origin == ranked.origin
    assert found.indices.tolist() == ranked.indices.tolist()
    assert np.allclose(found.logits, ranked.logits, rtol=0, atol=1e-6)


def test_a_category_without_images_is_named():
    with pytest.raises(UserError, match="category 3 has no training image"):
        bank.see(Squares(), ITEMS, 4, "proposed", seed=1)


NAMES = ["a", "b", "c"]


def test_a_bank_comes_back_as_it_was(tmp_path):
    entries, begun = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    bank_file.export(tmp_path / "bank", entries, NAMES, "gemma3")
    bank_file.export_begun(tmp_path / "bank", begun)
    assert torch.equal(bank_file.read(tmp_path / "bank", tuple(NAMES)), entries)
    assert torch.equal(bank_file.read_begun(tmp_path / "bank"), begun)
    with pytest.raises(UserError, match="bank of other categories: it has no 'd'"):
        bank_file.read(tmp_path / "bank", ("a", "b", "d"))
    with pytest.raises(UserError, match="their number or order differs"):
        bank_file.read(tmp_path / "bank", ("b", "a", "c"))
    with pytest.raises(UserError, match="is no bank"):
        bank_file.read(tmp_path / "nowhere", ("a",))


def of_another_write(folder):
    bank_file.export(folder.with_name("other"), torch.zeros(3, 2, 4), NAMES, "gemma3")
    (folder.with_name("other") / "bank.safetensors").rename(folder / "bank.safetensors")


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def rewritten(**changes):
    def write(folder):
        facts = json.loads((folder / "bank.json").read_text()) | changes
        kept = {key: value for key, value in facts.items() if value is not None}
        (folder / "bank.json").write_text(json.dumps(kept))

    return write


DAMAGE = {
    "cut": (cut("bank.safetensors", -4), r"bank\.safetensors is damaged"),
    "empty": (cut("bank.safetensors", 0), r"bank\.safetensors is damaged"),
    "gone": (lambda folder: (folder / "bank.safetensors").unlink(), r"bank\.safetensors is missing"),
    "garbage": (lambda f: (f / "bank.safetensors").write_bytes(b"\xff" * 64), r"bank\.safetensors is damaged"),
    "tensor of another name": (
        lambda folder: save_file({"x": torch.zeros(3, 2, 4)}, folder / "bank.safetensors"),
        r"bank\.safetensors is damaged",
    ),
    "no matrices": (
        lambda folder: save_file({"entries": torch.zeros(3)}, folder / "bank.safetensors"),
        r"'entries' has the shape \[3\]",
    ),
    "another write": (of_another_write, "does not match its hash"),
    "json cut": (cut("bank.json", 20), "is no bank that a run has exported"),
    "json list": (lambda folder: (folder / "bank.json").write_text("[]"), r"bank\.json is damaged: it must hold names"),
    "json without names": (rewritten(names=None), r"bank\.json is damaged"),
    "json without hash": (rewritten(sha256=None), r"bank\.json is damaged"),
    "other shape": (rewritten(shape=[3, 4, 2]), "does not match its hash"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_bank_is_one_line(tmp_path, damage, message):
    folder = tmp_path / "bank"
    bank_file.export(folder, torch.ones(3, 2, 4), NAMES, "gemma3")
    damage(folder)
    with pytest.raises(UserError, match=f"{message}.*; (copy the bank again|give <run>/model/embeddings)") as error:
        bank_file.read(folder, NAMES)
    assert "\n" not in str(error.value)


def test_nearest_categories():
    entries = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 2.0]]])
    indices, cosines = bank.nearest(entries)
    assert indices.tolist() == [1, 2, 1] and cosines.tolist() == pytest.approx([0.6, 0.8, 0.8])


def asked_of(compose, *overrides):
    """What the check before a run asks."""
    changes = ("model=tiny_gemma3", "method.instruction=short", "model.load_in_8bit=false")
    config = validate(compose("method=alert", "data=digits", *changes, *overrides))
    return check(config, task.build(config))


def sources(asked):
    return asked.prompting.sources(asked.task)


def drafted(place, task, seed):
    """A draft's file for the test images of digits."""
    split, generator = task.evaluation["test"], np.random.default_rng(seed)
    images = [item.image for item in split.items]
    origin = candidates.Origin("class_means", "digits", 16, 1)
    made = candidates.rank(images, generator.normal(size=(len(images), 10)), split.names, origin)
    candidates.write_candidates(place / "test", made, split.names, [item.label for item in split.items])
    return made


@pytest.mark.slow
def test_a_draft_is_read_before_the_model_is_loaded(compose, digits_task, tmp_path):
    arguments = ["method.draft=file", f"method.draft_file={tmp_path}/SPLIT"]
    with pytest.raises(UserError, match=r"method\.draft_file: .*test\.json cannot be read"):
        asked_of(compose, *arguments)
    made = drafted(tmp_path, digits_task, seed=1)
    asked = asked_of(compose, *arguments).evaluation["test"]
    assert [prompt.categories for prompt in asked] == [made.shown(prompt.image, 2) for prompt in asked]
    (tmp_path / "test.npz").write_bytes(b"")
    with pytest.raises(UserError, match=r"method\.draft_file: .*test\.npz is no \.npz file"):
        asked_of(compose, *arguments)


def test_a_bank_is_looked_at_before_the_model_is_loaded(compose, tmp_path):
    with pytest.raises(UserError, match=f"^method.bank: {tmp_path} is no bank .* give <run>/model/embeddings"):
        asked_of(compose, f"method.bank={tmp_path}")


@pytest.mark.slow
def test_a_run_does_not_continue_with_other_files(compose, digits_task, tmp_path):
    names, place = digits_task.train.names, tmp_path / "bank"
    bank_file.export(place, torch.zeros(10, 4, 8), names, "gemma3")
    drafted(tmp_path, digits_task, seed=1)
    changes = {
        "method.bank": lambda: bank_file.export(place, torch.ones(10, 4, 8), names, "gemma3"),
        "method.draft_file of 'test'": lambda: drafted(tmp_path, digits_task, seed=2),
    }
    for key, change in changes.items():
        arguments = [f"method.bank={place}"]
        if "draft" in key:
            arguments = ["method.draft=file", f"method.draft_file={tmp_path}/SPLIT"]
        folder = tmp_path / key
        folder.mkdir()
        manifest.freeze_prompts(folder, {}, sources(asked_of(compose, *arguments)))
        manifest.check_sources(folder, sources(asked_of(compose, *arguments)))
        change()
        with pytest.raises(UserError, match=f"{key}: the file is not the one that .*prompts.json froze"):
            manifest.check_sources(folder, sources(asked_of(compose, *arguments)))
    assert sources(asked_of(compose)) == {}


def seen(method, digits_task):
    """As when pictures were seen, with similarities that make neighbours alike."""
    places = np.arange(10)
    method.similarities = 1 - abs(places[:, None] - places[None]) / 10
    return method


def test_training_prompts_change_with_the_epoch(digits_task):
    method = seen(AlertPrompting(seed=1, instruction="short"), digits_task)
    first, again, second = (method.train_prompts(digits_task, epoch) for epoch in (0, 0, 1))
    assert first == again and first != second
    for prompt, item in zip(first, digits_task.train.items, strict=True):
        assert item.label in prompt.categories and 2 <= len(prompt.categories) <= 8
        assert prompt.choices == tuple(digits_task.train.names[label] for label in prompt.categories)
        assert prompt.text.count(CATEGORY) == len(prompt.categories) and prompt.image_last
    assert {len(prompt.categories) for prompt in first} == set(range(2, 9))


def test_prompts_before_the_pictures_are_the_longest(digits_task):
    method = AlertPrompting(seed=1, instruction="short")
    longest = max(len(prompt.text) for prompt in method.train_prompts(digits_task))
    drawn = seen(method, digits_task)
    assert longest >= max(len(p.text) for epoch in range(20) for p in drawn.train_prompts(digits_task, epoch))


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.initialisation=best"], "method.initialisation=best: choose one of proposed"),
        (["method.draft=file"], "method.draft=file needs method.draft_file"),
        (
            ["method.draft=cafo"],
            "method.draft=cafo: a few-shot learner as the draft is few_shot=cafo method.draft=few_shot",
        ),
        (["method.draft=best"], "method.draft=best: choose one of class_means, oracle_recall, file, few_shot"),
        (["method.smallest=9"], "2 <= smallest <= largest"),
        (["method.k=11"], "method.k=11, but 'test' has only 10 to choose among"),
        (["setting=base_to_new"], "ALERT knows only categories with training images.*first: 'five'"),
    ],
    ids=["initialisation", "draft", "old draft", "unknown draft", "references", "k", "new classes"],
)
def test_bad_values_are_one_line(compose, overrides, message):
    with pytest.raises(UserError, match=message):
        asked_of(compose, *overrides)


def test_a_few_shot_draft_needs_a_few_shot_learner(compose, digits_task):
    where = ("method=alert", "model=tiny_gemma3", "model.load_in_8bit=false", "method.draft=few_shot")
    config = validate(compose(*where))
    with pytest.raises(UserError, match="method.draft=few_shot: no few-shot learner is chosen; add one.*few_shot=cafo"):
        check(config, task.build(config))
    config = validate(compose(*where, "few_shot=nearest_mean"))
    assert (config.clip.name, config.visual.name) == ("tiny", "pixels"), "it brings its encoders"
    check(config, task.build(config))


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
    untrained = [validate(compose(f"method={name}")).model for name in ("gemma_1shot", "alert_zeroshot")]
    assert [(model.load_in_8bit, model.lora.r) for model in untrained] == [(True, 0)] * 2  # the same base, no adapters
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


def answered(completion, answer):
    return Prediction("0-0", "0", 0, answer, False, False, Reply(completion, 1, False, True))


def test_what_the_reasoning_concludes_is_said_of_every_image(digits_task):
    replies = [
        ("<think>Like zero. It is not one, which has one straight stroke.</think><answer>zero</answer>", "zero", True),
        ("<think>Not one but zero.</think><answer>one</answer>", "one", False),
        ("<think>Round.</think><answer>zero</answer>", "zero", None),
        ("<think>Like zero.</think> zero", "", None),
        ("zero", "zero", None),
    ]
    items = digits_task.evaluation["test"].items
    predictions = [
        replace(answered(completion, answer), image=item.image)
        for item, (completion, answer, _) in zip(items, replies, strict=False)
    ]
    method = AlertPrompting(seed=1)
    origin = candidates.Origin("class_means", "digits", 16, 1)
    names, logits = digits_task.evaluation["test"].names, torch.arange(10.0, 0.0, -1.0).expand(5, 10).numpy()
    method.drafted["test"] = candidates.rank([p.image for p in predictions], logits, names, origin)
    found = method.extra_columns(digits_task, "test", predictions)
    assert found == {"candidates": [["zero", "one"]] * 5, "reasoning_agrees": [verdict for *_, verdict in replies]}
    counts = method.diagnostics(digits_task, "test", Answers(predictions, 0.0, columns=found))["reasoning"]
    assert counts == {"agree": 1, "differ": 1, "reasoning_names_none": 1, "malformed": 2}


@pytest.mark.parametrize("order", ["rank", "shuffle"])
def test_kept_answers_are_accounted_for_with_what_they_were_asked(order, digits_task, caplog):
    asked = digits_task.evaluation["test"]
    items = [item for item in asked.items if item.name == "zero"][:2]
    predictions = [replace(answered("zero", "zero"), image=item.image, label="zero") for item in items]
    method, origin = AlertPrompting(seed=1, k=2, order=order), candidates.Origin("class_means", "digits", 16, 1)
    logits = np.arange(10.0, 0.0, -1.0)[None].repeat(2, 0)  # zero, one, two, ...
    method.drafted["test"] = candidates.rank([item.image for item in items], logits, asked.names, origin)
    columns = method.extra_columns(digits_task, "test", predictions)
    same = method.diagnostics(digits_task, "test", Answers(predictions, 0.0, columns=columns))["draft"]
    assert (same["presence"], same["recall@1"], same["accuracy"]) == (1.0, 1.0, 1.0) and not caplog.records
    kept = {**columns, "candidates": [columns["candidates"][0], ["two", "one"]]}
    found = method.diagnostics(digits_task, "test", Answers(predictions, 0.0, columns=kept))["draft"]
    assert (found["presence"], found["recall@1"], found["recall@2"], found["recall@3"]) == (0.5, 0.5, 0.5, 1.0)
    assert found["accuracy"] == 0.5 and found["errors"]["not_among_candidates"] == 0.5
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of the 2 images of 'test' were asked with other candidates")


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


def embeddings(run):
    """After training, and before."""
    folder = run / "model" / "embeddings"
    return bank_file.read(folder, bank_file.facts(folder)["names"]), bank_file.read_begun(folder)


@pytest.mark.slow
def test_what_was_frozen_is_what_was_asked(undisturbed):
    """The hash of prompts.json, from the prompts beside the answers; training prompts are among those that it covers."""
    rows = pyarrow.parquet.read_table(undisturbed / "predictions.parquet").to_pylist()
    kept = json.loads((undisturbed / "prompts.json").read_text())
    for phase in ("before", "after"):
        asked = [[None, row["prompt"]] for row in rows if (row["phase"], row["split"]) == (phase, "test")]
        text = json.dumps(asked, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        assert kept["prompts"]["test"] == hashlib.sha256(text.encode()).hexdigest()
    assert set(kept["prompts"]) == {"train", "test"} and len({row["prompt"] for row in rows}) > 20
    assert kept["sources"] == {
        "model/embeddings/begun.safetensors": bank_file.bank_hash(embeddings(undisturbed)[1], digits.NAMES)
    }


@pytest.mark.faults
def test_a_continued_run_asks_what_it_asked_or_says_what_has_changed(job, runner, tmp_path):
    """Not what the tower would say now: a GPU may round otherwise when it sees the images again."""
    run = tmp_path / "run"
    arguments = [*job, *FULL, f"cache_dir={tmp_path}"]
    assert runner(run, arguments, Kill("common.training.grpo.trainer:GRPOTrainer._update", 3)) == -9
    begun, similar = (
        run / "model" / "embeddings" / "begun.safetensors",
        run / "model" / "embeddings" / "similarities.npy",
    )
    whole, alike = begun.read_bytes(), np.load(similar)
    bank_file.export_begun(begun.parent, bank_file.read_begun(begun.parent) * 1.01)
    assert runner(run, arguments) == 1
    said = (run / "run.log").read_text()
    assert "model/embeddings/begun.safetensors: the file is not the one that" in said and "prompts.json froze" in said
    begun.write_bytes(whole)
    np.save(similar, alike[::-1].copy())  # other categories are alike, so other references are drawn
    assert runner(run, arguments) == 1
    assert "prompts.json froze other prompts for split 'train'" in (run / "run.log").read_text()
    np.save(similar, alike)
    assert runner(run, arguments) == 0


@pytest.mark.slow
def test_a_run_moves_the_bank_and_accounts_for_its_answers(undisturbed):
    moved = bank.drift(*embeddings(undisturbed))
    assert moved.shape == (10,) and float(moved.min()) > 0, "all ten categories are referred to"
    assert [path.parent.parent.name for path in undisturbed.rglob("begun.safetensors")] == ["model"], "written once"
    assert len(list(undisturbed.glob("checkpoints/*/model/embeddings/bank.safetensors"))) > 0
    draft = json.loads((undisturbed / "metrics.json").read_text())["after"]["test"]["draft"]
    assert draft["recall@1"] <= draft["recall@2"] == draft["presence"] < draft["recall@8"]
    reasoning = json.loads((undisturbed / "metrics.json").read_text())["after"]["test"]["reasoning"]
    assert sum(reasoning.values()) == draft["n"] and reasoning["malformed"] > 0
    table = pyarrow.parquet.read_table(undisturbed / "predictions.parquet")
    assert {len(row["candidates"]) for row in table.select(["candidates"]).to_pylist()} == {2}
    assert {"reasoning_agrees", "candidates"} < set(table.column_names)
    lines = (undisturbed / "timings.jsonl").read_text().splitlines()
    assert all("judge/calls" in json.loads(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(Kill("common.training.grpo.trainer:GRPOTrainer._update", 4), marks=pytest.mark.faults),
        pytest.param(Kill("common.judge.reward:CachedJudge._ask", 3), marks=pytest.mark.faults),
        pytest.param(Kill("common.training.engine:Engine.save", 2, after=True), marks=pytest.mark.faults),
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
@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (["backend=hf", "model=nobody/nothing"], "judge.model=nobody/nothing is neither a local folder nor reachable"),
        (["backend=openai", "model=m"], "no connection"),
    ],
    ids=["hub", "server"],
)
def test_a_judge_that_is_not_there_stops_the_run_before_it_computes(judge, said, job, runner, tmp_path):
    runtime = ["runtime.base_url=http://127.0.0.1:9/v1", "runtime.retries=0"]
    mine = [f"rewards.reasoning.{value}" for value in (*(f"judge.{part}" for part in judge), *runtime)]
    assert runner(tmp_path / "run", [*job, *FULL, *mine, f"cache_dir={tmp_path}"]) == 1
    assert said in (tmp_path / "run" / "run.log").read_text()
    assert not (tmp_path / "run" / "predictions").exists() and not list(tmp_path.glob("features"))


@pytest.mark.faults
def test_a_killed_run_with_adapters_ends_as_if_nothing_had_happened(adapted, job, runner, tmp_path):
    arguments = [*job, *LORA, f"cache_dir={tmp_path}"]
    assert runner(tmp_path / "run", arguments, Kill("common.training.grpo.trainer:GRPOTrainer._update", 4)) == -9
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
    assert runner(tmp_path / "run", arguments) == 0
    files = ("adapter_model.safetensors", "embeddings/bank.safetensors", "embeddings/begun.safetensors")
    for name in ("metrics.jsonl", *(f"model/{name}" for name in files)):
        assert (tmp_path / "run" / name).read_bytes() == (adapted / name).read_bytes(), name
    assert float(bank.drift(*embeddings(adapted)).min()) > 0, "the bank has moved"


@pytest.mark.faults
def test_frozen_bank_and_base_stay_as_they_are(job, runner, tmp_path):
    assert runner(tmp_path / "run", [*job, *LORA, "method.trainable=false", f"cache_dir={tmp_path}"]) == 0
    assert torch.equal(*embeddings(tmp_path / "run"))
    adapters = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(value.any() for name, value in adapters.items() if "lora_B" in name), (
        "the rest is trained: B begins at 0"
    )
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists(), (
        "the base is not written: it has not changed"
    )


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["undisturbed", pytest.param("adapted", marks=pytest.mark.faults)])
def test_an_exported_bank_gives_the_same_answers(trained, request, job, runner, tmp_path):
    folder = request.getfixturevalue(trained)
    replaced = [a for a in job if not a.startswith(("method=", "model.path", "trainer.", "+rewards", "checkpoint"))]
    again = [f"model.path={folder / 'model'}", f"method.bank={folder / 'model' / 'embeddings'}"]
    arguments = ["method=alert_zeroshot", *replaced, *again, f"cache_dir={tmp_path}"]
    assert runner(tmp_path / "run", arguments) == 0
    columns = ["image", "completion"]
    read = {
        name: pyarrow.parquet.read_table(folder / "predictions.parquet").to_pandas()
        for name, folder in (("before", folder), ("after", tmp_path / "run"))
    }
    before = read["before"][read["before"].phase == "after"][columns].reset_index(drop=True)
    assert before.equals(read["after"][columns].reset_index(drop=True))
    begun = read["before"][read["before"].phase == "before"][columns].reset_index(drop=True)
    assert not before.equals(begun), "the training changed some"


@pytest.mark.faults
def test_every_path_of_imagenet(job, runner, compose, tmp_path):
    """The paper's run as it is composed, but for 8 bits and size, with a judge that answers; then its model and bank
    tested over a learner's candidates."""
    root = data_tree.build(tmp_path / "data")
    model = [a for a in job if a.startswith(("model.", "gpus=", "tracking=", "rollout."))]
    model = [a for a in model if "checkpointing" not in a and ".path" not in a]
    where = ["data=imagenet", f"data.root={root}", "shots=2", "setting=shift", "setting.test_on=[imagenet_v2]"]
    where += ["method.k=2", "model.max_prompt_tokens=4096", "validation=none", f"cache_dir={tmp_path}"]
    path = next(a for a in job if a.startswith("model.path="))
    paper = ["method=alert", *model, path, *where, "rollout.backend=tests.rollouts.Thinking"]
    with JudgeServer(lambda prompt, number: str(1 + number % 10)) as server:
        judge = [
            f"rewards.reasoning.{a}"
            for a in ("judge.backend=openai", "judge.model=m", f"runtime.base_url={server.url}")
        ]
        assert runner(tmp_path / "run", [*paper, *judge]) == 0
        assert len(server.requests) > 1
    used = validate(compose(*paper))
    assert used.model.lora.r > 0 and used.model.freeze_vision and used.model.gradient_checkpointing
    assert (used.method["instruction"], used.label_scoring, used.trainer.group_size) == ("paper", True, 6)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"test", "imagenet_v2"} == set(found["after"]) and found["after"]["imagenet_v2"]["draft"]["n"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("rewards/reasoning/mean", 0) for line in lines) > 0

    data = task.build(used)
    for split, asked in data.task.evaluation.items():
        images, truths = zip(*((item.image, item.label) for item in asked.items), strict=True)
        origin = candidates.Origin("CaFo", split if split == "imagenet_v2" else "imagenet", 2, 1)
        logits = np.random.default_rng(1).normal(size=(len(images), len(asked.names)))
        candidates.write_candidates(
            tmp_path / "cafo" / split, candidates.rank(images, logits, asked.names, origin), asked.names, truths
        )
    tested = [
        f"model.path={tmp_path}/run/model",
        f"method.bank={tmp_path}/run/model/embeddings",
        "method.order=shuffle",
    ]
    tested += ["method.draft=file", f"method.draft_file={tmp_path}/cafo/SPLIT", "label_scoring=direct"]
    assert runner(tmp_path / "tested", ["method=alert_zeroshot", *model, *where, *tested]) == 0
    account = json.loads((tmp_path / "tested" / "metrics.json").read_text())["before"]["test"]["draft"]
    assert account["method"] == "CaFo" and account["presence"] == account["recall@2"] < 1


def test_a_bank_can_be_looked_at(tmp_path, capsys):
    from alert import inspect

    begun = torch.tensor([[[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 2.0]]])
    entries = begun.clone()
    entries[2, 0, 1] = 2.5
    bank_file.export(tmp_path, entries, NAMES, "gemma3")
    with pytest.raises(UserError, match="does not say what the bank began from"):
        inspect.rows(tmp_path)
    bank_file.export_begun(tmp_path, begun)
    found = inspect.rows(tmp_path)
    assert found[0] == ("c", 2.5, 0.25, "b", pytest.approx(0.8)) and [row[2] for row in found[1:]] == [0, 0]
    inspect.main([str(tmp_path)])
    assert (tmp_path / "bank.png").stat().st_size > 1000 and "25.00" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no bank"):
        inspect.main([str(tmp_path / "nowhere")])


def test_a_category_without_images_is_refused_before_the_model_loads(digits_task):
    rest = tuple(item for item in digits_task.train.items if item.label != 4)
    task = replace(digits_task, train=replace(digits_task.train, items=rest))
    with pytest.raises(UserError, match="but 1 has none, first: 'four'"):
        check_images(task)


REPLIES = {
    "six": (0, 0, 0),
    "<answer>six</answer>": (0, 0, 1),
    "<think>a</think><answer>six</answer>": (1, 1, 1),
    "<think>a</think><answer>one</answer>": (1, 1, 0),
    "Sure! <think>a</think> So: <answer>six</answer>.": (0, 1, 1),
    "<answer>six</answer><answer>one</answer>": (0, 0, 0),
}


@pytest.mark.parametrize(("completion", "earned"), REPLIES.items(), ids=REPLIES)
def test_formats_and_accuracy_of_alert(compose, completion, earned):
    c = validate(compose("method=alert", "rewards=alert_no_judge"))
    prompt = Prompt("0", "?", "six", ("six", "one"))
    parts = rewards.score([Sample(prompt, completion)], rewards.build_rewards(c.rewards)).parts
    assert tuple(parts[name][0] for name in ("format", "soft_format", "accuracy")) == earned
    reply = Completion(torch.tensor([1]), torch.tensor([0.0]), completion, truncated=False)
    graded = grade(AlertPrompting(seed=1), prompt, 6, reply)
    assert graded.correct is bool(earned[2]), "testing reads answers as training does"
    assert graded.reply.correct_official is None, "there is no code of the authors to differ from"


@pytest.mark.parametrize("missing", [True, False], ids=["may be missing", "must be there"])
def test_only_a_reward_that_may_be_missing_is_left_out(missing):
    import math

    from common.rewards import Reward
    from common.rollout.base import Completion
    from common.training.grpo.batch import score_groups
    from common.types import Prompt

    class Judge:
        may_be_missing, needs_base = missing, False
        judge_replies = ("no answer", "1", "2", None)

        def __call__(self, samples):
            return [math.nan, 1.0, 0.5, 0.25]

        def prepare(self): ...

        def bind(self, generate, identity): ...

        def metrics(self):
            return {}

    rewards = {"judge": Reward(2.0, Judge()), "length": Reward(1.0, lambda samples: [1.0, 0.0, 1.0, 0.0])}
    reply = Completion(torch.tensor([1]), torch.tensor([0.0]), "six", truncated=False)
    found = score_groups([Prompt("0", "?", "six")] * 2, [[reply, reply], [reply, reply]], rewards)
    assert found.judge_replies == {"judge": ["no answer", "1", "2", None]}
    if missing:
        assert found.parts["judge"] == [0.0, 0.0, 0.5, 0.25] and found.total == [1.0, 0.0, 2.0, 0.5]
        assert found.known == {"judge": [None, None, 0.5, 0.25], "length": [1.0, 0.0, 1.0, 0.0]}
    else:
        assert math.isnan(found.parts["judge"][0]) and math.isnan(found.total[0]) and found.total[1] == 2.0


def reported(judged, shuffle=None):
    """Metrics and table rows of two groups of two samples whose judge gave these scores."""
    from types import SimpleNamespace

    from common.rewards import Scores
    from common.rollout.base import Completion
    from common.training.grpo.batch import RolloutBatch, compare, describe, rows
    from common.training.grpo.loss import scaled
    from common.types import Prompt

    gone = [score is None for score in judged]
    parts = {"judge": [score or 0.0 for score in judged], "length": [1.0, 0.0, 1.0, 0.0]}
    total = [a + b for a, b in zip(*parts.values(), strict=True)]
    reply = Completion(torch.tensor([1]), torch.tensor([0.0]), "six", truncated=False)
    group, prompt = SimpleNamespace(prompt=SimpleNamespace(ids=[1])), Prompt("0", "?", "six")
    scores = Scores(parts, total, {"judge": gone}, {"judge": [None, *("abc"[: len(judged) - 1])]})
    used, found = compare(
        scores, dict.fromkeys(parts, 1.0), 2, lambda p, w: scaled((p * w[:, None, None]).sum(0)), shuffle
    )
    batch = RolloutBatch([prompt] * 2, [group] * 2, [[reply] * 2] * 2, used, found)
    return describe(batch), rows(1, batch)


@pytest.mark.parametrize("shuffle", [None, 1], ids=["as it is", "shuffled"])
def test_a_missing_reward_is_not_shown_as_zero(shuffle):
    metrics, rows = reported([None, None, 0.5, 0.25], shuffle)
    assert metrics["rewards/judge/mean"] == 0.375 and metrics["rewards/judge/std"] == pytest.approx(0.17677669)
    assert metrics["rewards/judge/missing"] == 0.5 and "rewards/length/missing" not in metrics
    assert metrics["reward"] == (1.0 + 1.5 + 0.25) / 4
    shown = [row["rewards/judge"] for row in rows]
    assert (
        shown == [None, None, 0.5, 0.25]
        if shuffle is None
        else sorted(map(str, shown)) == ["0.25", "0.5", "None", "None"]
    )
    assert all(row["reward"] == (row["rewards/judge"] or 0) + row["rewards/length"] for row in rows)
    assert [row["judge_reply/judge"] for row in rows] == [None, "a", "b", "c"], "words stay with their completion"


def test_a_reward_that_is_missing_everywhere_does_not_stop_the_run():
    from common.run.loop import check_finite

    metrics, rows = reported([None] * 4)
    check_finite(metrics, 1)
    assert metrics["rewards/judge/missing"] == 1.0 and "rewards/judge/mean" not in metrics
    assert json.loads(json.dumps(rows))[0]["rewards/judge"] is None
