"""Where training workers meet: torch's store, which on one's own machine listens on loopback alone."""

import ipaddress
import socket
from datetime import timedelta
from importlib import import_module
from typing import Any

# A function of the same name hides the module.
rendezvous: Any = import_module("torch.distributed.rendezvous")


def keep_to_loopback() -> None:
    """From now on, a store of this process that is named by a loopback address listens there.

    Torch has its store listen on every interface, whatever the address that workers are told, and asks nobody who comes
    for a token. It takes a socket that listens already, but not by the way of the environment, which everybody uses.
    """
    make = rendezvous._create_c10d_store

    def store(hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True) -> Any:
        if rank != 0 or not _is_loopback(hostname):
            return make(hostname, port, rank, world_size, timeout, use_libuv)
        listener = socket.create_server((hostname, port))
        return rendezvous.TCPStore(
            hostname, port, world_size, is_master=True, timeout=timeout, multi_tenant=True,
            master_listen_fd=listener.detach(), use_libuv=use_libuv,
        )  # fmt: skip

    rendezvous._create_c10d_store = store


def _is_loopback(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return False
