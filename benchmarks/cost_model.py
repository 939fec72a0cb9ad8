"""Measure the cost of an update: CPU seconds of scoring, loss and backward against the number of tokens.

    python -m benchmarks.cost_model                  # writes docs/cost.png

One factor varies at a time: prompt tokens P, completion tokens R, completions G. The shared-prefix path computes
P + G R tokens per group, the plain path, one row per completion, G (P + R). If only the number of tokens matters, both
lie on straight lines, and the token ratio predicts the gain. Policy with gradient and reference without (beta = 0.04),
the 17 M Qwen2-VL of the other benchmarks; the paths alternate in one process, one thread, medians.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.setup import Case, OurModels, OurStep, alternate, prepare, save_model, show

BASE = Case(400, 16, 8)
GRID = {
    "P": [Case(p, BASE.completion, BASE.group) for p in (200, 400, 800, 1200)],
    "R": [Case(BASE.prompt, r, BASE.group) for r in (4, 16, 64, 128)],
    "G": [Case(BASE.prompt, BASE.completion, g) for g in (2, 4, 8, 16)],
}
LABELS = {"P": "prompt P varies", "R": "completion R varies", "G": "group G varies"}
COLOURS = {"shared": "#2f6db3", "plain": "#d9822b"}
MARKERS = {"P": "o", "R": "s", "G": "^"}


@dataclass(frozen=True)
class Fit:
    """Least-squares line: seconds = intercept + slope * tokens."""

    slope: float
    intercept: float
    r2: float

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * tokens

    def __str__(self) -> str:
        sign = "+" if self.intercept >= 0 else "−"
        return f"{1000 * self.slope:.2f} ms per token {sign} {abs(self.intercept):.2f} s,  R² = {self.r2:.4f}"


def fit(tokens: list[int], seconds: list[float]) -> Fit:
    """Fit a line through the points, with the share of variance that it explains."""
    x, y = np.array(tokens, dtype=float), np.array(seconds)
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (intercept + slope * x)
    return Fit(float(slope), float(intercept), float(1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()))


def measure(folder: Path, repetitions: int) -> dict[Case, dict[str, float]]:
    """Measure the median CPU seconds of both paths for every case of the grid."""
    models = OurModels(folder)
    medians = {}
    for case in dict.fromkeys(case for cases in GRID.values() for case in cases):
        paths = {"shared": partial(OurStep, shared=True), "plain": partial(OurStep, shared=False)}
        seconds = alternate({name: path(models, case) for name, path in paths.items()}, repetitions)
        medians[case] = {name: values.median for name, values in seconds.items()}
    return medians


def tokens_of(case: Case, path: str) -> int:
    """Return the number of tokens that a path computes."""
    return case.shared_tokens if path == "shared" else case.plain_tokens


def draw(medians: dict[Case, dict[str, float]], fits: dict[str, Fit], target: Path) -> None:
    """Draw the figure: left the shared path on its own scale, right both paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(
        "Cost of one GRPO update without sampling (policy + reference + backward, 17 M Qwen2-VL)", fontsize=11
    )
    for axis, paths in ((left, ("shared",)), (right, ("shared", "plain"))):
        for path in paths:
            line = fits[path]
            ends = np.array([0.0, 1.05 * max(tokens_of(case, path) for case in medians)])
            axis.plot(ends, line(ends), color=COLOURS[path], linewidth=1.5, label=f"{path}: {line}")
            for factor, cases in GRID.items():
                points = [(tokens_of(case, path), medians[case][path]) for case in cases]
                axis.plot(*zip(*points, strict=True), MARKERS[factor], color=COLOURS[path], markersize=6, alpha=0.85)
        axis.set(ylabel="CPU seconds, one thread", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="tokens computed: P + G R", title="shared prefix")
    right.set(xlabel="tokens computed: P + G R (shared), G (P + R) (plain)", title="the same groups on both paths")
    factors = [Line2D([], [], marker=MARKERS[f], linestyle="", color="#555555", label=LABELS[f]) for f in GRID]
    for axis in (left, right):
        lines = axis.get_legend_handles_labels()[0]
        axis.legend(handles=[*lines, *(factors if axis is left else [])], fontsize=8, frameon=False, loc="upper left")
    figure.savefig(target, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, fit, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=Path("docs/cost.png"))
    options = parser.parse_args()
    prepare()
    with tempfile.TemporaryDirectory() as workdir:
        medians = measure(save_model(Path(workdir) / "model"), options.repetitions)
    fits = {
        path: fit([tokens_of(case, path) for case in medians], [seconds[path] for seconds in medians.values()])
        for path in COLOURS
    }
    draw(medians, fits, options.figure)
    rows = [
        (
            case.name,
            str(case.shared_tokens),
            f"{seconds['shared']:.3f}",
            str(case.plain_tokens),
            f"{seconds['plain']:.3f}",
            f"{case.plain_tokens / case.shared_tokens:.2f}",
            f"{seconds['plain'] / seconds['shared']:.2f}",
        )
        for case, seconds in medians.items()
    ]
    columns = ("case", "shared tokens", "CPU s", "plain tokens", "CPU s", "token ratio", "CPU ratio")
    result: dict[str, Any] = {
        "fit": {path: vars(line) for path, line in fits.items()},
        "r2": fits["shared"].r2,
        "points": {case.name: seconds for case, seconds in medians.items()},
    }
    for path, line in fits.items():
        print(f"{path}: {line}")
    show("Scoring, loss and backward of one group", columns, rows, result)


if __name__ == "__main__":
    main()
