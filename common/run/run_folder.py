"""Read and write the run folder: the only place a run writes to, and the source of every table and figure.

    config.yaml           the resolved configuration, with its signature
    manifest.json         images and labels of the task, hashed
    prompts.json          hashes of the prompts of every split, and of the files that decide them
    metrics.jsonl         one line per update, written at once (TRL's metric names); byte-identical after a resume
    timings.jsonl         seconds of each update by phase
    checkpoints/          see common/run/checkpoint.py
    completions.parquet   every sampled completion with its rewards (completions/: parts, while the run goes)
    predictions.parquet   every evaluated image, before and after training, with the probabilities of the class names
                          and the method's own columns (predictions/: parts, while the run goes)
    held_out.parquet      answers to images that were not trained on (cross-validation, or validation images), by which
                          confidences are calibrated
    metrics.json          the result; written last, so its presence means the run is finished
    thumbnails.parquet    small copies of some pictures, for the report
    report.html           all of this as a page (report/: its data, if it is large)
    doubts.csv            of cross-validated photos: what may be wrong with them (doubts.html shows them)
    curves.png, confusion-<split>.png, run.log, model/ (weights), wandb/

The signature covers everything that a result depends on. The same command shows the result of a finished folder and
continues an unfinished one; a used folder is refused for another configuration or for images that have changed since.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from common.config import trust
from common.config.composition import decides_result, differences, signature
from common.data import manifest
from common.run import predictions
from common.run.result import Result
from common.runtime.distributed import rank
from common.types import Answers, UserError

LOCK = ".lock"
MANIFEST = "manifest.json"
HELD_OUT = "held_out.parquet"
LOGS = ("metrics.jsonl", "timings.jsonl")


class RunFolder:
    """Reads and writes one run folder. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._logs: dict[str, IO[str]] = {}
        self._lock: IO[str] | None = None

    def finished_result(self, values: dict[str, Any]) -> Result | None:
        """Return the result in the folder, or None if the folder is free or its run was interrupted.

        Raises:
            UserError: The folder holds a run with another configuration, or something that is not a run.
        """
        config = self.path / "config.yaml"
        if not config.is_file():
            self._check_free()
            return None
        old = trust.read(config)
        if "signature" not in old:
            raise UserError(f"{config} was not written by a run; choose another folder")
        digits = old.pop("signature")
        changed = differences(decides_result(old), decides_result(values))
        # compare the values first: an edited file may differ in the signature only
        if changed or digits != signature(old):
            changed = changed or ["the file was edited"]
            raise UserError(
                f"{self.path} already holds a run with other values ({'; '.join(changed)});"
                " choose another folder with run_name=<name> or hydra.run.dir=<folder>"
            )
        return Result.load(self.path) if (self.path / "metrics.json").is_file() else None

    def _check_free(self) -> None:
        if rank() != 0 or not self.path.is_dir():
            return  # other ranks may get here after rank 0 has claimed the folder
        # files that `claim` or `preview` may have written before
        ours = {LOCK, MANIFEST} if manifest.is_one(self.path / MANIFEST) else {LOCK}
        names = {entry.name for entry in self.path.iterdir()} - ours
        strange = sorted(name for name in names if not name.endswith(".unfinished"))
        if strange:
            raise UserError(f"{self.path} is not empty and holds no run (it has {strange[0]}); choose another folder")

    def preview(self, new: dict[str, Any]) -> Path:
        """Write the manifest that a run would have, and return its path; the manifest of a run stays as it is.

        Raises:
            UserError: The folder holds a run with another manifest, or something that is not a run.
        """
        path = self.path / MANIFEST
        if not (self.path / "config.yaml").is_file():
            self._check_free()
            self.path.mkdir(parents=True, exist_ok=True)
            manifest.write(new, path)
        elif path.is_file():
            manifest.verify(path, new)
        else:
            raise UserError(f"{self.path} holds a run that has only begun; choose another folder with run_name=<name>")
        return path

    def claim(self, values: dict[str, Any]) -> None:
        """Lock the folder for this configuration, for as long as this object lives; existing files are kept.

        Raises:
            UserError: Another process uses the folder, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w", encoding="utf-8")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (self.path / "config.yaml").is_file():
                (self.path / MANIFEST).unlink(missing_ok=True)  # from `preview`, perhaps of older data
            text = yaml.safe_dump({"signature": signature(values), **values}, sort_keys=False)
            self._write_whole("config.yaml", text)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running in {self.path}; wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.path}: {error.strerror}") from error

    def log(self, name: str, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl or timings.jsonl; it is in the file when this returns."""
        if name not in self._logs:
            self._logs[name] = (self.path / name).open("a", buffering=1, encoding="utf-8")
        self._logs[name].write(json.dumps(values) + "\n")

    def lengths(self) -> dict[str, int]:
        """Return the bytes of the logs, after flushing them to disk."""
        for file in self._logs.values():
            os.fsync(file.fileno())
        return {name: (self.path / name).stat().st_size for name in LOGS if (self.path / name).is_file()}

    def rewind(self, update: int, lengths: dict[str, int]) -> None:
        """Drop what was written after an update, since it will be computed again.

        Args:
            update: Number of updates to keep.
            lengths: Bytes of the logs after that update, see `lengths`.
        """
        for name in LOGS:
            path = self.path / name
            if path.is_file():
                os.truncate(path, min(lengths.get(name, 0), path.stat().st_size))
        for part in (self.path / "completions").glob("*.parquet"):
            if int(part.stem) > update:
                part.unlink()

    def write_completions(self, rows: list[dict[str, Any]], update: int) -> None:
        """Write completions as a file of their own, so that a crash loses no earlier ones."""
        import pyarrow

        self._write_table(pyarrow.Table.from_pylist(rows), self.path / "completions" / f"{update:06d}.parquet")

    def merge_completions(self) -> None:
        """Join the parts to completions.parquet."""
        self._merge("completions")

    def write_predictions(self, phase: str, split: str, answers: Answers) -> None:
        """Save a finished split (see common/run/predictions.py); `phase` is `before` or `after` training."""
        self._write_table(predictions.to_table(phase, split, answers), self._predictions(phase, split))

    def read_predictions(self, phase: str, split: str) -> Answers | None:
        """Read what `write_predictions` saved; None if that split is not finished."""
        import pyarrow.parquet

        path = self._predictions(phase, split)
        return predictions.from_table(pyarrow.parquet.read_table(path)) if path.is_file() else None

    def write_held_out(self, source: str, answers: Answers) -> None:
        """Save answers to images that were not trained on; `source` as in common/evaluation/calibration.py."""
        self._write_table(predictions.to_table("after", source, answers), self.path / HELD_OUT)

    def read_held_out(self) -> Answers | None:
        """Read what `write_held_out` saved; None if there were no such images."""
        import pyarrow.parquet

        path = self.path / HELD_OUT
        return predictions.from_table(pyarrow.parquet.read_table(path)) if path.is_file() else None

    def _predictions(self, phase: str, split: str) -> Path:
        return self.path / "predictions" / f"{phase}-{split}.parquet"

    def merge_predictions(self) -> None:
        """Join the parts to predictions.parquet."""
        self._merge("predictions")

    def _write_table(self, table: Any, path: Path) -> None:
        import pyarrow.parquet

        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        pyarrow.parquet.write_table(table, unfinished)
        os.replace(unfinished, path)

    def _merge(self, name: str) -> None:
        """Join parts to one file. The parts stay until the result is written, since a resumed run needs them."""
        import pyarrow
        import pyarrow.parquet

        folder, whole = self.path / name, self.path / f"{name}.parquet"
        parts = sorted(folder.glob("*.parquet"))
        if parts:
            unfinished = whole.with_suffix(".unfinished")
            schemas = [pyarrow.parquet.read_schema(part).remove_metadata() for part in parts]
            schema = pyarrow.unify_schemas(schemas)  # a column that is empty in one part has its type from another
            with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
                for part in parts:
                    table = pyarrow.parquet.read_table(part).replace_schema_metadata()
                    for field in schema:  # an earlier version may have written the part, with fewer columns
                        if field.name not in table.column_names:
                            table = table.append_column(field, pyarrow.nulls(len(table), field.type))
                    writer.write_table(table.select(schema.names).cast(schema))
            os.replace(unfinished, whole)

    def write_result(self, result: Result) -> None:
        """Write metrics.json atomically; delete what only an unfinished run needs."""
        self._write_whole("metrics.json", json.dumps(result.to_json(), indent=2) + "\n")
        for name in ("completions", "predictions"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def _write_whole(self, name: str, text: str) -> None:
        unfinished = self.path / f"{name}.unfinished"
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.path / name)

    def read_log(self, name: str) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl or timings.jsonl."""
        path = self.path / name
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def close(self) -> None:
        for file in self._logs.values():
            file.close()
        self._logs = {}


# Errors after the result is saved.

log = logging.getLogger(__name__)


@contextmanager
def best_effort(who: str) -> Iterator[None]:
    """Log exceptions instead of raising them: the result is already saved."""
    try:
        yield
    except Exception as error:  # any kind, since trackers and plotting libraries raise their own
        log.warning("%s failed (%s: %s); the run folder is whole", who, type(error).__name__, error)
