"""Write a few-shot learner with its encoder as one ONNX or TorchScript file, from pixels to probabilities."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from common.data.images import WHITE
from common.evaluation.calibration import EDGE, Calibration
from common.few_shot.heads.base import Pictures
from common.few_shot.learner import FewShotLearner
from common.predict.classifier import Classifier
from common.types import UserError

FILES = {"onnx": "model.onnx", "torchscript": "model.pt"}
PREPROCESSING = "preprocessing.json"


class FromPixels(nn.Module):
    """An encoder, a fitted head and a calibration as one module."""

    def __init__(self, learner: FewShotLearner, names: tuple[str, ...], calibrated: Calibration) -> None:
        """
        Args:
            learner: Fitted learner that needs the features of one encoder and nothing else.
            names: Names without duplicates, in the order of the result.
            calibrated: Calibration of the probabilities.
        """
        super().__init__()
        self.encoder = learner.features.encoded[0].encoder
        self.head, self.calibrated = learner.learner, calibrated
        self.text = learner.features.text(learner.task.train.names)
        look = self.encoder.look
        self.register_buffer("mean", torch.tensor(look.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(look.std)[:, None, None])
        # classes of one name add up
        merged = torch.tensor([[name == of for name in names] for of in learner.task.train.names], dtype=torch.float32)
        self.register_buffer("merged", merged)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return probabilities of shape [N, K] from pixels from 0 to 255, uint8, of shape [N, 3, S, S]."""
        features = self.encoder.images((pixels.float() / 255 - self.get_buffer("mean")) / self.get_buffer("std"))
        labels = torch.zeros(len(pixels), dtype=torch.long)
        logits = self.head.logits(Pictures(features, labels), self.text)
        return curved(
            (logits.float() / self.calibrated.temperature).softmax(1) @ self.get_buffer("merged"), self.calibrated
        )


def curved(values: Tensor, calibrated: Calibration) -> Tensor:
    """Return probabilities after the curve of a calibration, as `Calibration.__call__` has it. Shape: [N, K]."""
    if (calibrated.slope, calibrated.bias) == (1.0, 0.0) or values.shape[1] < 2:
        return values
    count, places = values.shape[1], values.argmax(1, keepdim=True)
    first = torch.zeros_like(values).scatter(1, places, 1.0)
    others = (1 - first) * values
    rest = others.sum(1, keepdim=True)  # not 1 - the first, which rounds
    others, even = others / rest.clamp(min=1e-30), (1 - first) / (count - 1)
    odds = values.gather(1, places).clamp(EDGE, 1 - EDGE).log() - rest.clamp(EDGE, 1 - EDGE).log()
    confidence = torch.sigmoid(calibrated.slope * odds + calibrated.bias).clamp(min=1 / count)
    second, most = others.amax(1, keepdim=True), confidence / (1 - confidence).clamp(min=EDGE)
    mixed = torch.where(second > most, (second - most) / (second - 1 / (count - 1)).clamp(min=EDGE), 0.0)
    return torch.where(first > 0, confidence, (1 - confidence) * ((1 - mixed) * others + mixed * even))


def write(classifier: Classifier, kind: str, target: Path) -> dict[str, Any]:
    """Write the model and how its pictures are prepared; return the latter.

    Args:
        classifier: Classifier of a run of a few-shot learner.
        kind: A key of FILES.
        target: Folder.

    Raises:
        UserError: The learner needs more than one encoder's features, or ONNX is not installed.
    """
    classifier(Image.new("RGB", (32, 32)))  # builds the learner
    learner = classifier.learner
    assert isinstance(learner, FewShotLearner), "checked by the caller"
    if len(learner.features.encoded) > 1 or "maps" in learner.learner.needs:
        raise UserError(
            f"--as {kind} writes learners on one encoder's features, and {learner.name} needs more; export a run of"
            " best_of, linear_probe, nearest_mean, tip_adapter or tip_adapter_f"
        )
    module = FromPixels(learner, classifier.names, classifier.calibrated).eval().requires_grad_(False)
    size = learner.features.encoded[0].encoder.look.size
    example = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that the exporter is deprecated, and what tracing always warns of
        if kind == "torchscript":
            torch.jit.trace(module, (example,)).save(str(target / FILES[kind]))  # type: ignore[no-untyped-call]
        else:
            _write_onnx(module, example, target / FILES[kind])
    look = learner.features.encoded[0].encoder.look
    facts = {
        "names": list(classifier.names),
        "size": size,
        "squash": look.squash,
        "crop": look.crop,
        "interpolation": look.interpolation,
        "background": classifier.background or WHITE,
    }
    (target / PREPROCESSING).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def _write_onnx(module: nn.Module, example: Tensor, path: Path) -> None:
    try:
        import onnx  # noqa: F401  # torch writes with it
    except ImportError as error:
        raise UserError("--as onnx needs the package onnx: uv pip install 'onnx>=1.20,<2'") from error
    torch.onnx.export(
        module,
        (example,),
        str(path),
        dynamo=False,
        input_names=["pixels"],
        output_names=["probabilities"],
        dynamic_axes={"pixels": {0: "n"}, "probabilities": {0: "n"}},
    )
