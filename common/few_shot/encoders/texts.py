"""Write the texts that CLIP reads for a class: templates, or sentences of a language model (CuPL's, CaFo's)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common.counted import counted
from common.data.listing import invisible, visible
from common.types import UserError

KEY = "clip.prompts"
MARKS = ("<start_of_text>", "<end_of_text>")  # open_clip's tokenizer turns them into its special tokens


def of_templates(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Fill every template with every name; underscores in names become spaces.

    >>> of_templates(["king_crab"], ["a photo of a {}.", "{} texture."])
    [['a photo of a king crab.', 'king crab texture.']]

    Raises:
        UserError: There is no template, or one without {} or with one of MARKS.
    """
    if not templates:
        raise UserError("clip.templates is empty; give one or more, such as ['a photo of a {}.']")
    if bad := [template for template in templates if template.count("{}") != 1]:
        raise UserError(f"clip.templates: '{bad[0]}' must have one {{}}, where the class name stands")
    return _without_marks(
        "clip.templates", names, [[template.replace("{}", spoken(name)) for template in templates] for name in names]
    )


def spoken(name: str) -> str:
    """Return a class name as the text tower reads it."""
    return name.replace("_", " ")


def of_file(path: Path, names: Sequence[str]) -> list[list[str]]:
    """Read the sentences of every class: a JSON object from the name (spaces, not underscores) to a list of sentences.

    Args:
        path: Path of the file. It may hold more classes. A sentence that occurs twice counts twice.
        names: Class names.

    Raises:
        UserError: The file cannot be read, lacks a class, has no list of sentences for a class, or has a sentence with
            one of MARKS.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{KEY}={path} cannot be read ({error.strerror}); give a JSON file, or null") from error
    except ValueError as error:
        raise UserError(
            f"{KEY}={path} is not JSON ({error}); give an object from names to lists of sentences"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{KEY}={path} holds a {type(content).__name__}, not an object from names to lists of sentences"
        )
    wanted = [spoken(name) for name in names]
    if missing := [name for name in dict.fromkeys(wanted) if name not in content]:
        shown = ", ".join(f"'{name}'" for name in missing[:5]) + (", …" if len(missing) > 5 else "")
        # Invisible characters (such as a soft hyphen) make keys differ that look the same: name them in the error.
        alike = {visible(key): character for key in content if (character := invisible(key))}
        shown += next(
            (f"; its key '{name}' has the invisible character {alike[name]}" for name in missing if name in alike), ""
        )
        raise UserError(
            f"{KEY}={path} lacks {len(missing)} of {counted(len(set(wanted)), 'class')}: {shown}"
            "; keys are the class names of the run, letter by letter"
        )
    for name in wanted:
        sentences = content[name]
        if (
            not isinstance(sentences, list)
            or not sentences
            or not all(isinstance(s, str) and s.strip() for s in sentences)
        ):
            raise UserError(f"{KEY}={path}: '{name}' must have a list of one or more sentences")
    return _without_marks(f"{KEY}={path}", names, [content[name] for name in wanted])


def _without_marks(key: str, names: Sequence[str], sentences: list[list[str]]) -> list[list[str]]:
    for name, each in zip(names, sentences, strict=True):
        for mark in MARKS:
            if marked := next((sentence for sentence in each if mark in sentence), None):
                raise UserError(
                    f"{key}: '{marked}' of class '{name}' has '{mark}', which ends a text for CLIP; reword it"
                )
    return sentences
