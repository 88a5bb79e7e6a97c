"""Several processes, often on several hosts, that share an evaluation.

`jax.distributed` brings them together: it knows Slurm, Open MPI and TPU pods, and otherwise takes
an address and numbers. But it ends a process whose neighbour has died by `abort()`, with a stack
trace and without the neighbour's number. So once they have met they leave it, and each has a TCP
connection with process 0, on which the death of a process shows at once and that of a host within
half a minute. Each computes on its own devices; what crosses the network are settings at the start
and predictions at the end.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import Any

from internimage_jax.evaluation_settings import differences
from internimage_jax.messages import one_line

JOINING_SECONDS = 300  # the processes of a job may start minutes apart
_GREETING_SECONDS = 5.0  # for the first bytes of a connection, which may be a stranger's
GRACE_SECONDS = 20  # after another process has ended, for this one to end in its own way
_DATA, _FAILED, _DONE = b"D", b"F", b"E"
_TOKEN_BYTES = 32


class Group:
    """A process alone; `join` returns the group of several."""

    index = 0
    count = 1

    def check(self) -> None:
        """Raises OSError where another process has ended before its time."""

    def exchange(self, data: bytes) -> list[bytes]:
        """Returns the `data` of every process, in the order of their numbers; waits for all.

        Raises OSError where another process has ended before its time.
        """
        return [data]

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError where another process has other settings (JSON values)."""
        first, *_ = parts = self.exchange(json.dumps(settings).encode())
        for index, part in enumerate(parts):
            if found := differences(json.loads(first), json.loads(part)):
                raise ValueError(f"process {index} has other settings: {'; '.join(found)} there")


class ConnectedGroup(Group):
    """Processes connected through process 0.

    Args:
        index: Of this process.
        count: Of processes.
        connections: Of process 0 with each other one, by number; of the others with process 0.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, Connection]):
        self.index = index
        self.count = count
        self._connections = dict(connections)
        # Held to send: two threads do, and half of a message is not to begin another.
        self._sending = {other: threading.Lock() for other in connections}
        self._changed = threading.Condition()  # held to use what follows
        self._messages: dict[int, list[bytes]] = {other: [] for other in connections}
        self._failure: str | None = None
        self._leaving = self._first_is_done = False
        # The main thread sees a failure at its next batch. Where that takes long, as compiling a
        # large model does, the process ends all the same.
        self._ending = threading.Timer(GRACE_SECONDS, self._end)
        self._ending.daemon = True
        threading.Thread(target=self._listen, name="processes", daemon=True).start()

    def check(self) -> None:
        with self._changed:
            if self._failure is not None:
                raise OSError(self._failure)

    def exchange(self, data: bytes) -> list[bytes]:
        if self.index > 0:
            self._send(0, _DATA + data)
            return [self._receive(0) for _ in range(self.count)]
        parts = [data, *(self._receive(other) for other in range(1, self.count))]
        for other in self._connections:
            for part in parts:
                self._send(other, _DATA + part)
        return parts

    def leave(self, error: str | None) -> None:
        """Ends the group.

        Args:
            error: Why this process ends before its time, which the others will say too; or None.
                Then the others wait for process 0, which writes the report.

        Raises:
            OSError: `error` is None and process 0 has failed.
        """
        with self._changed:
            if error is None and self.index > 0:
                self._changed.wait_for(lambda: self._first_is_done or self._failure)
                error = None if self._first_is_done else self._failure
            self._leaving = True
            last = f"process {self.index}: {error}" if self._failure is None else self._failure
        self._ending.cancel()
        if error is not None or self.index == 0:
            self._send_all(_DONE if error is None else _FAILED + last.encode())
        if error is not None and last == self._failure:
            raise OSError(error)

    def _send(self, other: int, message: bytes) -> None:
        self.check()
        try:
            with self._sending[other]:
                self._connections[other].send_bytes(message)
        except OSError:
            self._fail(f"process {other} has died")
            self.check()

    def _send_all(self, message: bytes) -> None:
        for other, connection in self._connections.items():
            with contextlib.suppress(OSError), self._sending[other]:  # some may be gone already
                connection.send_bytes(message)

    def _receive(self, other: int) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._messages[other])
            if self._failure is not None:
                raise OSError(self._failure)
            return self._messages[other].pop(0)

    def _listen(self) -> None:
        """Takes in messages, in a thread of its own, and sees where a connection ends."""
        others = {connection: other for other, connection in self._connections.items()}
        while others:
            for connection in wait(list(others)):
                assert isinstance(connection, Connection)
                other = others[connection]
                try:
                    message = connection.recv_bytes()
                except (EOFError, OSError):
                    del others[connection]
                    self._fail(f"process {other} has died")
                    continue
                if message[:1] == _FAILED:
                    self._fail(message[1:].decode())
                with self._changed:
                    if message[:1] == _DATA:
                        self._messages[other].append(message[1:])
                    elif message[:1] == _DONE:
                        self._first_is_done = True
                    self._changed.notify_all()

    def _fail(self, reason: str) -> None:
        with self._changed:
            if self._failure is not None or self._leaving or self._first_is_done:
                return
            self._failure = reason
            self._changed.notify_all()
        self._ending.start()
        if self.index == 0:  # only this one is connected with all
            self._send_all(_FAILED + reason.encode())

    def _end(self) -> None:
        print(f"error: {self._failure}", file=sys.stderr, flush=True)
        os._exit(1)


@contextlib.contextmanager
def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[Group]:
    """Brings the processes of an evaluation together; call it before JAX uses a device.

    An error within the context ends the other processes too, and they report it.

    Args:
        coordinator: "HOST:PORT" of process 0; None, with the two others, is what
            `jax.distributed` finds out under Slurm, Open MPI or on TPUs.
        num_processes: How many there are.
        process_id: Which one this is, from 0.

    Raises:
        ValueError: A number is out of range, or one of the three is missing.
        OSError: The processes did not come together; later, another one has ended.
    """
    given = (coordinator, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ValueError("coordinator, num_processes and process_id: expected all three, or none")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator: expected HOST:PORT, got {coordinator!r}")
    if num_processes is not None and process_id is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"process_id: expected 0 to {num_processes - 1}, as there are {num_processes} "
                f"processes, got {process_id}"
            )
        if num_processes == 1:
            yield Group()
            return
    group = _connected(coordinator, num_processes, process_id)
    try:
        yield group
    except BaseException as error:
        if isinstance(group, ConnectedGroup):
            with contextlib.suppress(OSError):
                group.leave(one_line(error))
        raise
    if isinstance(group, ConnectedGroup):
        group.leave(None)


def _connected(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Group:
    import jax
    from jax._src.distributed import global_state

    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=JOINING_SECONDS
        )
        index, count = global_state.process_id, global_state.num_processes
        connections = {} if count == 1 else _connections(global_state, index, count)
        jax.distributed.shutdown()
    except (RuntimeError, ValueError, OSError) as error:
        if coordinator is None and isinstance(error, ValueError):
            raise ValueError(
                "coordinator: this is no job of Slurm, Open MPI or a TPU that jax.distributed "
                "knows; expected coordinator, num_processes and process_id"
            ) from None
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"the processes did not come together: {reason}") from error
    # From here on, JAX is to see this process alone: what it would do with the others needs the
    # service that has just been left.
    global_state.process_id, global_state.num_processes = 0, 1
    return ConnectedGroup(index, count, connections) if count > 1 else Group()


def _connections(state: Any, index: int, count: int) -> dict[int, Connection]:
    """Opens the connections; their address and a token travel by the service's key-value store."""
    key = "internimage_jax/evaluation"
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    if index > 0:
        values = state.client.blocking_key_value_get(key, JOINING_SECONDS * 1000)
        port, token = values.split()
        stream = socket.create_connection((host, int(port)), timeout=JOINING_SECONDS)
        stream.sendall(bytes.fromhex(token) + index.to_bytes(4, "big"))
        return {0: _watched(stream)}
    token = secrets.token_bytes(_TOKEN_BYTES)
    connections = {}
    both = socket.has_dualstack_ipv6()  # the coordinator's address may be an IPv6 one
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", 0), family=family, backlog=count, dualstack_ipv6=both) as server:
        server.settimeout(JOINING_SECONDS)
        state.client.key_value_set(key, f"{server.getsockname()[1]} {token.hex()}")
        while len(connections) < count - 1:
            stream, _ = server.accept()
            greeting = _greeting(stream)
            other = int.from_bytes(greeting[_TOKEN_BYTES:], "big")
            if hmac.compare_digest(greeting[:_TOKEN_BYTES], token) and 0 < other < count:
                connections[other] = _watched(stream)
            else:
                stream.close()  # somebody else's
    return connections


def _greeting(stream: socket.socket) -> bytes:
    """The token and number that a process begins with; of a stranger, less or other bytes."""
    greeting = b""
    stream.settimeout(_GREETING_SECONDS)
    with contextlib.suppress(OSError):
        while part := stream.recv(_TOKEN_BYTES + 4 - len(greeting)):
            greeting += part
    return greeting


def _watched(stream: socket.socket) -> Connection:
    """A connection that ends within half a minute after its other end has vanished."""
    stream.settimeout(None)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 10),
        (socket.TCP_KEEPINTVL, 5),
        (socket.TCP_KEEPCNT, 4),
        (socket.TCP_USER_TIMEOUT, 30_000),  # milliseconds
    ):
        stream.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(stream.detach())
