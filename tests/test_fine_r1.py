"""Fine-R1: its reward, partners and negatives, TAPO's loss against a plain loop, who is scored about what, whole runs."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch

from clsrl.related import fine_r1, fine_r1_learner
from clsrl.related.fine_r1 import FineR1Prompt, most_confused, read_similar
from clsrl.related.fine_r1_learner import FineR1Learner
from clsrl.related.tapo import dual_clipped, k3, tapo
from common import Classifier
from common.config.composition import validate
from common.config.schema import GRPOConfig
from common.data.digits import Digits
from common.export import __main__ as export
from common.forward.label_scores import LabelScores
from common.models.encoder import EncodedPrompt
from common.rewards import Reward
from common.rollout.base import Completion, Decoding, Request
from common.training.base import Epochs
from common.training.grpo import trainer as grpo_trainer
from common.training.grpo.batch import Measured, rows
from common.training.grpo.loss import LossInputs, LossOutputs, grpo_advantages, token_weights
from common.training.grpo.trainer import GRPOTrainer, Sampling
from common.types import Item, Prompt, Sample, Split, Task, UserError
from common.vlm.check import check_groups
from common.vlm.prompting import prompts_hash
from tests.faults import Kill
from tests.test_predict import expected

# ---- the reward


@pytest.mark.parametrize(
    ("reply", "official", "strict"),
    [
        ("<think>white</think><answer>Arctic Fox</answer>", 1, 1),
        ("<think>white</think><answer>owl or arctic fox</answer>", 1, 0),
        ("<think>white</think><answer>\narctic fox\n</answer>", 1, 1),
        ("<answer>owl</answer> <answer>arctic fox</answer>", 0, 0),  # the first one counts
        ("<think>white</think><answer>fox</answer>", 0, 0),
        ("<think>white</think><answer></answer>", 0, 0),
        ("arctic fox", 0, 1),  # no tags
    ],
)
def test_an_answer_that_contains_the_label_earns(reply, official, strict):
    made = [Sample(Prompt("1", "?", "arctic fox"), reply)]
    assert fine_r1.accuracy(made) == [official] and fine_r1.accuracy(made, match="strict") == [strict]


def test_the_evaluation_reads_to_the_last_tag():
    prompting = FineR1Prompt(seed=1)
    assert prompting.matches_officially("<answer>owl</answer><answer>Arctic_Fox</answer>", "arctic fox")
    assert not prompting.matches_officially("arctic fox", "arctic fox")
    assert not prompting.matches_officially("<answer> </answer>", "owl")


# ---- partner and negative

NAMES = ("zero", "six", "eight")
ITEMS = tuple(Item(f"{name}/{n}", label, name) for label, name in enumerate(NAMES) for n in range(4))


def task_of(items=ITEMS):
    split = Split(tuple(items), NAMES, "Which of the list?", "Which digit?")
    return Task(split, {"test": split}, None, "", {})


def asked(epoch=0, items=ITEMS, confused=None, **arguments):
    prompting = FineR1Prompt(seed=1, **arguments)
    prompting.confused = confused
    return prompting.train_prompts(task_of(items), epoch)


CONFUSED = {"zero": "eight", "six": "zero", "eight": "six"}


def test_a_partner_is_of_the_class_and_a_negative_of_the_similar_one():
    seen = []
    for epoch in range(30):
        for prompt in asked(epoch, confused=CONFUSED):
            (partner,), (negative,) = prompt.sampled_with, prompt.scored_with
            assert partner.split("/")[0] == prompt.label and partner != prompt.image
            assert negative.split("/")[0] == CONFUSED[prompt.label]
            seen.append((prompt.image, partner, negative))
    assert len({(image, partner) for image, partner, _ in seen}) == 12 * 3, "every other picture of the class"
    assert len({(image, negative) for image, _, negative in seen}) == 12 * 4
    assert asked(3, confused=CONFUSED) == asked(3, confused=CONFUSED) != asked(4, confused=CONFUSED)
    first, second = ([p.sampled_with for p in asked(0, confused=CONFUSED, items=i)] for i in (ITEMS, ITEMS[::-1]))
    assert first != second, "pictures are drawn from in their order"


def test_prompts_are_final_when_the_negatives_are_known(tmp_path):
    path = tmp_path / "similar.csv"
    path.write_text("zero,eight\nsix,eight\neight,six\n")
    prompting = FineR1Prompt(seed=1)
    assert not prompting.final and prompting.train_prompts(task_of())[0].scored_with[0].startswith("six")
    prompting.confused = CONFUSED
    assert prompting.final and prompting.train_prompts(task_of(())) == [] and prompting.sources(task_of()) == {}
    given = FineR1Prompt(seed=1, similar=str(path))
    assert given.final and all(
        p.scored_with[0].split("/")[0] in ("six", "eight") for p in given.train_prompts(task_of())
    )
    before = given.sources(task_of())
    path.write_text("zero,six\nsix,eight\neight,six\n")
    assert before.keys() == {"method.similar"} and before != given.sources(task_of())
    assert prompts_hash(asked(confused=CONFUSED)) != prompts_hash(asked(confused={**CONFUSED, "six": "eight"}))


def test_either_picture_can_be_left_out():
    (prompt, *_) = asked(intra_class=False, confused=CONFUSED)
    assert prompt.sampled_with == () and prompt.scored_with
    (prompt, *_) = asked(inter_class=False)
    assert prompt.sampled_with and prompt.scored_with == () and FineR1Prompt(seed=1, inter_class=False).final
    assert (
        asked(items=ITEMS[:5], intra_class=False, confused={"zero": "six", "six": "zero"})[4]
        .scored_with[0]
        .startswith("zero")
    )
    prompt = asked(confused=CONFUSED)[0]
    assert prompt.about("x") == Prompt("x", prompt.text, "zero")


@pytest.mark.parametrize(
    ("items", "said"),
    [
        (ITEMS[:5], "class 'six' has a single training image.*shots=2 or above.*method.intra_class=false"),
        (ITEMS[:4], "all training images are of class 'zero'.*method.inter_class=false"),
    ],
)
def test_pictures_that_are_missing_are_named(items, said):
    with pytest.raises(UserError, match=said):
        asked(items=items)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zero,six\nsix,eight", "class 'eight' has no row"),
        ("zero,six\nsix,six\neight,six", "class 'six' has 'six'"),
        ("zero,six\nsix,nine\neight,six", "class 'six' has 'nine'"),
        ("zero,six,eight", "the row zero,six,eight has 3 columns"),
    ],
)
def test_a_file_of_similar_classes_is_checked(tmp_path, text, said):
    path = tmp_path / "similar.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_similar(path, NAMES)
    with pytest.raises(UserError, match="missing.csv cannot be read"):
        read_similar(tmp_path / "missing.csv", NAMES)


def test_the_most_confused_class_is_measured(monkeypatch, tmp_path):
    """About 16 pictures of a class at most, from the probabilities of bare names; kept, and read again."""
    items = [Item(f"{name}/{n}", label, name) for label, name in enumerate(NAMES) for n in range(20)]
    scored = []

    def labels(encoded, responses):
        scored.extend(zip(encoded, responses, strict=True))
        likely = {"zero": [9.0, 1.0, 2.0], "six": [5.0, 9.0, 1.0], "eight": [2.0, 2.0, 9.0]}
        return [LabelScores(torch.tensor(likely[p.label], dtype=torch.double), torch.ones(3)) for p in encoded]

    learner = object.__new__(FineR1Learner)
    learner.prompting, learner.task, learner.folder = FineR1Prompt(seed=1), task_of(items), tmp_path
    learner.config = SimpleNamespace(rollout=SimpleNamespace(evaluation_batch=7), doctor="auto")
    learner.encoder, learner.replies = list, SimpleNamespace(labels=labels)
    learner._sampling = lambda: torch.no_grad()
    learner.finish_prompts()
    assert json.loads((tmp_path / "similar.json").read_text()) == {"zero": "eight", "six": "zero", "eight": "zero"}
    assert len(scored) == 48 and all(names == list(NAMES) for _, names in scored)
    assert scored[0][0].text == "Which digit?\n Please directly output the answer."
    assert learner.prompts.prompting.final and learner.prompts.train[0].scored_with[0].startswith("eight")
    learner.prompting = FineR1Prompt(seed=1)
    monkeypatch.setattr(FineR1Learner, "measure", lambda *_: pytest.fail("measured again"))
    learner.finish_prompts()
    assert learner.prompting.confused == {"zero": "eight", "six": "zero", "eight": "zero"}
    for text, said in (("{", "is damaged"), ('{"zero": "six"}', "is of other classes")):
        (tmp_path / "similar.json").write_text(text)
        with pytest.raises(UserError, match=said):
            fine_r1_learner.read(tmp_path / "similar.json", NAMES)
    assert most_confused(["a", "b"], [[0.5, 0.5], [0.5, 0.5]], ["a", "b"]) == {"a": "b", "b": "a"}


# ---- the loss

CONFIG = {"name": "grpo", "learning_rate": 1e-6, "epochs": 1.0, "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}


def random_inputs(seed, negative=True):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 1, 4, 2])
    count = int(lengths.sum())
    logps = (-3 * torch.rand(count, generator=draw, dtype=torch.double)).requires_grad_()
    old = logps.detach() + 1.5 * torch.randn(count, generator=draw, dtype=torch.double)
    others = logps.detach() + 1.5 * torch.randn(count, generator=draw, dtype=torch.double)
    weights = token_weights("dapo", lengths * torch.tensor([1, 1, 1, 0]), 4, 4, 8, 9)  # the last one is masked
    advantages = torch.tensor([1.2, -0.7, -0.9, 2.0], dtype=torch.double)
    owner = torch.arange(4).repeat_interleave(lengths)
    return LossInputs(logps, old, None, advantages, weights, owner, None, others[None] if negative else None)


def by_hand(given, contrast=0.01, sharpening=0.03, bound=3.0, limit=10.0):
    """Loss and its gradient, token by token."""
    loss, gradient = 0.0, []
    for t in range(len(given.logps)):
        weight, advantage = float(given.weights[given.owner[t]]), float(given.advantages[given.owner[t]])
        p = given.logps[t].item()
        ratio = math.exp(p - float(given.old_logps[t]))
        clip = min(max(ratio, 0.8), 1.28)
        gained = min(ratio * advantage, clip * advantage)
        slope = ratio * advantage if ratio * advantage <= clip * advantage else 0.0
        if advantage < 0 and gained < bound * advantage:
            gained, slope = bound * advantage, 0.0
        value, slope = -gained - sharpening * p, -slope - sharpening
        if given.other_logps is not None:
            n = float(given.other_logps[0, t])
            kl = math.exp(n - p) - (n - p) - 1
            value -= contrast * min(kl, limit) + 0.03 * n
            slope -= contrast * (1 - math.exp(n - p)) if kl < limit else 0.0
        loss, gradient = loss + weight * value, [*gradient, weight * slope]
    return loss, gradient


@pytest.mark.parametrize("negative", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_tapo_equals_a_plain_loop(seed, negative):
    given = random_inputs(seed, negative)
    out = tapo(given, GRPOConfig(group_size=4, **CONFIG))
    out.loss.backward()
    loss, gradient = by_hand(given)
    assert out.loss.item() == pytest.approx(loss) and given.logps.grad.tolist() == pytest.approx(gradient)
    assert {"kl_negative", "nll_negative"} <= out.means.keys() if negative else "kl_negative" not in out.means
    assert out.means["nll"] == (pytest.approx(-given.logps[:8].sum().item()), 8.0)


def test_the_policy_is_moved_away_from_the_negative():
    """A token that is as probable about the negative gets nothing; a step down the gradient raises the KL."""
    given = random_inputs(1)
    zero = LossInputs(**{**given.__dict__, "advantages": torch.zeros(4, dtype=torch.double)})
    tapo(zero, GRPOConfig(group_size=4, **CONFIG), contrast=0.5, sharpening=0.0, kl_limit=1e3).loss.backward()
    before, counted = k3(given.logps, given.other_logps[0])[:8].sum(), given.logps.grad[:8]
    moved = k3(given.logps - 0.1 * given.logps.grad, given.other_logps[0])[:8].sum()
    assert moved > before and torch.equal(counted.sign(), (given.other_logps[0] - given.logps).sign()[:8])
    assert k3(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0


def test_the_estimate_is_that_of_the_policy_from_the_negative():
    """Over all tokens, weighted as the policy draws them, k3 is KL(policy || negative), not the other way round."""
    p, n = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    found = float((p * k3(p.log(), n.log())).sum())
    assert found == pytest.approx(float((p * (p / n).log()).sum())) != pytest.approx(float((n * (n / p).log()).sum()))


def test_the_negatives_own_term_trains_nothing():
    gradients, losses = [], []
    for weight in (0.0, 0.03, 5.0):
        given = random_inputs(2)
        out = tapo(given, GRPOConfig(group_size=4, **CONFIG), sharpening_negative=weight)
        out.loss.backward()
        gradients.append(given.logps.grad)
        losses.append(out.loss.item())
    assert torch.equal(gradients[0], gradients[2]) and len(set(losses)) == 3


def test_the_second_bound_is_for_negative_advantages_alone():
    ratio = torch.tensor([0.5, 2.9, 5.0, 0.5, 2.9, 5.0])
    advantage = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    loss, low, high = dual_clipped(0.2, 0.28, 3.0)(ratio, advantage, ratio.log())
    assert loss.tolist() == pytest.approx([0.8, 2.9, 3.0, -0.5, -1.28, -1.28])
    assert low.tolist() == [True] + [False] * 5 and high.tolist() == [False] * 4 + [True] * 2


def test_a_token_cannot_earn_without_end_by_becoming_improbable():
    given = random_inputs(0)
    with torch.no_grad():
        given.logps[0] = -120.0
    out = tapo(given, GRPOConfig(group_size=4, **CONFIG), sharpening=0.0)
    out.loss.backward()
    assert bool(given.logps.grad.isfinite().all()) and out.means["kl_negative"][0] / 8 < 10
    with pytest.raises(UserError, match="dual_clip=1.2 must be above 1 \\+ trainer.epsilon_high=1.28"):
        tapo(given, GRPOConfig(group_size=4, **CONFIG), dual_clip=1.2)
    with pytest.raises(UserError, match="kl_limit=0 must be above 0"):
        tapo(given, GRPOConfig(group_size=4, **CONFIG), kl_limit=0)


# ---- who is sampled, compared and scored about what; without a model

PICTURES = {"anchor": 1.0, "partner": 2.0, "negative": 3.0, "other": 4.0}
DECODING = Decoding(1.0, 0, 1.0, 5)


def encode(prompts):
    ids = [torch.tensor([PICTURES[prompt.image]]) for prompt in prompts]
    return [EncodedPrompt(each, each[None]) for each in ids]


class Scripted:
    """A sampler that answers with the picture and the place in its share of the group."""

    def __init__(self):
        self.calls = []

    def generate(self, requests, group_size, decoding):
        self.calls.append(([float(r.encoded.ids[0]) for r in requests], [r.seed for r in requests], group_size))
        made = []
        for request in requests:
            about = float(request.encoded.ids[0])
            texts = [f"{about:.0f}.{j}" for j in range(group_size)]
            made.append([Completion(torch.tensor([j, 9]), torch.zeros(2), text, False) for j, text in enumerate(texts)])
        return made


def a_trainer(monkeypatch, prompts, reward, **changes):
    """A trainer whose policy gives a token of a completion -(picture + token / 10)."""
    monkeypatch.setattr(
        grpo_trainer,
        "requests",
        lambda _, asked, seeds: [Request(e, s, None, None) for e, s in zip(encode(asked), seeds, strict=True)],
    )
    options = {"group_size": 4, "prompts_per_update": 1, "steps_per_rollout": 2, "prompts_per_forward": 2, **changes}
    config = GRPOConfig(**{**CONFIG, **options})
    made = object.__new__(GRPOTrainer)
    rewards = {"accuracy": Reward(1.0, reward), "other": Reward(0.1, lambda s: [len(x.completion) * 1.0 for x in s])}
    made.samples = Sampling(encode, Scripted(), Epochs(lambda _: prompts), rewards, DECODING, config, 1)
    made.config, made.rewards, made.version, made.seed, made.open_image = config, rewards, 0, 1, None
    made.advantages = lambda parts, weights: grpo_advantages(parts, weights, config)
    made.by_sum, made._pack = True, lambda groups: groups

    weight = torch.ones((), requires_grad=True)

    def engine(groups, entropy=True):
        logps = [-(group.prompt.ids[0] + ids / 10) for group in groups for ids in group.completions]
        return weight * torch.cat(logps), None

    made.engine = engine
    return made


PROMPTS = [Prompt("anchor", "?", "six", sampled_with=("partner",), scored_with=("negative",)) for _ in range(2)]


def test_half_of_a_group_is_sampled_about_the_partner(monkeypatch):
    trainer = a_trainer(monkeypatch, PROMPTS, lambda samples: [1.0, 0.0, 0.0, 0.0] * 2)
    sampled = trainer.samples(0, 0)
    ((about, seeds, each),) = trainer.samples.rollout.calls
    assert about == [1, 2, 1, 2] and each == 2
    assert seeds == ["rollout-1-0-0", "rollout-1-0-0-with-1", "rollout-1-0-1", "rollout-1-0-1-with-1"]
    assert [[c.text for c in group] for group in sampled.completions] == [["1.0", "1.1", "2.0", "2.1"]] * 2
    assert [float(request.encoded.ids[0]) for request in sampled.requests] == [1, 1]
    batch = trainer._score(0, sampled)
    # one group of four: 1 0 0 0 has mean 0.25 and unbiased deviation 0.5 over all, not over each half
    assert batch.advantages[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-3)
    assert [row["sampled_with"] for row in rows(1, batch)] == ["anchor", "anchor", "partner", "partner"] * 2
    assert {row["image"] for row in rows(1, batch)} == {"anchor"}


def test_all_are_trained_about_the_anchor_and_scored_about_the_negative(monkeypatch):
    """Old log-probabilities of both halves belong to the anchor, those of the loss's other images to the negative."""
    trainer = a_trainer(monkeypatch, PROMPTS, lambda samples: [1.0, 0.0, 0.0, 0.0] * 2)
    trainer.current = batch = trainer._score(0, trainer.samples(0, 0))
    trainer._remember_old()
    trainer._remember_others()
    tokens = torch.tensor([0, 9, 1, 9] * 2) / 10
    assert torch.allclose(batch.old_logps[1], -(1 + tokens)) and list(batch.old_logps) == [1], "the first has its own"
    assert all(torch.allclose(batch.other_logps[i], -(3 + tokens)[None]) for i in range(2))
    assert not any(x.requires_grad for x in (*batch.old_logps.values(), *batch.other_logps.values()))
    logps = -(1 + tokens).requires_grad_()
    packed = SimpleNamespace(owner=torch.arange(4).repeat_interleave(2), completions=4)
    given = trainer._loss_inputs([1], torch.ones(1, 4), packed, logps, True)
    assert torch.equal(given.other_logps, batch.other_logps[1]) and not given.other_logps.requires_grad
    assert torch.equal(given.old_logps, batch.old_logps[1]) and given.ref_logps is None
    batch.other_logps.clear()  # a dummy forward
    assert trainer._loss_inputs([1], torch.zeros(1, 4), packed, logps, True).other_logps.shape == (1, 8)
    without = trainer._score(0, a_trainer(monkeypatch, [p.about("anchor") for p in PROMPTS], len).samples(0, 0))
    assert (
        without.others == [] and without.alike([0]).tolist() == [True] * 4 and "sampled_with" not in rows(1, without)[0]
    )


def test_only_what_was_sampled_about_the_anchor_is_compared_with_the_sampler(monkeypatch):
    trainer = a_trainer(monkeypatch, PROMPTS, lambda samples: [1.0, 0.0, 0.0, 0.0] * 2)
    batch = trainer._score(0, trainer.samples(0, 0))
    assert batch.alike([1, 0]).tolist() == [True, True, False, False] * 2
    given = LossInputs(torch.zeros(4), torch.zeros(4), None, torch.ones(4), torch.ones(4), torch.arange(4))
    measured, gap = Measured(), torch.tensor([0.1, 0.3, 5.0, 7.0])
    measured.add(given, LossOutputs(torch.zeros(()), {}, None, None), torch.zeros(4), gap, batch.alike([0]), True)
    assert measured.means["sampling/sampling_logp_difference/mean"] == (pytest.approx(0.4), 2.0)
    assert measured.highest["sampling/sampling_logp_difference/max"] == pytest.approx(0.3)


def test_groups_that_are_all_right_or_all_wrong_are_refilled(monkeypatch):
    """By the accuracy alone, although another reward differs; a new anchor comes with its own pictures."""
    more = [*PROMPTS, *(Prompt("other", "?", "nine", sampled_with=("negative",), scored_with=("partner",)),) * 2]
    right = {"1.0": 1.0, "4.0": 1.0}
    changes = {"zero_variance": "refill", "resample_rounds": 1, "prompts_per_update": 1}

    def reward(samples):
        if any(s.prompt.image == "other" for s in samples):
            return [right.get(s.completion, 0.0) for s in samples]
        return [1.0] * len(samples)

    monkeypatch.setattr(grpo_trainer, "batch", lambda *_: [(0, 0), (0, 1)])
    for by, left in (("accuracy", ["other"] * 2), (None, ["anchor"] * 2)):
        trainer = a_trainer(monkeypatch, more, reward, zero_variance_by=by, **changes)
        trainer.samples.rewards["other"] = Reward(0.1, lambda samples: [float(i % 3) for i, _ in enumerate(samples)])
        sampled = trainer.samples(0, 0)
        assert [prompt.image for prompt in sampled.prompts] == left
        assert [float(request.encoded.ids[0]) for request in sampled.requests] == [PICTURES[i] for i in left]
    again = a_trainer(monkeypatch, more, reward, zero_variance_by="accuracy", **changes)
    again.samples(0, 0)
    assert again.samples.rollout.calls[1][0] == [4, 3, 4, 3]
    assert again.samples.rollout.calls[1][1][:2] == ["rollout-1-0-0-again-0", "rollout-1-0-0-again-0-with-1"]


def test_skipped_groups_can_be_told_by_one_reward(monkeypatch):
    trainer = a_trainer(monkeypatch, PROMPTS, lambda samples: [1.0] * 4 + [1.0, 0.0, 0.0, 0.0])
    batch = trainer._score(0, trainer.samples(0, 0))
    batch.scores.total[:] = range(8)
    assert batch.zero_variance_groups(True, "accuracy") == {0} and batch.zero_variance_groups(True) == set()


# ---- what is refused, and what it composes to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"group_size": 5},
            "trainer.group_size=5: a group of method=fine_r1 is sampled about several images, in equal parts; choose a multiple of 2",
        ),
        ({"importance_correction": "token_mask"}, "trainer.importance_correction=token_mask: .*; set it to none"),
        ({}, None),
    ],
)
def test_a_group_must_have_two_halves(changes, said):
    config = SimpleNamespace(trainer=GRPOConfig(**{**CONFIG, "group_size": 4, **changes}), method={"name": "fine_r1"})
    check_groups(config, [prompt.about("anchor") for prompt in PROMPTS])
    if said is None:
        check_groups(config, PROMPTS)
    else:
        with pytest.raises(UserError, match=said):
            check_groups(config, PROMPTS)


def test_the_reward_that_must_differ_exists():
    trainer = GRPOConfig(**CONFIG, group_size=4, zero_variance_by="grade")
    config = SimpleNamespace(trainer=trainer, rewards={"accuracy": {}, "format": {}})
    with pytest.raises(
        UserError, match="zero_variance_by=grade is no reward of this run; take one of accuracy, format"
    ):
        check_groups(config, [])


@pytest.mark.slow
def test_it_is_the_papers_configuration(compose):
    config = validate(compose("method=fine_r1", "model=qwen2_5_vl_3b", "gpus=0"))
    trainer = config.trainer
    assert (trainer.group_size, trainer.prompts_per_rollout, trainer.updates_per_rollout) == (10, 384, 6)
    assert (trainer.epsilon, trainer.epsilon_high, trainer.beta, trainer.loss_type) == (0.2, 0.28, 0.0, "dapo")
    assert (trainer.learning_rate, trainer.weight_decay, trainer.epochs) == (1e-6, 0.01, 10)
    assert (trainer.zero_variance, trainer.zero_variance_by) == ("refill", "accuracy")
    assert {name: entry["weight"] for name, entry in config.rewards.items()} == {"accuracy": 0.9, "format": 0.1}
    assert (config.rollout.top_p, config.rollout.temperature, config.rollout.max_completion_tokens) == (0.99, 1.0, 2048)
    official = validate(compose("method=fine_r1", "protocol=official"))
    assert official.rewards["accuracy"]["match"] == "official"


# ---- whole updates and runs


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("impl", ["shared", "plain"])
def test_two_updates_equal_a_plain_loop(load_vlm, digits_task, impl):
    """Ratio about the anchor, KL and sharpening of all completions, from forwards without a shared prefix."""
    from common.forward.logprobs import PolicyScorer
    from common.forward.packing import PromptGroup, pack_plain
    from tests.test_training import distance, grpo, weights

    method = FineR1Prompt(seed=1)
    method.confused = {name: digits_task.train.names[i - 1] for i, name in enumerate(digits_task.train.names)}
    options = {"sharpening": 0.5, "contrast": 0.5}
    vlm = load_vlm()
    trainer = grpo(
        vlm,
        digits_task,
        method,
        **{"steps_per_rollout": 2, "prompts_per_update": 2, "loss_type": "dapo", "epsilon_high": 0.28},
        **{"learning_rate": 0.3, "optimizer": "torch.optim.SGD", "impl": impl},
        **{"loss": "clsrl.related.tapo.tapo", "loss_options": options},
    )
    found = [trainer.step(update) for update in range(2)]
    batch = trainer.current
    trainer.close()
    plain = load_vlm()
    scorer = PolicyScorer(plain, 1.0, 1024)
    optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.3)
    encoder = trainer.samples.encoder

    def logps(parts, pictures):
        encoded = encoder([batch.prompts[i].about(pictures[i]) for i in parts])
        groups = [PromptGroup(e, batch.groups[i].completions) for i, e in zip(parts, encoded, strict=True)]
        return scorer(pack_plain(groups, plain.family, plain.pad, plain.device))[0].double()

    anchors, negatives = [p.image for p in batch.prompts], [p.scored_with[0] for p in batch.prompts]
    with torch.no_grad():
        old = {parts: logps(parts, anchors) for parts in ((0, 1), (2, 3))}
        away = {parts: logps(parts, negatives) for parts in ((0, 1), (2, 3))}
    assert float((old[0, 1] - away[0, 1]).abs().mean()) > 1e-3, "the negative is another picture"
    for step, parts in zip(found, ((0, 1), (2, 3)), strict=True):
        now = logps(parts, anchors)
        lengths = torch.tensor([len(c) for i in parts for c in batch.groups[i].completions])
        advantage = batch.advantages[list(parts)].flatten().double().repeat_interleave(lengths)
        ratio, away_by = (now - old[parts]).exp(), away[parts] - now
        losses = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        losses = torch.where(advantage < 0, losses.clamp(max=-3 * advantage), losses)
        kl = (away_by.exp() - away_by - 1).clamp(max=10)
        losses = losses - 0.5 * kl - 0.5 * now - 0.03 * away[parts]
        assert step.metrics["loss"] == pytest.approx(float(losses.mean().detach()), abs=1e-5)
        assert step.metrics["nll_negative"] == pytest.approx(float(-away[parts].mean()), abs=1e-5)
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.step()
    assert distance(weights(vlm.model), weights(plain.model)) < 1e-5


RUN = [
    *["method=fine_r1", "data=digits", "tracking=none", "trainer.evaluate_every=0", "label_scoring=false"],
    *["setting.test_per_class=20"],
]


@pytest.mark.faults
@pytest.mark.parametrize("protocol", ["clean", "official"])
def test_it_learns_and_answers_alike_afterwards(runner, tmp_path, protocol):
    run, folder = tmp_path / "run", tmp_path / "exported"
    assert runner(run, [*RUN, f"protocol={protocol}", "trainer.updates=30"]) == 0
    result = json.loads((run / "metrics.json").read_text())
    before, after = (result[phase]["test"] for phase in ("before", "after"))
    assert after["accuracy"] > before["accuracy"] + 0.08
    assert export.main([str(run), str(folder)]) == 0
    tested, digits = expected(run)[:20], Digits()
    for place in (run, folder):
        classifier = Classifier.load(place)
        answers = classifier({row["image"]: digits.open(row["image"]) for row in tested})
        assert [answer.reply for answer in answers] == [row["completion"] for row in tested]
        assert [answer.label for answer in answers] == [row["answer"] or None for row in tested]
        classifier.close()


@pytest.mark.faults
def test_killed_and_resumed_it_is_the_same(runner, tmp_path):
    short = [*RUN, "trainer.updates=6", "checkpoint.every=2", "setting.test_per_class=5", "shots=4"]
    whole, killed, two = tmp_path / "whole", tmp_path / "killed", tmp_path / "two"
    assert runner(whole, short) == 0
    measuring = "clsrl.related.fine_r1_learner:FineR1Learner.measure"
    assert runner(killed, short, Kill(measuring, 1)) == -9 and not (killed / "similar.json").exists()
    assert runner(killed, short, Kill("common.training.engine:Engine.step", 5)) == -9
    before = (killed / "similar.json").stat().st_mtime_ns
    assert runner(killed, short) == 0
    assert (killed / "similar.json").stat().st_mtime_ns == before, "not measured again"
    for name in ("similar.json", "prompts.json", "metrics.jsonl", "model/model.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    for name in ("predictions", "completions"):
        tables = [pyarrow.parquet.read_table(folder / f"{name}.parquet") for folder in (whole, killed)]
        assert tables[0].equals(tables[1])
    assert runner.ranks(2, two, [*short, "trainer.updates=2", "checkpoint.every=2"]) == [0, 0]
    assert (two / "similar.json").read_bytes() == (whole / "similar.json").read_bytes()
    first, second = (
        [row for row in pyarrow.parquet.read_table(folder / "completions.parquet").to_pylist() if row["step"] == 1]
        for folder in (whole, two)
    )
    columns = ("image", "sampled_with", "completion", "reward")
    assert [[row[c] for c in columns] for row in first] == [[row[c] for c in columns] for row in second]
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (whole, two)
    ]
    updates = [[line for line in each if "loss" in line][:2] for each in lines]
    for mine, other in zip(*updates, strict=True):
        for name in ("loss", "reward", "kl_negative", "nll", "nll_negative"):
            if name in mine:
                assert mine[name] == pytest.approx(other[name], abs=1e-3), name
