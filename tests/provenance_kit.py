"""Certificates of every kind, good and useless, and what others' programs read in a picture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from farm.provenance import Authority, make_authority
from tests.servers import ServerMissing

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8
OPENSSL = serialization.PrivateFormat.TraditionalOpenSSL
OPEN = serialization.NoEncryption()
E_MAIL = ExtendedKeyUsageOID.EMAIL_PROTECTION
C2PA = x509.ObjectIdentifier("1.3.6.1.4.1.62558.2.1")
TLS = ExtendedKeyUsageOID.SERVER_AUTH


@cache
def key_of(kind: str) -> Any:
    """A private key; RSA ones take a while."""
    return {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
        "root": lambda: ec.generate_private_key(ec.SECP256R1()),
    }[kind]()


def issue(
    directory: Path,
    kind: str = "P-256",
    purpose: x509.ObjectIdentifier = E_MAIL,
    days: float = 30,
    form: serialization.PrivateFormat = PKCS8,
    lock: serialization.KeySerializationEncryption = OPEN,
) -> Authority:
    """A signer's files, as another authority than ours makes them. `days`: until it expires."""
    root, key, now = key_of("root"), key_of(kind), datetime.now(UTC)
    who = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Elsewhere")])
    start = x509.CertificateBuilder().issuer_name(who).not_valid_before(now - timedelta(days=400))
    anchor = (
        start.subject_name(who)
        .public_key(root.public_key())
        .serial_number(1)
        .not_valid_after(now + timedelta(days=400))
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .sign(root, hashes.SHA256())
    )
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    by = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    signer = x509.Name([*who, x509.NameAttribute(NameOID.COMMON_NAME, kind)])
    leaf = (
        start.subject_name(signer)
        .public_key(key.public_key())
        .serial_number(2)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(by, critical=False)
        .sign(root, hashes.SHA256())
    )
    made = Authority(directory / "a.pem", directory / "a.key", directory / "root.pem")
    made.certificate.write_bytes(leaf.public_bytes(PEM) + anchor.public_bytes(PEM))
    made.key.write_bytes(key.private_bytes(PEM, form, lock))
    made.anchors.write_bytes(anchor.public_bytes(PEM))
    return made


def settings_of(made: Authority) -> dict[str, Path]:
    return {"c2pa_certificate": made.certificate, "c2pa_key": made.key, "c2pa_trust": made.anchors}


def own_authority(directory: Path) -> Authority:
    return make_authority(directory / "signer", "Ñandú & Söhne <b>")


def secret_lines(key: Path) -> list[str]:
    """The lines of a key's file that nobody may see."""
    return [line for line in key.read_text().splitlines() if not line.startswith("---")]


def exiftool(path: Path) -> dict[str, Any]:
    """What exiftool reads in a picture, by tag with its group."""
    program = shutil.which("exiftool")
    if program is None:
        why = "no exiftool: apt-get install libimage-exiftool-perl"
        if os.environ.get("CI"):
            raise ServerMissing(why)
        pytest.skip(why)
    command = [program, "-json", "-G", "-charset", "UTF8", str(path)]
    told = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
    found: dict[str, Any] = json.loads(told)[0]
    return found
