"""The lines between rank 0 and the others, over real sockets of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from dsmixer.training.channel import Hub, Lines, Message, connect

TOKEN = "the token"


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub("127.0.0.1", TOKEN, 3)
    yield hub
    hub.close()


def joined(hub: Hub, rank: int) -> Lines:
    lines = connect("127.0.0.1", hub.port, TOKEN, rank)
    assert lines is not None
    while rank not in hub.ranks:
        assert hub.hear(5.0) == []
    return lines


def heard(hub: Hub, count: int) -> list[tuple[int, Message | None]]:
    found: list[tuple[int, Message | None]] = []
    while len(found) < count:
        found += hub.hear(5.0)
    return found


def test_what_ranks_say_is_heard_by_rank_and_in_order(hub: Hub) -> None:
    first, second = joined(hub, 1), joined(hub, 2)
    for number in (1, 2, 3):
        first.send({"number": number})
    second.send({"text": "grün\n"})
    messages = heard(hub, 4)
    assert [m for rank, m in messages if rank == 1] == [{"number": 1}, {"number": 2}, {"number": 3}]
    assert (2, {"text": "grün\n"}) in messages


def test_rank_0_speaks_to_one_and_to_all(hub: Hub) -> None:
    first, second = joined(hub, 1), joined(hub, 2)
    hub.tell(1, {"to": "one"})
    hub.tell_all({"to": "all"})
    of_first: list[Message] = []
    while len(of_first) < 2:
        of_first += first.receive(5.0) or []
    assert of_first == [{"to": "one"}, {"to": "all"}] and second.receive(5.0) == [{"to": "all"}]
    assert second.receive(0.0) == [], "nothing more, and nobody waits for it"


def test_an_end_is_seen_on_the_other_side_at_once(hub: Hub) -> None:
    first, second = joined(hub, 1), joined(hub, 2)
    first.close()
    assert heard(hub, 1) == [(1, None)] and list(hub.ranks) == [2]
    hub.close()
    assert second.receive(5.0) is None


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "guessed", "rank": 1}\n',
        b'{"token": "the token", "rank": 7}\n',
        b"\xff\n",
    ],
)
def test_strangers_are_not_heard(hub: Hub, first: bytes) -> None:
    rank = joined(hub, 1)
    with socket.create_connection(("127.0.0.1", hub.port), timeout=5.0) as stranger:
        stranger.sendall(first + b'{"beat": "false"}\n')
        stranger.shutdown(socket.SHUT_WR)
        rank.send({"beat": "true"})
        messages = heard(hub, 1)
        while hub.hear(0.2):
            pass
    assert messages == [(1, {"beat": "true"})] and list(hub.ranks) == [1]


def test_a_second_connection_of_a_rank_does_not_take_its_place(hub: Hub) -> None:
    rank = joined(hub, 1)
    again = connect("127.0.0.1", hub.port, TOKEN, 1)
    assert again is not None
    again.send({"beat": "false"})
    rank.send({"beat": "true"})
    assert heard(hub, 1) == [(1, {"beat": "true"})] and hub.hear(0.2) == []


def test_nobody_there_is_told_and_not_raised(hub: Hub) -> None:
    port = hub.port
    hub.close()
    assert connect("127.0.0.1", port, TOKEN, 1) is None
