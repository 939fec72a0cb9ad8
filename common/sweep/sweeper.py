"""Hydra sweeper for the papers' tables and figures: `python run.py -cd sweeps -cn alert_table1`; for several at once
`-cn mini_paper` (common/sweep/plan.py).

Hydra's own sweeper runs one product of values; this one runs a list of products, and points that need the runs of other
points (common/sweep/plan.py). All points are composed and checked before the first one runs, finished ones are skipped,
and a failed point stops only those that need it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from common.config import composition, suggest
from common.config.command_line import literal
from common.config.schema import Config
from common.counted import counted
from common.report.paper import page, results
from common.run.run_folder import RunFolder, best_effort
from common.runtime.progress import doing, progress
from common.sweep import dry, plan, plugin
from common.sweep.plan import LATER, RUN, Point, decides, expand
from common.types import UserError


@dataclass(frozen=True)
class Job:
    """A point with its folder. overrides: for Hydra; values: whole configuration; needs: folders of needed points."""

    point: Point
    folder: Path
    overrides: dict[str, str]
    values: dict[str, Any]
    needs: tuple[Path, ...]
    config: Config | None = None

    def shown(self, finished: bool) -> dry.Run:
        """Return the run for `dry=true`."""
        alike = tuple(each for each in self.overrides.items() if each[0] not in LATER)
        needs = [path.name for path in self.needs]
        assert self.config is not None
        return dry.Run(self.folder.name, self.values, self.config, finished, alike, needs)

    @property
    def finished(self) -> bool:
        """Whether its folder holds the result of exactly this configuration.

        Raises:
            UserError: It holds the result of another configuration.
        """
        return RunFolder(self.folder).finished_result(self.values) is not None


class PaperSweeper(Sweeper):
    """Sweeper of this module. Its keys: conf/hydra/sweeper/paper.yaml."""

    def __init__(self, **keys: Any) -> None:
        self.keys: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in keys.items()
        }
        self.cost: dict[str, Any] = self.keys["cost"]
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run what is not finished, in the order of dependencies, and write the pages."""
        assert self.config is not None and self.hydra_context is not None
        plugin.unregister(PaperSweeper)
        # plan: chapters, points, and which of them are finished
        given = self.given(arguments)
        chapters = plan.with_methods(self.chapters(), given.get("method"))
        for chapter in chapters:
            page.check(chapter.page)
        jobs, shown = self.jobs(chapters, given)
        finished = {job.folder for job in jobs if job.finished}
        if self.config.dry:
            here = "slurm" not in str(self.config.hydra.launcher.get("_target_", "")).lower()
            dry.show([job.shown(job.folder in finished) for job in jobs], self.cost, here)
            return None
        # run
        folder, pages = self.describe(chapters, shown, given)
        print(f"{folder}: {counted(len(jobs), 'point')}, {len(finished)} finished")
        returns = self.run(jobs, finished)
        # write the pages
        from common.report import publish  # here, because it imports matplotlib

        found = [publish.write_page(each, shown=True) for each in pages]
        if self.is_book:
            from common.report.html import sweep_page

            print(sweep_page.make_book(folder, self.keys["title"], chapters, found))
        with best_effort("the tracker"):
            for built, where in zip(found, pages, strict=True):
                publish.publish_to_wandb(built, where, self.config.tracking)
        for each in returns:
            _ = each.return_value  # raises the first failure
        return [returns]

    @property
    def is_book(self) -> bool:
        """Whether this sweep consists of others."""
        return bool(self.keys["chapters"])

    def chapters(self) -> list[plan.Chapter]:
        """Return the chapters of a book, or this sweep alone."""
        assert self.config is not None and self.hydra_context is not None
        if self.is_book:
            return plan.read(self.keys, plan.folders(self.hydra_context.config_loader))
        return [plan.alone(str(self.config.hydra.job.config_name), self.keys)]

    def jobs(
        self, chapters: Sequence[plan.Chapter], given: Mapping[str, Sequence[str]]
    ) -> tuple[list[Job], list[list[results.SweepRun]]]:
        """Return the points of all chapters with their folders, each once and those first that others need; and for
        each chapter the positions of its runs on the page.

        Args:
            chapters: Chapters of the sweep.
            given: Values of the command line.

        Raises:
            UserError: A point is not a valid run.
        """
        assert self.config is not None and self.hydra_context is not None
        composer = Composer(self.hydra_context.config_loader, self.config)
        print("composing and checking every point before the first one runs", flush=True)
        found: dict[Path, Job] = {}
        shown: list[list[results.SweepRun]] = [[] for _ in chapters]
        points = [(n, point) for n, one in enumerate(chapters) for point in expand(one.spec, one.values(given))]
        for number, point in progress(points, "composing", len(points)):
            jobs = composer.jobs(point)
            for job in jobs:
                found.setdefault(job.folder, job)
            # the last job is the point itself, those before it are needed by it
            seed, where = int(jobs[-1].values["seed"]), keys(jobs[-1], chapters[number].page)
            shown[number].append(results.SweepRun(jobs[-1].folder.name, seed, where))
        return sorted(found.values(), key=lambda job: job.point.depth), shown

    def given(self, arguments: Sequence[str]) -> dict[str, list[str]]:
        """Return the values of the command line by key."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        values: dict[str, list[str]] = {}
        for override in parser.parse_overrides(list(arguments)):
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise UserError(f"{override.input_line}: give the values one by one, separated by commas")
            swept = override.is_sweep_override()
            texts = list(override.sweep_string_iterator()) if swept else [override.get_value_element_as_str()]
            values[override.get_key_element()] = texts
        values.pop("dry", None)
        return values

    def describe(
        self,
        chapters: Sequence[plan.Chapter],
        shown: Sequence[list[results.SweepRun]],
        given: Mapping[str, Sequence[str]],
    ) -> tuple[Path, list[Path]]:
        """Save what the pages need. Return the sweep's folder and those of its chapters, beside those of the runs."""
        assert self.config is not None
        name, outputs = str(self.config.hydra.job.config_name), Path(self.config.hydra.sweep.dir)
        said = {key: ",".join(values) for key, values in given.items() if decides(key)}
        pages = []
        for chapter, runs in zip(chapters, shown, strict=True):
            values = {**chapter.given, **given}
            changed, chosen = chapter.parted({key: each for key, each in values.items() if decides(key)})
            pages.append(outputs / plan.folder_name(f"{name}-{chapter.name}" if self.is_book else name, said))
            results.Sweep(chapter.name, chapter.page, changed, runs, chosen).save(pages[-1])
        return outputs / plan.folder_name(name, said), pages

    def run(self, jobs: Sequence[Job], finished: set[Path]) -> list[JobReturn]:
        """Launch unfinished jobs. A job whose needs have no result is reported and skipped."""
        assert self.launcher is not None
        returns: list[JobReturn] = []
        left, ready = [job for job in jobs if job.folder not in finished], set(finished)
        # jobs of one depth do not depend on each other, so they are launched together
        for depth in sorted({job.point.depth for job in left}):
            wave = [job for job in left if job.point.depth == depth]
            for job in [job for job in wave if not ready.issuperset(job.needs)]:
                missing = next(path for path in job.needs if path not in ready)
                print(f"{job.folder.name}: left out, since {missing.name} has no result", file=sys.stderr)
                wave.remove(job)
            if not wave:
                continue
            batch = [literal([f"{key}={value}" for key, value in self.tagged(job.overrides)]) for job in wave]
            with doing(f"{len(wave)} of {counted(len(left), 'run')}"):
                done = self.launcher.launch(batch, initial_job_idx=len(returns))
            returns.extend(done)
            ready |= {job.folder for job, each in zip(wave, done, strict=True) if each.status == JobStatus.COMPLETED}
        return returns

    def tagged(self, overrides: Mapping[str, str]) -> list[tuple[str, str]]:
        """Add the sweep's name as a W&B tag. A run that another sweep has made keeps that one's tag."""
        assert self.config is not None
        tags = [] if "tracking.tags" in overrides else [("tracking.tags", f"[{self.config.hydra.job.config_name}]")]
        return [*overrides.items(), *tags]


class Composer:
    """Composes and checks points; those that differ only in seed and shots are composed once."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self.loader, self.master = loader, master
        self.composed: dict[tuple[tuple[str, str], ...], tuple[DictConfig, DictConfig]] = {}
        self.learners: dict[tuple[str, ...], tuple[str, set[str] | None]] = {}

    def jobs(self, point: Point) -> list[Job]:
        """Return the job of a point, after the jobs that it needs."""
        needed = {name: self.jobs(other) for name, other in point.needs.items()}
        folders = {name: jobs[-1].folder for name, jobs in needed.items()}
        overrides = {key: RUN.sub(lambda found: str(folders[found[1]]), v) for key, v in point.overrides.items()}
        overrides = self.fitting(overrides)
        cfg, task = self.compose(overrides)
        folder = Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir
        config: Any = OmegaConf.to_object(task)
        job = Job(point, folder, overrides, composition.plain(task), tuple(folders.values()), config)
        return [*(job for jobs in needed.values() for job in jobs), job]

    def fitting(self, overrides: Mapping[str, str]) -> dict[str, str]:
        """Return the overrides without those for other points: values of the command line are given to all of them."""
        name, own = self.learner(overrides)
        no_model = {"model"} if name == "few_shot" else set()
        return {key: value for key, value in overrides.items() if key not in no_model and not _of_others(key, own)}

    def learner(self, overrides: Mapping[str, str]) -> tuple[str, set[str] | None]:
        """Return the learner's name of a point, and the keys of its few-shot learner; None: it has none."""
        chosen = tuple(f"{key}={overrides[key]}" for key in ("method", "few_shot") if key in overrides)
        if chosen not in self.learners:
            cfg = self.loader.load_sweep_config(self.master, literal(chosen))
            keys = None if cfg.few_shot is None else {str(key) for key in cfg.few_shot}
            self.learners[chosen] = str(cfg.learner.name), keys
        return self.learners[chosen]

    def compose(self, overrides: Mapping[str, str]) -> tuple[DictConfig, DictConfig]:
        """Return the configuration with Hydra's part, and the configuration of the run, without its name.

        Raises:
            UserError: It is not valid.
        """
        # the key says which of LATER are set, too: an unset one must not keep the value of the point before
        fixed = tuple((key, "" if key in LATER else value) for key, value in overrides.items())
        if fixed not in self.composed:
            texts = literal([f"{key}={value}" for key, value in overrides.items()])
            cfg = self.loader.load_sweep_config(self.master, texts)
            task = _task(cfg)
            try:
                composition.validate(task, texts)
            except UserError as error:
                raise UserError(f"{' '.join(texts)}: {error}") from error
            self.composed[fixed] = cfg, task
        # set shots and seed in the shared configuration
        for each in (both := self.composed[fixed]):
            for key in LATER:
                if key in overrides:
                    each[key] = int(overrides[key]) if overrides[key].isdecimal() else overrides[key]
        return both


def _of_others(key: str, own: set[str] | None) -> bool:
    """Tell whether a key belongs to few-shot learners or their encoders, but not to the point's own learner.

    Args:
        key: Key of an override.
        own: Keys of the point's few-shot learner; None: it has none.
    """
    group, _, value = key.lstrip("+").partition(".")
    if own is None:
        return group in ("clip", "visual") or (group == "few_shot" and value != "")
    return group == "few_shot" and value not in own and bool(suggest.owners(group, value))


def _task(cfg: DictConfig) -> DictConfig:
    """Return the configuration without Hydra's part and without the run's name, which would need a composition."""
    with open_dict(cfg):
        hydra = cfg.pop("hydra")
        task = cfg.copy()
        cfg["hydra"] = hydra  # put back, since folder names need it
    task.run_name = ""
    return task


def keys(job: Job, page: Mapping[str, Any]) -> dict[str, str]:
    """Return the position of a run on a page: its labels, else a group's option or the value at a dotted path."""
    found = {}
    for key in (*page.get("rows", ()), *page.get("columns", ()), *page.get("panels", ()), *page.get("minus", ())):
        value: Any = job.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        value = value.get("name") if isinstance(value, Mapping) else value
        if key in job.point.labels or value is not None:  # `split` and `measure` come from the result
            found[key] = job.point.labels.get(key, str(value))
    return found
