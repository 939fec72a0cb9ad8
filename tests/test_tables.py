"""The lines below the table of a run, and its pictures."""

from __future__ import annotations

from common.report import figures, tables


def summary(**probability):
    return {"probability": probability} if probability else {}


def test_probabilities_are_one_line_per_split():
    before = summary(top1=0.6628, top5=0.9536, ece=0.1528)
    after = summary(top1=1.0, top5=1.0, ece=0.059)
    result = {"train": {"updates": 3}, "zero_shot": {"test": before}, "eval": {"test": after}}
    (line,) = tables.probability_lines(result)
    assert line == (
        "test, most probable name: zero-shot 66.28 % (top-5 95.36, ECE 15.28), trained 100.00 % (top-5 100.00, ECE 5.90)"
    )
    assert len(line) <= 120
    (line,) = tables.probability_lines(
        {"train": {"updates": 0}, "zero_shot": {"test": before}, "eval": {"test": before}}
    )
    assert "trained" not in line


def test_a_result_without_label_scoring_has_no_line():
    result = {"train": {"updates": 3}, "zero_shot": {"test": summary()}, "eval": {"test": summary()}}
    assert tables.probability_lines(result) == []


def test_several_splits_have_one_number():
    numbers = {"zero_shot": {"harmonic_mean": 0.5}, "eval": {"harmonic_mean": 0.625}}
    aliases = {"zero_shot": {"new": {"accuracy_aliases": 0.5}}, "eval": {"new": {"accuracy_aliases": 0.75}}}
    best = {"update": 2, "accuracy": 1.0, "split": "base"}
    result = {
        "train": {"updates": 3, "best": best},
        "overall": numbers,
        "left_out": 2,
        "short_classes": {"a": 1},
        **aliases,
    }
    assert tables.overall_lines(result) == [
        "harmonic mean: zero-shot 50.00 %, trained 62.50 %",
        "new, other words accepted: zero-shot 50.00 %, trained 75.00 %",
        "best update 2 was chosen on base itself: no validation images",
        "1 classes have fewer training images than shots, first: 'a' has 1",
        "2 pictures that cannot be decoded were left out (manifest.json names them)",
    ]
    untrained = {"train": {"updates": 0}, "overall": {"zero_shot": {}, "eval": {}}, "left_out": 0}
    untrained |= {"eval": {"test": {}}, "zero_shot": {"test": {}}, "short_classes": {}}
    assert tables.overall_lines(untrained) == []


def test_many_classes_show_their_confusions(tmp_path, monkeypatch):
    names = [f"class {i}" for i in range(50)]
    table = [[9 if x == y else 0 for x in range(51)] for y in range(50)]
    table[3][7], table[8][50], table[4][5] = 5, 6, 1
    shown = {}
    monkeypatch.setattr(figures.plt, "close", lambda figure: shown.update(figure=figure))
    figures.confusion(table, names, "title", tmp_path / "confusion.png")
    labels = [label.get_text() for label in shown["figure"].axes[0].get_yticklabels()]
    assert labels == ["class 8 → no class name", "class 3 → class 7", "class 4 → class 5"]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
