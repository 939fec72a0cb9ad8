"""Show how far the category embeddings of a run have moved, and which are similar: a table and a figure.

    python -m alert.inspect outputs/<run>/model/embeddings

Shapes: C categories, m tokens of an image, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alert.bank import embeddings as bank
from alert.bank import file as bank_file
from common.counted import counted
from common.report.figures import drawable, literal_text
from common.runtime import process
from common.runtime.progress import SOON, watched
from common.types import UserError

SHOWN = 40  # number of categories in the table


def rows(folder: Path) -> list[tuple[str, float, float, str, float]]:
    """Return name, norm, drift as a share of the initial norm, nearest category and its cosine, largest drift first.

    Raises:
        UserError: The folder holds no bank.
    """
    names = bank_file.facts(folder)["names"]
    if not (folder / bank_file.BEGUN).is_file():
        raise UserError(f"{folder} does not say what the bank began from; only a run's model/embeddings does")
    entries, begun = bank_file.read(folder, names), bank_file.read_begun(folder)
    bank_file.check_fits(folder / bank_file.BEGUN, begun, entries.shape, "copy both files from one run")
    norms, moved = entries.flatten(1).norm(dim=1).tolist(), bank.drift(entries, begun).tolist()
    indices, cosines = bank.nearest(entries)
    nearest = [names[index] for index in indices.tolist()]
    categories = zip(names, norms, moved, nearest, cosines.tolist(), strict=True)
    return sorted(categories, key=lambda row: -row[2])


def table(categories: Sequence[tuple[str, float, float, str, float]]) -> Table:
    """Return a table of the categories that moved most."""
    shown = Table(
        title=f"{min(SHOWN, len(categories))} of {counted(len(categories), 'category')}, the most moved first"
    )
    shown.add_column("category")
    for name in ("norm", "moved %", "nearest", "cosine"):
        shown.add_column(name, justify="right")
    for name, norm, moved, nearest, cosine in categories[:SHOWN]:
        shown.add_row(Text(name), f"{norm:.2f}", f"{100 * moved:.2f}", Text(nearest), f"{cosine:.3f}")
    return shown


@literal_text
def figure(categories: Sequence[tuple[str, float, float, str, float]], path: Path) -> None:
    """Draw every category by similarity to its nearest one and by drift."""
    picture, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    axis.scatter([row[4] for row in categories], [100 * row[2] for row in categories], s=18, color="#2f6db3", alpha=0.7)
    for name, _, moved, _, cosine in categories[:10]:
        axis.annotate(drawable(name), (cosine, 100 * moved), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axis.set(xlabel="cosine to the nearest other category", ylabel="moved since the beginning (% of the norm)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    picture.savefig(path, dpi=130)
    plt.close(picture)


def main(arguments: Sequence[str]) -> None:
    """Print the table and write bank.png beside the bank."""
    if len(arguments) != 1:
        sys.exit("error: give one folder: python -m alert.inspect <run>/model/embeddings")
    folder = Path(arguments[0]).expanduser()
    try:
        with watched(f"reading {folder}", SOON):
            categories = rows(folder)
    except UserError as error:
        sys.exit(f"error: {error}")
    Console().print(table(categories))
    figure(categories, folder / "bank.png")
    print(f"wrote {folder / 'bank.png'}")


if __name__ == "__main__":
    process.ensure_utf8()
    main(sys.argv[1:])
