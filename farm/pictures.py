"""What a stored picture is: its key, its bytes, and the parameters and the AI mark inside it.

The parameters stand as A1111 `parameters` text (PNG: iTXt, JPEG and WebP: EXIF UserComment), the
mark as XMP `Iptc4xmpExt:DigitalSourceType` = trainedAlgorithmicMedia
(http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from farm.spec import JobSpec
from farm.store.ids import SESSION_PART, JobRef

CONTENT_TYPES = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
EXTENSIONS = {"png": "png", "webp": "webp", "jpeg": "jpg"}
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_MOST_COMMENT = 65_000  # bytes; all of the EXIF data of a JPEG are one segment of 65,533
_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    " Iptc4xmpExt:DigitalSourceType="
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


@dataclass(frozen=True)
class Origin:
    """What rendered a picture."""

    engine: str
    weights_sha256: str
    loras: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of each, by name


def object_key(ref: JobRef, claim_no: int, session_id: str, form: str) -> str:
    """The blob key of a job's picture; no other claim ever writes it.

    Part of the session stands in it, for a number can come twice: a database that lost its last
    commits, as a fail-over to an asynchronous replica may, counts on from an older one.
    """
    claim = f"{ref.idx:07d}-{claim_no}-{session_id[:SESSION_PART]}"
    return f"pictures/{ref.batch_id}/{claim}.{EXTENSIONS[form]}"


def parameters(spec: JobSpec, origin: Origin) -> str:
    """The job as A1111 `parameters` text: prompt, negative prompt, a line of `key: value` pairs.

    Its keys mean what modules/infotext_utils.py of AUTOMATIC1111/stable-diffusion-webui has them
    mean; LoRAs stand in a key of their own, so that the prompt stays as it was given.
    """
    settings = {
        "Steps": spec.steps,
        "Sampler": spec.scheduler or "model default",
        "CFG scale": f"{spec.guidance_scale:g}",
        "Seed": spec.seed,
        "Size": f"{spec.width}x{spec.height}",
        "Model hash": origin.weights_sha256[:10],
        "Model": spec.model,
        **_beyond_text(spec, origin),
        "Engine": origin.engine,
        "Version": "renderfarm",
    }
    negative = f"\nNegative prompt: {spec.negative_prompt}" if spec.negative_prompt else ""
    return f"{spec.prompt}{negative}\n" + ", ".join(f"{k}: {v}" for k, v in settings.items())


def _beyond_text(spec: JobSpec, origin: Origin) -> dict[str, str]:
    """What a job has beside its texts and sizes; nothing where it has nothing."""
    found = {}
    if spec.strength is not None:
        found["Denoising strength"] = f"{spec.strength:g}"
    if spec.clip_skip:
        found["Clip skip"] = str(spec.clip_skip + 1)  # there 1 means that nothing is left out
    if spec.loras:
        tags = " ".join(f"<lora:{name}:{weight:g}>" for name, weight in spec.loras)
        hashes = ", ".join(f"{name}: {origin.loras[name][:10]}" for name, _ in spec.loras)
        found |= {"Loras": f'"{tags}"', "Lora hashes": f'"{hashes}"'}
    return found


def encode(pixels: bytes, spec: JobSpec, origin: Origin) -> bytes:
    """A file in `spec.format` from `pixels`: 8-bit RGB, height x width x 3, row by row."""
    text = parameters(spec, origin)
    if spec.format == "png":
        from farm.png import png  # whoever only submits has no numpy

        texts = {"parameters": text, "XML:com.adobe.xmp": _XMP}
        return png(pixels, spec.width, spec.height, texts)
    image, out = Image.frombytes("RGB", (spec.width, spec.height), pixels), io.BytesIO()
    exif, comment = Image.Exif(), text.encode("utf-16-be")
    if len(comment) > _MOST_COMMENT:  # two texts of 8,000 emoji: the end of the second is left out
        cut = spec.like_this(spec.prompt, f"{spec.negative_prompt[:4_000]} ...", spec.seed)
        comment = parameters(cut, origin).encode("utf-16-be")
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + comment
    if spec.format == "webp":
        image.save(out, "WEBP", quality=92, method=2, exif=exif, xmp=_XMP.encode())
    else:
        image.save(out, "JPEG", quality=95, subsampling=0, exif=exif, xmp=_XMP.encode())
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
