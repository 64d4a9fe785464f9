"""A certificate authority for tests: it vouches for one signer, and nobody else knows it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import Invalid
from farm.provenance import sdk

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder, KeyUsage, Name

MAX_NAME = 64  # characters: X.520's bound of an organisation
VALID = timedelta(days=3650)
_SKEW = timedelta(hours=1)  # that another machine's clock may be behind


@dataclass(frozen=True)
class Authority:
    """Where its files lie: the signer's chain, the signer's key (mode 0600), the authority."""

    certificate: Path
    key: Path
    anchors: Path


def make_authority(directory: Path, name: str, *, force: bool = False) -> Authority:
    """A test authority and a signer's certificate under it, as C2PA wants them; both for ten years.

    `name`: the organisation that signs. The authority's own key is forgotten at once, so it can
    vouch for nobody else. Raises Invalid for a name that is none, and unless `force` for files that
    are there.
    """
    sdk.load()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise Invalid(f"the name has 1 to {MAX_NAME} characters, none of them control characters")
    made = Authority(directory / "signer.pem", directory / "signer.key", directory / "test-ca.pem")
    there = [path for path in (made.key, made.certificate, made.anchors) if path.exists()]
    if there and not force:
        raise Invalid(f"{there[0]} is there already; with --force others take its place")
    root, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    anchor = _anchor(root, name)
    leaf = _leaf(root, key, anchor.subject, name)
    pem = form.Encoding.PEM
    directory.mkdir(parents=True, exist_ok=True)
    secret = key.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption())
    _write(made.key, secret, 0o600)
    _write(made.certificate, leaf.public_bytes(pem) + anchor.public_bytes(pem), 0o644)
    _write(made.anchors, anchor.public_bytes(pem), 0o644)
    return made


def _anchor(root: EllipticCurvePrivateKey, name: str) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    who = _name(name, "test authority, trusted by nobody")
    builder = _builder(root, who, who).add_extension(x509.BasicConstraints(True, 0), critical=True)
    return builder.add_extension(_usage(vouches=True), critical=True).sign(root, hashes.SHA256())


def _leaf(
    root: EllipticCurvePrivateKey, key: EllipticCurvePrivateKey, issuer: Name, name: str
) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID

    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    builder = (
        _builder(key, _name(name, "test signer"), issuer)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(_usage(vouches=False), critical=True)
        .add_extension(purpose, critical=False)
        .add_extension(by, critical=False)
    )
    return builder.sign(root, hashes.SHA256())


def _name(organisation: str, what: str) -> Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    parts = {NameOID.ORGANIZATION_NAME: organisation, NameOID.COMMON_NAME: what}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts.items()])


def _builder(key: EllipticCurvePrivateKey, subject: Name, issuer: Name) -> CertificateBuilder:
    from cryptography import x509

    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, vouches: bool) -> KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not vouches,
        key_cert_sign=vouches,
        crl_sign=vouches,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """A new file in the place of any other, never readable by more than `mode` allows."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
