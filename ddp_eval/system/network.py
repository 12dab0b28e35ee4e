"""Network addresses of this machine: the one that gloo takes, and whether another node's can be reached. Linux; no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_GET_ADDRESS = 0x8915  # SIOCGIFADDR
_REACH_S = 5.0


@dataclasses.dataclass(frozen=True)
class Listener:
    """A port of this process on which other nodes may knock."""

    port: int


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Accept connections, and close them at once, for the life of the block."""
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=_answer, args=(server,), daemon=True).start()
        try:
            yield Listener(server.getsockname()[1])
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # ends the accept


def _answer(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


def can_reach(address: str, port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((address, port), _REACH_S).close()
        return True
    return False


def gloo_address() -> str:
    """The IPv4 address that gloo offers to other ranks: of GLOO_SOCKET_IFNAME, else what the host name stands for."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if named:
        return address_of(named) or "127.0.0.1"
    with contextlib.suppress(OSError):
        address = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        with socket.socket() as trial:
            trial.bind((address, 0))
        return str(address)
    return "127.0.0.1"


def address_of(interface: str) -> str | None:
    """Its IPv4 address; None if it has none or does not exist."""
    import fcntl

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(any_socket.fileno(), _GET_ADDRESS, request)[20:24])
    return None


def describe() -> str:
    """The interfaces with an address, but the loopback: "eth0 10.0.0.1, ib0 10.1.0.1"."""
    found = [(name, address_of(name)) for _, name in socket.if_nameindex() if name != "lo"]
    return ", ".join(f"{name} {address}" for name, address in found if address) or "none but the loopback"


def machine() -> str:
    """Equal for processes that reach each other through the loopback: same boot, same network namespace."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
    return socket.gethostname()
