"""Reads an offline `.wandb` file: a W&B header, then records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

BLOCK, HEADER = 32_768, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, checksums verified."""
    data = path.read_bytes()
    assert struct.unpack("<4sHB", data[:7])[:2] == (b":W&B", 0xBEE1)
    position, pieces = 7, []
    while position + HEADER <= len(data):
        if (left := BLOCK - position % BLOCK) < HEADER:  # padding at the end of a block
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind == 0:
            return
        body = data[position + HEADER : position + HEADER + length]
        assert checksum == zlib.crc32(body, zlib.crc32(bytes([kind])))
        position += HEADER + length
        pieces.append(body)
        if kind in (FULL, LAST):
            record = protocol.Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


def summary_of(path: Path, patience: float = 20.0) -> dict[str, Any]:
    """The run's identity, its history rows, its metric definitions and its exit code.

    W&B writes in a process of its own; a busy machine may still be at it when the run has ended.
    """
    end = time.monotonic() + patience
    while (found := _summary(path))["exit"] is None and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _summary(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"history": [], "metrics": [], "config": {}, "summary": {}, "exit": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run" and record.run.project:
            found |= {
                "project": record.run.project,
                "group": record.run.run_group,
                "job_type": record.run.job_type,
                "tags": sorted(record.run.tags),
                "name": record.run.display_name,
            }
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["history"].append(row)
        elif kind == "summary":
            for item in record.summary.update:
                found["summary"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        elif kind == "metric":
            found["metrics"].append((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
