"""A sweep on a cluster of two nodes, both of them on this machine, each with a core of its own."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.small_sweeps import PATIENCE, command_line, epochs_of, session_of, table, until, write

pytest.importorskip("ray", reason="no ray here: it comes with the extra `sweep`")
pytestmark = pytest.mark.slow  # half a minute each

# one for all nodes
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}


class Node:
    """What `ray start` starts, in a session of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [
            Path(sys.executable).with_name("ray"),
            "start",
            "--block",
            "--num-cpus=1",
            "--object-store-memory=80000000",
            *arguments,
        ]
        self.process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def pids(self, name: bytes = b"") -> list[int]:
        return [pid for pid in session_of(self.process.pid) if name in command_line(pid)]

    def stop(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def cluster(tmp_path):
    """(address, head, other node)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    head = Node(
        "--head",
        f"--port={address.split(':')[1]}",
        "--include-dashboard=false",
        "--node-ip-address=127.0.0.1",
    )
    nodes = [head]
    try:
        until(lambda: answers(address), head.process)
        nodes.append(Node(f"--address={address}", "--node-ip-address=127.0.0.1"))
        until(lambda: cores_of(address) == 2, nodes[1].process)
        yield address, *nodes
    finally:
        for node in nodes:
            node.stop()


def answers(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def cores_of(address: str) -> float:
    code = (
        f"import ray; ray.init('{address}', log_to_driver=False); "
        "print(ray.cluster_resources().get('CPU', 0))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return float(told.stdout.split()[-1]) if told.returncode == 0 else 0.0


def begin(small_pack, tmp_path, address, epochs):
    file, out = write(tmp_path, "seed = [0, 1, 2, 3]", epochs=epochs), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "sweep",
        str(file),
        "--data",
        str(small_pack),
        "--out",
        str(out),
        "--address",
        address,
    ]
    return out, subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_trials_run_on_both_nodes(small_pack, tmp_path, cluster):
    out, process = begin(small_pack, tmp_path, cluster[0], epochs=20)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    rows = table(out)
    assert [row["status"] for row in rows] == ["finished"] * 4 and len(
        {row["node"] for row in rows}
    ) == 2


def test_trials_of_a_killed_node_go_on_at_the_other(small_pack, tmp_path, cluster):
    address, _, other = cluster
    out, process = begin(small_pack, tmp_path, address, epochs=60)
    until(lambda: sum(epochs_of(run) >= 3 for run in out.glob("runs/*")) == 2, process)
    for pid in other.pids(b"raylet"):
        os.kill(pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    rows = table(out)
    assert [row["status"] for row in rows] == ["finished"] * 4 and len(
        {row["node"] for row in rows}
    ) == 1
    assert all(epochs_of(run) == 60 for run in out.glob("runs/*"))
    assert sorted(int(row["attempts"]) for row in rows) == [1, 1, 1, 2]
