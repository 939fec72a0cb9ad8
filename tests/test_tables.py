"""The lines below the table of a run, and its pictures."""

from __future__ import annotations

from dataclasses import MISSING, fields

from common.evaluation.metrics import ProbabilitySummary, Summary
from common.report import figures, tables
from common.run import tracking
from common.run.result import Result


def summary(**values):
    return Summary(**{"n": 10, "accuracy": 0.5, "ci95": [0.2, 0.8], "per_class": {}, "seconds": 1.0, **values})


def scored(top1, top5, ece):
    return summary(probability=ProbabilitySummary(top1, top5, ece, brier=0.5, aurc=0.5, risk_coverage=[]))


def result(before, after, **values):
    """A result with one split each way; the other fields do not matter here."""
    given = {
        "before": before,
        "after": after,
        "train": {"updates": 3},
        "overall": {"before": {}, "after": {}},
        **values,
    }
    given = {"origins": {"digits": "own split"}, "left_out": 0, "short_classes": {}, **given}
    names = [field.name for field in fields(Result) if field.default is MISSING and field.default_factory is MISSING]
    return Result(**{**dict.fromkeys(names, "x"), **given})


def test_probabilities_are_one_line_per_split():
    before, after = scored(0.6628, 0.9536, 0.1528), scored(1.0, 1.0, 0.059)
    (line,) = tables.probability_lines(result({"test": before}, {"test": after}))
    assert line == (
        "test, most probable name: zero-shot 66.28 % (top-5 95.36, ECE 15.28), trained 100.00 % (top-5 100.00, ECE 5.90)"
    )
    assert len(line) <= 120
    (line,) = tables.probability_lines(result({"test": before}, {}))
    assert "trained" not in line


def test_a_result_without_label_scoring_has_no_line():
    assert tables.probability_lines(result({"test": summary()}, {"test": summary()})) == []


def test_several_splits_have_one_number():
    several = result(
        {"new": summary(accuracy_aliases=0.5)},
        {"new": summary(accuracy_aliases=0.75)},
        overall={"before": {"harmonic_mean": 0.5}, "after": {"harmonic_mean": 0.625}},
        train={
            "updates": 3,
            "tested": 3,
            "best": {"update": 2, "accuracy": 1.0, "split": "base"},
            "last": {"update": 3, "accuracy": 0.5, "split": "base"},
        },
        left_out=2,
        short_classes={"a": 1},
    )
    assert tables.overall_lines(several) == [
        "harmonic mean: zero-shot 50.00 %, trained 62.50 %",
        "new, other words accepted: zero-shot 50.00 %, trained 75.00 %",
        "trained: update 3 of 3; the best evaluation was after update 2 (100.00 % on base itself: no validation images;"
        " after the last one 50.00 %)",
        "1 class has fewer training images than shots=x: a 1",
        "2 pictures that cannot be decoded were left out (manifest.json names them)",
    ]
    assert tables.overall_lines(result({"test": summary()}, {}, train={"updates": 0})) == []


def columns(shown):
    return [column.header for column in tables.result_table(shown).columns]


def test_the_table_has_columns_for_what_there_is_to_say():
    said = {"well_formed": 1.0, "mean_tokens": 2.0}
    assert columns(result({"test": summary(accuracy_official=0.5, **said)}, {}))[4:7] == [
        "official match %",
        "well-formed %",
        "tokens",
    ]
    assert columns(result({"test": summary(**said)}, {}))[4:] == ["well-formed %", "tokens", "seconds to answer"]
    assert columns(result({"test": summary()}, {})) == [
        "split",
        "images",
        "accuracy %",
        "95 % interval",
        "seconds to answer",
    ]


def test_the_mean_of_classes_stands_beside_the_accuracy_where_they_are_uneven():
    shown = result({"test": summary(accuracy=0.9, accuracy_macro=0.5)}, {"test": summary(accuracy=0.8)})
    names, rows = tables.result_cells(shown)
    assert names[2:5] == ["accuracy %", "95 % interval", "class mean %"]
    assert [row[4] for row in rows] == ["50.00", "–"]
    assert "class mean %" not in tables.result_cells(result({"test": summary()}, {}))[0]


def test_many_classes_show_their_confusions():
    names = [f"class {i}" for i in range(50)]
    table = [[9 if x == y else 0 for x in range(51)] for y in range(50)]
    table[3][7], table[8][50], table[4][5] = 5, 6, 1
    (axis,) = figures.confusion(table, names).axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["class 8 → no class name", "class 3 → class 7", "class 4 → class 5"]


def test_a_run_without_training_has_bars_instead_of_empty_axes(tmp_path):
    figure = figures.accuracies({"base": summary(accuracy=0.25), "new": summary(accuracy=0.75)})
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == [25, 75]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["base", "new"]
    figures.save(figure, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and b"<svg" in (
        tmp_path / "curves.svg"
    ).read_bytes()


def test_what_is_measured_once_has_no_curve():
    fitted = [{"step": n, "accuracy": 0.5} for n in range(3)]
    assert not figures.has_curves([*fitted, {"step": 2, "eval/test/accuracy": 0.5}])
    assert figures.has_curves([{"step": 0, "eval/test/accuracy": 0.5}, {"step": 2, "eval/test/accuracy": 0.6}])
    assert figures.has_curves([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}])


def test_what_is_fitted_at_once_has_accuracies_alone():
    """Neither rewards nor losses were logged: no empty axes beside them."""
    (axis,) = figures.curves([{"step": 0, "eval/val/accuracy": 0.5}, {"step": 1, "eval/val/accuracy": 0.75}]).axes
    assert axis.get_ylabel() == "accuracy (%)" and list(axis.lines[0].get_ydata()) == [50, 75]
    left, _ = figures.curves([{"step": 1, "loss": 2.0, "eval/val/accuracy": 0.5}]).axes
    assert left.get_ylabel() == "loss (nats)" and list(left.lines[0].get_ydata()) == [2]


def test_a_remark_marks_every_trained_accuracy():
    shown = result({"test": summary()}, {"test": summary(accuracy=0.75)}, remarks=["selected on the test images"])
    cells = list(tables.result_table(shown).columns[2].cells)
    assert cells == ["50.00", "75.00 †"]
    assert tables.overall_lines(shown)[0] == "†: selected on the test images"
    assert list(tables.result_table(result({"test": summary()}, {})).columns[2].cells) == ["50.00"]


def test_who_knew_nothing_before_has_no_row_of_it():
    """Its answers would be the first class, and its gain what that class is not."""
    said = {"after": {"harmonic_mean": 0.75}}
    blank = result({}, {"new": scored(0.7, 0.9, 0.1)}, overall=said, train={"updates": 1, "paired": {}})
    assert [row[0] for row in tables.result_cells(blank)[1]] == ["new, trained"]
    assert tables.probability_lines(blank) == ["new, most probable name: trained 70.00 % (top-5 90.00, ECE 10.00)"]
    assert tables.overall_lines(blank) == ["harmonic mean: trained 75.00 %"] and tables.paired_lines(blank) == []
    assert tracking.numbers(blank) == {"after/new": 0.5, "after/harmonic_mean": 0.75}
    both = result({"new": summary()}, {"new": summary(accuracy=0.75)}, overall={})
    assert tracking.numbers(both) == {"before/new": 0.5, "after/new": 0.75, "gain/new": 0.25}


def test_names_that_no_font_has_are_spelt_out(tmp_path, recwarn):
    """Emoji, Chinese and a very long name: a picture that leaves room for its cells, and nothing is warned of."""
    names = ["🎉 jeans", "summer dress 👗", "猫", "shoes with a name that is longer than any picture is wide"]
    figures.save(figure := figures.confusion([[1] * 5] * 4, names), tmp_path / "matrix.png", "🎉 birds")
    (axis,) = figure.axes
    shown = [label.get_text() for label in axis.get_yticklabels()]
    assert shown[:3] == ["(party popper) jeans", "summer dress (dress)", "(U+732B)"]
    assert shown[3].startswith("shoes with a name") and len(shown[3]) <= figures.WIDEST
    assert axis.get_position().width > 0.3 and axis.get_position().height > 0.3
    assert not [each for each in recwarn if "Glyph" in str(each.message) or "layout" in str(each.message)]
