"""Certificates and keys in PEM files. Of a key's content nothing is ever told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import InvalidConfig
from farm.provenance import sdk

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

MAX_BYTES = 2**20  # of a file; the list of all whom C2PA trusts has less


def certificates(path: Path, setting: str) -> list[Certificate]:
    """The certificates in a file; at least one. Raises InvalidConfig, which names the setting."""
    sdk.load()
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path, setting))
    except ValueError:
        raise InvalidConfig(f"{setting}: {path} holds no certificate in PEM") from None


def joined(chain: list[Certificate]) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return b"".join(one.public_bytes(Encoding.PEM) for one in chain)


def read_anchors(path: Path) -> str:
    """Certificates (PEM) whose signers are trusted. Raises InvalidConfig where there are none."""
    return joined(certificates(path, "c2pa_trust")).decode()


def private_key(path: Path, certificate: Certificate) -> tuple[str, bytes]:
    """What its key signs with (es256, es384, ps256, ed25519), and the key as PKCS #8.

    Raises InvalidConfig for any other key, and for one that is not the certificate's.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key(_read(path, "c2pa_key"), None)
    except TypeError:
        raise InvalidConfig(f"c2pa_key: {path} has a passphrase; give it without one") from None
    except Exception as error:
        if isinstance(error, InvalidConfig):
            raise
        raise InvalidConfig(f"c2pa_key: {path} holds no private key in PEM") from None
    if key.public_key() != certificate.public_key():
        raise InvalidConfig(f"c2pa_key: {path} is not the key of c2pa_certificate's first one")
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return _algorithm(key, path), key.private_bytes(serialization.Encoding.PEM, form, none)


def _algorithm(key: object, path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    match key:
        case ec.EllipticCurvePrivateKey(curve=ec.SECP256R1()):
            return "es256"
        case ec.EllipticCurvePrivateKey(curve=ec.SECP384R1()):
            return "es384"
        case rsa.RSAPrivateKey():
            return "ps256"
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
    raise InvalidConfig(f"c2pa_key: {path}: expected an EC (P-256, P-384), RSA or Ed25519 key")


def _read(path: Path, setting: str) -> bytes:
    try:
        if not path.is_file():
            raise InvalidConfig(f"{setting}: there is no file {path}")
        with path.open("rb") as file:
            return file.read(MAX_BYTES)
    except OSError as error:
        raise InvalidConfig(f"{setting}: {path}: {error.strerror}") from None
