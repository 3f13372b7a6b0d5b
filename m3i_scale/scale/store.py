"""The store in which ranks find each other. Where an interface is chosen, it listens there and nowhere else."""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from m3i_scale.errors import UserError

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Whoever sets one of them has chosen."""
_KEPT: list[TCPStore] = []


def listen_at_master_address(timeout: timedelta) -> None:
    """Open rank 0's store at MASTER_ADDR, where an interface is chosen; PyTorch would open it on all interfaces.

    PyTorch then uses this one, which it finds by its port, as long as it is kept. Under torchrun the store is in its
    agent, which was started before, and is none of ours.

    Args:
        timeout: of a rank that waits for a key.

    Raises:
        UserError: MASTER_ADDR is no address of this host, or one that other hosts cannot reach, or the port is taken.
    """
    chosen = [os.environ[name] for name in INTERFACES if name in os.environ]
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["RANK"] != "0" or not chosen or of_agent:
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise UserError(
            f"rank 0 cannot listen at {host}, port {port}: {error.strerror}",
            where="MASTER_ADDR, MASTER_PORT",
            why="the other ranks look for it there",
            fix="the address of the chosen interface on this host, and a port that nobody uses",
        ) from None
    address = listener.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback and "lo" not in chosen and _several_hosts():
        listener.close()
        raise UserError(
            f"rank 0 would listen at {address} alone, where no other host can reach it",
            where=f"MASTER_ADDR: {host}",
            why=f"an interface is chosen ({chosen[0]}), and that is no address of it; /etc/hosts may give a host's own "
            "name the loopback",
            fix="the address of the chosen interface on this host",
        )
    _KEPT.append(
        TCPStore(
            host,
            port,
            int(os.environ["WORLD_SIZE"]),
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listener.detach(),
        )
    )


def _several_hosts() -> bool:
    """Whether fewer ranks are here than in all; where nobody says how many, no."""
    world = int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("LOCAL_WORLD_SIZE", world)) < world
