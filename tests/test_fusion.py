"""ALERT's answers fused with its draft's: hand-derived values, recovery of known weights, and whole runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from alert import fusion, prompting
from alert.draft import FewShotDraft
from alert.fusion import Fusion
from common import Classifier
from common.config.composition import validate
from common.data import task
from common.data.digits import Digits
from common.evaluation.calibration import temperature
from common.few_shot.candidates import Candidates, Origin
from common.few_shot.check import make
from common.few_shot.heads import folds
from common.report import tables
from common.run.result import Result
from common.run.run_folder import RunFolder
from common.types import Answers, Prediction, Probabilities, Reply, Split, UserError
from tests.test_predict import METHODS, QUICK, calibrated, expected


def simulated(n, draft, model, seed=0, k=2):
    """Logits of two experts, and truths drawn from the product of both raised to these powers."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (2, n, k))
    chances = softmax(draft * logits[0] + model * logits[1], 1)
    truths = np.array([rng.choice(k, p=row) for row in chances])
    return logits[0], logits[1], truths


def test_a_product_by_hand():
    """0.8^0.5 x 0.4^2 against 0.2^0.5 x 0.6^2: 0.1431 and 0.1610."""
    found = Fusion("product", 0.5, 2.0, 0, 0, 1)(np.log([[0.8, 0.2]]), np.log([[0.4, 0.6]]))
    np.testing.assert_allclose(found, [[0.14311 / 0.30411, 0.16100 / 0.30411]], atol=1e-4)


def test_a_gate_by_hand():
    """At power 1 the margin is ln 4, the draft's share sigmoid(-1 + ln 4) = 0.5954."""
    found = Fusion("gate", 1.0, 1.0, -1.0, 1.0, 1)(np.log([[0.8, 0.2]]), np.log([[0.4, 0.6]]))
    share = expit(-1 + np.log(4))
    np.testing.assert_allclose(found, [[share * 0.8 + (1 - share) * 0.4, share * 0.2 + (1 - share) * 0.6]])
    # a constant per image, as logits have, changes nothing
    np.testing.assert_allclose(
        Fusion("gate", 1.0, 1.0, -1.0, 1.0, 1)(np.log([[8.0, 2.0]]), np.log([[4.0, 6.0]])), found
    )


def test_a_product_of_many_images_is_logistic_regression():
    """Two candidates: the log-odds are linear in the two differences; scikit-learn without a penalty as the oracle."""
    draft, model, truths = simulated(20_000, 0.7, 1.6)
    found = fusion.fit("product", draft, model, truths)
    x = np.stack([draft[:, 1] - draft[:, 0], model[:, 1] - model[:, 0]], 1)
    expected = LogisticRegression(C=np.inf, fit_intercept=False).fit(x, truths).coef_[0]
    np.testing.assert_allclose([found.draft, found.model], expected, atol=0.02)
    in_other_units = fusion.fit("product", 0.01 * draft, model, truths)
    assert in_other_units.draft == pytest.approx(100 * found.draft, rel=1e-3)
    np.testing.assert_allclose(expected, [0.7, 1.6], atol=0.05)
    assert found.n == 20_000


def test_an_expert_that_knows_nothing_gets_no_weight():
    draft, model, truths = simulated(4_000, 1.0, 0.0)
    found = fusion.fit("product", draft, model, truths)
    assert found.draft == pytest.approx(1, abs=0.1) and found.model < 0.05
    swapped = fusion.fit("product", model, draft, truths)
    assert swapped.draft < 0.05 and swapped.model == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["product", "gate"])
def test_few_images_are_held_by_what_each_knows_alone(kind):
    """Over 40 draws of 40 images the fusion loses little to the better one, and is ahead where both know something."""
    lost, ahead = [], []
    for seed in range(40):
        strong, weak, truths = simulated(2_040, 1.0, 0.3, seed)
        found = fusion.fit(kind, strong[:40], weak[:40], truths[:40])
        right = [(each[40:].argmax(1) == truths[40:]).mean() for each in (strong, weak, found(strong, weak))]
        lost.append(max(right[:2]) - right[2])
        equal, other, truths = simulated(2_040, 1.0, 1.0, seed)
        found = fusion.fit(kind, equal[:40], other[:40], truths[:40])
        right = [(each[40:].argmax(1) == truths[40:]).mean() for each in (equal, other, found(equal, other))]
        ahead.append(right[2] - max(right[:2]))
    assert np.mean(lost) < 0.01
    assert np.mean(ahead) > 0.04


def test_a_gate_trusts_a_sure_draft():
    """The draft is right where its margin is large and guesses elsewhere; the model is right three times out of four."""
    rng = np.random.default_rng(1)
    truths, sure = rng.integers(0, 2, 3_000), rng.random(3_000) < 0.5
    said = np.where(sure, truths, rng.integers(0, 2, 3_000))
    draft = np.eye(2)[said] * np.where(sure, 6.0, 0.5)[:, None]
    model = np.eye(2)[np.where(rng.random(3_000) < 0.75, truths, 1 - truths)] * np.log(3)
    found = fusion.fit("gate", draft, model, truths)
    margins = found.draft * np.array([0.5, 6.0])
    low, high = expit(found.bias + found.slope * margins)
    assert high > 0.9 > 0.3 > low
    right = (found(draft, model).argmax(1) == truths).mean()
    assert right == pytest.approx(0.875, abs=0.02)


def test_images_whose_class_is_not_offered_teach_nothing():
    draft, model, truths = simulated(200, 0.7, 1.6)
    without = fusion.fit("product", draft, model, truths)
    strange = np.concatenate([draft, [[9.0, -9.0]]]), np.concatenate([model, [[-9.0, 9.0]]]), np.append(truths, -1)
    assert fusion.fit("product", *strange) == without


def answers():
    """Two images of three classes, two candidates each in the order of the prompt; the model is right on the first."""
    reply = Reply("<think>It has legs.</think><answer>…</answer>", 9, False, True)
    made = [
        Prediction("a", "Arctic Fox", 0, "arctic fox", True, True, reply),
        Prediction("b", "owl", 1, "ox", False, False, reply),
    ]
    table = Probabilities(
        ("Arctic Fox", "owl", "ox"),
        np.array([[1, 0], [1, 2]], np.int32),
        np.array([[0.4, 0.6], [0.45, 0.55]], np.float32),
    )
    return Answers(made, 1.0, table, columns={"candidates": [["owl", "Arctic Fox"], ["owl", "ox"]]})


DRAFTED = Candidates(
    ("b", "a"), np.array([[1, 2, 0], [1, 0, 2]]), np.array([[5.0, 1.0, 0.0], [0.3, 0.1, 0.0]]), Origin("x", "y", 1, 1)
)
SPLIT = Split((), ("Arctic Fox", "owl", "ox"), "?", "?", {"owl": ("barn owl",)})


def test_both_are_about_the_candidates_of_the_prompt():
    draft, model = fusion.both(answers(), DRAFTED, SPLIT.names)
    np.testing.assert_allclose(draft, [[0.3, 0.1], [5.0, 1.0]])
    np.testing.assert_allclose(np.exp(model), [[0.4, 0.6], [0.45, 0.55]], rtol=1e-6)


def test_fused_answers_keep_reply_and_own_answer():
    found = fusion.fused(answers(), DRAFTED, SPLIT, Fusion("product", 1.0, 1.0, 0, 0, 9))
    assert [(p.answer, p.correct, p.correct_alias) for p in found.predictions] == [
        ("arctic fox", True, True),
        ("owl", True, True),
    ]
    assert [p.reply for p in found.predictions] == [p.reply for p in answers().predictions]
    assert found.columns[fusion.OWN] == ["arctic fox", "ox"] and found.right_alone == [True, False]
    assert found.columns[fusion.DRAFTED] == ["owl", "owl"]
    expected = softmax(np.log([[0.4, 0.6], [0.45, 0.55]]) + log_softmax([[0.3, 0.1], [5.0, 1.0]], 1), 1)
    np.testing.assert_allclose(found.probabilities.values, expected, rtol=1e-5)
    told = fusion.compared(found)["fusion"]
    assert (told["draft"], told["alert"], told["fused"]) == (0.5, 0.5, 1.0)
    assert (told["against_draft"]["fixed"], told["against_alert"]["broken"]) == (1, 0)
    assert fusion.compared(answers()) == {} and answers().right_alone == [True, False]


def test_weights_are_read_back_and_missing_ones_named(tmp_path):
    made = Fusion("gate", 0.5, 1.5, -0.1, 2.0, 40)
    made.save(tmp_path / "model")
    assert Fusion.load(tmp_path / "model") == made
    with pytest.raises(UserError, match=r"fusion.json, the weights of method.fusion"):
        Fusion.load(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.fusion=sum"], "method.fusion=sum: choose one of none, gate, product"),
        (["method.fusion=gate", "method.k=1"], "method.fusion=gate weighs at least two candidates"),
        (["method.fusion=product", "method.draft=oracle_recall"], "that knows no labels"),
        (["method.fusion=product", "validation=none"], "method.fusion=product is fitted on validation images"),
        (["method.fusion=product", "validation=held_out", "label_scoring=false"], "label_scoring=true"),
    ],
)
def test_what_a_fusion_needs_is_checked_before_the_model_is_loaded(compose, words, message):
    config = validate(compose("method=alert", "model=tiny_gemma3", "rewards=alert_no_judge", *words))
    with pytest.raises(UserError, match=message):
        prompting.check(config, task.build(config))


def test_a_finished_draft_brings_a_warning(compose, caplog):
    """Its candidates of validation images are of the fit that chose by them."""
    asked = SimpleNamespace(evaluation={"val": None})
    for draft, warned in (("class_means", 0), ("file", 1)):
        words = ["method=alert", "model=tiny_gemma3", "method.fusion=gate", f"method.draft={draft}"]
        prompting.check_fusion(validate(compose(*words, "method.draft_file=a_run")), asked)
        assert sum("trusts it too much" in line for line in caplog.messages) == warned


def test_a_fusion_sees_the_draft_as_it_is_on_new_images(compose, tmp_path, monkeypatch):
    """A fit searches on the validation images; their candidates come from fits that searched on others of them."""
    words = ["method=alert", "model=tiny_gemma3", "few_shot=proker", "method.draft=few_shot", "shots=4", "clip=tiny"]
    words += ["validation=held_out", "setting.test_per_class=2", f"cache_dir={tmp_path / 'cache'}"]
    for kind in ("none", "gate"):
        config = validate(compose(*words, f"method.fusion={kind}"))
        draft = FewShotDraft(config, task.build(config), torch.device("cpu"), tmp_path / kind)
        found = draft.candidates()["val"]
        fitted = draft._fitted()  # from its checkpoints
        items = list(fitted.task.evaluation["val"].items)
        seen = fitted.logits("val", items)
        honest = folds.out_of_selection(fitted.learner, lambda config=config: make(config), config.seed).numpy()
        assert not np.array_equal(honest, seen)
        rows = -np.sort(-(honest if kind == "gate" else seen), 1)
        np.testing.assert_allclose([found.scores(item.image) for item in items], rows, rtol=1e-5)
        fitted.close()
    monkeypatch.setattr(fitted.learner, "chooses", False)  # no fits more where nothing was chosen
    fitted.write_unselected()
    np.testing.assert_allclose(
        np.load(tmp_path / "gate/candidates/val.npz")["topk_logit"], -np.sort(-seen, 1), rtol=1e-5
    )


@pytest.mark.parametrize(("name", "chooses"), [("clap", False), ("cafo", True)])
def test_what_a_learner_chooses_by(name, chooses, compose):
    words = ["method=alert", "model=tiny_gemma3", "method.draft=few_shot", "clip=tiny", f"few_shot={name}"]
    assert make(validate(compose(*words))).chooses is chooses


@pytest.mark.faults
def test_a_run_is_fused_reported_and_predicts_as_it_evaluated(runner, tmp_path):
    run = tmp_path / "run"
    assert runner(run, [*QUICK, *METHODS["alert"], "method.fusion=product"]) == 0
    made, result = Fusion.load(run / "model"), Result.load(run)
    assert made.kind == "product" and 20 <= made.n <= 40 and made.draft > 0
    rows = expected(run)
    # the fusion of the file is that of the table, computed here from candidates and recorded probabilities
    told = result.after["test"].facts["fusion"]
    assert told["fused"] == np.mean([row["answer"] == row["label"] for row in rows]) == result.after["test"].accuracy
    assert told["alert"] == np.mean([row["own_correct"] for row in rows])
    assert told["draft"] == np.mean([row["draft_answer"] == row["candidates"][0] == row["label"] for row in rows])
    assert any(row["answer"] != row["own_answer"] for row in rows), "it changes answers"
    # the weights are those of the trained model, not of the evaluation before
    answers = RunFolder(run).read_held_out()
    assert len(answers.predictions) == 40 and answers.columns["own_answer"]
    assert tables.fusion_lines(result)[0].startswith(f"test: draft {100 * told['draft']:.2f} %, alert ")
    classifier, digits = Classifier.load(run), Digits()
    for answer, row in zip(
        classifier({row["image"]: digits.open(row["image"]) for row in rows[:40]}), rows, strict=False
    ):
        assert (answer.label, answer.reply) == (row["answer"], row["completion"])
        assert answer.confidence == pytest.approx(calibrated(run, row)[row["answer"]], abs=1e-5)
    classifier.close()


def test_forty_images_without_an_error_promise_no_certainty():
    rng = np.random.default_rng(0)
    truths = rng.integers(0, 2, 40)
    logits = np.eye(2)[truths] * rng.uniform(1, 3, 40)[:, None]
    found = fusion.fit("product", logits, logits, truths)
    alone = 1 / temperature(logits, truths)
    assert 1 < found.draft / alone < 1.2


def test_forty_images_move_the_weights_as_far_as_the_penalties_let_them():
    """At a minimum the slope of the cross entropy is that of the penalty, here computed by differences."""
    draft, model, truths = simulated(40, 1.0, 0.3, k=3)
    a, b = 1 / temperature(draft, truths), 1 / temperature(model, truths)
    rows = np.arange(40)

    def slopes(entropy, at):
        steps = 1e-5 * np.eye(2)
        return np.array([(entropy(at + step) - entropy(at - step)) / 2e-5 for step in steps])

    found = fusion.fit("product", draft, model, truths)
    powers = np.array([found.draft / a, found.model / b])
    said = slopes(lambda w: -log_softmax(w[0] * a * draft + w[1] * b * model, 1)[rows, truths].sum(), powers)
    np.testing.assert_allclose(said, -2 * 4 * (powers - [1, 0.5]), atol=1e-2)
    assert abs(said).min() > 0.3, "the images do say something"

    found = fusion.fit("gate", draft, model, truths)
    weights = np.array([found.bias, found.slope])

    def mixed(w):
        made = Fusion("gate", a, b, w[0], w[1], 40)(draft, model)
        return -np.log(made[rows, truths]).sum()

    said = slopes(mixed, weights)
    np.testing.assert_allclose(said, -2 * 2 * (weights - [1, 1]), atol=1e-2)
    assert abs(said).min() > 0.1, "the images do say something"


def test_where_the_images_say_nothing_the_draft_is_trusted_more():
    """Of two experts that say the same no image tells which is better, so the weights are those that few images leave.

    The mixture is then the same for every share; the product's two powers have the same gradient and keep their
    difference of a half.
    """
    rng = np.random.default_rng(0)
    logits, truths = rng.normal(0, 1, (30, 3)), rng.integers(0, 3, 30)
    gate = fusion.fit("gate", logits, 2 * logits, truths)
    assert (gate.bias, gate.slope) == pytest.approx((1, 1), abs=1e-4)
    alone, product = 1 / temperature(logits, truths), fusion.fit("product", logits, logits, truths)
    assert product.draft - product.model == pytest.approx(alone / 2, rel=1e-3)
    # sigmoid(1) = 0.73 of a draft that cannot decide, and its share grows with its margin
    undecided, sure = Fusion("gate", 1, 1, gate.bias, gate.slope, 30)(
        np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([[np.log(3), 0.0], [0.0, 2.0]])
    )
    assert undecided[0] == pytest.approx(0.7311 * 0.5 + 0.2689 * 0.75, abs=1e-3)
    assert sure[0] == pytest.approx(0.9526 * 0.8808 + 0.0474 * 0.1192, abs=1e-3)
