"""Two hosts: two agents of torchrun that meet on the loopback, each with a rank, as on a cluster with a shared disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.test_ranks import answered, assert_same_run, metrics

pytestmark = pytest.mark.faults


@pytest.fixture
def job(untrained_folders):
    return [
        "model.recipe=null",
        f"model.path={untrained_folders['qwen2_vl']}",
        "trainer.updates=3",
        "trainer.prompts_per_update=4",
        "trainer.evaluate_every=0",
        "rollout.max_completion_tokens=8",
        "rewards=none",
        "+rewards.short={weight:1.0,fn:tests.rewards.shorter}",
        "label_scoring=false",
        "setting.test_per_class=5",
        "tracking=none",
    ]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agent(folder, job, nodes, per_node, port, node=0):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        str(nodes),
        "--nproc-per-node",
        str(per_node),
    ]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    output = (folder.parent / f"{folder.name}-{node}.log").open("w")
    return subprocess.Popen(
        [*launcher, *meeting, "run.py", f"hydra.run.dir={folder}", *job],
        cwd=REPOSITORY,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def log(folder, node):
    return (folder.parent / f"{folder.name}-{node}.log").read_text()


def test_two_hosts_train_as_one(job, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert agent(one, job, 1, 2, free_port()).wait(300) == 0, log(one, 0)[-3000:]
    port = free_port()
    agents = [agent(two, job, 2, 1, port, node) for node in range(2)]
    assert [each.wait(300) for each in agents] == [0, 0], log(two, 0)[-3000:]
    assert [row["step"] for row in metrics(one) if "reward" in row] == [1, 2, 3] and answered(one)
    assert_same_run(one, two)


def test_when_one_host_dies_the_other_ends_and_says_so(job, tmp_path):
    folder, port = tmp_path / "run", free_port()
    agents = [agent(folder, [*job, "trainer.updates=2000"], 2, 1, port, node) for node in range(2)]
    began = time.monotonic()
    while not (folder / "metrics.jsonl").is_file() or len(metrics(folder)) < 2:
        assert time.monotonic() - began < 200 and all(each.poll() is None for each in agents), log(folder, 0)[-2000:]
        time.sleep(0.5)
    host = psutil.Process(agents[1].pid)
    for process in [host, *host.children(recursive=True)]:
        process.kill()
    try:
        assert agents[0].wait(120) != 0
    finally:
        agents[0].terminate()
    assert any(word in log(folder, 0) for word in ("Connection closed by peer", "failed", "SignalException")), log(
        folder, 0
    )
