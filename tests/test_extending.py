"""Everything that can be added is added from outside the repository, as a user would: a package and a folder of YAML.

python run.py -cd <folder> method=mine data=mine ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pyarrow.parquet
import pytest

from common.config.composition import validate
from common.run.result import Result
from common.types import UserError
from tests.conftest import REPOSITORY

PACKAGE = '''
"""A package that knows nothing of the repository but its types."""

from __future__ import annotations

from io import BytesIO
from PIL import Image, ImageDraw

from common.data.source import Parts, fingerprint
from common.data.task import Splits
from common.models.families import Qwen2VL
from common.rollout.hf import HFRollout
from common.types import Item, Prompt, Source
from common.vlm.prompting import Prompting

NAMES = ("square", "circle", "cross")


class Drawn:
    """Pictures that are drawn when they are asked for; the key says which."""

    def open(self, image):
        _, name, number = image.split("/")
        picture = Image.new("RGB", (40, 40))
        draw, low, high = ImageDraw.Draw(picture), 4 + int(number) % 5, 30 + int(number) % 7
        if name == "square":
            draw.rectangle((low, low, high, high), fill="white")
        elif name == "circle":
            draw.ellipse((low, low, high, high), fill="white")
        else:
            draw.line((low, low, high, high), fill="white", width=4)
            draw.line((low, high, high, low), fill="white", width=4)
        return picture

    def stamp(self, image):
        return image

    def size(self, image):
        return len(self.content(image))

    def content(self, image, start=0, length=None):
        self.open(image).save(stored := BytesIO(), "png")
        return stored.getvalue()[start : None if length is None else start + length]


def read(place, *, count: int) -> Source:
    """A dataset: `count` drawings of each shape."""
    items = [Item(f"{place.name}/{n}/{i}", label, n) for label, n in enumerate(NAMES) for i in range(count)]
    train = [item for item in items if int(item.image.split("/")[2]) < 4]
    test = [item for item in items if item not in train]
    parts = Parts(train, (), test)
    return Source(NAMES, tuple(train), (), tuple(test), Drawn(), fingerprint(NAMES, parts), "own split")


def all_but_one(data, targets, how) -> Splits:
    """A setting: the last class is only tested."""
    known = [item for item in data.source.train if item.label < 2]
    return Splits(data.split(known, [0, 1]), {"test": data.split(data.source.test)}, {})


class Shout(Prompting):
    """A method: it wants capitals."""

    def __init__(self, *, seed: int, question: str) -> None:
        self.seed, self.question = seed, question

    def _prompts(self, split):
        text = f"{self.question} {', '.join(split.choices)}"
        return [Prompt(item.image, text, item.name, split.choices) for item in split.items]

    def train_prompts(self, task, epoch=0):
        return self._prompts(task.train)

    def evaluation_prompts(self, task, split):
        return self._prompts(task.evaluation[split])

    def well_formed(self, completion):
        return completion.isupper()

    def answer(self, completion):
        return completion.lower() if self.well_formed(completion) else None

    def label_response(self, name):
        return name.upper()


def capitals(samples, *, scale: float = 1.0) -> list[float]:
    """A reward: the share of capitals."""
    return [scale * sum(c.isupper() for c in s.completion) / (1 + len(s.completion)) for s in samples]


class Family(Qwen2VL):
    """A model's architecture; here one that is known already."""


class Sampler:
    """A rollout backend that writes down what it is told."""

    logprobs_untruncated = True

    def __init__(self, vlm, *, diary: str) -> None:
        self.inside, self.diary = HFRollout(vlm), open(diary, "w")

    def generate(self, requests, group_size, decoding):
        # the form for engines that render images themselves: one placeholder, the picture beside it
        ids, (picture,) = requests[0].unexpanded(), requests[0].pictures()
        image = self.inside.vlm.model.config.image_token_id
        print("unexpanded", int((ids == image).sum()), picture.size[0], file=self.diary)
        return self.inside.generate(requests, group_size, decoding)

    def refresh(self, version):
        print("refresh", version, file=self.diary)
        self.inside.refresh(version)

    def wake(self):
        print("wake", file=self.diary)

    def rest(self):
        print("rest", file=self.diary)

    def close(self):
        self.diary.close()
'''

YAML = {
    "method/mine": """
        # @package _global_
        defaults: [override /trainer: grpo, override /rewards: mine]
        method: {name: mine, _target_: mine.Shout, seed: "${seed}", question: "Which shape is it?"}
    """,
    "rewards/mine": "capitals: {weight: 2.0, fn: mine.capitals, scale: 0.5}",
    "data/mine": """
        defaults: [/schema/data@_here_, _self_]
        name: mine
        folder: ""
        root: "."
        reader: {_target_: mine.read, count: 6}
        question: Which shape?
    """,
    "setting/mine": """
        defaults: [/schema/setting@_here_, _self_]
        name: mine
        build: mine.all_but_one
    """,
    "model/mine": """
        defaults: [/schema/model@_here_, _self_]
        name: mine
        family: mine.Family
        path: ${oc.env:WEIGHTS}
        dtype: float32
        image_size: 32
        max_prompt_tokens: 512
    """,
    "rollout/mine": """
        defaults: [hf, _self_]
        name: mine
        backend: mine.Sampler
        options: {diary: "${oc.env:DIARY}"}
        max_completion_tokens: 6
    """,
}


@pytest.fixture
def outside(tmp_path):
    """`outside(package, yaml)`: writes both and returns a function that calls run.py with them."""

    def make(package, files, **environment):
        (tmp_path / "mine.py").write_text(package)
        for name, text in files.items():
            path = tmp_path / "conf" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).strip() + "\n")

        def call(*overrides):
            command = [sys.executable, str(REPOSITORY / "run.py"), "-cd", "conf", "tracking=none", *overrides]
            command += [f"hydra.run.dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"]
            env = {**os.environ, **environment}  # the package lies in the current folder
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return tmp_path / "run"

        return call

    return make


@pytest.mark.slow
def test_six_extensions_from_outside_in_one_run(outside, untrained_folder, tmp_path):
    diary = tmp_path / "diary.txt"
    call = outside(PACKAGE, YAML, WEIGHTS=str(untrained_folder), DIARY=str(diary))
    mine = [f"{group}=mine" for group in ("method", "data", "setting", "model", "rollout")]
    folder = call(*mine, "shots=4", "trainer.updates=2", "trainer.prompts_per_update=4", "trainer.learning_rate=1e-3")
    result = Result.load(folder)
    assert (result.method, result.data, result.setting, result.model) == ("mine",) * 4
    assert (
        result.train["updates"] == 2
        and result.final["test"].n == 6
        and set(result.final["test"].per_class)
        == {
            "square",
            "circle",
            "cross",
        }
    )
    rows = pyarrow.parquet.read_table(folder / "completions.parquet").to_pylist()
    assert {row["label"] for row in rows} == {"square", "circle"}, "the setting left the third class out"
    for row in rows:
        capitals = sum(c.isupper() for c in row["completion"])
        assert row["reward"] == pytest.approx(2 * 0.5 * capitals / (1 + len(row["completion"])))
    lines = diary.read_text().split("\n")[:-1]
    versions = [int(line.split()[1]) for line in lines if line.startswith("refresh")]
    assert versions[0] == 0 and versions[-1] == 2 and versions == sorted(versions)
    assert [line for line in lines if line.startswith(("wake", "rest"))] == ["wake", "rest"] * len(versions)
    assert {line for line in lines if line.startswith("unexpanded")} == {"unexpanded 1 32"}


CLASSIFIER = '''
"""A learner without a language model: the nearest class mean of the pixels."""

from __future__ import annotations

import json
import time

import numpy as np

from common.data.loading import make_loader
from common.evaluation.evaluate import evenly_spaced
from common.learner import Learner
from common.training.base import Step
from common.types import Answers, Prediction, Probabilities


class NearestMean(Learner):
    decoding = "nearest class mean"
    weights = {"path": "none", "sha256": "none"}

    def __init__(self, config, data, device, folder, checkpoints):
        self.config, self.means = config, None
        self.set_task(data.task)

    def set_task(self, task):
        self.task, self.load = task, make_loader(self.config, task)

    def pixels(self, items):
        return np.stack([np.asarray(p, np.float32).ravel() / 255 for p in self.load([i.image for i in items])])

    def predict(self, split, limit=None):
        began, asked = time.perf_counter(), self.task.evaluation[split]
        items = evenly_spaced(list(asked.items), limit)
        names = asked.choices
        if self.means is None:
            logits = np.zeros((len(items), len(names)))
        else:
            logits = -((self.pixels(items)[:, None] - self.means[None]) ** 2).sum(-1)
        chosen = logits.argmax(1)
        grown = np.exp(logits - logits.max(1, keepdims=True))
        table = Probabilities(
            names, np.tile(np.arange(len(names), dtype=np.int32), (len(items), 1)),
            (grown / grown.sum(1, keepdims=True)).astype(np.float32),
        )
        made = [
            Prediction(item.image, item.name, item.label, names[c], bool(c == item.label), bool(c == item.label))
            for item, c in zip(items, chosen, strict=True)
        ]
        return Answers(made, time.perf_counter() - began, table)

    def train(self, recorder):
        items = self.task.train.items
        pixels, labels = self.pixels(items), np.array([item.label for item in items])
        self.means = np.stack([pixels[labels == label].mean(0) for label in range(labels.max() + 1)])
        recorder.update(1, Step({"loss": 0.0}, {"update": 0.0}, []), last=True)
        return 1

    def save(self, folder):
        folder.mkdir(parents=True)
        np.save(folder / "means.npy", self.means)

    def close(self): ...


def check(config, data): ...
'''


@pytest.mark.faults
def test_another_learner_has_the_same_run_folder(outside, tmp_path):
    """Pixels of real digits: the run's accuracy is that of scikit-learn on the same images."""
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.neighbors import NearestCentroid

    files = {
        "learner/mine": """
            defaults: [/schema/learner@_here_, _self_]
            name: mine
            build: mine.NearestMean
            check: mine.check
        """,
        "method/mine": """
            # @package _global_
            defaults: [override /learner: mine]
            method: {name: mine}
        """,
    }
    folder = outside(CLASSIFIER, files)("method=mine", "shots=16")
    result = Result.load(folder)
    assert result.decoding == "nearest class mean" and result.train["updates"] == 1
    before, after = result.before["test"], result.after["test"]
    assert after.well_formed is None and after.accuracy_official is None, "no replies, nothing to say about them"
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pylist()
    digits = load_digits()
    tested = [row for row in rows if row["phase"] == "after"]
    index = np.array([int(row["image"].rpartition("/")[2]) for row in tested])
    others = np.setdiff1d(np.arange(1797), index)
    assert len(others) == 160 == manifest["splits"]["train"]["n"]
    expected = NearestCentroid().fit(digits.data[others], digits.target[others]).predict(digits.data[index])
    # the pictures are the same numbers enlarged, so a few near ties fall the other way
    assert after.accuracy == pytest.approx((expected == digits.target[index]).mean(), abs=0.01)
    assert after.accuracy > 0.8 > before.accuracy
    assert after.probability.top1 == after.accuracy and tested[0]["completion"] is None
    for name in ("curves.png", "confusion-test.png", "config.yaml", "metrics.jsonl", "model/means.npy"):
        assert (folder / name).is_file()


PARTS = '''
"""The parts of a trainer: a loss, advantages, an optimizer, a tracker, and a reward that looks at the picture."""

from __future__ import annotations

import os

import numpy as np
import torch

from common.training.grpo.loss import LossInputs, LossOutputs


def note(*words):
    with open(os.environ["DIARY"], "a") as diary:
        print(*words, file=diary)


def reinforce(inputs: LossInputs, config, *, scale: float) -> LossOutputs:
    """Policy gradient without a ratio; the sign is that of a loss."""
    weights = (inputs.weights * inputs.advantages.to(inputs.weights))[inputs.owner].to(inputs.logps)
    loss = -scale * (weights * inputs.logps).sum()
    note("loss", float(loss))
    return LossOutputs(loss, {"reinforce": (float(loss), 1.0)}, None, None)


def centred(parts, weights, config, *, factor: float) -> torch.Tensor:
    total = (parts * weights[:, None, None]).sum(0)
    return factor * (total - total.mean(1, keepdim=True))


class Plain(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay=0.0, loud=False):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        note("optimizer", loud)


class Diary:
    id = "the-diary"

    def __init__(self, config, folder, job_type, tags, values, splits, open_image, known=None):
        note("tracker", job_type, values["shots"], *splits)

    def log(self, metrics, step):
        if "reinforce" in metrics:
            note("step", step, metrics["reinforce"])

    def completions(self, rows, step): ...

    def result(self, result, evaluation):
        note("result", result.method)

    def close(self, failed):
        note("closed", failed)


def bright(samples) -> list[float]:
    """Brightness of the picture, and a tenth for every token; nothing for what was cut."""
    return [
        0.0 if s.truncated else float(np.asarray(s.picture, dtype=float).mean() / 255) + s.tokens / 10 for s in samples
    ]
'''


@pytest.mark.slow
def test_the_parts_of_a_trainer_from_outside(outside, tmp_path):
    """Loss, advantages, optimizer, tracker, and a reward that sees length, cut and picture; each of its own module."""
    import numpy as np

    from common.data.digits import Digits

    diary = tmp_path / "diary.txt"
    call = outside(PARTS, {"label/none": ""}, DIARY=str(diary))
    folder = call(
        "method=nothinking",
        "rewards=none",
        "+rewards.bright={weight: 2.0, fn: mine.bright}",
        "trainer.loss=mine.reinforce",
        "+trainer.loss_options.scale=0.5",
        "trainer.advantages=mine.centred",
        "+trainer.advantages_options.factor=3.0",
        "trainer.optimizer=mine.Plain",
        "+trainer.optimizer_options.loud=true",
        "tracking=wandb",
        "tracking.tracker=mine.Diary",
        "shots=4",
        "trainer.updates=2",
        "trainer.prompts_per_update=4",
        "setting.test_per_class=3",
        "label_scoring=false",
        "doctor=false",
    )
    lines = [line.split() for line in diary.read_text().splitlines()]
    said = {line[0]: line[1:] for line in lines}
    assert said["tracker"][:2] == ["train", "4"] and said["optimizer"] == ["True"]
    assert said["result"] == ["nothinking"] and said["closed"] == ["False"]
    losses = [float(line[1]) for line in lines if line[0] == "loss"]
    steps = [(int(line[1]), float(line[2])) for line in lines if line[0] == "step"]
    assert [step for step, _ in steps] == [1, 2]
    assert sum(losses) / len(losses) == pytest.approx(sum(value for _, value in steps) / 2)
    rows = pyarrow.parquet.read_table(folder / "completions.parquet").to_pylist()
    opened = Digits()
    for row in rows:
        light = np.asarray(opened.open(row["image"]), dtype=float).mean() / 255
        assert row["reward"] == pytest.approx(0.0 if row["truncated"] else 2 * (light + row["tokens"] / 10))
    first = [row for row in rows if row["step"] == 1 and row["image"] == rows[0]["image"]]
    mean = np.mean([row["reward"] for row in first])
    assert [row["advantage"] for row in first] == pytest.approx([3 * (row["reward"] - mean) for row in first], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["trainer.loss=common.rewards.nothing"], "trainer.loss=common.rewards.nothing cannot be imported"),
        (["+trainer.loss_options.scale=1"], "trainer.loss=common.training.grpo.loss.grpo_loss: .*'scale'"),
        (["trainer.advantages=common.training.grpo.loss.advantages"], "trainer.advantages=.*'scaling'"),
        (["trainer.optimizer=torch.optim.Sgd"], "trainer.optimizer=torch.optim.Sgd cannot be imported"),
        (["+trainer.optimizer_options.amsgard=true"], "trainer.optimizer_options.amsgard: torch.optim.AdamW does not"),
        (["trainer.optimizer=torch.optim.SGD", "trainer.embeddings=host"], "set trainer.embeddings=device"),
        (["tracking=wandb", "tracking.tracker=nowhere.Tracker"], "there is no module 'nowhere'"),
    ],
)
def test_a_part_that_is_not_there_is_refused_before_anything_is_loaded(compose, changes, said):
    with pytest.raises(UserError, match=said):
        validate(compose("method=clsrl", *changes))


def test_an_optimizer_gets_the_usual_values_that_it_takes_and_its_own():
    """SGD takes no betas; what no class takes is one line."""
    import torch

    from common.config.schema import TrainerConfig
    from common.training.engine import make_optimizer

    values = {"name": "sft", "learning_rate": 0.1, "epochs": 1.0, "weight_decay": 0.2, "betas": [0.5, 0.6]}
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.3}]
    adamw = make_optimizer(TrainerConfig(**values), groups)
    assert type(adamw) is torch.optim.AdamW and adamw.param_groups[0]["lr"] == 0.3
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.5, 0.6), 0.2)
    own = {"optimizer": "torch.optim.SGD", "optimizer_options": {"momentum": 0.9}}
    sgd = make_optimizer(TrainerConfig(**values, **own), groups)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 0.2)
    wrong = {"optimizer": "torch.optim.SGD", "optimizer_options": {"momentum": -1.0}}
    with pytest.raises(UserError, match="torch.optim.SGD does not take these values .*momentum.* correct trainer.opt"):
        make_optimizer(TrainerConfig(**values, **wrong), groups)
