"""SpeciaRL: verdicts and rewards by hand, where taxonomies come from, what is measured, and whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from clsrl.related import speciarl
from clsrl.related.speciarl import SpeciaRLPrompt, Specificity
from clsrl.related.taxonomy import Taxonomy, load
from common import Classifier
from common.config.composition import validate
from common.data import task
from common.export import __main__ as export
from common.types import Answers, Item, Prediction, Prompt, Reply, Sample, Split, Task, UserError
from tests.faults import Kill
from tests.test_predict import expected

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
RIGHT, SHOE, CLOTHES, ABSTAINS, WRONG = "ankle boot", "shoe", "clothing", "None", "sandal"


def tagged(answer):
    return f"<think>it has a heel</think><answer>{answer}</answer>"


def samples(*answers, image="1", label="ankle boot"):
    return [Sample(Prompt(image, "?", label), answer if "<" in answer else tagged(answer)) for answer in answers]


def reward(group_size=10, **arguments):
    return Specificity(taxonomy="fashion", group_size=group_size, **arguments)


@pytest.mark.parametrize(
    ("taxonomy", "label", "verdicts"),
    [
        (
            "fashion",
            "ankle boot",
            {
                "Ankle_Boot": "specific",
                "boot": "less specific",
                "shoe": "less specific",
                "footwear": "generic",  # three steps
                "garment": "generic",
                "sandal": "wrong",
                "none": "abstain",
                "not a boot": "wrong",
                "sandal or ankle boot": "wrong",
                "": "wrong",
            },
        ),
        ("fashion", "trouser", {"pants": "specific", "bottoms": "less specific", "shirt": "wrong"}),
        ("fashion", "t-shirt", {"shirt": "wrong", "top": "less specific", "tee": "specific"}),
        ("oxford_pets", "scottish terrier", {"terrier": "less specific", "dog": "generic", "cat": "wrong"}),
        ("oxford_pets", "bengal", {"cat": "generic", "animal": "generic"}),
        ("digits", "six", {"six": "specific", "digit": "generic", "seven": "wrong", "none": "abstain"}),
        (
            "names",
            "Black footed Albatross",
            {"albatross": "less specific", "footed albatross": "less specific", "black": "wrong", "bird": "wrong"},
        ),
        ("names", "albatross", {"black footed albatross": "wrong", "no albatross": "wrong", "albatross": "specific"}),
        ("flowers102", "passion flower", {"flower": "generic", "passion": "wrong"}),
        (
            "stanford_cars",
            "2012 Aston Martin Virage Coupe",
            {
                "Aston Martin Virage Coupe 2012": "specific",
                "aston martin virage coupe": "less specific",
                "aston martin virage": "less specific",
                "aston martin": "less specific",
                "aston": "wrong",
                "coupe": "generic",
                "car": "generic",
                "2012": "wrong",
                "2011 aston martin virage coupe": "wrong",
            },
        ),
        ("fgvc_aircraft", "737-200", {"boeing 737": "less specific", "Boeing": "less specific", "737-300": "wrong"}),
        ("fgvc_aircraft", "A320", {"A321": "wrong", "Airbus": "less specific", "plane": "generic"}),
    ],
)
def test_verdicts(taxonomy, label, verdicts):
    assert {answer: load(taxonomy).verdict(label, answer) for answer in verdicts} == verdicts


def test_a_kind_of_the_label_is_more_specific_and_aliases_are_as_specific():
    shoes = Taxonomy({"pump": frozenset({"high heel"}), "high heel": frozenset({"shoe"})})
    assert [shoes.verdict("Shoe", said) for said in ("pump", "high heel", "red pump")] == [
        *["more specific"] * 2,
        "wrong",
    ]
    assert shoes.verdict("high heel", "stiletto", ["Stiletto"]) == "specific"


@pytest.mark.parametrize(
    ("answers", "values"),
    [
        ((RIGHT, SHOE, CLOTHES, ABSTAINS, WRONG), (1, 0, 0, 0, 0)),
        ((WRONG, SHOE, CLOTHES, "boot"), (0, 1, 0, 1)),
        ((CLOTHES, ABSTAINS, WRONG), (1, 0, 0)),
        ((WRONG, ABSTAINS, WRONG), (0, 1, 0)),
        ((WRONG, WRONG), (0, 0)),
        ((RIGHT, "ankle boot", "<answer></answer>"), (1, 1, -1)),
        ((RIGHT, f"{tagged(RIGHT)} or not", "<think>a</think><answer> </answer>"), (1, -1, -1)),
        (("<answer>ankle boot</answer>", WRONG), (-1, 0)),
    ],
)
def test_the_best_rank_of_the_group_is_paid(answers, values):
    assert reward()(samples(*answers)) == list(values)


def test_the_ablations():
    group = samples(SHOE, RIGHT, RIGHT, CLOTHES, ABSTAINS, WRONG, "<answer>")
    assert {kind: reward(kind=kind)(group) for kind in ("first_best", *speciarl.STATIC)} == {
        "first_best": [0, 1, 0, 0, 0, 0, -1],
        "specific": [0, 1, 1, 0, 0, 0, -1],
        "scale_1": [0.75, 1, 1, 0.5, 0.25, 0, -1],
        "scale_2": [0.75, 1, 1, 0.5, 0, 0, -1],
        "scale_3": [0.75, 1, 1, 0, 0, 0, -1],
    }
    with pytest.raises(UserError, match="kind=worst: choose one of best, first_best"):
        reward(kind="worst")


def test_groups_are_compared_apart():
    two = samples(SHOE, WRONG) + samples(RIGHT, SHOE, image="2")
    assert reward(2)(two) == reward(4)(two) == [1, 0, 1, 0]
    again = samples(SHOE, WRONG) + samples(RIGHT, SHOE)  # the same image twice in a batch
    assert reward(2)(again) == [1, 0, 1, 0] and reward(4)(again) == [0, 0, 1, 0]
    assert reward(2)([]) == []


def test_every_class_of_a_shipped_taxonomy_stands_below_something():
    names = json.loads((Path(__file__).parent / "class_names.json").read_text())["fgvc_aircraft"]
    for dataset, classes in {"fashion": FASHION, "fgvc_aircraft": names}.items():
        taxonomy = load(dataset)
        assert [name for name in classes if name.lower() not in taxonomy.parents] == []
        assert [name for name in classes if taxonomy.verdict(name, name) != "specific"] == []
        pairs = [(a, b) for a in classes for b in classes if a != b and taxonomy.verdict(a, b) != "wrong"]
        assert pairs == [], "no class is right for another one"


def test_a_taxonomy_of_ones_own(tmp_path):
    rows = tmp_path / "mine.csv"
    rows.write_text("child,parent\nArctic_Fox,fox\nfox,Canid\ncanid,animal\n")
    said = [load(str(rows)).verdict("arctic fox", answer) for answer in ("fox", "canid", "animal", "owl")]
    assert said == ["less specific", "less specific", "generic", "wrong"]
    written = tmp_path / "mine.yaml"
    written.write_text("parents: {arctic fox: [fox, white animal], fox: animal}\nsynonyms: [[fox, reynard]]\n")
    said = [load(str(written)).verdict("arctic fox", answer) for answer in ("reynard", "white animal", "animal")]
    assert said == ["less specific", "generic", "generic"]
    mixed = tmp_path / "mixed.yaml"
    mixed.write_text("parents: {t shirt: top}\nrule: head_noun\n")
    said = [load(str(mixed)).verdict(label, "shirt") for label in ("polo shirt", "t shirt")]
    assert said == ["less specific", "wrong"], "what the file says of a class goes before its name"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "fox,canid,animal\n", "the row fox,canid,animal is not child,parent"),
        ("b.csv", "fox,canid\ncanid,animal\nanimal,fox\n", "'fox' stands above itself"),
        ("c.yaml", "parent: {}\n", "has parent; known are parents, synonyms, generic, rule"),
        ("d.yaml", "- fox\n", "must hold parents"),
        ("e.yaml", "{", "is no YAML"),
        ("f.yaml", "rule: verbs\n", "rule=verbs: choose one of none, head_noun, car"),
        ("g.txt", "", "give method.taxonomy=names .*a shipped one .digits, fashion"),
    ],
)
def test_a_bad_taxonomy_is_refused_before_anything_is_computed(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    split = Split((Item("1", 0, "fox"),), ("fox",), "?", "?")
    prompting = SpeciaRLPrompt(seed=1, taxonomy=str(tmp_path / name))
    with pytest.raises(UserError, match=f"^method.taxonomy.*{said}"):
        prompting.sources(Task(split, {"test": split}, None, "", {}))


def test_wordnets_nouns(tmp_path):
    lines = [
        "  1 This software and database",
        "00001740 03 n 01 entity 0 000 | that which is perceived",
        "01503061 05 n 01 bird 0 001 @ 00001740 n 0000 | warm-blooded",
        "02058221 05 n 02 albatross 0 mollymawk 0 002 @ 01503061 n 0000 ~ 02058594 n 0000 | large birds",
        "02058594 05 n 02 wandering_albatross 0 Diomedea_exulans 0 001 @ 02058221 n 0000 | very large",
        "09999999 18 n 01 bird 1 001 @ 00001740 n 0000 | a person",
    ]
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    taxonomy = load(str(tmp_path))
    verdicts = {
        "diomedea exulans": "specific",
        "mollymawk": "less specific",
        "bird": "less specific",
        "entity": "generic",
        "gull": "wrong",
        "0": "wrong",
    }
    assert {answer: taxonomy.verdict("Wandering Albatross", answer) for answer in verdicts} == verdicts
    assert taxonomy.verdict("bird", "wandering albatross") == "more specific"
    # a name that it lacks goes by its last word
    assert taxonomy.verdict("Laysan Albatross", "bird") == "less specific"


def test_the_official_lists_of_aircraft(tmp_path):
    for what, names in {
        "variant": ["737-200", "A320", "A321"],
        "family": ["Boeing 737", "A320", "A320"],
        "manufacturer": ["Boeing", "Airbus", "Airbus"],
    }.items():
        rows = "".join(f"{image:07d} {name}\n" for image, name in enumerate(names))
        (tmp_path / f"images_{what}_train.txt").write_text(rows)
    taxonomy = load(str(tmp_path))
    assert [taxonomy.verdict("737-200", said) for said in ("boeing 737", "Boeing", "aircraft")] == [
        *["less specific"] * 2,
        "generic",
    ]
    assert [taxonomy.verdict("A320", said) for said in ("A321", "Airbus")] == ["wrong", "less specific"]


def made(*answers, label="ankle boot"):
    return [
        Prediction(str(n), label, 0, "", False, False, Reply(tagged(answer) if answer else "boot", 5, False, True))
        for n, answer in enumerate(answers)
    ]


def test_what_an_evaluation_reports():
    task = Task(Split((), (), "", ""), {"test": Split((), FASHION, "?", "?")}, None, "", {})
    prompting = SpeciaRLPrompt(seed=1, taxonomy="fashion")
    predictions = made("ankle boot", "shoe", "boot", "clothing", "None", "sandal", "ankle boot", "")
    columns = prompting.extra_columns(task, "test", [*predictions, *made("shoe", label="")])
    assert columns["verdict"] == [
        *("specific", "less specific", "less specific", "generic", "abstain", "wrong", "specific", "unparsable", None),
    ]
    columns = prompting.extra_columns(task, "test", predictions)
    facts = prompting.diagnostics(task, "test", Answers(predictions, 0.0, columns=columns))["specificity"]
    # 5 of 8 are correct, 2 of these specific: 2 * 5/8 * 2/5 / (5/8 + 2/5) = 20/41
    assert (facts["correctness"], facts["specificity"]) == (5 / 8, 2 / 5)
    assert facts["harmonic_mean"] == pytest.approx(20 / 41)
    assert facts["verdicts"]["less specific"] == 2 / 8 and sum(facts["verdicts"].values()) == 1
    assert speciarl.measures([None]) == {} and speciarl.measures(["wrong"])["harmonic_mean"] == 0
    assert prompting.answer(tagged("None")) is None and prompting.answer(tagged("Shoe")) == "shoe"


def test_it_asks_without_a_list():
    split = Split((Item("1", 0, "bag"),), FASHION, "?", "What type of clothing is in the photo?", {"bag": ("tote",)})
    for question, start in (("general", speciarl.QUESTION), ("data", split.open_question)):
        prompting = SpeciaRLPrompt(seed=1, taxonomy="fashion", question=question)
        task = Task(split, {"test": split}, None, "", {})
        for asked in (*prompting.train_prompts(task), *prompting.evaluation_prompts(task, "test")):
            assert asked.text == f"{start}{speciarl.ENDING}" and asked.choices == () and asked.label == "bag"
            assert reward()([Sample(asked, tagged("tote")), Sample(asked, tagged("accessory"))]) == [1, 0]
    assert "None" in speciarl.ENDING and not any(name in speciarl.QUESTION + speciarl.ENDING for name in FASHION)
    with pytest.raises(UserError, match="method.list_share=0.4: SpeciaRL lists no names"):
        SpeciaRLPrompt(seed=1, taxonomy="fashion", list_share=0.4)


@pytest.mark.slow
def test_it_is_the_papers_configuration(compose):
    config = validate(compose("method=speciarl", "model=qwen2_5_vl_7b", "gpus=0"))
    trainer, lora = config.trainer, config.model.lora
    assert (trainer.group_size, trainer.learning_rate, trainer.beta, trainer.steps_per_rollout) == (10, 3e-5, 0.01, 2)
    assert (lora.r, lora.alpha, trainer.prompts_per_update, trainer.epochs) == (64, 32, 128, 15)
    assert "(language|text)_model" in lora.targets and config.rewards["specificity"]["group_size"] == 10
    with pytest.raises(UserError, match="data.open_question=What has no effect: method.question=general"):
        validate(compose("method=speciarl", "data.open_question=What"), ["data.open_question=What"])


def test_a_class_named_none_is_refused():
    split = Split((Item("1", 0, "None"),), ("None",), "?", "?")
    with pytest.raises(UserError, match="a class is named 'none'"):
        SpeciaRLPrompt(seed=1, taxonomy="names").sources(Task(split, {"test": split}, None, "", {}))


RUN = [
    *["method=speciarl", "data=fashion", "tracking=none", "label_scoring=false", "trainer.evaluate_every=0"],
    *["trainer.updates=40", "setting.test_per_class=60"],
]


@pytest.mark.faults
def test_it_learns_and_answers_alike_afterwards(runner, compose, tmp_path):
    run, folder, rows = tmp_path / "run", tmp_path / "exported", tmp_path / "rows.csv"
    rows.write_text("ankle boot,boot\nboot,shoe\nsandal,shoe\nshoe,garment\n")
    assert runner(run, [*RUN, f"method.taxonomy={rows}"]) == 0
    rows.unlink()  # new pictures have no labels to compare with
    result = json.loads((run / "metrics.json").read_text())
    before, after = (result[phase]["test"]["specificity"] for phase in ("before", "after"))
    assert after["harmonic_mean"] > before["harmonic_mean"] + 0.04
    assert after["verdicts"]["unparsable"] == 0
    rows = pyarrow.parquet.read_table(run / "predictions.parquet").to_pylist()
    assert {row["verdict"] for row in rows} <= set(speciarl.KINDS) and all(
        (row["verdict"] == "specific") == row["correct"] for row in rows if row["verdict"] != "unparsable"
    )
    assert export.main([str(run), str(folder)]) == 0
    assert str(tmp_path) not in (folder / "run" / "config.yaml").read_text()
    images = task.build(validate(compose(*RUN))).task.images
    tested = expected(run)[:20]
    for place in (run, folder):
        classifier = Classifier.load(place)
        answers = classifier({row["image"]: images.open(row["image"]) for row in tested})
        assert [answer.reply for answer in answers] == [row["completion"] for row in tested]
        assert [answer.label for answer in answers] == [row["answer"] or None for row in tested]
        classifier.close()


@pytest.mark.faults
def test_killed_and_resumed_it_is_the_same(runner, tmp_path):
    short = [*RUN, "trainer.updates=6", "checkpoint.every=2", "setting.test_per_class=5"]
    assert runner(tmp_path / "whole", short) == 0
    assert runner(tmp_path / "killed", short, Kill("common.training.engine:Engine.step", 5)) == -9
    assert runner(tmp_path / "killed", short) == 0
    for name in ("metrics.jsonl", "model/adapter_model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    tables = [pyarrow.parquet.read_table(tmp_path / name / "predictions.parquet") for name in ("whole", "killed")]
    assert tables[0].equals(tables[1])
