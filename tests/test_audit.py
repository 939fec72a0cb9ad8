"""`common.report audit`: rewards that can be gamed are found out, sound ones are not accused."""

from __future__ import annotations

import json

import pytest
import yaml

from common.report import __main__ as command
from common.report.audit import attacks, audit
from common.types import UserError

NAMES = ["cat", "dog", "fox"]


@pytest.fixture
def run(tmp_path):
    def make(**rewards):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"rewards": rewards}, sort_keys=False))
        (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"train": {"names": NAMES}}}))
        return tmp_path

    return make


def contains(samples):
    """The evaluation of a public system: any reply with the name in it is right."""
    return [float(sample.label in sample.completion) for sample in samples]


def prefix(samples):
    """An empty answer is part of every name."""
    return [float(sample.label.startswith(sample.completion)) for sample in samples]


def nothing(samples):
    return [0.0 for _ in samples]


@pytest.mark.slow
def test_the_projects_own_mixes_cannot_be_gamed(run, compose):
    for option in ("nothinking", "clsrl", "alert_no_judge"):
        model = "tiny_gemma3" if option.startswith("alert") else "tiny_qwen2_vl"
        folder = run(**_plain(compose(f"rewards={option}", f"model={model}")))
        table, cheats = audit(folder)
        assert cheats == [], option
        assert max(float(table.rows[0][-1]), float(table.rows[1][-1])) > 0


def test_totals_are_weighted(run):
    folder = run(
        format={"weight": 0.5, "fn": "common.rewards.strict_format"},
        accuracy={"weight": 2.0, "fn": "common.rewards.accuracy"},
    )
    table, _ = audit(folder)
    assert table.columns == ("reply", "format", "accuracy", "total")
    assert table.rows[0] == ("right, tagged", "1", "1", "2.5")
    assert table.rows[2] == ("wrong, tagged", "1", "0", "0.5")


def test_a_reward_that_looks_for_the_name_anywhere_is_found_out(run, capsys):
    folder = run(match={"weight": 1.0, "fn": "tests.test_audit.contains"})
    _, cheats = audit(folder, trust_code=True)
    assert {"hedged, tagged", "all names, bare", "nested tags", "right in its thoughts, wrong answer"} <= set(cheats)
    assert {"empty", "wrong, bare", "look-alike letters"}.isdisjoint(cheats)
    assert command.main(["audit", str(folder), "--trust-code"]) == 1
    assert "hedged, bare: earns as much as the right answer" in capsys.readouterr().out


def test_one_that_pays_for_silence_is_found_out(run):
    assert "empty" in audit(run(match={"weight": 1.0, "fn": "tests.test_audit.prefix"}), trust_code=True)[1]


def test_one_that_pays_nobody_says_so(run):
    table, cheats = audit(run(match={"weight": 1.0, "fn": "tests.test_audit.nothing"}), trust_code=True)
    assert cheats == ["nothing is paid"] and "these rewards teach nothing" in " ".join(table.notes)


def test_a_judge_is_not_asked(run, compose):
    folder = run(**_plain(compose("method=alert", "model=tiny_gemma3")))
    table, cheats = audit(folder)
    assert "reasoning" in table.columns and cheats == []
    assert {row[table.columns.index("reasoning")] for row in table.rows} == {"not asked"}


def _plain(cfg):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg.rewards, resolve=True)


def test_attacks_do_not_contain_the_letters_they_imitate():
    (fake,) = [a for a in attacks("cat", ["dog"]) if a.name == "look-alike letters"]
    assert "cat" not in fake.text and len(next(a for a in attacks("cat", ["dog"]) if "100 kB" in a.name).text) > 99_000


@pytest.mark.parametrize("broken", ["nothing there", "no rewards"])
def test_what_cannot_be_audited(run, tmp_path, broken):
    folder = tmp_path if broken == "nothing there" else run()
    with pytest.raises(UserError, match=r"no run's folder|learnt from no rewards"):
        audit(folder)
