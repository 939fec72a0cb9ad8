"""Compare the speed of `Classifier` on image files with that of an evaluation on the same images.

    python -m benchmarks.predict                     # --images 1000; two minutes

First, a run without training is made. Then two measurements alternate: its learner predicts the first images of its
test set, as in the pipeline (images read and encoded again), and `Classifier` predicts the same images as PNG files.
Loading the model is not timed. tests/test_predict.py checks that the answers are equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import Classifier
from common.data import task as tasks
from common.data.digits import Digits
from common.learner import learner_class
from common.predict.trained_model import TrainedModel, config_of
from common.run.checkpoint import Checkpoints
from common.runtime.group import init_process_group


def main() -> None:
    """Print seconds, images per second, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        quick = ["method=zeroshot", "setting.test_per_class=1", "tracking=none", "tracking.report=false"]
        subprocess.run([sys.executable, "run.py", f"hydra.run.dir={folder / 'run'}", *quick], check=True)
        # the test images, as a task and as PNG files
        config = config_of(TrainedModel.of(folder / "run"))
        config.setting.test_per_class = None
        data = tasks.build(config)
        tested = data.task.evaluation["test"]
        tested = replace(tested, items=tested.items[: options.images])
        data = replace(data, task=replace(data.task, evaluation={"test": tested}))
        (folder / "photos").mkdir()
        for item in tested.items:
            Digits().open(item.image).save(folder / "photos" / f"{item.image}.png")
        files = sorted((folder / "photos").iterdir())
        classifier = Classifier.load(folder / "run")
        classifier(files[:1])  # loads the model
        make = learner_class(config)
        seconds: dict[str, list[float]] = {"evaluation": [], "predict": []}
        device = init_process_group(config.gpus)
        for number in range(options.repetitions):
            inner = folder / f"evaluation-{number}"
            inner.mkdir()
            learner = make(config, data, device, inner, Checkpoints(inner, 1))
            clock = time.perf_counter()
            learner.predict("test")
            seconds["evaluation"].append(time.perf_counter() - clock)
            learner.close()
            clock = time.perf_counter()
            answers = classifier(files)
            seconds["predict"].append(time.perf_counter() - clock)
            assert len(answers) == len(files) and not any(answer.error for answer in answers)
        classifier.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.2f} s, {len(files) / value:.0f} images/s")
    ratio = round(medians["evaluation"] / medians["predict"], 2)
    print(json.dumps({"images": len(files), "cases": {"predict": {"ratio": ratio, "seconds": seconds}}}))


if __name__ == "__main__":
    main()
