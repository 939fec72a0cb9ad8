"""Mirror a run to Weights & Biases from rank 0. Offline unless there is an API key and the server answers.

After a resume the updates since the last checkpoint are logged once more under the same run and step; metrics.jsonl
has each once. The W&B run and the images of its tables lie inside the run folder, so that `wandb sync` works from
another machine.
"""

from __future__ import annotations

import base64
import json
import logging
import netrc
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from common.config.composition import values_of
from common.config.schema import Config, TrackingConfig
from common.evaluation.evaluate import Evaluation
from common.parsing import normalize
from common.plugins import locate
from common.run.result import Result
from common.runtime.distributed import rank
from common.types import Prediction, Task

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
SERVER = "https://api.wandb.ai"
LONGEST_ANSWER = 8.0  # seconds to wait for the server; W&B itself waits two minutes for an unreachable one
OFFLINE = "W&B: %s; the run is tracked offline, `wandb sync` uploads it"
CONFUSED = 100  # most classes in a confusion matrix


class Tracker(Protocol):
    """Service that metrics are mirrored to. id: id of the run there, with which a resumed run continues it."""

    id: str | None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log scalars of one update."""

    def completions(self, rows: list[dict[str, Any]], step: int) -> None:
        """Log a few sampled completions with their images."""

    def result(self, result: Result, evaluation: Evaluation) -> None:
        """Log the numbers of the result, and predictions and confusion matrix of the last evaluation."""

    def close(self, failed: bool) -> None:
        """End the run."""


class NullTracker:
    """Tracks nothing, on ranks other than 0 and with tracking=none."""

    id: str | None = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        return

    def completions(self, rows: list[dict[str, Any]], step: int) -> None:
        return

    def result(self, result: Result, evaluation: Evaluation) -> None:
        return

    def close(self, failed: bool) -> None:
        return


class WandbTracker:
    """One W&B run. The step is our own `step` metric: W&B's counter drops rows after a resume."""

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        job_type: str,
        tags: list[str],
        values: dict[str, Any],
        splits: Iterable[str],
        open_image: Callable[[str], Image],
        known: str | None = None,
    ) -> None:
        """
        Args:
            config: Project, group, tags and mode; see `settled_mode`.
            folder: Run folder; the tracker's id is kept there until a checkpoint has it.
            job_type: `train` or `eval`.
            tags: Tags beside those of `config`.
            values: The run's configuration.
            splits: Names of the evaluated splits.
            open_image: Function from an image's key to the image.
            known: Tracker's id of the run that is resumed, from its checkpoint.
        """
        os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / "data")  # images of tables are staged there
        (folder / "wandb" / "data").mkdir(parents=True, exist_ok=True)
        import wandb

        self.wandb, self.config, self.open_image = wandb, config, open_image
        noted = folder / "wandb" / "run_id"
        self.id: str | None = known or (noted.read_text(encoding="utf-8") if noted.is_file() else uuid.uuid4().hex[:8])
        noted.write_text(self.id, encoding="utf-8")
        begin = partial(
            wandb.init,
            project=config.project,
            id=self.id,
            resume="allow",
            group=config.group,
            job_type=job_type,
            tags=[*tags, *config.tags],
            name=folder.name,
            config=values,
            dir=str(folder.resolve()),
            reinit="finish_previous",
            settings=wandb.Settings(console="off", disable_git=True, silent=True, init_timeout=30),
        )
        try:
            self.run = begin(mode=cast(Any, resolve_mode(config.mode)))
        except wandb.Error as error:  # no permission for the project, or the server is gone again
            log.warning(OFFLINE, " ".join(str(error).split()))
            self.run = begin(mode="offline")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        for split in splits:
            self.run.define_metric(f"eval/{split}/accuracy", step_metric="step", summary="max")
        self.table: Any = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({prefixed(key): value for key, value in metrics.items()} | {"step": step})

    def completions(self, rows: list[dict[str, Any]], step: int) -> None:
        rows = rows[: self.config.completions_rows]
        if not rows:
            return
        columns = list(rows[0])
        if self.table is None:
            self.table = self.wandb.Table(columns=list[str | int](columns), log_mode="INCREMENTAL")
        for row in rows:
            picture = self.wandb.Image(self.open_image(row["image"]), caption=row["label"])
            self.table.add_data(*[picture if key == "image" else row[key] for key in columns])
        self.run.log({"completions": self.table, "step": step})

    def result(self, result: Result, evaluation: Evaluation) -> None:
        self.run.summary.update(numbers(result))
        for split, answers in evaluation.answers.items():
            self.run.log({f"predictions/{split}": self._predictions(answers.predictions)})
            labels = sorted({p.label for p in answers.predictions})
            if len(labels) <= CONFUSED:
                column = {normalize(name): number for number, name in enumerate(labels)}
                chart = self.wandb.plot.confusion_matrix(
                    y_true=[column[normalize(p.label)] for p in answers.predictions],
                    preds=[column.get(normalize(p.answer), len(labels)) for p in answers.predictions],
                    class_names=[*labels, "(no class name)"],  # "other" may be a class
                )
                self.run.log({f"confusion/{split}": chart})

    def _predictions(self, predictions: Sequence[Prediction]) -> Any:
        """Return some predictions as a table, wrong ones first."""
        table = self.wandb.Table(columns=["image", "label", "answer", "correct", "reply"])
        for p in sorted(predictions, key=lambda p: p.correct)[: self.config.predictions_rows]:
            picture = self.wandb.Image(self.open_image(p.image), caption=p.label)
            table.add_data(picture, p.label, p.answer, p.correct, p.reply.text if p.reply else None)
        return table

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=1 if failed else 0)


def numbers(result: Result) -> dict[str, float]:
    """Return the numbers that compare runs, by split: accuracy before and after training and the gain, from 0 to 1 as
    in `eval/<split>/accuracy` of the updates.
    """
    metrics: dict[str, float] = {}
    for phase, summaries in (("before", result.before), ("after", result.after)):
        metrics |= {f"{phase}/{split}": summary.accuracy for split, summary in summaries.items()}
    for split in result.before.keys() & result.after.keys():
        metrics[f"gain/{split}"] = metrics[f"after/{split}"] - metrics[f"before/{split}"]
    for phase, values in result.overall.items():
        metrics |= {f"{phase}/{name}": value for name, value in values.items()}
    return metrics


def make_tracker(config: Config, folder: Path, task: Task, known: str | None) -> Tracker:
    """Create the configured tracker on rank 0, none elsewhere. `known`: its id of the run that is resumed."""
    if rank() != 0 or config.tracking.mode == "disabled":
        return NullTracker()
    whose = dict.fromkeys(task.origins.values())
    tags = [config.method["name"], config.data.name, config.setting.name, f"s{config.shots}", *whose]
    job_type = "eval" if config.trainer.name == "none" else "train"
    make = cast("type[WandbTracker]", locate(config.tracking.tracker, "tracking.tracker"))
    return make(config.tracking, folder, job_type, tags, values_of(config), task.evaluation, task.images.open, known)


def resolve_mode(mode: str) -> str:
    """Resolve `auto`: WANDB_MODE if set, else `online` with an API key (environment or ~/.netrc), else `offline`."""
    if mode != "auto":
        return mode
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    return "online" if api_key() else "offline"


def settled_mode(mode: str) -> str:
    """Resolve the mode, but return `offline` with a warning if W&B could not go online; call it before long work."""
    mode = resolve_mode(mode)
    if mode != "online" or rank() != 0 or "WANDB_IDENTITY_TOKEN_FILE" in os.environ:
        return mode
    problem = what_keeps_offline()
    if problem is None:
        return mode
    log.warning(OFFLINE, problem)
    return "offline"


def settled(config: TrackingConfig) -> TrackingConfig:
    """The configuration with the mode that W&B will have; a tracker of one's own reads `mode` as it likes."""
    if config.tracker != TrackingConfig.tracker:
        return config
    return replace(config, mode=settled_mode(config.mode))


def what_keeps_offline() -> str | None:
    """Return why W&B's server cannot be used with the API key; None if it can. Takes at most LONGEST_ANSWER seconds."""
    key, server = api_key(), os.environ.get("WANDB_BASE_URL", SERVER).rstrip("/")
    if not key:
        return "there is no API key (wandb login, or WANDB_API_KEY)"
    answers: list[str | None] = []
    # in a thread, since a name lookup has no time limit of its own
    asking = threading.Thread(target=lambda: answers.append(_asked(server, key)), daemon=True)
    asking.start()
    asking.join(LONGEST_ANSWER)
    return answers[0] if answers else f"{server} does not answer"


def _asked(server: str, key: str) -> str | None:
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    request = Request(f"{server}/graphql", b'{"query": "query {viewer {id}}"}', headers)
    try:
        with urlopen(request, timeout=LONGEST_ANSWER) as answer:
            viewer = json.load(answer)["data"]["viewer"]
    except HTTPError as error:
        return f"{server} does not take the API key" if error.code in (401, 403) else f"{server}: {error}"
    except (URLError, OSError) as error:
        return f"{server} cannot be reached ({getattr(error, 'reason', error)})"
    except (ValueError, LookupError, TypeError):
        return f"{server} does not answer as W&B does"
    return None if viewer else f"{server} does not know the API key"


def api_key() -> str | None:
    """Return W&B's key, from the environment or ~/.netrc."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    host = urlsplit(os.environ.get("WANDB_BASE_URL", SERVER)).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        if found := netrc.netrc(Path("~/.netrc").expanduser()).authenticators(host):
            return found[2]
    return None


def prefixed(name: str) -> str:
    """Prefix a metric with `train/` as TRL does, unless it begins with `eval/` or `time/`."""
    return name if name.startswith(("eval/", "time/")) else f"train/{name}"
