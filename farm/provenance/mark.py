"""What a picture says of its origin: parameters, XMP, and a C2PA manifest with its signature."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from farm.errors import InvalidParameter
from farm.picture_bounds import PNG, png_chunks, refuse_endless
from farm.provenance import sdk
from farm.spec import INPUT_FORMATS

MAX_BYTES = 64 * 2**20
_ACTIONS = re.compile(r"c2pa\.actions(\.v\d+)?(__\d+)?")
_SOURCE_TYPE = re.compile(rb'DigitalSourceType(?:="|>|\s+rdf:resource=")([^"<]{1,200})')
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_IN_WORDS = {
    "signingCredential.untrusted": "its signer is not trusted",
    "signingCredential.expired": "its signer's certificate has expired",
    "assertion.dataHash.mismatch": "the file was changed after it was signed",
    "claimSignature.mismatch": "its signature is wrong",
}


_BOX = bytes.fromhex("6332706100110010800000aa00389b71")  # the JUMBF type of a manifest store


def is_signed(data: bytes) -> bool:
    """Whether a picture holds a C2PA manifest, be it good or bad; a quick look at its bytes."""
    return b"caBX" in png_chunks(data) if data.startswith(PNG) else _BOX in data


@dataclass(frozen=True)
class Mark:
    """What a picture says of its origin; None: it does not say it.

    `c2pa`: "valid" is signed and unchanged, "trusted" also by one whom the anchors vouch for.
    `codes`: what is wrong with the manifest, as C2PA names it. `signed_source_type` stands in the
    manifest, `source_type` in XMP, where anybody can write.
    """

    c2pa: Literal["none", "valid", "trusted", "invalid"]
    codes: tuple[str, ...] = ()
    parameters: str | None = None
    source_type: str | None = None
    signed_source_type: str | None = None
    title: str | None = None
    signer: str | None = None
    claim_generator: str | None = None

    @property
    def fault(self) -> str:
        """Why this is no AI mark to rely on; nothing where it is one."""
        if self.codes:
            return "; ".join(_IN_WORDS.get(code, code) for code in self.codes)
        if self.c2pa == "none":
            return "it is not signed"
        if self.signed_source_type != sdk.MADE_BY_MODEL:
            return "its signer does not say that a model made it"
        return ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_mark(data: bytes, anchors: str | None = None) -> Mark:
    """What a PNG, JPEG or WebP file carries; `anchors` (PEM): who vouches for signers.

    The pixels are not decoded. Raises InvalidParameter for what is no such file, or is one out of
    all proportion, and InvalidConfig without c2pa-python.
    """
    sdk.load()
    if len(data) > MAX_BYTES:
        raise InvalidParameter(f"it is larger than {MAX_BYTES >> 20} MiB")
    refuse_endless(data)
    try:
        with Image.open(io.BytesIO(data), formats=INPUT_FORMATS) as picture:
            parameters, source_type = _parameters(picture), _source_type(picture)
        manifest = _manifest(data, anchors)
        return Mark(parameters=parameters, source_type=source_type, **manifest)
    except UnidentifiedImageError:
        raise InvalidParameter("it is no PNG, JPEG or WebP picture") from None
    except Exception as error:  # whatever a decoder says of bytes that strangers made
        what = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InvalidParameter(f"it cannot be read as PNG, JPEG or WebP: {what}") from None


def _parameters(picture: Image.Image) -> str | None:
    """The A1111 `parameters`: a text in PNG, EXIF UserComment elsewhere."""
    told = picture.info.get("parameters")
    if told is not None:
        return str(told)
    comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return None
    coding = "utf-16-be" if comment.startswith(b"UNICODE\0") else "utf-8"
    return comment[8:].decode(coding, "replace")


def _source_type(picture: Image.Image) -> str | None:
    """IPTC's digital source type in XMP, found without a parser: strangers wrote it."""
    found = _SOURCE_TYPE.search(picture.info.get("xmp", b""))
    return found[1].decode("utf-8", "replace") if found else None


def _manifest(data: bytes, anchors: str | None) -> dict[str, Any]:
    """The part of a Mark that the manifest tells."""
    c2pa, context = sdk.load(), sdk.context(anchors)
    try:
        reader = c2pa.Reader.try_create(io.BytesIO(data), context=context)
    except c2pa.C2paError as error:
        what = str(error).splitlines()[0][:200]
        return {"c2pa": "none" if what.startswith("Remote:") else "invalid", "codes": (what,)}
    if reader is None:
        return {"c2pa": "none"}
    with reader:
        state, told = reader.get_validation_state(), json.loads(reader.json())
    manifest = told["manifests"][told["active_manifest"]]
    results = told["validation_results"].get("activeManifest", {})
    by, maker = manifest.get("signature_info", {}), manifest["claim_generator_info"][0]
    return {
        "c2pa": state.lower(),
        "codes": tuple(dict.fromkeys(one["code"] for one in results.get("failure", ()))),
        "signed_source_type": _signed_source_type(manifest["assertions"]),
        "title": manifest.get("title"),
        "signer": _said(by.get("issuer"), by.get("common_name")),
        "claim_generator": _said(maker.get("name"), maker.get("version")),
    }


def _said(*parts: str | None) -> str | None:
    return " ".join(filter(None, parts)) or None


def _signed_source_type(assertions: list[dict[str, Any]]) -> str | None:
    """How the picture was created, by the manifest's actions."""
    for one in assertions:
        for action in one["data"]["actions"] if _ACTIONS.fullmatch(one["label"]) else ():
            if action["action"] == "c2pa.created":
                return str(action.get("digitalSourceType"))
    return None
