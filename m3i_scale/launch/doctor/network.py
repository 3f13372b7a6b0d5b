"""Ports: whether the head's can be reached, and the store that ranks find each other with."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from datetime import timedelta
from typing import Any

_HELLO = b"m3i-scale doctor\n"


class Listener:
    """Waits at a port of this host, says hello to whoever comes, and closes after a while."""

    def __init__(self, address: str, port: int, seconds: float) -> None:
        """Raises OSError where the port is taken, or the address is none of this host."""
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((address, port), family=family, backlog=1024)
        self._socket.settimeout(seconds)
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The port is free for the store."""
        with contextlib.suppress(OSError):  # wakes the thread, which would hold the port
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5.0)
        self._socket.close()

    def _serve(self) -> None:
        try:
            while True:
                guest, _ = self._socket.accept()
                with guest:
                    guest.sendall(_HELLO)
        except OSError:  # closed, or the time is over
            return


def reach(address: str, port: int, seconds: float) -> dict[str, Any]:
    """Connect to a `Listener`; milliseconds, or why not."""
    began = time.perf_counter()
    try:
        with socket.create_connection((address, port), timeout=seconds) as guest:
            took = time.perf_counter() - began
            own = guest.getsockname()[0]
            with guest.makefile("rb") as file:
                said = file.read(len(_HELLO))
    except OSError as error:
        return {"fault": error.strerror or str(error)}
    if said != _HELLO:
        return {"fault": "somebody else answers there"}
    return {"ms": took * 1e3, "from": own}


def own_addresses(interfaces: dict[str, list[str]], name: str | None) -> list[str]:
    """IPv4 addresses of an interface, or of all but the loopback."""
    chosen = [name] if name is not None else [known for known in interfaces if known != "lo"]
    return [address for known in chosen for address in interfaces.get(known, []) if ":" not in address]


def open_store(address: str, port: int, master: bool, seconds: float) -> Any:
    """The store of rank 0, opened at that address and nowhere else, or joined.

    Raises:
        RuntimeError: it cannot be.
        OSError: the port is taken, or the address is none of this host.
    """
    from torch._C._distributed_c10d import TCPStore

    patience = timedelta(seconds=seconds)
    if not master:
        return TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)
    return TCPStore(
        address,
        port,
        is_master=True,
        timeout=patience,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # PyTorch itself would listen on all interfaces
    )
