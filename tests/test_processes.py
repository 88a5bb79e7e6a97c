"""Several processes: what one puts in reaches all, and the death of one ends the others."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Pipe
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from internimage_jax import processes
from internimage_jax.commands.demo import write_checkpoint
from internimage_jax.config import InternImageConfig
from internimage_jax.evaluation_folder import EvaluationFolder
from internimage_jax.labels import imagenet1k_classes
from internimage_jax.processes import ConnectedGroup, Group, join
from internimage_jax.report import TIMES

CONFIG = InternImageConfig(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
COUNT = 23


def connected(count: int) -> list[ConnectedGroup]:
    """A group within this process."""
    pairs = {other: Pipe() for other in range(1, count)}
    first = ConnectedGroup(0, count, {other: pair[0] for other, pair in pairs.items()})
    return [first, *(ConnectedGroup(i, count, {0: pair[1]}) for i, pair in pairs.items())]


def test_what_each_puts_in_reaches_all_in_order() -> None:
    groups = connected(3)
    with ThreadPoolExecutor(3) as pool:
        for round in (b"", b"\0\n\xff"):
            got = list(pool.map(lambda g, r=round: g.exchange(b"%d" % g.index + r), groups))
            assert got == [[b"0" + round, b"1" + round, b"2" + round]] * 3
        list(pool.map(lambda g: g.leave(None), groups))


def test_an_error_of_one_is_raised_in_all_with_its_number() -> None:
    groups = connected(3)
    groups[1].leave("a.jpg: the file is empty")
    for group in (groups[0], groups[2]):
        with pytest.raises(OSError, match=r"^process 1: a\.jpg: the file is empty$"):
            group.exchange(b"")
        with pytest.raises(OSError, match=r"^process 1: "):
            group.check()
        with pytest.raises(OSError, match=r"^process 1: "):
            group.leave("process 1: a.jpg: the file is empty")


def test_an_ended_connection_is_a_death() -> None:
    ours, theirs = Pipe()
    group = ConnectedGroup(0, 2, {1: ours})
    theirs.close()
    with pytest.raises(OSError, match=r"^process 1 has died$"):
        group.exchange(b"")
    with pytest.raises(OSError, match=r"^process 1 has died$"):
        group.leave("process 1 has died")


def test_of_a_death_the_others_are_told_by_the_first() -> None:
    pairs = [Pipe(), Pipe()]
    first = ConnectedGroup(0, 3, {1: pairs[0][0], 2: pairs[1][0]})
    third = ConnectedGroup(2, 3, {0: pairs[1][1]})
    pairs[0][1].close()
    for group in (third, first):
        with pytest.raises(OSError, match=r"^process 1 has died$"):
            group.exchange(b"")
        with pytest.raises(OSError, match=r"^process 1 has died$"):
            group.leave("process 1 has died")


def test_a_death_is_not_told_in_the_midst_of_what_is_being_sent() -> None:
    pairs = [Pipe() for _ in range(2)]
    first = ConnectedGroup(0, 3, {1: pairs[0][0], 2: pairs[1][0]})
    second, third = pairs[0][1], pairs[1][1]
    for other in (second, third):
        other.send_bytes(b"D")
    data = b"z" * 10_000_000  # more than a connection holds
    with ThreadPoolExecutor(1) as pool:
        exchange = pool.submit(first.exchange, data)
        assert second.poll(60)  # it has begun, and is not read
        third.close()
        while first._failure is None:
            time.sleep(0.01)
        assert not exchange.done()
        assert second.recv_bytes() == b"D" + data
        assert second.recv_bytes() == b"Fprocess 2 has died"
        with pytest.raises(OSError, match=r"^process 2 has died$"):
            exchange.result()
    with pytest.raises(OSError, match=r"^process 2 has died$"):
        first.leave("process 2 has died")


def test_the_others_wait_for_the_first_which_writes_the_report() -> None:
    first, second = connected(2)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(second.leave, None)
        time.sleep(0.1)
        assert not leaving.done()
        first.leave(None)
        leaving.result(timeout=30)
    for group in (first, second):
        for connection in group._connections.values():
            connection.close()  # as at a process's end, which is no death now
    time.sleep(0.1)
    for group in (first, second):
        group.check()

    first, second = connected(2)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(second.leave, None)
        first.leave("report.json: cannot be written")
        with pytest.raises(OSError, match=r"^process 0: report\.json: cannot be written$"):
            leaving.result(timeout=30)


def test_who_has_left_after_a_death_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(ConnectedGroup, "_end", lambda _: ended.append(True))
    for leaves in (True, False):
        ours, theirs = Pipe()
        group = ConnectedGroup(0, 2, {1: ours})
        theirs.close()
        with pytest.raises(OSError, match="process 1 has died"):
            group.exchange(b"")
        if leaves:
            with pytest.raises(OSError, match="process 1 has died"):
                group.leave("process 1 has died")
        time.sleep(0.5)
        assert bool(ended) != leaves


BUSY = """
import time
from multiprocessing.connection import Pipe
from internimage_jax import processes
processes.GRACE_SECONDS = 0.2
ours, theirs = Pipe()
group = processes.ConnectedGroup(0, 2, {1: ours})
theirs.close()
time.sleep(60)
"""


def test_a_process_that_is_busy_ends_with_the_others() -> None:
    process = start("-c", BUSY)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (1, "", "error: process 1 has died\n")


def test_other_settings_in_one_process_are_named() -> None:
    groups = connected(2)
    settings = [{"dtype": "float32", "data": {"images": 7}}, {"dtype": "float32", "data": {}}]

    def error(group: ConnectedGroup) -> str:
        with pytest.raises(ValueError) as caught:
            group.check_same(settings[group.index])
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        for message in pool.map(error, groups):
            assert message == "process 1 has other settings: data.images was 7 and is null there"
    for group in groups:
        with contextlib.suppress(OSError):  # raised where the other one's word came first
            group.leave("differ")


def test_strangers_and_greetings_in_pieces_do_not_keep_the_processes_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_GREETING_SECONDS", 0.3)
    told = queue.Queue()
    state = SimpleNamespace(
        coordinator_address="localhost:1",
        client=SimpleNamespace(key_value_set=lambda key, value: told.put(value.split())),
    )
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        waiting = pool.submit(processes._connections, state, 0, 2)
        port, token = told.get(timeout=30)
        ours, theirs = bytes.fromhex(token), bytes(len(token) // 2)
        one, two = (number.to_bytes(4, "big") for number in (1, 2))
        for parts in (
            [theirs + one],
            [ours + two],  # of two there are 0 and 1
            [],
            [b"GET / HTTP/1.1\r\n\r\n"],
            [ours, one],
        ):
            stream = socket.create_connection(("localhost", int(port)))
            stack.enter_context(stream)
            for part in parts:
                stream.sendall(part)
                time.sleep(0.1)
        connections = waiting.result(timeout=30)
        assert list(connections) == [1]
        stream.sendall(b"\0\0\0\5hello")  # as a connection frames it
        assert connections[1].recv_bytes() == b"hello"
        connections[1].close()


def test_a_host_that_vanishes_is_missed_within_half_a_minute() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        connection = processes._watched(ours)
        with socket.socket(fileno=os.dup(connection.fileno())) as stream:
            assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count, unanswered = (
                stream.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
                for name in ("KEEPIDLE", "KEEPINTVL", "KEEPCNT", "USER_TIMEOUT")
            )
        assert idle + interval * count <= 30 and 0 < unanswered <= 30_000
        connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_the_coordinators_address_is_of_either_kind(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "JOINING_SECONDS", 10)
    if host == "[::1]":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    told = queue.Queue()
    client = SimpleNamespace(
        key_value_set=lambda key, value: told.put(value),
        blocking_key_value_get=lambda key, milliseconds: told.get(timeout=30),
    )
    state = SimpleNamespace(coordinator_address=f"{host}:1", client=client)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda index: processes._connections(state, index, 2), range(2)))
    both[1][0].send_bytes(b"here")
    assert both[0][1].recv_bytes() == b"here"
    for connections in both:
        for connection in connections.values():
            connection.close()


def test_one_process_is_a_group_of_its_own() -> None:
    with join("localhost:1", 1, 0) as group:
        assert (group.index, group.count) == (0, 1)
        assert group.exchange(b"a") == [b"a"]
    assert type(group) is Group


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "expected all three, or none"),
        (("localhost", 2, 0), "coordinator: expected HOST:PORT, got 'localhost'"),
        (("localhost:1", 2, 2), "process_id: expected 0 to 1"),
        (("localhost:1", 2, -1), "process_id: expected 0 to 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[str, int, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message), join(*arguments):
        pass


@pytest.mark.parametrize(
    ("arguments", "raised", "error", "message"),
    [
        ((), ValueError("coordinator_address should be"), ValueError, "no job of Slurm, Open MPI"),
        (("localhost:1", 2, 0), RuntimeError("too late\nby far"), OSError, r"together: too late$"),
    ],
)
def test_processes_that_do_not_come_together_say_why(
    arguments: tuple[()] | tuple[str, int, int],
    raised: Exception,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def initialize(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(error, match=message), join(*arguments):
        pass


# Processes of their own


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


WAITING = """
import os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
from internimage_jax.processes import join
try:
    with join(sys.argv[1], 2, int(sys.argv[2])) as group:
        print("joined", flush=True)
        while True:
            group.check()
            time.sleep(0.05)
except OSError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(1)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_names_it(victim: int) -> None:
    address = f"127.0.0.1:{free_port()}"
    both = [start("-c", WAITING, address, str(k)) for k in range(2)]
    try:
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "joined\n"
        both[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, err = both[1 - victim].communicate(timeout=60)
        assert time.monotonic() - killed < 10
        assert (both[1 - victim].returncode, err) == (1, f"error: process {victim} has died\n")
    finally:
        for process in both:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and with images of two classes, one of them the model's answer."""
    root = tmp_path_factory.mktemp("work")
    write_checkpoint(root / "model", CONFIG, image_size=32)
    for seed in range(COUNT):
        path = root / "data" / str(imagenet1k_classes()[40 * seed].wnid) / f"{seed}.png"
        path.parent.mkdir(parents=True)
        pixels = np.random.RandomState(seed).randint(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return root


def test_two_processes_and_eight_devices_count_as_one_does(work: Path) -> None:
    common = ["-m", "internimage_jax", "evaluate", str(work / "data"), "--json"]
    common += ["--model", str(work / "model"), "--batch-size", "1"]
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    together += ["--output", str(work / "two")]
    started = [
        start(*common, *together, "--process-id", "0", devices=2),
        start(*common, *together, "--process-id", "1", devices=2),
        start(*common, "--output", str(work / "eight"), devices=8),
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert [err for _, err in outputs] == ["", "", ""]
    assert outputs[1][0] == ""  # process 0 speaks for both
    two, eight = json.loads(outputs[0][0]), json.loads(outputs[2][0])
    assert (two["processes"], len(two["devices"]), len(eight["devices"])) == (2, 2, 8)
    for key in set(two) - {*TIMES, "processes", "devices", "calibration"}:
        assert two[key] == eight[key], key
    for name in ("two", "eight"):
        lines = (work / name / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["index"] for line in lines] == list(range(COUNT))
    assert json.loads((work / "two" / "report.json").read_text()) == two


def test_another_number_of_processes_neither_resumes_nor_overwrites(tmp_path: Path) -> None:
    ours, theirs = ({"processes": count} for count in (1, 2))
    for index in range(2):
        with EvaluationFolder(tmp_path, resume=index > 0, index=index, count=2) as folder:
            assert folder.done(theirs, batch=1, images=3) == []
            folder.open(theirs, [])
    with pytest.raises(FileExistsError, match="holds an evaluation"):
        EvaluationFolder(tmp_path, resume=False)
    with pytest.raises(ValueError, match="processes was 2 and is 1"):
        EvaluationFolder(tmp_path, resume=True).done(ours, batch=1, images=3)
    assert json.loads((tmp_path / "settings.json").read_text()) == theirs
