"""`farm models convert`: a quantised copy that renders as the original does, made whole or not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farm.catalog import Defaults, Lane, Weights, load_catalog
from tests import sdcpp_models
from tests.sdcpp_kit import PARTS, Kit, spec
from workers.engine import EngineConfig
from workers.engines.checkpoint_files import checked_tensors

ENTRY = """
[models.klein]
licence = "apache-2.0"
terms = "be kind"
attribution = "the tests"
description = "noise"
family = "flux2-klein"
memory_gb = 1.5
defaults = { width = 64, height = 64, steps = 2, guidance_scale = 1.0 }
sizes = ["64x64", "96x64"]
max_steps = 8
[models.klein.engines.sdcpp]
path = "PATH"
threads = 1
options = { wtype = "f32", rng = "std_default" }
"""
PARTS_TOML = ", ".join(f'{part} = "{file}"' for part, file in PARTS.items())
Farm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    entry(path, sdcpp_models.klein())
    return path


def entry(home: Path, path: Path) -> None:
    (home / "models.toml").write_text(ENTRY.replace("PATH", str(path)))


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FARM_")}
    return kept | {"FARM_HOME": str(home), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def farm(env: dict[str, str]) -> Farm:
    def call(*args: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "farm", "models", *map(str, args)]
        done = subprocess.run(
            argv, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return call


@pytest.fixture
def render(home: Path, tmp_path: Path) -> Iterator[Callable[[str], np.ndarray[Any, Any]]]:
    """A model of the catalogue -> its picture of the tests' job."""
    kits: list[Kit] = []

    def pixels(model: str) -> np.ndarray[Any, Any]:
        weights = load_catalog(home / "models.toml").weights(Lane(model, "sdcpp"))
        kits.append(Kit(tmp_path / f"{model}.log", EngineConfig("sdcpp", model, weights)))
        found = kits[-1].result(spec(model=model))
        assert isinstance(found, np.ndarray), found
        return found.astype(int)

    yield pixels
    for kit in kits:
        kit.child.close()


def strays(home: Path) -> list[str]:
    """What a conversion left that is neither its result nor a place's lock."""
    found = [p for p in (home / "models").rglob("*") if p.is_file()]
    return [p.name for p in found if p.suffix != ".gguf" and not p.name.endswith(".busy")]


def test_the_copy_is_a_smaller_model_that_renders_alike(
    farm: Farm, home: Path, render: Callable[[str], np.ndarray[Any, Any]]
) -> None:
    ran = farm("convert", "klein", "--type", "Q8_0", "--threads", 1, "--json")
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    file = Path(told["path"])
    assert file == home / "models" / "klein-q8_0" / "sdcpp" / "klein-q8_0.gguf"
    assert told["before"] == sdcpp_models.klein().stat().st_size
    assert told["after"] == file.stat().st_size < 0.75 * told["before"]
    assert "18.7 MB became 13 MB" in ran.stderr
    assert strays(home) == []
    assert "q8_0" in {tensor.kind for tensor in checked_tensors(file)}

    old, new = (load_catalog(home / "models.toml").get(n) for n in ("klein", "klein-q8_0"))
    changed = {"engines", "memory_gb"}
    assert new.model_dump(exclude=changed) == old.model_dump(exclude=changed)
    assert new.memory_gb is None
    weights = new.engines["sdcpp"]
    assert (weights.path, weights.threads) == (file, 1)
    assert weights.options == {"rng": "std_default"}

    assert farm("verify", "klein-q8_0").returncode == 0
    before, after = render("klein"), render("klein-q8_0")
    apart = np.abs(before - after).mean()
    other = np.abs(before - before[::-1]).mean()  # what two unlike pictures differ by
    print(f"mean difference {apart:.2f} of 255, of unlike pictures {other:.2f}")
    assert 0 < apart < other / 5

    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert farm("verify", "klein-q8_0").returncode == 1


def test_of_a_model_in_parts_the_large_ones_become_smaller(
    farm: Farm, home: Path, tmp_path: Path, render: Callable[[str], np.ndarray[Any, Any]]
) -> None:
    folder = tmp_path / "parts"
    shutil.copytree(sdcpp_models.klein_parts(), folder)
    text = ENTRY.replace("PATH", str(folder)).replace('{ wtype = "f32",', f"{{ {PARTS_TOML},")
    (home / "models.toml").write_text(text)
    ran = farm("convert", "klein", "--type", "q8_0", "--name", "small")
    assert ran.returncode == 0, ran.stderr
    place = home / "models" / "small" / "sdcpp"
    kinds = {f.name: {t.kind for t in checked_tensors(f)} for f in place.iterdir()}
    assert set(kinds) == {"diffusion_model.gguf", "llm.gguf", "vae.safetensors"}
    assert [name for name in sorted(kinds) if "q8_0" in kinds[name]] == sorted(kinds)[:2]
    assert (place / "vae.safetensors").read_bytes() == (folder / "vae.safetensors").read_bytes()
    weights = load_catalog(home / "models.toml").get("small").engines["sdcpp"]
    assert weights.path == place
    assert weights.options == {
        "diffusion_model": "diffusion_model.gguf", "llm": "llm.gguf", "vae": "vae.safetensors",
        "rng": "std_default",
    }  # fmt: skip
    assert farm("verify", "small").returncode == 0
    again = farm("convert", "small", "--type", "q8_0")
    assert (again.returncode, again.stderr.count("q8_0 already")) == (2, 2)
    before = render("klein")
    shutil.rmtree(folder)  # the copy stands on its own
    apart = np.abs(before - render("small")).mean()
    print(f"mean difference {apart:.2f} of 255")
    assert 0 < apart < 5


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["klein", "--type", "q8_1"], "one of f32, f16, bf16, q8_0"),
        (["klein", "--type", "default"], "one of f32"),
        (["klein", "--type", "f16"], "f16 already"),
        (["klein", "--type", "q8_0", "--name", "shapes"], "there is a model shapes already"),
        (["klein", "--type", "q8_0", "--name", "../x"], "not made of a-z"),
        (["shapes", "--type", "q8_0"], "is a directory"),
        (["klien", "--type", "q8_0"], "did you mean klein"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    farm: Farm, home: Path, args: list[str], named: str
) -> None:
    before = (home / "models.toml").read_text()
    ran = farm("convert", *args)
    assert (ran.returncode, named in ran.stderr) == (2, True), ran.stderr
    assert (home / "models.toml").read_text() == before
    assert not list((home / "models").rglob("*.gguf"))
    assert strays(home) == []


def test_a_quantised_one_is_not_quantised_alike_again(farm: Farm, home: Path) -> None:
    entry(home, sdcpp_models.klein_gguf("q8_0"))
    ran = farm("convert", "klein", "--type", "q8_0")
    assert (ran.returncode, "q8_0 already" in ran.stderr) == (2, True)
    assert farm("convert", "klein", "--type", "q4_0", "--name", "small").returncode == 0
    kinds = {t.kind for t in checked_tensors(home / "models/small/sdcpp/small.gguf")}
    assert "q4_0" in kinds


def test_a_checkpoint_of_diffusers_becomes_one_for_sdcpp(farm: Farm, home: Path) -> None:
    text = (home / "models.toml").read_text()
    text = text.replace("engines.sdcpp", "engines.diffusers")
    text = re.sub(r"(defaults|sizes|max_steps) = .*\n", "", text)
    (home / "models.toml").write_text(text.replace("options", 'dtype = "float16"\noptions'))
    ran = farm("convert", "klein", "--type", "q5_1")
    assert ran.returncode == 0, ran.stderr
    model = load_catalog(home / "models.toml").get("klein-q5_1")
    file = home / "models" / "klein-q5_1" / "sdcpp" / "klein-q5_1.gguf"
    assert model.engines == {"sdcpp": Weights(path=file)}  # options were the other engine's
    assert model.defaults == Defaults()  # the model's, not its family's


@pytest.mark.parametrize("how", ["truncated", "noise", "pickle"])
def test_a_broken_file_is_told(farm: Farm, home: Path, tmp_path: Path, how: str) -> None:
    data = sdcpp_models.klein().read_bytes()
    bad = tmp_path / ("bad.pt" if how == "pickle" else "bad.safetensors")
    bad.write_bytes({"truncated": data[:-9], "noise": os.urandom(999), "pickle": data}[how])
    entry(home, bad)
    if how == "pickle":
        text = (home / "models.toml").read_text()
        (home / "models.toml").write_text(text.replace("threads", "allow_pickle = true\nthreads"))
    ran = farm("convert", "klein", "--type", "q8_0", "--json")
    assert (ran.returncode, json.loads(ran.stdout)["error"]["code"]) == (1, "ERR_MODEL_NOT_LOADED")
    assert strays(home) == []


def test_killed_in_the_middle_nothing_half_is_left(
    farm: Farm, home: Path, env: dict[str, str]
) -> None:
    """Whenever it dies: no entry without its file, and the next run does it all."""
    catalog = (home / "models.toml").read_text()
    place = home / "models" / "klein-q8_0" / "sdcpp"
    argv = [sys.executable, "-m", "farm", "models", "convert", "klein", "--type", "q8_0"]
    process = subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (place.parent / ".sdcpp.converting" / ".log").exists():  # the child has begun
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(place.glob("*.gguf"))
    assert (home / "models.toml").read_text() == catalog
    half = place.parent / ".sdcpp.converting" / "klein-q8_0.gguf"
    half.write_bytes(b"half")  # had it come so far
    ran = farm("convert", "klein", "--type", "q8_0")
    assert ran.returncode == 0, ran.stderr
    assert strays(home) == []
    assert farm("verify", "klein-q8_0").returncode == 0


def test_what_the_library_does_is_told_when_it_aborts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that dies by a signal, as native code may: its last words, nothing left behind."""
    from farm.config import load_settings
    from farm.errors import EngineCrashed
    from farm.models import convert

    def abort(argv: list[Any], log: Path) -> subprocess.Popen[bytes]:
        code = "import os; os.write(1, b'GGML_ASSERT failed\\n'); os.abort()"
        with log.open("ab") as out:
            return subprocess.Popen([sys.executable, "-c", code], stdout=out)

    monkeypatch.setattr(convert, "spawn", abort)
    with pytest.raises(EngineCrashed, match=r"SIGABRT; its last words: GGML_ASSERT failed"):
        convert.convert(load_settings(home=home), "klein", "q8_0")
    assert strays(home) == []


def test_no_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farm.errors import EnvironmentFault
    from farm.models import place
    from workers.convert import convert

    monkeypatch.setattr(place, "MARGIN", 2**60)
    with pytest.raises(EnvironmentFault, match="are needed"):
        convert(sdcpp_models.klein(), tmp_path / "x.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []
