"""Show what a run would ask (`manifest=true`): a few prompts of every split in full. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.data import duplicates
from common.data.manifest import notes_of
from common.data.sampling import too_few
from common.evaluation.evaluate import evenly_spaced
from common.types import Prompt
from common.vlm.prompting import TaskPrompts

SHOWN = 3  # prompts of each split
LISTED = 20  # class names shown of a list


def shortened(text: str, choices: Sequence[str], listed: int = LISTED) -> str:
    """Return the text of a prompt, with a long list of names cut after the first ones.

    A list is found as the choices in their order with the same separator between all of them.

    >>> shortened("Which? Choose from a, b, c, d.", ("a", "b", "c", "d"), listed=2)
    'Which? Choose from a, b, … (4 names).'
    >>> shortened("Which? a or b", ("a", "b"), listed=2), shortened("What is it?", ("a", "b", "c"), listed=2)
    ('Which? a or b', 'What is it?')
    """
    if len(choices) <= listed:
        return text
    start = text.find(choices[0])
    while start >= 0:
        after = start + len(choices[0])
        second = text.find(choices[1], after)
        separator = text[after:second] if second > after else ""
        if text.startswith(whole := separator.join(choices), start):
            cut = separator.join([*choices[:listed], f"… ({len(choices):,} names)"])
            return text[:start] + cut + text[start + len(whole) :]
        start = text.find(choices[0], start + 1)
    return text


def question(split: str, prompt: Prompt) -> Text:
    """Format one prompt; square brackets in it are not markup."""
    where = " (the picture behind the text)" if prompt.image_last else ""
    lines = [f"{split} · {prompt.image} · {prompt.label}{where}"]
    if prompt.system is not None:
        lines.append(f"system: {prompt.system}")
    lines.append(shortened(prompt.text, prompt.choices))
    head, *rest = lines
    return Text.assemble((head, "bold"), *(f"\n{line}" for line in rest), "\n")


def overview(manifest: Mapping[str, Any]) -> Table:
    """Return a table with images, classes, origin of the split and number of duplicates of each split."""
    table = Table(title=Text(f"{manifest['data']} · {manifest['setting']}", style="table.title"), title_justify="left")
    table.add_column("split")
    for name in ("images", "classes"):
        table.add_column(name, justify="right")
    table.add_column("whose split")
    table.add_column("there twice", justify="right")
    twice = {image for groups in manifest.get("duplicates", {}).values() for group in groups for image in group}
    origins = manifest["origins"]
    for name, split in manifest["splits"].items():
        origin = origins.get(name, next(iter(origins.values())))
        classes = len({row[1] for row in split["rows"]})
        double = sum(row[0] in twice for row in split["rows"])
        table.add_row(Text(name), f"{split['n']:,}", f"{classes:,}", Text(origin), f"{double:,}" if double else "–")
    return table


def remarks(manifest: Mapping[str, Any], task_prompts: TaskPrompts | None) -> list[str]:
    """Return notes on the data: what was passed over, duplicates, classes with too few images, undecided names."""
    lines = notes_of(manifest)
    if found := manifest.get("duplicates"):
        lines.append(duplicates.worded(found))
    if short := manifest["short_classes"]:
        lines.append(too_few(short, manifest["shots"]))
    if task_prompts is not None and not task_prompts.prompting.final:
        lines.append("the method chooses the names once the model has seen the pictures; those above stand for them")
    return lines


def show(
    manifest: Mapping[str, Any], task_prompts: TaskPrompts | None, path: Path, console: Console | None = None
) -> None:
    """Print a few prompts of every split, the summary, and the path of the manifest.

    Args:
        manifest: The run's manifest.
        task_prompts: Prompts of the run; None: its learner has none.
        path: File of the manifest.
        console: Standard output if None.
    """
    console = console or Console(width=None if Console().is_terminal else 120)
    parts = {} if task_prompts is None else {"train": task_prompts.train, **task_prompts.evaluation}
    for split, prompts in parts.items():
        for prompt in evenly_spaced(prompts, SHOWN):
            console.print(question(split, prompt), soft_wrap=True)
    console.print(overview(manifest))
    for line in remarks(manifest, task_prompts):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"all images, labels and hashes: {path}"), soft_wrap=True)
