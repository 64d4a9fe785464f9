"""The memory of a diffusers lane: its limit, the rungs of its ladder, the measured micro-batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from farm.catalog import Weights
from farm.errors import InvalidConfig, ModelNotLoaded, OutOfMemory
from tests.load_kit import Loaded, NoWatch, config, job
from tests.models import tiny
from workers.child import Child
from workers.engine import EngineConfig
from workers.engines.diffusers_memory import (
    Easing,
    cap_from,
    default_side,
    first_cap,
    measured_cap,
)
from workers.engines.diffusers_options import options_of
from workers.engines.memory_limit import machine_memory
from workers.messages import Eased, Failed, Rendered

# numpy 2 tells diffusers' schedulers, which turn tensors to arrays, of a protocol to come
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
GB = 2**30


# -------------------------------------------------------------------------- VAE tiles
def largest_decode(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latent pixels of each call of the VAE's decoder: what its memory grows with."""
    seen: list[int] = []
    forward = pipe.vae.decoder.forward

    def watched(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.shape[0] * latents.shape[2] * latents.shape[3])
        return forward(latents, *args, **kwargs)

    monkeypatch.setattr(pipe.vae.decoder, "forward", watched)
    return seen


def test_easing_tiles_the_vae_and_pictures_stay_close(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Loaded(tiny("sd15"))
    sizes = largest_decode(loaded.pipe, monkeypatch)
    whole, small = loaded.picture(side=256), loaded.picture()
    assert sizes == [32 * 32, 8 * 8]
    assert loaded.engine.ease() == "the VAE works picture by picture and in tiles"
    sizes.clear()
    tiled = loaded.picture(side=256)
    assert max(sizes) == 8 * 8, "a tile is as large as the VAE's own sample size, 64 pixels"
    assert len(sizes) > 16
    unlike = np.abs(loaded.picture(side=256, seed=6).astype(int) - whole).mean()
    assert 0 < np.abs(tiled.astype(int) - whole).mean() < unlike / 2
    assert np.array_equal(loaded.picture(), small), "one tile holds it whole"
    sizes.clear()
    loaded.engine.render([job(seed=n) for n in range(3)], NoWatch())
    assert sizes == [8 * 8] * 3
    assert loaded.engine.ease() is None


def test_rungs_taken_before_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    eased = Loaded(tiny("sd15"), eased=1)
    assert eased.info.versions["vae_tiling"] == eased.info.versions["vae_slicing"] == "true"
    assert eased.engine.ease() is None
    assert "vae_tiling" not in Loaded(tiny("sd15")).info.versions
    assert eased.info.weights_sha256 == Loaded(tiny("sd15")).info.weights_sha256
    told = Loaded(tiny("sd15"), vae_tiling=True, vae_slicing=True)
    assert np.array_equal(told.picture(side=128), eased.picture(side=128))
    assert told.info.weights_sha256 != Loaded(tiny("sd15")).info.weights_sha256
    assert told.engine.ease() is None


def test_strict_mode_keeps_its_pixels() -> None:
    strict = Loaded(tiny("sd15"), strict=True, eased=3)
    assert strict.engine.ease() is None
    assert "vae_tiling" not in strict.info.versions


def test_memory_is_told() -> None:
    assert Loaded(tiny("sd15")).info.memory == machine_memory()
    assert 2**28 < machine_memory() < 2**50


def outcome(child: Child, side: int) -> list[str]:
    """What came of one job: Eased, then Rendered or the code of its failure."""
    events = child.render([job(side, steps=1)])
    return [
        event.error.code if isinstance(event, Failed) else type(event).__name__
        for event in events
        if isinstance(event, Eased | Rendered | Failed)
    ]


def written_memory(pid: int | None) -> int:
    """Bytes that count against a memory limit: the process' private memory that is written to."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="others limit no process' memory")


@pytest.fixture(scope="module")
def enough(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes that a process takes which has rendered 64x64; about 400 MiB."""
    child = Child(config(tiny("sd15"), strict=True), log=tmp_path_factory.mktemp("log") / "log")
    assert child.start().memory == machine_memory()
    assert outcome(child, 64) == ["Rendered"]
    taken = written_memory(child.pid)
    assert outcome(child, 512) == ["Rendered"]
    child.close()
    return taken


@LINUX
def test_what_does_not_fit_the_limit_is_out_of_memory_and_the_next_renders(
    enough: int, tmp_path: Path
) -> None:
    limit = enough + 30 * 2**20
    child = Child(config(tiny("sd15"), memory_limit=limit, strict=True), log=tmp_path / "log")
    assert child.start().memory == limit
    pid = child.pid
    assert outcome(child, 64) == ["Rendered"]
    assert outcome(child, 512) == [OutOfMemory.code]
    assert outcome(child, 64) == ["Rendered"]
    assert child.pid == pid, "the process lives on"
    child.close()


@LINUX
def test_tiles_make_a_picture_fit_that_did_not(enough: int, tmp_path: Path) -> None:
    wide = AutoencoderKL(
        sample_size=64,
        block_out_channels=(64,) * 4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    wide.save_pretrained(tmp_path / "wide")  # 64 MiB a layer at 512x512, 1 MiB a tile
    found = []
    for spare in (190, 130, 250):  # MiB; what an allocator takes beside the tensors varies
        limit = enough + spare * 2**20
        told = config(tiny("sd15"), components={"vae": str(tmp_path / "wide")}, memory_limit=limit)
        child = Child(told, log=tmp_path / "log")
        child.start()
        found.append(outcome(child, 512))
        again = outcome(child, 512)
        child.close()
        if found[-1] == ["Eased", "Rendered"]:
            assert again == ["Rendered"], "once eased it stays so"
            return
    raise AssertionError(f"at no limit did tiles make it fit: {found}")


@LINUX
def test_a_limit_too_small_for_the_model_says_so(tmp_path: Path) -> None:
    child = Child(config(tiny("sd15"), memory_limit=320 * 2**20), log=tmp_path / "log")
    by_torch = "the memory does not suffice for the model: raise"
    by_python = "it does not load within --memory-limit .*: raise it"
    with pytest.raises(ModelNotLoaded, match=f"{by_torch}|{by_python}"):
        child.start()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_on_a_gpu_offload_keeps_the_pixels(offload: str) -> None:
    loaded = Loaded(tiny("sd15"), device="cuda", strict=True, offload=offload)
    first = loaded.picture()
    expected = Loaded(tiny("sd15"), device="cuda", strict=True).picture()
    assert np.array_equal(first, expected)
    while loaded.engine.ease():
        assert np.array_equal(loaded.picture(), expected)


# ------------------------------------------------------------------- rungs with a GPU
class Pipe:
    """The parts of a pipeline that easing calls; notes what is done to it."""

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(self) -> None:
        self.vae = AutoencoderKL(norm_num_groups=8, block_out_channels=(8,))
        self.done: list[str] = []

    def to(self, device: torch.device) -> None:
        self.done.append(f"to {device}")

    def enable_model_cpu_offload(self, device: torch.device) -> None:
        self.done.append(f"models beside {device}")

    def enable_sequential_cpu_offload(self, device: torch.device) -> None:
        self.done.append(f"layers beside {device}")


def placed(rungs: int = 0, strict: bool = False, **options: Any) -> tuple[Easing, Pipe]:
    told = config(tiny("sd15"), **options)
    easing, pipe = Easing(torch.device("cuda:1"), options_of(told), strict), Pipe()
    easing.place(pipe, rungs)
    return easing, pipe


def test_the_rungs_on_a_gpu_in_their_order() -> None:
    easing, pipe = placed()
    assert pipe.done == ["to cuda:1"]
    assert "tiles" in str(easing.ease())
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (True, True)
    assert "models wait" in str(easing.ease())
    assert "layers wait" in str(easing.ease())
    assert easing.ease() is None
    assert pipe.done == ["to cuda:1", "models beside cuda:1", "layers beside cuda:1"]
    assert easing.told() == {"vae_slicing": "true", "vae_tiling": "true", "offload": "sequential"}


@pytest.mark.parametrize(
    ("settings", "done", "left"),
    [
        ({"rungs": 1}, ["to cuda:1"], 2),
        ({"rungs": 2}, ["models beside cuda:1"], 1),
        ({"rungs": 9}, ["models beside cuda:1", "layers beside cuda:1"], 0),
        ({"strict": True}, ["to cuda:1"], 2),
        ({"strict": True, "rungs": 1}, ["models beside cuda:1"], 1),
        ({"offload": "model"}, ["models beside cuda:1"], 2),
        ({"offload": "sequential"}, ["layers beside cuda:1"], 1),
        ({"device_map": "balanced"}, [], 1),
    ],
)
def test_rungs_taken_at_once_and_by_option(
    settings: dict[str, Any], done: list[str], left: int
) -> None:
    easing, pipe = placed(**settings)
    assert pipe.done == done
    rungs = [easing.ease() for _ in range(left + 1)]
    assert [rung is None for rung in rungs] == [False] * left + [True]


def test_a_pipeline_without_tiles_refuses_the_option() -> None:
    easing = Easing(torch.device("cpu"), options_of(config(tiny("sd15"), vae_tiling=True)), False)
    with pytest.raises(InvalidConfig, match="option vae_tiling: SimpleNamespace has none"):
        easing.place(SimpleNamespace(to=lambda device: None), 0)


# ------------------------------------------------------------- the measured micro-batch
@pytest.mark.parametrize(
    ("one", "two", "free", "cap"),
    [
        (2 * GB, 3 * GB, 10 * GB, 8),  # 2 + 7 x 1 = 9, a tenth stays free
        (2 * GB, 3 * GB, 139 * GB, 16),
        (2 * GB, 4 * GB, 4 * GB, 1),
        (2 * GB, 4 * GB, 5 * GB, 2),
        (6 * GB, 8 * GB, 5 * GB, 1),
        (6 * GB, 8 * GB, 0, 1),
        (2 * GB, 2 * GB, 139 * GB, 16),  # the first hides the second: no division by nothing
        (2 * GB, 2 * GB, 3 * GB, 6),
        (0, 0, GB, 16),
    ],
)
def test_the_cap_by_the_peaks_of_one_and_two(one: int, two: int, free: int, cap: int) -> None:
    assert cap_from(one, two, free, ceiling=16) == cap


@pytest.mark.parametrize("fits", [0, 1])
def test_a_probe_without_room_for_two_gives_one(fits: int) -> None:
    def peak(count: int) -> int:
        if count > fits:
            raise OutOfMemory
        return GB

    assert measured_cap(peak, 100 * GB) == 1


@pytest.mark.parametrize(
    ("device", "settings", "cap"),
    [
        ("cpu", {}, 1),
        ("cpu", {"micro_batch": 8}, 8),
        ("cuda", {"micro_batch": 8}, 8),
        ("cuda", {"strict": True}, 4),
    ],
)
def test_nothing_is_measured_where_it_is_told(
    device: str, settings: dict[str, Any], cap: int
) -> None:
    def render(count: int) -> None:
        raise AssertionError("rendered")

    assert first_cap(config(Path("x"), **settings), torch.device(device), render) == cap
    weights = Weights(micro_batch=3)
    told = EngineConfig("diffusers", "tiny", weights)
    assert first_cap(told, torch.device(device), render) == 3


def test_the_models_own_size() -> None:
    sized: Callable[..., Any] = SimpleNamespace
    assert default_side(sized(default_sample_size=128, vae_scale_factor=8)) == 1024
    unet = sized(config=sized(sample_size=64))
    assert default_side(sized(unet=unet, vae_scale_factor=8)) == 512
    assert default_side(sized()) == 512
    assert default_side(Loaded(tiny("sd15")).pipe) == 64
