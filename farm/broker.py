"""The Celery app and the tokens in Redis: the only Celery import in farm/.

Redis holds doorbells and no truth: a token names a lane and no job. Tokens are acknowledged early
(the claim in SQL is the acknowledgement) and no result backend exists.
"""

from __future__ import annotations

import binascii
import json
import logging
import ssl
from typing import Any
from urllib.parse import urlsplit

import kombu.exceptions
import redis.exceptions
from celery import Celery
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import Channel, Transport

from farm.catalog import Lane
from farm.config import redact
from farm.errors import BrokerUnavailable, InvalidConfig

log = logging.getLogger(__name__)
TASK = "farm.render"
MAX_TOKEN = 4096  # bytes; ours are 150
_NEVER = ("compression", "eta", "expires", "chord", "group")
_AWAY = (kombu.exceptions.OperationalError, redis.exceptions.RedisError, OSError)
_TRANSPORT = {
    "socket_timeout": 10,
    "socket_connect_timeout": 3,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "global_keyprefix": "farm:",
}


class RedisChannel(Channel):  # type: ignore[misc]  # kombu is untyped
    """Redis as kombu has it, but what is no message is dropped and does not end the worker."""

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except (ValueError, RecursionError) as error:  # no JSON
            log.warning("what is no message is dropped: %s", type(error).__name__)
            return True


class RedisTransport(Transport):  # type: ignore[misc]
    Channel = RedisChannel

    def _deliver(self, message: Any, queue: str) -> None:
        if _is_token(message, queue):
            super()._deliver(_bare(message, queue), queue)
        else:
            log.warning("a message on %s that no farm sends is dropped", queue)


TRANSPORT_ALIASES |= dict.fromkeys(("redis", "rediss"), f"{__name__}:RedisTransport")


def _is_token(message: Any, queue: str) -> bool:
    """Whether it is built as kombu's are (kombu/transport/virtual/base.py) and rings this lane.

    What Celery can do beyond is never sent by a farm, and refused: other tasks, compressed bodies
    (a few kilobytes unpack to gigabytes), times in the future (kept in memory), callbacks, chords.
    """
    try:
        headers, properties = message["headers"], message["properties"]
        if len(message["body"]) > MAX_TOKEN or any(headers.get(name) for name in _NEVER):
            return False
        body = json.loads(binascii.a2b_base64(message["body"], strict_mode=True))
        args, lane, embedded = body
        return (
            args == []
            and Lane(**lane).queue == queue
            and not any(embedded.values())
            and headers["task"] == TASK
            and isinstance(headers["id"], str)
            and properties["body_encoding"] == "base64"
            and isinstance(properties["delivery_tag"], str)
            and isinstance(properties["delivery_info"], dict)
            and message["content-type"] == "application/json"
            and message["content-encoding"] == "utf-8"
        )
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return False


def _bare(message: Any, queue: str) -> dict[str, Any]:
    """The token without all that Celery would read in it: one thing of a wrong kind there, such as
    a priority, made the consumer connect anew and read the same message again, for ever."""
    properties = {
        "delivery_tag": message["properties"]["delivery_tag"],
        "delivery_info": {"exchange": "", "routing_key": queue},
        "body_encoding": "base64",
    }
    headers = {"lang": "py", "task": TASK, "id": message["headers"]["id"], "ignore_result": True}
    return {**message, "headers": headers, "properties": properties}


def make_app(url: str) -> Celery:
    """The Celery app of producers and workers; JSON only, early acknowledgement, no results."""
    app = Celery("farm", broker=url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_acks_late=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        worker_enable_remote_control=False,  # whoever reaches Redis could shut workers down
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # Redis that is full, or read-only after a failover
        broker_transport_options=_TRANSPORT,
        enable_utc=True,
    )
    if url.startswith("rediss:"):
        app.conf.broker_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}
    return app


class Broker:
    """Rings lanes and looks at their queues. Every method raises BrokerUnavailable when away."""

    def __init__(self, url: str) -> None:
        self.shown = redact(url)
        _refuse_unquoted(url)
        self.app = make_app(url)

    def publish(self, lane: Lane, tokens: int) -> None:
        """Put tokens on a lane's queue."""
        try:
            with self.app.producer_pool.acquire(block=True, timeout=10) as producer:
                for _ in range(tokens):
                    self.app.send_task(
                        TASK,
                        kwargs=lane._asdict(),
                        queue=lane.queue,
                        ignore_result=True,
                        retry=False,
                        producer=producer,
                    )
        except _AWAY as error:
            raise self._away(error) from error

    def length(self, lane: Lane) -> int:
        """How many tokens wait on a lane's queue."""
        try:
            with self.app.connection_for_read() as connection:
                return int(_redis(connection).llen(lane.queue))
        except _AWAY as error:
            raise self._away(error) from error

    def ping(self) -> str:
        """The server's name and version; raises BrokerUnavailable."""
        try:
            with self.app.connection_for_read() as connection:
                info: dict[str, Any] = _redis(connection).info("server")
        except _AWAY as error:
            raise self._away(error) from error
        name = info.get("server_name", "redis")
        return f"{name} {info.get(f'{name}_version', info.get('redis_version'))}"

    def config(self, *names: str) -> dict[str, str]:
        """The server's settings of these names; those that it does not tell are left out."""
        try:
            with self.app.connection_for_read() as connection:
                return dict(_redis(connection).config_get(*names))
        except redis.exceptions.ResponseError:  # managed servers refuse CONFIG
            return {}
        except _AWAY as error:
            raise self._away(error) from error

    def _away(self, error: Exception) -> BrokerUnavailable:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return BrokerUnavailable(f"{self.shown} does not answer: {why}")

    def close(self) -> None:
        self.app.close()


def _refuse_unquoted(url: str) -> None:
    """Raises InvalidConfig where kombu's own error would tell the password."""
    try:
        _ = urlsplit(url).port
    except ValueError:
        raise InvalidConfig(
            "broker_url is no URL; write redis://:PASSWORD@HOST:6379/0, a password with / or @ in "
            "it percent-encoded"
        ) from None


def _redis(connection: Any) -> Any:
    connection.ensure_connection(max_retries=1, timeout=3)
    channel: Channel = connection.default_channel
    return channel.client
