"""Signs pictures; `farm.config` says with what."""

from __future__ import annotations

import io
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from farm.config import Settings
from farm.errors import EnvironmentFault, InvalidConfig
from farm.provenance import pem, sdk
from farm.provenance.mark import read_mark


class Signer:
    """Signs with one certificate; any thread may call `sign`."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """The chain (PEM, the signer's own certificate first) and its key (PEM, no passphrase).

        Raises InvalidConfig unless a picture that they sign now is valid to C2PA.
        """
        chain = pem.certificates(certificate, "c2pa_certificate")
        algorithm, private = pem.private_key(key, chain[0])
        self.name = chain[0].subject.rfc4514_string()
        self.until = min(one.not_valid_after_utc for one in chain)
        where = f"c2pa_certificate: {certificate}"
        if self.trouble:
            raise InvalidConfig(f"{where}: {self.trouble}")
        c2pa = sdk.load()
        try:
            info = c2pa.C2paSignerInfo(algorithm, pem.joined(chain), private, None)
            self._context = sdk.context(signer=c2pa.Signer.from_info(info))
            mark = read_mark(self.trial())
        except c2pa.C2paError as error:
            raise InvalidConfig(f"{where}: C2PA does not sign with it: {error}") from None
        if mark.fault:
            raise InvalidConfig(f"{where}: what it signs is not valid: {mark.fault}")

    @property
    def trouble(self) -> str:
        """Why nothing can be signed now; else nothing."""
        if time.time() < self.until.timestamp():
            return ""
        return (
            f"the certificate of {self.name} expired on {self.until:%Y-%m-%d}; "
            "put a new one in its place and start the worker again"
        )

    def sign(self, data: bytes, form: str, *, title: str, agent: str) -> bytes:
        """The file `data` (`form`: png, webp or jpeg) with a manifest; its pixels are untouched.

        `title` names the picture, `agent` the model that made it. Raises EnvironmentFault once the
        certificate has expired.
        """
        if self.trouble:
            raise EnvironmentFault(self.trouble)
        signed = io.BytesIO()
        with sdk.load().Builder(_manifest(title, agent), self._context) as builder:
            builder.sign(f"image/{form}", io.BytesIO(data), signed)
        return signed.getvalue()

    def trial(self) -> bytes:
        """A small signed PNG."""
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, "PNG")
        return self.sign(out.getvalue(), "png", title="trial", agent="none")


def open_signer(settings: Settings) -> Signer | None:
    """The signer that the settings ask for; None: pictures are not signed. Raises InvalidConfig."""
    certificate, key = settings.c2pa_certificate, settings.c2pa_key
    if certificate and key:
        return Signer(certificate, key)
    if certificate or key:
        raise InvalidConfig("c2pa_certificate and c2pa_key go together: set both or neither")
    return None


def _manifest(title: str, agent: str) -> dict[str, Any]:
    created = {
        "action": "c2pa.created",
        "digitalSourceType": sdk.MADE_BY_MODEL,
        "softwareAgent": {"name": agent},
    }
    return {
        "claim_generator_info": [{"name": "renderfarm", "version": _version()}],
        "title": title,
        "alg": "sha256",
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}],
    }


@cache
def _version() -> str:
    return version("renderfarm")
