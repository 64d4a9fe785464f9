"""Messages that no farm sent: a worker drops each, stays, and goes on with its work."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from farm.broker import TASK, _bare, _is_token
from farm.catalog import Lane
from tests.farm_kit import FarmKit
from tests.servers import RedisServer

LANE = Lane("fake-one", "fake")
PICKLED = base64.b64encode(pickle.dumps([[], {}, {}])).decode()

FAKE = LANE._asdict()
EMBEDDED: dict[str, Any] = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))


def _body(kwargs: dict[str, str], **embedded: Any) -> str:
    return base64.b64encode(json.dumps([[], kwargs, EMBEDDED | embedded]).encode()).decode()


def _message(**changes: Any) -> dict[str, Any]:
    """A message as kombu makes them, with changes."""
    where = {"exchange": "", "routing_key": LANE.queue}
    properties = {"delivery_tag": "a", "body_encoding": "base64", "delivery_info": where}
    return {
        "body": base64.b64encode(b"[[], {}, {}]").decode(),
        "headers": {"task": TASK, "id": "1"},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": properties,
    } | changes


FOREIGN: dict[str, bytes] = {
    "bytes": b"\x80\x04\xff",
    "text": b"farm",
    "nothing": b"",
    "nested too deep": b"[" * 100_000,
    **{f"JSON {text}": text.encode() for text in ("null", "7", "[]", "{}", '"x"', "[1, 2, 3]")},
    **{
        name: json.dumps(message).encode()
        for name, message in {
            "no arguments": _message(),
            "another lane": _message(body=_body({"model": "fake-one", "engine": "x"})),
            "callbacks": _message(body=_body(FAKE, callbacks=[{"task": TASK}])),
            "a chain": _message(body=_body(FAKE, chain=[{"task": "os.system", "args": ["id"]}])),
            "in a hundred years": _message(
                body=_body(FAKE), headers={"task": TASK, "id": "4", "eta": "2126-01-01T00:00:00"}
            ),
            "a bomb": _message(
                body=base64.b64encode(zlib.compress(bytes(1 << 26))).decode(),
                headers={"task": TASK, "id": "5", "compression": "application/x-gzip"},
            ),
            "64 MB": _message(body=base64.b64encode(bytes(48_000_000)).decode()),
            "yaml": _message(
                body=base64.b64encode(b"!!python/object/apply:os.system [id]").decode(),
                **{"content-type": "application/x-yaml"},
            ),
            "msgpack": _message(
                body=base64.b64encode(b"\x93\x90\x80\x80").decode(),
                **{"content-type": "application/x-msgpack", "content-encoding": "binary"},
            ),
            "another task": _message(headers={"task": "os.system", "id": "2"}),
            "no base64": _message(body="%%%"),
            "half a JSON body": _message(body=base64.b64encode(b"[1").decode()),
            "a pickle": _message(
                body=PICKLED, **{"content-type": "application/x-python-serialize"}
            ),
            "a pickle that says JSON": _message(body=PICKLED),
            "a type that is none": _message(**{"content-type": 5}),
            "headers that are none": _message(headers=[1]),
            "a token without an id": _message(body=_body(FAKE), headers={"task": TASK}),
            "an unknown compression": _message(
                headers={"task": TASK, "id": "3", "compression": "none such"}
            ),
            "no properties": _message(properties=None),
            "no tag": _message(properties={"body_encoding": "base64", "delivery_info": {}}),
        }.items()
    },
}


ODD: dict[str, Any] = {
    "headers": _message(
        body=_body(FAKE), headers={"task": TASK, "id": "4", "timelimit": 5, "stamps": 7}
    ),
    "properties": _message(
        body=_body(FAKE),
        properties={
            "delivery_tag": "b",
            "body_encoding": "base64",
            "delivery_info": {},
            "priority": "x",
        },
    ),
}


def test_foreign_messages_neither_stop_nor_end_a_worker(
    tmp_path: Path, redis_server: RedisServer, redis_url: str
) -> None:
    with FarmKit(tmp_path / "home", redis_url) as kit:
        kit.dispatcher()  # it rings again: what is dropped was counted as a token
        worker = kit.worker()
        with redis.Redis.from_url(redis_server.client_url) as client:
            odd = {f"odd {name}": json.dumps(token).encode() for name, token in ODD.items()}
            for name, foreign in {**FOREIGN, **odd}.items():
                client.lpush(f"farm:{LANE.queue}", foreign)
                batch = kit.farm.submit([f"after {name}"], model="fake-one")
                status = kit.farm.wait(batch.id, 20)
                assert status.counts["succeeded"] == 1, name
                assert worker.poll() is None, f"{name}\n{kit.log('worker-fake-one')[-2000:]}"


def test_a_token_of_ours_is_told_from_them() -> None:
    good = _message(body=_body(FAKE))
    assert _is_token(good, LANE.queue)
    assert not _is_token(good, Lane("fake-one", "sdcpp").queue)
    for name, foreign in FOREIGN.items():
        try:
            message = json.loads(foreign)
        except (ValueError, RecursionError):
            continue
        assert not _is_token(message, LANE.queue), name


@pytest.mark.parametrize("what", ODD)
def test_what_is_odd_in_a_token_is_not_read(what: str) -> None:
    plain = _bare(_message(body=_body(FAKE)), LANE.queue)
    assert _is_token(ODD[what], LANE.queue)
    found = _bare(ODD[what], LANE.queue)
    found["headers"]["id"] = plain["headers"]["id"]
    found["properties"]["delivery_tag"] = plain["properties"]["delivery_tag"]
    assert found == plain


def test_nobody_commands_a_worker_through_redis(
    tmp_path: Path, redis_server: RedisServer, redis_url: str
) -> None:
    """Celery's remote control would stop workers, or make them consume from other queues."""
    with FarmKit(tmp_path / "home", redis_url) as kit:
        kit.dispatcher()
        worker = kit.worker()
        with Celery("stranger", broker=redis_url, set_as_current=False) as stranger:
            stranger.conf.broker_transport_options = {"global_keyprefix": "farm:"}
            assert stranger.control.ping(timeout=1) == []
            for command in ("pool_restart", "shutdown"):
                stranger.control.broadcast(command)
        status = kit.farm.wait(kit.farm.submit(["after"], model="fake-one").id, 20)
        assert (status.counts["succeeded"], worker.poll()) == (1, None)
