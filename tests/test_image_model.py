"""A few-shot learner as one ONNX or TorchScript file answers as its run does."""

from __future__ import annotations

import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from common import Classifier
from common.evaluation.calibration import Calibration
from common.export import __main__ as command
from common.export import image_model
from common.types import Probabilities

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in enumerate(("blue_tit", "robin", "wren")):
        (root / name).mkdir()
        for number in range(12):
            pixels = np.clip(rng.normal(60 + 60 * label, 50, (30 + number, 44, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module", params=["linear_probe", pytest.param("tip_adapter", marks=pytest.mark.faults)])
def run(runner, photos, tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("runs") / "run"
    others = {"linear_probe", "tip_adapter_f", "tip_adapter", "nearest_mean"} - {request.param}
    quick = ["few_shot.repeats=1", "few_shot.folds=2", *(f"~few_shot.learners.{name}" for name in sorted(others))]
    assert runner(folder, ["experiment=photos", f"data.folder={photos}", *quick]) == 0
    return folder


@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_the_file_answers_as_the_run(run, photos, tmp_path, kind, capsys, monkeypatch):
    assert command.main([str(run), str(tmp_path / "out"), "--as", kind]) == 0
    facts = json.loads((tmp_path / "out" / image_model.PREPROCESSING).read_text())
    assert facts["names"] == ["blue tit", "robin", "wren"] and facts["size"] == 224 and facts["crop"] == 1.0
    files = sorted(photos.rglob("*.png"))[::5]
    pixels = []
    for file in files:
        photo = F.resize(Image.open(file).convert("RGB"), [224], InterpolationMode.BICUBIC)
        pixels.append(np.array(F.center_crop(photo, [224, 224])).transpose(2, 0, 1))
    if kind == "onnx":
        session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
        (found,) = session.run(None, {"pixels": np.stack(pixels)})
    else:
        found = torch.jit.load(tmp_path / "out" / "model.pt")(torch.from_numpy(np.stack(pixels))).numpy()
    # the code of the card, run as it stands, prepares pictures to the pixel
    card = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    Image.open(files[0]).save("photo.jpg", "PNG")
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    name, share = capsys.readouterr().out.rsplit(maxsplit=1)
    assert name == facts["names"][found[0].argmax()] and float(share) == pytest.approx(found[0].max(), abs=1e-5)
    classifier = Classifier.load(run)
    answers = classifier(files)
    classifier.close()
    for answer, row in zip(answers, found, strict=True):
        shares = dict(answer.top)
        assert [shares[name] for name in facts["names"]] == pytest.approx(row.tolist(), abs=1e-4)
    assert "from lite0 (weights" in card, "the encoder is what the weights come from"
    assert "image-classification" in card and "cross" not in card.split("---")[1]


def test_what_cannot_be_written_is_refused(run, tmp_path, capsys):
    assert command.main([str(run), str(tmp_path / "out"), "--as", "model"]) == 2
    assert "--as model: method=best_of can be written as onnx, torchscript" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("slope", "bias"), [(1.0, 0.0), (0.3, -1.5), (2.0, 1.0), (0.7, -0.2)])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_curve_of_a_file_is_that_of_the_run(slope, bias, classes):
    values = np.random.default_rng(classes).dirichlet([0.3] * classes, 200).astype(np.float32)
    places = np.broadcast_to(np.arange(classes, dtype=np.int32), values.shape)
    calibrated = Calibration(1.0, slope, bias)
    expected = calibrated(Probabilities(tuple("abcdefghij"[:classes]), places, values))
    found = image_model.curved(torch.tensor(values), calibrated).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert (expected.max(1) - np.take_along_axis(expected, values.argmax(1)[:, None], 1)[:, 0]).max() <= 1e-12
