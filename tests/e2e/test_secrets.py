"""A whole farm with recognisable secrets, at work and in trouble: nothing that it writes tells one.

Searched are logs and output at the most talkative level, SQL, HTTP answers, command lines, objects.
"""

from __future__ import annotations

import io
import re
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import boto3
import httpx2 as httpx
import psutil
import pytest

from farm.cli import main
from farm.store.tables import metadata
from tests.farm_kit import FarmKit, until
from tests.servers import RedisServer, S3Server

MARK = "GEHEIM"  # in every password here; `%2F`: some code takes a URL apart wrongly
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """One that wants a password."""
    with RedisServer(tcp=True) as server:
        server.command("CONFIG", "SET", "requirepass", f"{MARK}-redis/x")
        yield server


class Seen:
    """All that a farm was seen to write, by where."""

    def __init__(self, kit: FarmKit, secrets: list[str]) -> None:
        self.kit, self.secrets = kit, [*secrets, MARK, "R0VIRUlN"]  # also in base 64
        self.texts: dict[str, str] = {}

    def farm(self, *args: str, **env: str) -> str:
        """Run a command of the farm; what it wrote."""
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(out):
            for name, value in (self.kit.env | env).items():
                patch.setenv(name, value)
            try:
                main(args)
            except Exception:  # with -v a fault of the farm comes with its traceback
                traceback.print_exc(file=out)
        self.texts[f"farm {' '.join(args)} {sorted(env.items())}".replace(MARK, "")] = (
            out.getvalue()
        )
        return out.getvalue()

    def ask(self, url: str, path: str, token: str, status: int) -> None:
        answer = httpx.get(url + path, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        assert answer.status_code == status, answer.text
        self.texts[f"GET {path} {status}"] = f"{answer.headers} {answer.text}"

    def rows(self) -> None:
        with self.kit.farm.db.read() as connection:
            for table in metadata.tables.values():
                self.texts[f"table {table}"] = str(connection.execute(table.select()).all())

    def command_lines(self) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended
                self.texts[f"command line of {child.pid}"] = " ".join(child.cmdline())

    def logs(self) -> None:
        for path in self.kit.home.rglob("*.log"):
            self.texts[path.name] = path.read_text(errors="replace")

    def told(self) -> dict[str, str]:
        """Where a secret stands, with what is around it."""
        found = {}
        for place, text in self.texts.items():
            for secret in self.secrets:
                if match := re.search(f".{{0,80}}{re.escape(secret)}.{{0,20}}", text):
                    found[place] = match[0]
        return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_secret_is_told(
    tmp_path: Path, redis: RedisServer, pg_url: str, s3_server: S3Server, s3_bucket: str
) -> None:
    database = pg_url.replace("postgres@", f"postgres:{MARK}-db%2Fx@")
    broker = redis.url.replace("//", f"//:{MARK}-redis%2Fx@")
    options = s3_server.options()
    with FarmKit(
        tmp_path / "home", broker, database_url=database, blobs_url=f"s3://{s3_bucket}/x",
        s3=options, log_level="debug",
    ) as kit:  # fmt: skip
        kit.env["HF_TOKEN"] = f"hf_{MARK}"
        seen = Seen(kit, [options.secret_key])
        token = seen.farm("token", "create", "t", "--scope", "read").strip().splitlines()[0]
        seen.texts.clear()  # the one place where a token is told
        seen.secrets.append(token.split("_", 2)[2])
        kit.dispatcher()
        kit.worker()
        kit.run("-m", "farm", "serve", "--port", "0", name="serve")
        until(lambda: "serving http" in kit.log("serve"), 60)
        url = re.search(r"http://[\d.:]+", kit.log("serve"))
        assert url
        batch = kit.farm.submit(["a red circle", "b"], model="fake-one", reuse=False)
        assert kit.farm.wait(batch.id, 60).counts["succeeded"] == 2
        _look(seen, batch.id)
        for path, status in (
            ("/v1/batches", 200), ("/v1/workers", 200), ("/metrics", 200), ("/readyz", 200),
            (f"/v1/jobs/{batch.id}/0", 200), (f"/v1/jobs/{batch.id}/0/picture", 307),
            ("/v1/nothing", 404), (f"/v1/batches/{batch.id}/results", 200),
        ):  # fmt: skip
            seen.ask(url[0], path, token, status)
            if status == 200 and path != "/readyz":
                seen.ask(url[0], path, token + "x", 401)
        _objects(seen, s3_server, s3_bucket)
        _trouble(seen)
        seen.command_lines()
        _outage(seen, redis, url[0], token)
        seen.rows()
        for process in kit.processes:
            process.terminate()
            process.wait(30)
        seen.logs()
        assert {"dispatcher.log", "serve.log", "worker-fake-one.log"} <= set(seen.texts)
        told = seen.told()
        assert not told, "\n".join(f"{place}: {text}" for place, text in told.items())


def _look(seen: Seen, batch_id: str) -> None:
    """All that shows settings or state."""
    for args in (
        ("config", "show"), ("config", "show", "--json"), ("doctor",), ("doctor", "--json"),
        ("-vv", "status", batch_id, "--json"), ("status",), ("workers", "--json"),
        ("token", "list", "--json"), ("models", "--json"), ("-vv", "results", batch_id, "--list"),
    ):  # fmt: skip
        assert seen.farm(*args), args


def _trouble(seen: Seen) -> None:
    """Wrong passwords, servers that are away, settings that are none; told as the farm tells it."""
    away = f"postgresql+psycopg://farm:{MARK}%2Fx@{NOWHERE}/farm?sslpassword={MARK}"
    broken = {
        "FARM_DATABASE_URL": [
            away, f"postgresql+psycopg://farm:{MARK}@[::1/farm", f"mysql://farm:{MARK}@h/farm",
            f"farm:{MARK}@h", f"postgresql+psycopg://farm:{MARK}@h:port/farm", "sqlite://h/x",
        ],
        "FARM_BROKER_URL": [
            f"redis://:{MARK}%2Fx@{NOWHERE}/0", f"redis://u:{MARK}@[::1/0", f"amqp://u:{MARK}@h/",
            f"redis://:{MARK}@h:port/0", f"redis://:{MARK}/x@{NOWHERE}/0",
            seen.kit.env["FARM_BROKER_URL"].replace("redis%2Fx", "wrong"),
        ],
        "FARM_S3_SECRET_KEY": [f"{MARK}-s3"],
        "FARM_BLOBS_URL": [f"s3://key:{MARK}@bucket/x", f"https://u:{MARK}@h/x"],
        "FARM_S3_ENDPOINT_URL": [f"http://u:{MARK}@{NOWHERE}", f"u:{MARK}@h"],
        "FARM_HUB_URL": [f"http://u:{MARK}@{NOWHERE}"],
    }  # fmt: skip
    for name, values in broken.items():
        commands = [("-vv", "doctor"), ("config", "show", "--json")]
        if name == "FARM_HUB_URL":
            commands.append(("-vv", "models", "add", "org/model", "--yes"))
        if name == "FARM_DATABASE_URL":
            commands.append(("-vv", "status"))
        for value in values:
            for args in commands:
                seen.farm(*args, **{name: value})


def _outage(seen: Seen, redis: RedisServer, url: str, token: str) -> None:
    """Redis goes, and comes back with another password."""
    kit = seen.kit
    redis.kill()
    kit.farm.submit(["c"], model="fake-one", reuse=False)
    until(lambda: "does not answer" in kit.log("dispatcher"), 30)
    until(lambda: re.search("(?i)connect", kit.log("worker-fake-one")), 30)
    seen.ask(url, "/readyz", token, 503)
    redis.start()
    redis.command("CONFIG SET requirepass another\r\nCLIENT KILL TYPE normal")
    seen.ask(url, "/readyz", token, 503)
    refused = re.compile("(?i)wrongpass|invalid username-password|invalid password")
    until(lambda: refused.search(kit.log("serve")), 30)


def _objects(seen: Seen, server: S3Server, bucket: str) -> None:
    s3 = boto3.client(
        "s3", endpoint_url=server.endpoint_url, region_name="us-east-1",
        aws_access_key_id=server.access_key, aws_secret_access_key=server.secret_key,
    )  # fmt: skip
    for item in s3.list_objects_v2(Bucket=bucket)["Contents"]:
        found = s3.get_object(Bucket=bucket, Key=item["Key"])
        seen.texts[f"object {item['Key']}"] = found["Body"].read().decode("latin-1") + str(found)
    s3.close()
