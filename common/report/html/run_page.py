"""Write report.html of a run: results, curves, confusions, every reply, configuration and environment."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from common.config import trust
from common.config.composition import decides_result, differences, plain, register
from common.config.schema import CONF
from common.counted import agree, counted
from common.data.manifest import data_lines
from common.evaluation import metrics
from common.report import figures, folders, tables
from common.report.compare import Table
from common.report.html import transcripts
from common.report.html.render import Pieces, inline, render, write
from common.report.html.transcripts import Tally
from common.run import predictions
from common.run.result import Result
from common.run.run_folder import RunFolder

FILE, FOLDER = "report.html", "report"
NAMED, DRAWN = ("method", "data", "setting", "protocol", "model"), ("shots", "seed")  # configuration in a run's name
PARTS = {
    "results": "Results",
    "pictures": "Curves",
    "confusions": "Confusions",
    "classes": "Classes",
    "replies": "Replies",
    "configuration": "Configuration",
    "environment": "Environment",
}


def make(folder: Path) -> Path:
    """Write the page of a finished run into its folder, and return its path.

    Raises:
        UserError: The folder holds no finished run.
    """
    result = Result.load(folder)
    values = trust.read(folder / "config.yaml")
    pictures = predictions.read_thumbnails(folder)
    names = transcripts.class_names(folder)
    pieces = Pieces(folder / FOLDER, names)
    tally = Tally()
    # rows are streamed: the tally counts tested images while they pass
    pieces.add(tally(transcripts.tests(folder, pictures)))
    pieces.add(transcripts.training(folder, pictures))
    changed, data = _changed(values), pieces.finish()
    page = render(
        "run.html",
        "report.js",
        pieces.outside,
        title=f"{result.method} · {folders.photos(values)}",
        subtitle=f"{result.model}, {result.setting}, {result.protocol}, {counted(result.shots, 'shot')},"
        f" seed {result.seed}; {folder.resolve().name}",
        parts=PARTS.items(),
        results=Table(*tables.result_cells(result), _notes(result)),
        leaderboard=_leaderboard(result),
        pictures=_pictures(folder, tally),
        confusions=confusion_tables(tally, names),
        classes=class_tables(result),
        differences=changed or [],
        differences_note=_about(changed),
        config=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        environment=_environment(folder, result),
        data=data,
    )
    write(folder / FILE, page)
    return folder / FILE


def _notes(result: Result) -> list[str]:
    lines = [*tables.overall_lines(result), *data_lines(vars(result)), *tables.probability_lines(result)]
    lines += [*tables.fusion_lines(result), *tables.calibration_lines(result), *tables.paired_lines(result)]
    return [*lines, tables.time_line(result)]


def _leaderboard(result: Result) -> Table | None:
    cells = tables.leaderboard_cells(result)
    return None if cells is None else Table(*cells, [])


def confusion_tables(tally: Tally, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return confusions per split: a grid if there are few classes, else the most frequent pairs.

    Args:
        tally: Counts of the tested images.
        names: Class names, by normalised name; buttons refer to them by number.
    """
    places = {name: number for number, name in enumerate(names)}
    found = []
    for split, pairs in tally.pairs.items():
        counts: Counter[tuple[int, int]] = Counter()
        for (label, answer), count in pairs.items():
            counts[places[label], places.get(answer, -1)] += count
        seen = sorted({label for label, _ in counts})
        images, wrong = tally.images[split], tally.wrong[split]
        # wrong answers that name a class: all wrong ones without those that name none
        named = wrong - (images - sum(counts[n, n] for n in seen))
        table = {"split": split, "images": images, "wrong": wrong, "named": named}
        shown = list(names.values())
        if len(seen) <= figures.LEGIBLE:
            answered = [*seen, *sorted({a for _, a in counts} - {*seen, -1}), -1]
            grid = [(shown[label], [_cell(counts, label, a, shown) for a in answered]) for label in seen]
            found.append(table | {"grid": grid, "columns": [*(shown[a] for a in answered[:-1]), "no class name"]})
        else:
            errors = sorted((-count, *pair) for pair, count in counts.items() if pair[0] != pair[1])
            cells = [_cell(counts, label, answer, shown) for _, label, answer in errors[: figures.PAIRS]]
            found.append(table | {"grid": None, "pairs": cells})
    return found


def class_tables(result: Result) -> list[tuple[str, Table]]:
    """Return per split the accuracy and number of images of each class, before and after training; the worst first."""
    found = []
    for split, last in result.final.items():
        shown = tables.phases(result, split)
        columns = ("class", "images", *(f"{phase} %" for phase, _ in shown), "95 % interval")
        rows = []
        for name in sorted(last.per_class, key=lambda name: last.per_class[name]):
            n = last.images_per_class[name]
            # classes have few images, so their intervals are wide: show them
            interval = metrics.wilson_interval(round(last.per_class[name] * n), n)
            rows.append(
                (
                    name,
                    str(n),
                    *(tables.percent(summary.per_class.get(name)) for _, summary in shown),
                    " – ".join(map(tables.percent, interval)),
                )
            )
        found.append((split, Table(columns, rows, [])))
    return found


def _cell(counts: Counter[tuple[int, int]], label: int, answer: int, names: Sequence[str]) -> dict[str, Any]:
    total = sum(count for (row, _), count in counts.items() if row == label)
    count = counts[label, answer]
    return {
        "count": count,
        "share": round(count / total, 3),
        "label": label,
        "answer": answer,
        "kind": "right" if label == answer else "wrong",
        "names": (names[label], "no class name" if answer < 0 else names[answer]),
    }


def _pictures(folder: Path, tally: Tally) -> list[tuple[str, Any]]:
    found = []
    if figures.has_curves(rows := RunFolder(folder).read_log("metrics.jsonl")):
        fitted = not any("loss" in row for row in rows)
        caption = "Accuracies" if fitted else "Rewards, completion lengths and accuracies"
        found.append((f"{caption} over the training.", inline(figures.curves(rows))))
    if tally.surest:
        caption = "At the end of the run. Left: reliability, areas by images. Right: errors among the surest images."
        found.append((caption, inline(figures.calibration(tally.surest))))
    return found


def _changed(values: dict[str, Any]) -> list[tuple[str, str, str]] | None:
    """Return values that differ from the run's named options: key, usual value, own value; None if not known."""
    expected = _usual(values)
    if expected is None:
        return None
    own = {key: value for key, value in values.items() if key != "signature"}
    found = []
    for line in differences(decides_result(expected), decides_result(own)):
        key, _, change = line.partition(": ")
        before, _, after = change.partition(" -> ")
        found.append((key, before, after))
    return found


def _usual(values: dict[str, Any]) -> dict[str, Any] | None:
    """Compose the run's named options, shots and seed without other overrides; None if they do not exist here."""
    register()
    chosen = [f"{group}={values[group]['name']}" for group in NAMED] + [f"{key}={values[key]}" for key in DRAWN]
    own = (
        None if GlobalHydra.instance().is_initialized() else hydra.initialize_config_dir(str(CONF), version_base="1.3")
    )
    try:
        with own or nullcontext():  # at the end of a run Hydra is initialised, with the user's own config folders
            return plain(hydra.compose("config", chosen))
    except HydraException:
        return None


def _about(changed: list[tuple[str, str, str]] | None) -> str:
    if changed is None:
        return "Its options are none of this version's, so what differs from them is not known."
    many = f"{counted(len(changed) or 'No', 'value')} {agree(len(changed), 'differs', 'differ')}"
    return f"{many} from what the named options, shots and seed give by themselves."


def _environment(folder: Path, result: Result) -> list[tuple[str, str]]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    splits = ", ".join(f"{name} {split['n']}" for name, split in manifest.get("splits", {}).items())
    return [
        ("weights", f"{result.weights.get('path', '–')} (SHA-256 {result.weights.get('sha256', '–')})"),
        ("device", result.device or "–"),
        ("decoding", result.decoding),
        ("commit", result.git_commit or "none: not a git checkout"),
        ("packages", ", ".join(f"{name} {version}" for name, version in sorted(result.versions.items()))),
        ("signature", result.signature),
        ("manifest", f"{result.manifest}: {splits}"),
        ("splits", ", ".join(f"{data}: {origin}" for data, origin in result.origins.items())),
    ]
