"""Settings: flags > FARM_* environment > secret files > farm.toml > defaults.

Secret files: those of the directory FARM_SECRETS_DIR, named as the variable, in small letters.

Nothing needs to be set: without any setting the farm lives in one directory (`home`) with SQLite,
local pictures and its own Redis or Valkey on a unix socket.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from farm.errors import InvalidConfig
from farm.faults import unreadable, what, where
from farm.units import parse_size

SOCKET_PATH_LIMIT = 100  # bytes; sockaddr_un holds 108 on Linux, 104 on macOS


def default_home() -> Path:
    """Where the farm lives unless `home` says otherwise: $XDG_DATA_HOME/farm."""
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "farm"


def default_hub() -> str:
    """The hub that HF_ENDPOINT names, else the public one."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _bytes(value: object) -> object:
    """Bytes of a size as people write it; a plain number counts bytes."""
    if not isinstance(value, str) or value.strip().isdecimal():
        return value
    try:
        return parse_size(value)
    except InvalidConfig as error:
        raise ValueError(error.message) from None


def _no_pem(value: object) -> object:
    """The path of a file, not what is in it: a key would be shown wherever settings are."""
    if "-----BEGIN" in str(value):
        raise ValueError("give the path of the PEM file, not its text")
    return value


PemFile = Annotated[Path | None, BeforeValidator(_no_pem)]


class Settings(BaseSettings):
    """All settings of the farm. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix="FARM_", extra="forbid", frozen=True)

    home: Path = Field(default_factory=default_home, description="directory of the embedded farm")
    database_url: SecretStr | None = Field(
        None,
        description="SQLAlchemy URL; default: SQLite in home. postgresql+psycopg://user@host/db",
    )
    broker_url: SecretStr | None = Field(
        None,
        description="Redis or Valkey URL; default: the embedded server's socket. redis://host:6379/0",
    )
    blobs_url: str | None = Field(
        None,
        description="where pictures go; default: home/blobs. file:///dir or s3://bucket/prefix",
    )
    models_file: Path | None = Field(
        None, description="the catalogue; default: models.toml here or in home"
    )
    models_dir: Path | None = Field(None, description="fetched weights; default: home/models")
    spool_dir: Path | None = Field(
        None,
        description="finished pictures while the blob store is away; a local disk; "
        "default: home/spool",
    )
    spool_max: Annotated[int, BeforeValidator(_bytes)] = Field(
        4 * 2**30, ge=0, description="most that one worker spools, such as 4GiB; then it waits"
    )
    hub_url: str = Field(
        default_factory=default_hub,
        pattern=r"^https?://[^\s/]+",
        description="the model hub; default: HF_ENDPOINT, else https://huggingface.co",
    )
    hub_hosts: tuple[str, ...] = Field(
        (), description="private hosts (host or host:port) that the hub may redirect downloads to"
    )

    blocklist: Path | None = Field(
        None, description="a text file of terms that no prompt may hold, one a line"
    )

    c2pa_certificate: PemFile = Field(
        None,
        description="workers sign pictures with this certificate chain (PEM); default: unsigned",
    )
    c2pa_key: PemFile = Field(None, description="the private key of c2pa_certificate (PEM)")
    c2pa_trust: PemFile = Field(
        None, description="certificates (PEM) whose signers `farm provenance verify` trusts"
    )

    s3_endpoint_url: str | None = Field(None, description="S3 server; default: Amazon's")
    s3_region: str | None = Field(None, description="S3 region")
    s3_access_key: SecretStr | None = Field(None, description="default: boto3's own chain")
    s3_secret_key: SecretStr | None = Field(None, description="default: boto3's own chain")
    s3_path_style: bool = Field(
        True, description="bucket in the path (most S3 servers) or in the host"
    )
    s3_checksums: Literal["when_required", "when_supported"] = Field(
        "when_required", description="extra checksums; many S3 servers know none"
    )

    session_ttl_s: float = Field(30.0, gt=0, description="a worker silent for so long is lost")
    tick_s: float = Field(1.0, gt=0, description="how often the dispatcher looks")
    max_failures: int = Field(3, ge=1, description="failures after which a job is failed")
    retry_delay_s: float = Field(2.0, ge=0, description="wait after a failure, doubled each time")
    tokens_per_worker: int = Field(2, ge=1, description="doorbell messages a live worker")
    bundle_seconds: float = Field(4.0, gt=0, description="work a worker claims at once")
    bundle_max: int = Field(1024, ge=1, le=1024, description="most jobs in one bundle")
    load_timeout_s: float = Field(900.0, gt=0, description="longest a model may take to load")
    step_timeout_s: float = Field(300.0, gt=0, description="longest a step of a render may take")
    decode_timeout_s: float = Field(900.0, gt=0, description="longest decoding of a micro-batch")
    upload_timeout_s: float = Field(
        300.0, gt=0, description="longest upload; a worker with a longer one claims no more jobs"
    )
    shutdown_grace_s: float = Field(30.0, ge=0, description="time to finish pictures at shutdown")
    http_max_body: int = Field(
        2**30, gt=0, description="bytes of the largest prompt file that the HTTP API takes"
    )
    http_max_jobs: int = Field(
        10_000_000, ge=1, description="most jobs of one batch that comes over HTTP"
    )
    http_rate: float = Field(
        200.0, ge=0, description="requests a second of one token or address; 0: no limit"
    )
    http_waits: int = Field(
        500, ge=1, description="long polls and event streams of one token or address at once"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = Field(
        "text", description="lines of workers, dispatchers and the HTTP server: text or json"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, config_file())
        folder = os.environ.get("FARM_SECRETS_DIR")
        files = [SecretsSettingsSource(settings_cls, folder)] if folder else []
        return init_settings, env_settings, *files, toml

    @property
    def database(self) -> str:
        """SQLAlchemy URL, secrets included."""
        if self.database_url:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home.resolve() / 'farm.db'}"

    @property
    def broker(self) -> str:
        """Celery broker URL, secrets included."""
        if self.broker_url:
            return self.broker_url.get_secret_value()
        return f"redis+socket://{self.broker_socket}"

    @property
    def broker_socket(self) -> Path:
        """The embedded server's unix socket; in a directory of ours if home's path is too long."""
        path = self.home.resolve() / "broker.sock"
        if len(os.fsencode(path)) < SOCKET_PATH_LIMIT:
            return path
        name = hashlib.sha256(os.fsencode(self.home.resolve())).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"farm-{os.getuid()}" / f"{name}.sock"

    @property
    def blobs(self) -> str:
        """Blob store URL."""
        return self.blobs_url or (self.home.resolve() / "blobs").as_uri()

    @property
    def catalog_path(self) -> Path | None:
        """The models.toml in force, if there is one."""
        if self.models_file:
            return self.models_file
        for path in (Path("models.toml"), self.home / "models.toml"):
            if os.path.isfile(path):  # Path's own raises for a name that is too long
                return path
        return None

    @property
    def models_path(self) -> Path:
        """Where `farm models fetch` puts weights, one directory a model and engine."""
        return (self.models_dir or self.home / "models").absolute()

    @property
    def spool_path(self) -> Path:
        """Where workers hold finished pictures while the blob store is away."""
        return (self.spool_dir or self.home / "spool").absolute()

    def shown(self) -> dict[str, Any]:
        """Every setting for a person's eyes: secrets and passwords in URLs redacted."""
        values: dict[str, Any] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = redact(value.get_secret_value()) if name.endswith("_url") else "**********"
            elif name.endswith("_url") and value:
                value = redact(value)
            values[name] = str(value) if isinstance(value, Path) else value
        return values


def redact(url: str) -> str:
    """A URL without its password; query values are hidden too, since they may hold secrets.

    A password that should have been quoted, for an / or @ in it, is hidden as well; of what is no
    URL all that stands before an @.
    """
    whose, at, rest = url.rpartition("@")
    if url.startswith(("sqlite:", "file:")) or not at:
        whose, at, rest = "", "", url
    scheme, slashes, user = whose.partition("://") if "://" in whose else ("", "", whose)
    if "?" in user:  # the @ is one of the query, or the ? one of the password
        name = re.split("[:?]", user, maxsplit=1)[0] if slashes else ""
        return f"{scheme}{slashes}{name}?**********"
    name, colon, _ = user.partition(":")
    who = f"{name}{at}" if slashes and not colon else f"{name if slashes else ''}:**********{at}"
    place, mark, _ = rest.partition("?")
    return f"{scheme}{slashes}{who if at else ''}{place}{mark and '?**********'}"


def config_file() -> Path:
    """farm.toml: $FARM_CONFIG, else ./farm.toml."""
    return Path(os.environ.get("FARM_CONFIG", "farm.toml"))


def load_settings(**flags: Any) -> Settings:
    """Settings from all sources; flags that are None count as not given.

    Raises InvalidConfig naming each wrong setting, never its secret value.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        raise InvalidConfig("; ".join(map(_fault, faults))) from None
    except SettingsError:  # the one that is no plain text
        raise InvalidConfig('FARM_HUB_HOSTS must be a JSON list, such as ["a.example"]') from None
    except (OSError, ValueError) as error:  # a farm.toml that is no TOML
        raise InvalidConfig(f"{config_file()}: {unreadable(error)}") from None


def _fault(item: Mapping[str, Any]) -> str:
    name = where(item)
    if item["type"] == "extra_forbidden":  # of a variable that is no setting nothing is said
        return f"{config_file()}: no such setting: {name}"
    return f"{name} (FARM_{str(item['loc'][0]).upper()}): {what(item)}"
