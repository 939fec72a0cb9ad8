"""The run folder: the one place a run writes to, and the source of truth for every table and figure.

    config.yaml           the resolved configuration, with its signature
    manifest.json         images, labels and questions of the task, hashed
    metrics.jsonl         one line per update, written at once (TRL's metric names)
    completions.parquet   every sampled completion with its rewards
    predictions.parquet   every evaluated image, before and after training, with the probabilities of the class names
    metrics.json          the result; written last, so its presence means the run is finished
    curves.png, confusion.png, run.log, model/ (weights), wandb/

The signature covers what a result depends on. The same command in a finished folder shows the result; a different
configuration in a used folder is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import yaml

from common.config import decides_result, differences, signature
from common.distributed import rank
from common.types import Prediction, Result, UserError

LOCK = ".lock"
WRITTEN = (
    *("config.yaml", "manifest.json", "metrics.jsonl", "metrics.json", "run.log", "curves.png", "confusion.png"),
    *("completions", "completions.parquet", "predictions.parquet", "model", "wandb"),
)


class RunFolder:
    """Reads and writes one run folder. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._log: IO[str] | None = None
        self._lock: IO[str] | None = None

    def finished_result(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """The result that is already here, or None if the folder is free or its run was interrupted.

        Raises:
            UserError: The folder holds a run with another configuration, or something that is no run.
        """
        config = self.path / "config.yaml"
        if not config.is_file():
            self._check_free()
            return None
        old = yaml.safe_load(config.read_text())
        if not isinstance(old, dict) or "signature" not in old:
            raise UserError(f"{config} was not written by a run; choose another folder")
        if old.pop("signature") != signature(values):
            changed = differences(decides_result(old), decides_result(values)) or ["the file was edited"]
            raise UserError(
                f"{self.path} already holds a run with other values ({'; '.join(changed)});"
                " choose another folder with run_name=<name> or hydra.run.dir=<folder>"
            )
        result = self.path / "metrics.json"
        return json.loads(result.read_text()) if result.is_file() else None

    def _check_free(self) -> None:
        if rank() != 0 or not self.path.is_dir():
            return  # other ranks may look while rank 0 is claiming the folder
        names = (entry.name for entry in self.path.iterdir())
        strange = sorted(name for name in names if name != LOCK and not name.startswith("interrupted-"))
        if strange:
            raise UserError(f"{self.path} is not empty and holds no run (it has {strange[0]}); choose another folder")

    def claim(self, values: dict[str, Any]) -> None:
        """Mark the folder as this configuration's, for as long as this object lives.

        What an interrupted attempt left is moved aside, not overwritten.

        Raises:
            UserError: Another process is at work here, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (self.path / "config.yaml").is_file():
                self._move_aside()
            text = yaml.safe_dump({"signature": signature(values), **values}, sort_keys=False)
            self._write_whole("config.yaml", text)
        except BlockingIOError as error:
            raise UserError(
                f"another process is running in {self.path}; wait for it or choose another folder"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.path}: {error.strerror}") from error

    def _move_aside(self) -> None:
        earlier = list(self.path.glob("interrupted-*"))
        aside = self.path / f"interrupted-{len(earlier) + 1}"
        aside.mkdir()
        for name in WRITTEN:
            if (self.path / name).exists():
                (self.path / name).rename(aside / name)

    def log_metrics(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is on disk when this returns."""
        if self._log is None:
            self._log = (self.path / "metrics.jsonl").open("a", buffering=1)
        self._log.write(json.dumps(values) + "\n")

    def write_completions(self, rows: list[dict[str, Any]], part: int) -> None:
        """Add rows to the completions of the run, as a file of their own: a crash loses none of the earlier parts."""
        import pyarrow
        import pyarrow.parquet

        folder = self.path / "completions"
        folder.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{part:06d}.parquet")

    def merge_completions(self) -> None:
        """Join the parts to completions.parquet."""
        import pyarrow.parquet

        parts = sorted((self.path / "completions").glob("*.parquet"))
        if not parts:
            return
        unfinished = self.path / "completions.parquet.unfinished"
        schema = pyarrow.parquet.read_schema(parts[0])
        with pyarrow.parquet.ParquetWriter(unfinished, schema) as writer:
            for part in parts:
                writer.write_table(pyarrow.parquet.read_table(part, schema=schema))
        os.replace(unfinished, self.path / "completions.parquet")
        for part in parts:
            part.unlink()
        (self.path / "completions").rmdir()

    def write_predictions(self, predictions: dict[tuple[str, str], list[Prediction]]) -> None:
        """One row per image, phase (`zero_shot` or `eval`) and split."""
        import pyarrow
        import pyarrow.parquet

        column = {
            "str": pyarrow.string(),
            "bool": pyarrow.bool_(),
            "int": pyarrow.int64(),
            "tuple[str, ...]": pyarrow.list_(pyarrow.string()),
            "tuple[float, ...]": pyarrow.list_(pyarrow.float32()),
        }
        types = {"phase": "str", "split": "str"} | {field.name: str(field.type) for field in fields(Prediction)}
        schema = pyarrow.schema([(name, column[kind]) for name, kind in types.items()])
        rows = [
            {"phase": phase, "split": split, **vars(prediction)}
            for (phase, split), found in predictions.items()
            for prediction in found
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), self.path / "predictions.parquet")

    def write_result(self, result: Result) -> None:
        """Write metrics.json, whole or not at all."""
        self._write_whole("metrics.json", json.dumps(asdict(result), indent=2) + "\n")

    def _write_whole(self, name: str, text: str) -> None:
        unfinished = self.path / f"{name}.unfinished"
        unfinished.write_text(text)
        os.replace(unfinished, self.path / name)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
