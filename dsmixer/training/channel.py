"""Lines between rank 0 and the other ranks, beside the collectives: plain sockets that never block a rank.

A line is one JSON object. The first one of a connection holds the job's token and the rank.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
from typing import Any

CONNECT_SECONDS = 20.0
LONGEST_LINE = 2**16

Message = dict[str, Any]


class Lines:
    """One connection: whole messages in and out; ``rank`` is who is at the other end, once that is known."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.rank: int | None = None
        self._rest = b""

    def send(self, message: Message) -> bool:
        """Whether the message is on its way; what does not fit the buffer of a stopped reader is dropped."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self, timeout: float) -> list[Message] | None:
        """What has come, after at most ``timeout`` seconds; None where the other end is gone."""
        self.socket.settimeout(timeout)
        try:
            data = self.socket.recv(LONGEST_LINE)
        except (TimeoutError, BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        if not data or len(self._rest) > LONGEST_LINE:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [message for line in lines if isinstance(message := _parsed(line), dict)]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def connect(address: str, port: int, token: str, rank: int) -> Lines | None:
    """A connection to rank 0; None where it can't be reached."""
    try:
        connection = socket.create_connection((address, port), timeout=CONNECT_SECONDS)
    except OSError:
        return None
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    lines = Lines(connection)
    return lines if lines.send({"token": token, "rank": rank}) else None


class Hub:
    """Rank 0's end: accepts the other ranks and hears them.

    Args:
        address: where the ranks find rank 0; on this machine alone where that is a loopback address.
        token: that a connection has to begin with; others are closed.
        size: the number of ranks.

    Raises:
        OSError: no port can be opened.
    """

    def __init__(self, address: str, token: str, size: int) -> None:
        self._token, self._size = token, size
        alone = address in ("localhost", "::1") or address.startswith("127.")
        self._listener = _listening("127.0.0.1" if alone else None)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._unnamed: list[Lines] = []
        self.ranks: dict[int, Lines] = {}

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def hear(self, seconds: float) -> list[tuple[int, Message | None]]:
        """Messages by rank that come within the time; None for a rank whose connection has broken."""
        heard: list[tuple[int, Message | None]] = []
        for key, _ in self._selector.select(timeout=seconds):
            if key.data is None:
                self._accept()
            else:
                heard += self._read(key.data)
        return heard

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        lines = Lines(connection)
        self._unnamed.append(lines)
        self._selector.register(connection, selectors.EVENT_READ, lines)

    def _read(self, lines: Lines) -> list[tuple[int, Message | None]]:
        messages = lines.receive(0.0)
        if messages is None:
            self._drop(lines)
            return [] if lines.rank is None else [(lines.rank, None)]
        if lines.rank is None and messages:
            self._welcome(lines, messages.pop(0))
        return [] if lines.rank is None else [(lines.rank, message) for message in messages]

    def _welcome(self, lines: Lines, first: Message) -> None:
        rank = first.get("rank")
        if (
            first.get("token") != self._token
            or not isinstance(rank, int)
            or not 0 < rank < self._size
            or rank in self.ranks
        ):
            self._drop(lines)
            return
        self._unnamed.remove(lines)
        lines.rank = rank
        self.ranks[rank] = lines

    def _drop(self, lines: Lines) -> None:
        self._selector.unregister(lines.socket)
        lines.close()
        if lines.rank is None:
            self._unnamed.remove(lines)
        else:
            del self.ranks[lines.rank]

    def tell(self, rank: int, message: Message) -> None:
        """One rank, if it is still there."""
        if rank in self.ranks:
            self.ranks[rank].send(message)

    def tell_all(self, message: Message) -> None:
        """Every rank that is still there."""
        for rank in list(self.ranks):
            self.tell(rank, message)

    def close(self) -> None:
        for lines in [*self._unnamed, *self.ranks.values()]:
            lines.close()
        self._selector.close()
        self._listener.close()


def _listening(address: str | None) -> socket.socket:
    if address is not None:
        return socket.create_server((address, 0), backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)
