"""Localhost, ports, the variables of launchers, and the hub where a recipe needs it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from dsmixer.training.machine.finding import Finding, ok, problem, warning

LAUNCHER_PORT = 29500
"""Where DeepSpeed's launcher lets ranks meet unless ``--master_port`` says otherwise."""

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_network() -> list[Finding]:
    """Whether ranks on this machine can find each other."""
    return [*_localhost(), _port(), *_variables()]


def free_port() -> int | None:
    """A port of the loopback interface that nobody listens on just now; None where none can be reached."""
    try:
        _connect_to_self()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])
    except OSError:
        return None


def _localhost() -> Iterator[Finding]:
    fix = "add the line '127.0.0.1 localhost' to /etc/hosts"
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo("localhost", None)}
    except OSError as error:
        yield problem("localhost", f"it does not resolve: {error.strerror or error}", fix)
        return
    try:
        _connect_to_self()
    except OSError as error:
        found = f"no connection to 127.0.0.1: {error.strerror or error}"
        yield problem("localhost", found, "bring the interface up: ip link set lo up; check the firewall")
        return
    yield ok("localhost", f"{', '.join(sorted(addresses))}; ports can be opened and reached")
    yield _own_name()


def _connect_to_self() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        with socket.create_connection(server.getsockname(), timeout=5):
            server.accept()[0].close()


def _own_name() -> Finding:
    """gloo listens on the address of the host's own name."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        fix = f"add '127.0.1.1 {name}' to /etc/hosts, or set GLOO_SOCKET_IFNAME; several machines need it"
        return warning("own name", f"{name} does not resolve; gloo takes the loopback interface", fix)
    return ok("own name", f"{name} is {address}")


def _port() -> Finding:
    try:
        with socket.create_server(("", LAUNCHER_PORT)):
            return ok("launcher's port", f"{LAUNCHER_PORT} is free")
    except OSError as error:
        fix = "give the launcher another one: deepspeed --master_port 29501 …"
        return warning("launcher's port", f"{LAUNCHER_PORT} can't be had: {error.strerror or error}", fix)


def _variables() -> Iterator[Finding]:
    left = [f"{name}={os.environ[name]}" for name in LAUNCHER_VARIABLES if name in os.environ]
    if left:
        fix = f"unset {' '.join(LAUNCHER_VARIABLES)}, unless a launcher of your own has set them"
        yield warning(
            "environment", f"{', '.join(left)}: a command without a launcher takes them for its own", fix
        )
