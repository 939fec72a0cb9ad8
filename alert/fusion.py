"""Fuse ALERT's choice with its draft's (ours; the paper has none), with weights fitted on held-out images.

The prompt tells the model which candidates the draft ranks highest, but not how sure the draft is. Over a strong draft,
ALERT alone therefore overrules many right answers. Here both give probabilities of the candidates in the prompt:

- `product`: the two distributions, each raised to a power, are multiplied.
- `gate`: they are mixed, and the draft's share grows with the margin of its first candidate over the second.

Shapes: N images, K candidates in a prompt. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.calibration import log_probabilities, log_softmax, sigmoid, temperature
from common.evaluation.metrics import paired_test
from common.few_shot.candidates import Candidates
from common.parsing import normalize
from common.types import OWN_RIGHT, Answers, Prediction, Probabilities, Split, UserError

KINDS = ("none", "gate", "product")
FILE = "fusion.json"
OWN, DRAFTED = "own_answer", "draft_answer"  # columns of predictions.parquet, beside types.OWN_RIGHT
# Where few images leave the weights, and the ridge penalty that holds them there: our choice, by draws of 40 held-out
# images from 36 runs on digits and garments (docs/log.md). Both trust the draft more: the model has read its ranking in
# the prompt, so the model's probabilities repeat what the draft knows.
PRODUCT, PRODUCT_PENALTY = (1.0, 0.5), 4.0  # powers of draft and model, relative to those that calibrate each alone
GATE, GATE_PENALTY = (1.0, 1.0), 2.0  # bias and slope: without a margin the draft's share is sigmoid(1) = 0.73

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fusion:
    """How two distributions over the same candidates become one.

    kind: `gate` or `product`.
    draft, model: powers of the draft's and the model's probabilities.
    bias, slope: of `gate`; the draft's share is the sigmoid of bias + slope x margin, in nats.
    n: images that it was fitted on.
    """

    kind: str
    draft: float
    model: float
    bias: float
    slope: float
    n: int

    def __call__(self, draft: Floats, model: Floats) -> Floats:
        """Return the probabilities of the candidates.

        Args:
            draft: Logarithms of the draft's probabilities, up to a constant per image. Shape: [N, K].
            model: The same of the model.
        """
        if self.kind == "product":
            return np.exp(log_softmax(self.draft * draft + self.model * model))
        calibrated = self.draft * draft
        share = sigmoid(self.bias + self.slope * _margin(calibrated))[:, None]
        return share * np.exp(log_softmax(calibrated)) + (1 - share) * np.exp(log_softmax(self.model * model))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Fusion:
        """Read what `save` wrote.

        Raises:
            UserError: The file is missing or damaged.
        """
        try:
            return cls(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / FILE}, the weights of method.fusion, cannot be read ({error})") from error


def fit(kind: str, draft: Floats, model: Floats, truths: NDArray[np.integer]) -> Fusion:
    """Fit a fusion by cross entropy.

    Args:
        kind: `gate` or `product`.
        draft: As for `Fusion`. Shape: [N, K].
        model: The same.
        truths: Place of the true class among the candidates, -1 if it is none of them; such images are left out.
            Shape: [N].
    """
    rows = np.flatnonzero(truths >= 0)
    draft, model, truths = draft[rows], model[rows], truths[rows]
    alone = np.array([1 / temperature(draft, truths), 1 / temperature(model, truths)])
    draft, model = alone[0] * draft, alone[1] * model  # both calibrated: no matter in which units a draft has logits
    if kind == "product":
        held = np.array(PRODUCT)
        more = _minimum(
            lambda w: _cross_entropy(w[0] * draft + w[1] * model, truths) + PRODUCT_PENALTY * _squares(w - held),
            [held],
            lowest=(0.0, 0.0),
        )
        powers = more * alone
        return Fusion(kind, float(powers[0]), float(powers[1]), bias=0.0, slope=0.0, n=len(rows))
    by_draft, by_model = (np.exp(_at(log_softmax(logs), truths)) for logs in (draft, model))
    margin = _margin(draft)

    def loss(w: Floats) -> float:
        share = sigmoid(w[0] + w[1] * margin)
        mixed = share * by_draft + (1 - share) * by_model
        lost = -float(np.log(np.maximum(mixed, np.finfo(np.float64).tiny)).sum())
        return lost + GATE_PENALTY * _squares(w - np.array(GATE))

    # a mixture may have several minima
    starts = [np.array(start) for start in (GATE, (0.0, 1.0), (0.0, 0.0))]
    bias, slope = _minimum(loss, starts, lowest=(None, 0.0))
    return Fusion(kind, float(alone[0]), float(alone[1]), float(bias), float(slope), len(rows))


def _minimum(loss: Any, starts: Sequence[Floats], lowest: Sequence[float | None]) -> Floats:
    from scipy.optimize import minimize  # here, because the import takes a second

    found = [minimize(loss, start, method="L-BFGS-B", bounds=[(low, None) for low in lowest]) for start in starts]
    return np.asarray(min(found, key=lambda each: each.fun).x, np.float64)


def _cross_entropy(logs: Floats, truths: NDArray[np.integer]) -> float:
    return -float(_at(log_softmax(logs), truths).sum())


def _squares(values: Floats) -> float:
    return float((values**2).sum())


def _at(rows: Floats, places: NDArray[np.integer]) -> Floats:
    return np.take_along_axis(rows, places[:, None], 1)[:, 0]


def _margin(logs: Floats) -> Floats:
    """Return by how much the largest of each row exceeds the second largest. Shape: [N, K] -> [N]."""
    ordered = np.sort(logs, 1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])


# Answers: the model's probabilities and the draft's of the same candidates, and what the fusion makes of them.


def both(answers: Answers, drafted: Candidates, names: Sequence[str]) -> tuple[Floats, Floats]:
    """Return the logarithms of the draft's and the model's probabilities of the candidates in each prompt.

    Args:
        answers: Answers with probabilities.
        drafted: The draft's logits.
        names: Class names of the split, by label.

    Returns:
        Two arrays, each up to a constant per image. Shape of each: [N, K].
    """
    table = answers.probabilities
    assert table is not None, "checked before the model was loaded"
    model = log_probabilities(table)
    draft = np.empty(model.shape)
    for row, prediction in enumerate(answers.predictions):
        ranked = [normalize(names[label]) for label in drafted.ranking(prediction.image)]
        logits = dict(zip(ranked, drafted.scores(prediction.image), strict=True))
        draft[row] = [logits[normalize(table.names[number])] for number in table.classes[row].tolist()]
    return draft, model


def fused(answers: Answers, drafted: Candidates, split: Split, fusion: Fusion) -> Answers:
    """Return the answers of the fusion, with those of the model and the draft as columns; replies stay the model's."""
    draft, model = both(answers, drafted, split.names)
    table = answers.probabilities
    assert table is not None, "checked before the model was loaded"
    values = fusion(draft, model)
    chosen = [normalize(table.names[table.classes[row, place]]) for row, place in enumerate(values.argmax(1).tolist())]
    columns: dict[str, list[Any]] = {
        OWN: [p.answer for p in answers.predictions],
        OWN_RIGHT: [p.correct for p in answers.predictions],
        DRAFTED: [normalize(split.names[drafted.ranking(p.image)[0]]) for p in answers.predictions],
    }
    return replace(
        answers,
        predictions=[_answered(p, name, split) for p, name in zip(answers.predictions, chosen, strict=True)],
        probabilities=Probabilities(table.names, table.classes, values.astype(np.float32)),
        columns={**answers.columns, **columns},
    )


def _answered(prediction: Prediction, name: str, split: Split) -> Prediction:
    """Return a prediction with another answer, one of the candidates."""
    label = normalize(prediction.label)
    words = [label, *map(normalize, split.aliases.get(prediction.label, ()))]
    return replace(prediction, answer=name, correct=name == label, correct_alias=name in words)


def compared(answers: Answers) -> dict[str, Any]:
    """Return the accuracies of draft, model and fusion, and paired tests of the fusion against each; else nothing."""
    if OWN_RIGHT not in answers.columns:
        return {}
    right = [p.correct for p in answers.predictions]
    own = answers.right_alone
    drafts = zip(answers.columns[DRAFTED], answers.predictions, strict=True)
    draft = [name == normalize(p.label) for name, p in drafts]
    share = {name: sum(found) / len(found) for name, found in (("draft", draft), ("alert", own), ("fused", right))}
    tests = {"against_draft": paired_test(draft, right), "against_alert": paired_test(own, right)}
    return {"fusion": share | tests}
