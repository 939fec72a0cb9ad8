"""Names that cannot work are refused with the reason: tags of replies, special tokens, what nobody sees, commas."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from clsrl.prompting import ClassListPrompt
from common.config.composition import validate
from common.data import folder, names, source
from common.data.listing import Location, invisible
from common.few_shot.encoders import texts
from common.models import meter
from common.models.tiny import gemma3, qwen2_vl
from common.predict import trained_model
from common.serve.service import PredictionService
from common.types import CATEGORY, Item, Split, Task, UserError
from common.vlm import check

HIDDEN = {
    "zero width space": ("\u200b", "U+200B (zero width space)"),
    "soft hyphen": ("\u00ad", "U+00AD (soft hyphen)"),
    "direction mark": ("\u200e", "U+200E (left-to-right mark)"),
    "embedding": ("\u202b", "U+202B (right-to-left embedding)"),
    "isolate": ("\u2066", "U+2066 (left-to-right isolate)"),
    "byte order mark": ("\ufeff", "U+FEFF (zero width no-break space)"),
    "word joiner": ("\u2060", "U+2060 (word joiner)"),
    "joiner in ASCII": ("\u200d", "U+200D (zero width joiner)"),
    "filler": ("\u3164", "U+3164 (hangul filler)"),
    "empty Braille": ("\u2800", "U+2800 (braille pattern blank)"),
    "selector of a letter": ("\ufe0f", "U+FE0F (variation selector-16)"),
    "tag": ("\U000e0041", "U+E0041 (tag latin capital letter a)"),
    "escape": ("\x1b", "U+001B (a control character)"),
    "NUL": ("\0", "U+0000 (a control character)"),
    "half a letter": ("\ud800", "U+D800 (a control character)"),
}
WRONG = {
    **{tag: (f"a{tag}b", f"has '{tag}', a part of the form of replies") for tag in ("<think>", "</think>")},
    **{tag: (f"a{tag}b", f"has '{tag}', a part of the form of replies") for tag in ("<answer>", "</Answer>")},
    "place": ("cat <category>", "has '<category>', which marks the place of an embedding"),
    **{name: (f"c{letter}at", f"has the invisible character {said}") for name, (letter, said) in HIDDEN.items()},
    "nothing": ("_", "has no letter"),
}
SEEN = {
    "Persian": "\u0645\u06cc\u200c\u062e\u0648\u0631\u0645",
    "Hindi": "\u0915\u094d\u200d\u0937",
    "cook": "\U0001f469\u200d\U0001f373",
    "heart": "\u2764\ufe0f",
    "burning heart": "\u2764\ufe0f\u200d\U0001f525",
    "key": "1\ufe0f\u20e3",
    "England": "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "no-break": "sea\u00a0lake",
    "brackets": "a<b>c [d] {e}",
    "thinking": "the think tank",
}


@pytest.mark.parametrize("name", SEEN.values(), ids=SEEN)
def test_what_belongs_into_a_name_stays(name):
    assert names.objection(name) == "" and list(names.objections([name, "cat"])) == []


@pytest.mark.parametrize(("name", "why"), WRONG.values(), ids=WRONG)
def test_one_name(name, why):
    assert names.objection(name) == why


def test_the_character_is_named_wherever_it_stands():
    for letter, said in HIDDEN.values():
        for text in (f"{letter}cat", f"cat{letter}", f"c {letter} at"):
            assert invisible(text) == said


def photos(root, *classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(b"x")
    return Location("folder", root, root)


@pytest.mark.parametrize("name", ["<think>", "c\u200bat", "c\u00adat", "\u200fcat"])
def test_a_folder_of_such_a_name(tmp_path, name):
    with pytest.raises(UserError, match=f"class '.*' {names.objection(name).replace('(', '.').replace('+', '.')[:30]}"):
        folder.read(photos(tmp_path, "dog", "cat", name))


def test_a_label_of_such_a_name(tmp_path):
    (tmp_path / "a.csv").write_text("path,label\na.png,cat\nb.png,cat\u200b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"class 'cat' has the invisible character U\+200B \(zero width space\)"):
        folder.read(Location("folder", tmp_path, tmp_path / "a.csv"))


def test_two_names_that_look_the_same_are_one_answer():
    both = ["\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e"]  # with a joiner and without: both may be names
    (why,) = names.objections(both)
    assert why.startswith("classes '") and why.endswith("are one answer; give them other names")


def test_every_reader_refuses_them():
    """Whatever reads a dataset: hub copies, split files and readers of users have names, too."""
    items = (Item("a/1", 0, "cat"), Item("a/2", 1, "<answer>"))
    whole = SimpleNamespace(names=("cat", "<answer>"), train=items, val=(), test=())
    assert next(source.problems(whole)) == "class '<answer>' has '<answer>', a part of the form of replies; rename it"


@pytest.mark.parametrize("word", ["<answer>", "k\u200bitty"])
def test_other_words_for_a_class(tmp_path, word):
    path = tmp_path / "aliases.json"
    path.write_text(json.dumps({"cat": ["puss", word]}))
    with pytest.raises(UserError, match=f"data.aliases={path}: '.*' of class 'cat' has .*; correct it"):
        names.read_aliases(path, ["cat", "dog"])


def test_a_key_with_a_hidden_character_is_no_riddle(tmp_path):
    path = tmp_path / "aliases.json"
    path.write_text(json.dumps({"cat\u200b": ["puss"]}))
    with pytest.raises(UserError, match=r"no class 'cat.' \(it has the invisible character U\+200B"):
        names.read_aliases(path, ["cat", "dog"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "names: there is none"),
        (["cat", "<answer>dog"], "names: class '<answer>dog' has '<answer>', a part of the form of replies"),
        (["cat", "do\u200dg"], r"names: class 'dog' has the invisible character U\+200D"),
        (["cat", "Cat."], "names: classes 'cat' and 'Cat.' are one answer"),
    ],
)
def test_names_for_a_prediction(given, message):
    with pytest.raises(UserError, match=message):
        trained_model.check_names(given)


@pytest.mark.slow
def test_a_run_is_asked_about_other_names(tmp_path, compose):
    """They are refused before the model is loaded, its special tokens too."""
    config = validate(compose("method=nothinking", "data=digits"))
    split = {"names": ["one", "two"]}
    found = {"splits": {"train": split, "test": split}, "fingerprint": "", "origins": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    run = trained_model.TrainedModel(tmp_path, tmp_path, tmp_path / "model")
    assert trained_model.data_of(run, config, ["cat", "dog"]).task.evaluation["test"].names == ("cat", "dog")
    for name, why in (
        ("<answer>", "a part of the form of replies"),
        ("a<|im_end|>", "is a special token of model=tiny"),
    ):
        with pytest.raises(UserError, match=why):
            trained_model.data_of(run, config, ["cat", name])


@pytest.mark.parametrize("label", ["<answer>", "c\u200bat"])
def test_a_correction_on_the_page(tmp_path, label):
    with pytest.raises(UserError, match="the name '.*' has "):
        PredictionService(SimpleNamespace(names=("cat",)), tmp_path).keep(b"", label, None)


def test_a_path_that_was_copied_with_a_hidden_character(tmp_path):
    location = Location("folder", tmp_path, tmp_path / "\u202aphotos")
    with pytest.raises(UserError, match=r"does not exist \(the path has the invisible character U\+202A"):
        location.need(".")
    with pytest.raises(UserError, match=r"photos exists \(the path has the invisible character U\+202A"):
        replace(location, tried=(tmp_path / "\u202aphotos", tmp_path / "b" / "\u202aphotos")).need(".")


def task(classes=("cat", "dog"), question="What is in the photo?", aliases=None):
    split = Split((), tuple(classes), question, "What is it?", aliases or {})
    return Task(split, {"test": split}, None, "", {})


@pytest.fixture(scope="module")
def meters():
    return {"qwen2_vl": qwen2_vl.meter(), "gemma3": gemma3.meter(lambda: ["what is in the photo? cat dog"])}


TOKENS = [("qwen2_vl", "<|im_end|>"), ("qwen2_vl", "<|image_pad|>"), ("gemma3", "<start_of_turn>"), ("gemma3", "<eos>")]


@pytest.mark.parametrize(("model", "token"), TOKENS)
def test_special_tokens_in_names_questions_and_words(meters, compose, model, token):
    config = validate(compose("method=nothinking", "data=digits"))
    measure = meters[model]
    check.check_words(config, measure, task())
    bad = f"a {token} b"
    with pytest.raises(UserError, match=r"class 'a .* b': '.*' is a special token of model=") as refusal:
        check.check_words(config, measure, task(("cat", bad)))
    assert f"'{token}' is a special token" in str(refusal.value)
    with pytest.raises(UserError, match="'a .* b', a word for 'cat': '.*' is a special token"):
        check.check_words(config, measure, task(aliases={"cat": (bad,)}))
    for key in ("question", "open_question"):
        asked = replace(config, data=replace(config.data, **{key: f"What? {token}"}))
        with pytest.raises(UserError, match=f"data.{key}=What.*: '.*' is a special token"):
            check.check_words(asked, measure, task())


def test_the_first_special_token_is_named(meters):
    assert meters["qwen2_vl"].special_token("x<|im_end|>y<|im_start|>") == "<|im_end|>"
    assert meters["qwen2_vl"].special_token("<|IM_END|> <im_end>") is None


def test_the_place_of_an_embedding_in_a_question(meters, compose):
    config = validate(compose("method=nothinking", "data=digits", f"data.question='Which {CATEGORY}?'"))
    with pytest.raises(UserError, match="data.question=Which <category>.: '<category>' marks the place"):
        check.check_words(config, meters["qwen2_vl"], task())


def test_they_are_refused_before_anything_is_measured(compose, monkeypatch):
    """The check of every run of a language model."""
    config = validate(compose("method=nothinking", "data=digits", "data.question='What <|im_end|> is it?'"))
    monkeypatch.setattr(meter.PromptMeter, "tokens", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"data.question=.* '<\|im_end\|>' is a special token of model=tiny"):
        check.check_model(config, task(), [["one"]])


def test_marks_of_clip(tmp_path):
    with pytest.raises(UserError, match="clip.templates: 'cat<end_of_text> there' of class 'cat' has '<end_of_text>'"):
        texts.of_templates(["cat"], ["a photo of a {}.", "{}<end_of_text> there"])
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps({"cat": ["Small.", "<start_of_text> Big."]}))
    with pytest.raises(UserError, match=f"clip.prompts={path}: '<start_of_text> Big.' of class 'cat'"):
        texts.of_file(path, ["cat"])


def test_sentences_under_a_hidden_character(tmp_path):
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps({"cat\u200b": ["Small."]}))
    with pytest.raises(UserError, match=r"'cat'; its key 'cat' has the invisible character U\+200B"):
        texts.of_file(path, ["cat"])


def test_commas_are_in_the_way_of_a_list_alone(tmp_path):
    """`salt, pepper` is a class where no question separates names by commas."""
    found = folder.read(photos(tmp_path, "salt, pepper", "sugar"))
    assert found.names == ("salt, pepper", "sugar")
    asked = replace(task(found.names), evaluation={"test": Split(found.train, found.names, "Which?", "What?")})
    with pytest.raises(UserError, match="class 'salt, pepper' has a comma.*setting=open_set"):
        ClassListPrompt(instruction="think", seed=1).evaluation_prompts(asked, "test")
    asked_openly = ClassListPrompt(instruction="think", seed=1, list_share=0).evaluation_prompts(asked, "test")
    assert [prompt.label for prompt in asked_openly] == ["salt, pepper", "sugar"]


def test_a_class_of_the_model_may_have_a_comma_or_no_letter_on_the_page(tmp_path):
    desk = PredictionService(SimpleNamespace(names=("salt, pepper", "\U0001f415")), tmp_path)
    for label in ("salt, pepper", "\U0001f415"):
        with pytest.raises(UserError, match="not a picture"):  # the name was taken
            desk.keep(b"", label, None)
    for label in ("a, b", "!!"):
        with pytest.raises(UserError, match="is no class name"):
            desk.keep(b"", label, None)
