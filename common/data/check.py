"""Check which datasets are present, complete and of the published size: `make data-check DATA=/folder`.

`python -m common.data.check dtd eurosat` checks only these; `key=value` overrides a configuration as in run.py. The
exit code is 0 unless a dataset that was found has a problem.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.cli import CommandParser, program
from common.config import composition as config
from common.config.command_line import literal
from common.config.schema import CONF, DataConfig
from common.counted import agree, counted
from common.data.listing import documentation
from common.data.source import find, load
from common.runtime import process
from common.runtime.progress import bar, doing, watched
from common.types import BadImage, Source, UserError

SIZES = ("classes", "train", "val", "test")


@dataclass(frozen=True)
class Report:
    """Result of checking one dataset. `problems` are half sentences, the most serious first."""

    data: DataConfig
    found: bool
    origin: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def examine(data: DataConfig) -> Report:
    """Read a dataset, compare its sizes with the published ones and look for all its images."""
    if data.folder and not find(data).folder.exists():
        return Report(data, found=False)
    try:
        source = load(data)
    except UserError as error:
        return Report(data, found=True, problems=(str(error).removeprefix(f"data={data.name}: "),))
    sizes = {"classes": len(source.names), **{part: len(getattr(source, part)) for part in SIZES[1:]}}
    problems = (*_missing_images(data.name, source), *_differences(data.published, sizes))
    return Report(data, True, source.origin, sizes, problems)


def _missing_images(name: str, source: Source) -> Iterator[str]:
    """Yield a problem if images are missing or empty; only the dataset's own images, not those of another dataset."""
    items = (*source.train, *source.val, *source.test)
    own = [item.image for item in items if item.image.startswith(f"{name}/")]
    count, first = 0, ""
    for image in own:
        try:
            source.images.size(image)
        except BadImage as error:
            count, first = count + 1, first or f"{image} ({error})"
    if count:
        yield f"{count:,} of {counted(len(own), 'image')} {agree(count, 'is', 'are')} missing or empty, first: {first}"


def _differences(published: dict[str, int], sizes: dict[str, int]) -> Iterator[str]:
    """Yield the sizes that differ from the published ones; a part without images is not compared."""
    different = [key for key in SIZES if sizes[key] and sizes[key] != published.get(key, sizes[key])]
    if different:
        yield "not the published sizes: " + ", ".join(
            f"{key} {sizes[key]:,} of {published[key]:,}" for key in different
        )


def configured(names: Sequence[str], overrides: Sequence[str]) -> list[DataConfig]:
    """Compose the configurations of the datasets called `names`; without names, of all.

    Raises:
        UserError: There is no such dataset.
    """
    known = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"there is no data={unknown[0]}; there are {', '.join(known)}")
    # Hydra keeps one global instance per process, which another caller may have left initialised
    config.register()
    GlobalHydra.instance().clear()
    datasets = []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            for name in names or known:
                composed = hydra.compose("config", [f"data={name}", *literal(overrides)])
                data = OmegaConf.to_object(composed.data)
                assert isinstance(data, DataConfig)
                datasets.append(data)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from error
    return datasets


def table(reports: Sequence[Report]) -> Table:
    """Return a table with one row per dataset."""
    title = Text(f"datasets in {reports[0].data.root}", style="table.title")
    shown = Table(title=title, title_justify="left")
    for name in ("dataset", "there", "split"):
        shown.add_column(name)
    for name in (*SIZES, "published", "problems"):
        shown.add_column(name, justify="right")
    for report in reports:
        sizes = [f"{report.sizes[key]:,}" if report.sizes.get(key) else "–" for key in SIZES]
        state = "found" if report.found else "missing"
        problems = Text(str(len(report.problems)), style="red") if report.problems else Text("–")
        dataset, origin = Text(report.data.name), Text(report.origin or "–")
        shown.add_row(dataset, state, origin, *sizes, _published(report), problems)
    return shown


def _published(report: Report) -> str:
    published = report.data.published
    if not report.sizes or not published:
        return "–"
    return "differs" if any(_differences(published, report.sizes)) else "ok"


def lines(reports: Sequence[Report]) -> Iterator[str]:
    """Yield the first problem of every dataset and where the documentation is."""
    for report in reports:
        if report.problems:
            section = documentation(report.data.name)
            problem = report.problems[0]
            yield f"{report.data.name}: {problem}" + ("" if section in problem else f"; see {section}")
    if missing := [report.data.name for report in reports if not report.found]:
        yield f"missing: {', '.join(missing)}; docs/datasets.md has a section on each"


def main(arguments: Sequence[str]) -> int:
    """Print the table and the problems; return the exit code."""
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    console = Console(width=None if Console().is_terminal else 140)
    with watched("reading the configurations of " + (", ".join(names) or "all datasets")):
        chosen = configured(names, overrides)
        reports = []
        with bar("looking at the datasets", len(chosen)) as shown:
            for data in chosen:
                with doing(f"looking at {data.name}"):
                    reports.append(examine(data))
                shown.advance(data.name)
    console.print(table(reports))
    for line in lines(reports):
        console.print(Text(line), soft_wrap=True)
    return 1 if any(report.problems for report in reports) else 0


def command() -> int:
    """Parse the command line and run the check."""
    parser = CommandParser(
        prog=program("data-check"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="dataset|key=value", help="default: every dataset")
    try:
        return main(parser.parse_args().words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    process.ensure_utf8()
    sys.exit(command())
