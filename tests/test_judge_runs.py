"""The judge really asked: by the model that is trained, by several ranks, and by a run that is killed meanwhile."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext

import pyarrow.parquet
import pytest
import torch

from alert.contrastive import judge_prompt, reasoning
from common import pipeline
from common.config import composition as config
from common.data import task
from common.judge.base import LONGEST_CALL, Model, Runtime
from common.judge.hf import Checkpoint
from common.learner import learner_class
from common.models import files
from common.models.extra_embeddings import ExtraEmbeddings
from common.models.tiny import gemma3 as tiny_gemma3
from common.rollout.hf import FrozenReplies
from common.run import doctor
from common.run.checkpoint import Checkpoints
from common.runtime.distributed import LONGEST_WAIT
from common.training import reward_mix
from common.types import UserError
from tests.faults import Kill
from tests.judge_server import INSIDE, JudgeServer
from tests.test_judge import damaged

TEXTS = ["six", "round, but not closed", "I see one straight stroke as in one, but not two loops as in eight."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained Gemma whose greedy replies differ from question to question and have several words."""
    folder, processor = tmp_path_factory.mktemp("gemma3"), tiny_gemma3.build_processor()
    model = tiny_gemma3.build_model(processor.tokenizer, seed=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed_tokens" not in name:
                parameter.mul_(4.0)  # else it repeats its last token
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return [
        "method=alert",
        f"model.path={folder}",
        "model.dtype=float32",
        "model.image_size=32",
        "model.load_in_8bit=false",
        "model.gradient_checkpointing=false",
        "gpus=0",
        "data=digits",
        "tracking=none",
    ]


FULL = ["model.lora.r=0", "model.freeze_vision=false"]
LORA = ["model.lora.r=4", "model.lora.alpha=8"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [FULL, LORA], ids=["full", "lora"])
def test_the_own_judge_stays_the_model_before_training(weights, model, folder, compose, tmp_path):
    c = config.validate(compose(*model, *weights, f"cache_dir={tmp_path}"))
    prompts = [judge_prompt(text) for text in TEXTS]
    expected = Checkpoint(Model("hf", str(folder), dtype="float32"), Runtime()).ask(prompts)
    assert len(set(expected)) > 1

    learner = learner_class(c)(
        c, task.build(c), torch.device("cpu"), tmp_path, Checkpoints(tmp_path / "checkpoints", 2)
    )
    policy, judge = learner.policy, learner.rewards["reasoning"].function.judge
    assert judge.ask(prompts) == expected
    in_the_judge = [module for module in judge.generate.vlm.model.modules() if isinstance(module, ExtraEmbeddings)]
    assert policy.extra_embeddings is not None and len(in_the_judge) == (weights is LORA), "no copy of the embeddings"
    with torch.no_grad():
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.add_(0.5 * torch.randn_like(parameter))
    assert judge.ask(prompts) == expected

    now = FrozenReplies(policy, 8)  # a copy of the weights as they are now, or the base under the adapters
    now._base = nullcontext
    assert now(prompts, 16) != expected, "the policy itself would reply otherwise"


@pytest.fixture(scope="module")
def job(model):
    """Four updates of an untrained model whose completions are judged."""
    return [
        *model,
        "method.instruction=short",
        "rollout.backend=tests.rollouts.Thinking",
        "rollout.max_completion_tokens=8",
        "rollout.evaluation_batch=64",
        "trainer.updates=4",
        "trainer.prompts_per_forward=4",
        "trainer.learning_rate=1e-3",
        "trainer.embedding_learning_rate=1e-2",
        "label_scoring=false",
        "checkpoint.every=2",
        "setting.test_per_class=5",
    ]


def spread_of_scores(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["rewards/reasoning/std"] for line in lines if "loss" in line]


def counts(folder):
    lines = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    return [(line["judge/calls"], line["judge/cache_hits"]) for line in lines]


def by_letters(prompt, number):
    """1 to 10, from the reasoning alone."""
    return str(1 + sum(map(ord, INSIDE.search(prompt)[1])) % 10)


@pytest.mark.faults
def test_a_run_killed_between_two_questions_asks_none_of_them_twice(job, runner, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def arguments(url, cache):
        judge = ["judge.backend=openai", "judge.model=m", f"runtime.base_url={url}", "runtime.concurrency=1"]
        return [*job, *FULL, *(f"rewards.reasoning.{value}" for value in judge), f"cache_dir={tmp_path / cache}"]

    with JudgeServer(by_letters) as server:
        assert runner(tmp_path / "whole", arguments(server.url, "one")) == 0
        asked, calls = server.prompts, counts(tmp_path / "whole")
    assert min(spread_of_scores(tmp_path / "whole")) > 0 and calls[3][0] > 3
    first = 1 + sum(number for number, _ in calls[:3])  # one question before training
    answered = int(calls[3][0] // 2)  # of the fourth update

    with JudgeServer(by_letters) as server:
        killed = Kill("common.judge.openai:OpenAIServer._attempt", int(first) + answered + 1)
        assert runner(tmp_path / "run", arguments(server.url, "two"), killed) == -9
        assert len(server.requests) == first + answered
        assert runner(tmp_path / "run", arguments(server.url, "two")) == 0
    assert Counter(server.prompts[1:]) == Counter(asked)  # without the one that the second attempt begins with
    for name in ("metrics.jsonl", "model/model.safetensors", "model/embeddings/bank.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    found = counts(tmp_path / "run")
    assert found[:2] == calls[:2] and found[2] == (0, sum(calls[2])), "the third update, again, costs no question"
    assert found[3] == (calls[3][0] - answered, calls[3][1] + answered)


@pytest.mark.faults
def test_the_own_judge_of_a_continued_run_is_the_model_before_training(job, runner, tmp_path):
    mine = [*job, *FULL, "rewards.reasoning.fn=tests.rewards.JudgedByLetters", "rewards.reasoning.runtime.cache_gb=0"]
    mine += ["trainer.learning_rate=0.1", f"cache_dir={tmp_path}"]  # so much that its replies change
    assert runner(tmp_path / "whole", mine) == 0
    assert runner(tmp_path / "run", mine, Kill("common.training.engine:Engine.step", 3)) == -9
    assert runner(tmp_path / "run", mine) == 0
    assert min(spread_of_scores(tmp_path / "whole")) > 0
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.faults
def test_doctor_and_training_share_one_judge(job, compose, tmp_path, monkeypatch, process_group):
    built, copied = [], []
    build, replies = reward_mix.build_rewards, reward_mix.FrozenReplies
    monkeypatch.setattr(reward_mix, "build_rewards", lambda mix: built.append(mix) or build(mix))
    monkeypatch.setattr(reward_mix, "FrozenReplies", lambda *args: copied.append(args) or replies(*args))
    monkeypatch.setattr(doctor, "is_long", lambda updates, trainer: True)
    examined = []
    monkeypatch.setattr(doctor, "refuse", examined.append)  # it finds that an untrained model learns nothing
    cfg = compose(*job, *FULL, "rewards.reasoning.runtime.cache_gb=0", "trainer.updates=1", f"cache_dir={tmp_path}")
    c = config.validate(cfg)
    pipeline.run(c, tmp_path)
    assert len(built) == len(copied) == len(examined) == 1
    ((calls, hits),) = counts(tmp_path)
    rows = pyarrow.parquet.read_table(tmp_path / "completions.parquet").to_pylist()
    assert 0 < calls + hits == sum(reasoning(row["completion"]) is not None for row in rows), "and not the doctor's"


def test_ranks_wait_longer_than_a_judge_may_take(process_group):
    group = torch.distributed.group.WORLD._get_backend(process_group)
    assert group.options._timeout.total_seconds() >= LONGEST_WAIT > LONGEST_CALL


BROKEN = {
    "type": ({"model_type": "llava"}, "lacks [0-9]+ weights"),
    "size": ({"hidden_size": 90}, "has [0-9]+ weights of another shape"),
    "adapters": ({}, "holds adapters"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_judge_that_cannot_be_loaded_stops_the_run_first(
    settings, message, job, folder, compose, tmp_path, monkeypatch, process_group
):
    place = damaged(folder, tmp_path / "judge", **settings)
    judge = ["rewards.reasoning.judge.backend=hf", f"rewards.reasoning.judge.model={place}"]
    cfg = compose(*job, *judge, f"cache_dir={tmp_path}")
    c = config.validate(cfg)
    if not settings:  # since the configuration was checked
        (place / "adapter_config.json").write_text("{}")
        (place / "model.safetensors").rename(place / "adapter_model.safetensors")
    monkeypatch.setattr(files, "weights_folder", lambda c: pytest.fail("the run has begun"))
    with pytest.raises(UserError, match=f"judge.model={place} {message}") as error:
        pipeline.run(c, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.faults
@pytest.mark.parametrize("weights", [LORA, FULL], ids=["lora", "full"])
def test_two_ranks_with_unequal_numbers_of_questions_score_as_one(weights, job, runner, tmp_path):
    mine = [
        *job,
        *weights,
        "rewards.reasoning.fn=tests.rewards.JudgedByLetters",
        "rewards.reasoning.runtime.cache_gb=0",
    ]
    mine += ["trainer.embedding_learning_rate=1e-3", f"cache_dir={tmp_path}"]
    shards = ["deepspeed=zero3", "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0"]
    assert runner(tmp_path / "one", [*mine, "deepspeed=zero0"]) == 0
    assert runner.ranks(2, tmp_path / "two", [*mine, *shards]) == [0, 0]
    assert min(spread_of_scores(tmp_path / "two")) > 0
    alone, rows = (
        pyarrow.parquet.read_table(tmp_path / name / "completions.parquet").to_pylist() for name in ("one", "two")
    )
    for one, two in zip(alone, rows, strict=True):
        assert two == one | {"advantage": pytest.approx(one["advantage"], abs=1e-5)}
    size = sum(row["image"] == rows[0]["image"] for row in rows if row["step"] == 1)
    questions = [set(), set()]
    for place, row in enumerate(row for row in rows if row["step"] == 1):
        questions[place // size % 2].add(reasoning(row["completion"]))
    assert len(questions[0]) != len(questions[1])
