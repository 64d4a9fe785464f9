"""Signed pictures: what others' readers find in them, what they survive, and who may sign."""

from __future__ import annotations

import io
import json
import random
import socket
import stat
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from PIL import Image, PngImagePlugin
from sd_parsers import ParserManager

from farm import provenance
from farm.config import Settings, load_settings
from farm.doctor import Check, examine
from farm.errors import EnvironmentFault, Invalid, InvalidConfig, InvalidParameter
from farm.pictures import CONTENT_TYPES, EXTENSIONS, Origin, encode, parameters
from farm.provenance import (
    Authority,
    Signer,
    authority,
    is_signed,
    make_authority,
    open_signer,
    read_anchors,
    read_mark,
    sdk,
)
from farm.spec import JobSpec
from tests.cli_kit import Run, command_line
from tests.picture_kit import animated, bomb, picture
from tests.provenance_kit import (
    C2PA,
    OPENSSL,
    TLS,
    exiftool,
    issue,
    own_authority,
    secret_lines,
    settings_of,
)
from tests.store_kit import spec

ORIGIN = Origin("diffusers", "ab" * 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
MADE_BY_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
FORMS = list(CONTENT_TYPES)
PROMPTS = {
    "words": "a red circle, <b>bold</b> & 赤い円",
    "emoji": "🟥👩‍🎨" * 2_000,
    "long": "circle " * 1_142 + "circle",
    "markup": '<x:xmpmeta a="]]>"/></rdf:RDF><?xpacket end="w"?> c2pa jumb caBX {"label": "c2pa"}',
    "controls": "\\x1b[31m \\u0000 %00 &#0; \n\t Negative prompt: x\nSteps: 1, Sampler: y",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return own_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def signer(made: Authority) -> Signer:
    return Signer(made.certificate, made.key)


@pytest.fixture(scope="module")
def anchors(made: Authority) -> str:
    return read_anchors(made.anchors)


def plain(form: str, prompt: str = "a red circle", **fields: Any) -> tuple[JobSpec, bytes]:
    job = spec(prompt, format=form, **fields)
    return job, encode(PIXELS.tobytes(), job, ORIGIN)


def signed(signer: Signer, form: str, prompt: str = "a red circle", **fields: Any) -> bytes:
    return signer.sign(plain(form, prompt, **fields)[1], form, title="0abc/7", agent="fake/shapes")


def pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


# ---- what a signed picture is


@pytest.mark.parametrize("form", FORMS)
def test_c2pas_own_reader_finds_a_valid_manifest(form: str, signer: Signer, anchors: str) -> None:
    job, before = plain(form)
    data = signed(signer, form)
    with c2pa.Reader(CONTENT_TYPES[form], io.BytesIO(data)) as reader:
        assert reader.get_validation_state() == "Valid"
        told = json.loads(reader.json())
    manifest = told["manifests"][told["active_manifest"]]
    (actions,) = manifest["assertions"]
    (created,) = actions["data"]["actions"]
    assert created["action"] == "c2pa.created"
    assert created["digitalSourceType"] == MADE_BY_MODEL
    assert created["softwareAgent"] == {"name": "fake/shapes"}
    assert manifest["title"] == "0abc/7"
    assert manifest["claim_generator_info"][0]["name"] == "renderfarm"
    assert "thumbnail" not in str(told)
    assert pixels(data) == pixels(before)
    assert len(data) - len(before) < 4_096
    mark = read_mark(data, anchors)
    assert (mark.c2pa, mark.codes, mark.fault) == ("trusted", (), "")
    assert mark.parameters == parameters(job, ORIGIN)
    assert mark.source_type == mark.signed_source_type == MADE_BY_MODEL
    assert mark.signer == "Ñandú & Söhne <b> test signer"
    assert (mark.claim_generator or "").startswith("renderfarm ")


@pytest.mark.parametrize("form", FORMS)
def test_a_signed_picture_is_told_at_once(form: str, signer: Signer) -> None:
    assert is_signed(signed(signer, form))
    assert not is_signed(plain(form, "c2pa: urn:c2pa jumb jumd")[1])


@pytest.mark.parametrize("signs", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("form", FORMS)
def test_what_others_programs_read(form: str, signs: bool, signer: Signer, tmp_path: Path) -> None:
    job, data = plain(form, PROMPTS["words"], negative_prompt="dull", scheduler="euler_a")
    path = tmp_path / f"picture.{EXTENSIONS[form]}"
    path.write_bytes(signer.sign(data, form, title="t", agent="a") if signs else data)
    found = ParserManager().parse(path)
    assert found is not None
    assert [prompt.value for prompt in found.prompts] == [PROMPTS["words"]]
    assert [prompt.value for prompt in found.negative_prompts] == ["dull"]
    (sampler,) = found.samplers
    assert sampler.name == "euler_a"
    assert sampler.parameters["seed"] == str(job.seed)
    assert sampler.model
    assert sampler.model.name == "shapes"
    told = exiftool(path)
    assert told["XMP:DigitalSourceType"] == MADE_BY_MODEL
    assert parameters(job, ORIGIN) in (told.get("PNG:Parameters"), told.get("EXIF:UserComment"))
    assert not [name for name in told if "Warning" in name or "Error" in name], told


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("form", FORMS)
def test_any_text_can_stand_in_a_signed_picture(
    form: str, prompt: str, signer: Signer, anchors: str
) -> None:
    job, before = plain(form, prompt, negative_prompt=prompt)
    data = signed(signer, form, prompt, negative_prompt=prompt)
    mark = read_mark(data, anchors)
    assert (mark.c2pa, mark.fault) == ("trusted", "")
    assert mark.parameters == parameters(job, ORIGIN)
    assert mark.source_type == MADE_BY_MODEL
    assert pixels(data) == pixels(before)


@pytest.mark.parametrize("form", FORMS)
def test_one_changed_byte_is_seen(form: str, signer: Signer, anchors: str) -> None:
    before, data = plain(form)[1], signed(signer, form)
    start = data.index(b"jumb") - 16  # the heads of its first box and of what holds it
    end = start + 20 + len(data) - len(before)
    outside = [*range(start), *range(end, len(data))]
    text = data.index("red circle".encode("ascii" if form == "png" else "utf-16-be"))
    words = (b"0abc/7", b"fake/shapes", b"trainedAlgorithmicMedia", b"renderfarm", b"test signer")
    inside = [data.index(word, start, end) + 3 for word in words]
    pixel = data.index({"png": b"IDAT", "webp": b"VP8 ", "jpeg": b"\xff\xda"}[form]) + 100
    for place in [*outside[:: len(outside) // 60], *inside, outside[-1], text, pixel]:
        mark = read_changed(data, place, anchors)
        assert mark is None or mark.fault, f"byte {place} of {len(data)}"
    told = read_changed(data, pixel, anchors)
    assert told
    assert (told.c2pa, told.fault) == ("invalid", "the file was changed after it was signed")


def read_changed(data: bytes, place: int, anchors: str) -> provenance.Mark | None:
    """The mark after one bit there is another; None: it is no picture any more."""
    changed = bytearray(data)
    changed[place] ^= 1
    try:
        return read_mark(bytes(changed), anchors)
    except InvalidParameter:
        return None


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_that_was_saved_anew_is_not_signed(form: str, signer: Signer) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(signed(signer, form))).save(out, form)
    mark = read_mark(out.getvalue())
    assert (mark.c2pa, mark.signer, mark.fault) == ("none", None, "it is not signed")


def test_threads_sign_at_once(signer: Signer, anchors: str) -> None:
    jobs = [(FORMS[n % 3], f"prompt {n}") for n in range(60)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda job: signed(signer, *job), jobs))
    for (_, prompt), data in zip(jobs, done, strict=True):
        mark = read_mark(data, anchors)
        assert (mark.c2pa, (mark.parameters or "").splitlines()[0]) == ("trusted", prompt)
    assert len(set(done)) == len(jobs)


# ---- who signs


@pytest.mark.parametrize("kind", ["P-256", "P-384", "rsa", "ed25519"])
def test_keys_that_sign(kind: str, tmp_path: Path) -> None:
    made = issue(tmp_path, kind, C2PA)
    data = signed(Signer(made.certificate, made.key), "png")
    mark = read_mark(data, read_anchors(made.anchors))
    assert (mark.c2pa, mark.signer) == ("trusted", f"Elsewhere {kind}")


def test_a_key_as_openssl_writes_it(tmp_path: Path) -> None:
    made = issue(tmp_path, "P-256", form=OPENSSL)
    assert "EC PRIVATE KEY" in made.key.read_text()
    assert Signer(made.certificate, made.key).name == "CN=P-256,O=Elsewhere"


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"purpose": TLS}, "C2PA does not sign with it: Signature: the certificate is invalid"),
        ({"days": -1}, "the certificate of CN=P-256,O=Elsewhere expired on "),
        ({"kind": "secp256k1"}, "expected an EC"),
        (
            {"lock": serialization.BestAvailableEncryption(b"geheim")},
            "has a passphrase; give it without one",
        ),
    ],
)
def test_certificates_that_do_not_sign(how: dict[str, Any], told: str, tmp_path: Path) -> None:
    made = issue(tmp_path, **how)
    with pytest.raises(InvalidConfig) as caught:
        Signer(made.certificate, made.key)
    assert told in caught.value.message
    assert not any(line in caught.value.message for line in secret_lines(made.key))


@pytest.mark.parametrize(
    ("certificate", "key", "told"),
    [
        ("none.pem", "a.key", "c2pa_certificate: there is no file "),
        (".", "a.key", "c2pa_certificate: there is no file "),
        ("x" * 300, "a.key", "File name too long"),
        ("a.key", "a.key", "holds no certificate in PEM"),
        ("empty", "a.key", "holds no certificate in PEM"),
        ("a.pem", "none.key", "c2pa_key: there is no file "),
        ("a.pem", "a.pem", "holds no private key in PEM"),
        ("a.pem", "empty", "holds no private key in PEM"),
        ("a.pem", "other.key", "is not the key of c2pa_certificate's first one"),
        ("turned.pem", "a.key", "is not the key of c2pa_certificate's first one"),
    ],
)
def test_files_that_are_not_what_they_should_be(
    certificate: str, key: str, told: str, tmp_path: Path, made: Authority
) -> None:
    chain = issue(tmp_path).certificate.read_text()
    first, second = chain.split("-----END CERTIFICATE-----\n")[:2]
    end = "-----END CERTIFICATE-----\n"
    (tmp_path / "turned.pem").write_text(second + end + first + end)
    (tmp_path / "other.key").write_bytes(made.key.read_bytes())
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidConfig) as caught:
        Signer(tmp_path / certificate, tmp_path / key)
    assert told in caught.value.message
    for secret in (*secret_lines(tmp_path / "a.key"), *secret_lines(made.key)):
        assert secret not in caught.value.message


def test_a_certificate_that_expires_while_a_worker_runs(made: Authority) -> None:
    signer = Signer(made.certificate, made.key)
    assert signer.trouble == ""
    signer.until = datetime.now(UTC) - timedelta(seconds=1)
    assert "start the worker again" in signer.trouble
    with pytest.raises(EnvironmentFault, match="expired on"):
        signed(signer, "png")


def test_a_picture_outlives_no_certificate(tmp_path: Path) -> None:
    """Without time stamps a reader cannot know that the signature was there in time."""
    made = issue(tmp_path, days=10 / 86_400)
    data = signed(Signer(made.certificate, made.key), "png")
    deadline = time.monotonic() + 30
    while not (fault := read_mark(data).fault):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert fault == "its signer's certificate has expired"


def test_settings_name_both_files_or_neither(made: Authority) -> None:
    both = settings_of(made)
    assert open_signer(Settings()) is None
    assert open_signer(Settings(**both)) is not None
    for name in ("c2pa_certificate", "c2pa_key"):
        with pytest.raises(InvalidConfig, match="set both or neither"):
            open_signer(Settings(**{name: both[name]}))


def test_a_key_in_the_place_of_its_path_is_not_told(
    made: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "farm_c2pa_key").write_bytes(made.key.read_bytes())
    monkeypatch.setenv("FARM_SECRETS_DIR", str(tmp_path))
    with pytest.raises(InvalidConfig, match="give the path of the PEM file") as caught:
        load_settings()
    assert not any(line in caught.value.message for line in secret_lines(made.key))


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch, made: Authority) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    for act in (
        lambda: read_mark(picture()),
        lambda: open_signer(Settings(**settings_of(made))),
        lambda: make_authority(made.key.parent, "x", force=True),
    ):
        with pytest.raises(InvalidConfig, match=r"pip install 'renderfarm\[provenance\]'"):
            act()


def test_a_test_authority_is_made_once(tmp_path: Path) -> None:
    made = make_authority(tmp_path / "a", "Example")
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == [
        "signer.key", "signer.pem", "test-ca.pem",
    ]  # fmt: skip
    before = made.key.read_bytes()
    with pytest.raises(Invalid, match="is there already; with --force"):
        make_authority(tmp_path / "a", "Example")
    assert made.key.read_bytes() == before
    made.key.chmod(0o644)
    assert make_authority(tmp_path / "a", "Example", force=True) == made
    assert made.key.read_bytes() != before
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    Signer(made.certificate, made.key)


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\x1b[31m"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="1 to 64 characters"):
        make_authority(tmp_path / "a", name)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["é" * 64, "a=b,c+d\\", "🟥 GmbH & Co. KG", '"/><x>'])
def test_names_of_any_kind(name: str, tmp_path: Path) -> None:
    made = make_authority(tmp_path, name)
    mark = read_mark(Signer(made.certificate, made.key).trial(), read_anchors(made.anchors))
    assert (mark.c2pa, mark.signer) == ("trusted", f"{name} test signer")


# ---- what strangers give


def test_a_manifest_elsewhere_is_not_fetched() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        there = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.c2pa"
        xmp = (
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf='
            '"http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
            f' xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="{there}"/>'
            "</rdf:RDF></x:xmpmeta>"
        )
        mark = read_mark(picture("JPEG", xmp=xmp.encode()))
        with pytest.raises(BlockingIOError):
            server.accept()
    assert mark.c2pa == "none"
    assert there in mark.fault


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "it is no PNG, JPEG or WebP picture"),
        (b"GIF89a" + bytes(99), "it is no PNG, JPEG or WebP picture"),
        (picture()[:40], "it cannot be read|it is no PNG"),
        (bomb(60_000), "it cannot be read"),
        (picture()[:8] + b"\0\0\0\0aaaa\0\0\0\0" * 60_000, "a PNG of more than 50,000 chunks"),
        (picture() + bytes(64 * 2**20), "larger than 64 MiB"),
    ],
)
def test_files_that_are_no_pictures_or_too_much(data: bytes, told: str) -> None:
    with pytest.raises(InvalidParameter, match=told):
        read_mark(data)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_strangers_pictures(form: str) -> None:
    for data in (picture(form), animated(form)):
        mark = read_mark(data)
        assert (mark.c2pa, mark.parameters, mark.source_type) == ("none", None, None)


def test_marks_as_others_write_them() -> None:
    told = PngImagePlugin.PngInfo()
    xmp_key, xmp_text = "XML:com.adobe.xmp", "<a:DigitalSourceType>urn:x</a:DigitalSourceType>"
    told.add_itxt(xmp_key, xmp_text)
    assert read_mark(picture("PNG", pnginfo=told)).source_type == "urn:x"
    xmp = b'<a:DigitalSourceType rdf:resource="urn:y"/>'
    assert read_mark(picture("JPEG", xmp=xmp)).source_type == "urn:y"
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a red circle"
    assert read_mark(picture("JPEG", exif=exif)).parameters == "a red circle"


def test_a_signed_photograph_is_no_ai_mark(
    signer: Signer, anchors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdk, "MADE_BY_MODEL", MADE_BY_MODEL.replace("trained", "un"))
    data = signed(signer, "png")
    monkeypatch.undo()
    mark = read_mark(data, anchors)
    assert (mark.c2pa, mark.codes) == ("trusted", ())
    assert mark.fault == "its signer does not say that a model made it"


def test_damaged_files_are_a_clear_error_or_no_valid_mark(signer: Signer, anchors: str) -> None:
    rng = random.Random(7)
    whole = [signed(signer, form) for form in FORMS]
    seen = set()
    for _ in range(300):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            seen.add(read_mark(bytes(data), anchors).c2pa)
        except InvalidParameter:
            seen.add("unreadable")
    assert {"invalid", "unreadable"} <= seen


# ---- the command, and the doctor


@pytest.fixture
def farm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)
    with command_line(tmp_path / "home", monkeypatch, capsys) as run:
        yield run


def test_init_makes_what_its_settings_use(farm: Run, tmp_path: Path) -> None:
    code, out, err = farm("provenance", "init", "--name", "Example")
    assert code == 0
    assert "test authority: nobody but you trusts" in err
    (tmp_path / "farm.toml").write_text(out)
    conf = load_settings()
    signer = open_signer(conf)
    assert signer
    assert "O=Example" in signer.name
    code, _, err = farm("provenance", "init")
    assert (code, "ERR_INVALID" in err) == (2, True)
    told = json.loads(farm("provenance", "init", "--force", "--json")[1])
    assert told == {name: str(getattr(conf, name)) for name in told}
    for args in (("config", "show"), ("config", "show", "--json"), ("doctor",)):
        _, out, err = farm(*args)
        assert not any(line in out + err for line in secret_lines(Path(told["c2pa_key"]))), args
        assert "C2PA_KEY" in out or "signed by" in out, args


def test_show_and_verify(farm: Run, signer: Signer, made: Authority, tmp_path: Path) -> None:
    Path("good.png").write_bytes(signed(signer, "png"))
    Path("good.webp").write_bytes(signed(signer, "webp"))
    Path("plain.jpg").write_bytes(plain("jpeg")[1])
    Path("none.txt").write_text("none")
    code, out, err = farm("provenance", "show", "good.png", "plain.jpg")
    assert code == 0
    assert "C2PA                valid" in out
    assert "C2PA         none: it is not signed" in out
    assert "a red circle\n                    Steps: 4" in out
    shown = json.loads(farm("provenance", "show", "good.png", "plain.jpg", "--json")[1])
    assert [(one["c2pa"], one["fault"]) for one in shown] == [
        ("valid", None), ("none", "it is not signed"),
    ]  # fmt: skip
    code, _, err = farm("provenance", "show", "none.txt")
    assert (code, "none.txt: it is no PNG, JPEG or WebP picture" in err) == (2, True)

    code, out, err = farm("provenance", "verify", "good.png", "good.webp")
    assert (code, out.count("ok ")) == (0, 2)
    assert "give --trust" in err
    code, out, err = farm("provenance", "verify", "good.png", "--trust", made.anchors)
    assert (code, "trusted, signed by Ñandú" in out, "--trust" in err) == (0, True, False)
    elsewhere = issue(tmp_path).anchors
    code, out, _ = farm("provenance", "verify", "good.png", "--trust", elsewhere)
    assert (code, "its signer is not trusted" in out) == (1, True)
    code, out, err = farm("provenance", "verify", "good.png", "plain.jpg", "none.txt", "--json")
    assert code == 1
    assert [one["fault"] for one in json.loads(out)] == [
        None, "it is not signed", "it is no PNG, JPEG or WebP picture",
    ]  # fmt: skip
    assert "2 of 3 pictures" in err
    for args in (("none.png",), ("x" * 300,), ("good.png", "--trust", "none.txt")):
        code, out, err = farm("provenance", "verify", *args)
        assert code == 2, args
        assert "ERR_NOT_FOUND" in err or "ERR_INVALID_CONFIG" in err


def test_the_doctor_looks_at_the_signer(
    farm: Run, made: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**told: Path) -> list[Check]:
        return [check for check in examine(**told) if check.name == "signing"]

    assert found() == []
    (good,) = found(**settings_of(made))
    assert (good.verdict, "are signed by CN=test signer" in good.message) == ("ok", True)
    (bad,) = found(c2pa_certificate=tmp_path / "none.pem", c2pa_key=made.key)
    assert (bad.verdict, "there is no file" in bad.message) == ("fail", True)
    other = issue(tmp_path, days=20)
    other.key.chmod(0o644)
    checks = found(**settings_of(other) | {"c2pa_trust": made.anchors})
    assert [check.verdict for check in checks] == ["warn"] * 3
    assert [check.mend.split(":")[0] for check in checks] == [
        "have the certificate renewed",
        "let only the farm read it",
        "add the authority of c2pa_certificate to c2pa_trust",
    ]
    monkeypatch.setattr(authority, "VALID", timedelta(minutes=-30))
    (gone,) = found(**settings_of(make_authority(tmp_path / "gone", "x")))
    assert (gone.verdict, "expired on" in gone.message) == ("fail", True)
