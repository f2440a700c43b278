"""What keeps a Ray that is started here to its user: it listens on loopback alone, and others cannot read its token."""

import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def loopback() -> Iterator[None]:
    """Ray's processes that are started in here, and what they start, listen on 127.0.0.1.

    Ray takes a loopback address that it is given for a mistake and puts the machine's own in its place. What it does
    on other systems than Linux, to spare their users a firewall's question, is asked of it here.
    """
    from ray._private import ray_constants

    for name in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # of training workers, which inherit it
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before  # a process may join another cluster afterwards


def ensure_token() -> None:
    """See to it that Ray's token is there, and is its owner's alone to read: Ray would write it for everybody.

    Nothing is done where the environment brings a token, or says that there is to be none.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        _write_token(path)
    except OSError as error:
        raise OSError(
            f"Ray's token cannot be kept in {path}: {error.strerror}. Set HOME to a folder that can be written, or "
            "RAY_AUTH_TOKEN to a token of your own."
        ) from error


def _write_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, made = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # somebody was quicker
                os.link(made, path)
        finally:
            os.unlink(made)
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
