"""c2pa-python, loaded when it is first used, and what it is told."""

from __future__ import annotations

from typing import Any

from farm.errors import InvalidConfig

MADE_BY_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# What a signer's certificate may be for: e-mail, documents, C2PA by Microsoft, C2PA.
_PURPOSES = ("1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.311.76.59.1.9",
             "1.3.6.1.4.1.62558.2.1")  # fmt: skip


def load() -> Any:
    """The module `c2pa`. Raises InvalidConfig where it, or `cryptography`, is not installed."""
    try:
        import c2pa
        import cryptography  # noqa: F401 - whoever signs needs both
    except ImportError:
        raise InvalidConfig(
            "C2PA needs two more packages: pip install 'renderfarm[provenance]'"
        ) from None
    return c2pa


def context(anchors: str | None = None, signer: Any = None) -> Any:
    """No network, no thumbnails, and what was just signed is not read again.

    `anchors` (PEM): certificates whose signers are trusted; None: trust is not looked at.
    """
    c2pa = load()
    trust = {"trust_config": "\n".join(_PURPOSES)} | ({"trust_anchors": anchors} if anchors else {})
    told = {
        "version": 1,
        "verify": {
            "verify_after_sign": False,
            "verify_trust": anchors is not None,
            "remote_manifest_fetch": False,
            "ocsp_fetch": False,
        },
        "trust": trust,
        "builder": {"thumbnail": {"enabled": False}},
    }
    return c2pa.Context(c2pa.Settings.from_dict(told), signer)
