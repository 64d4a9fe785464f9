"""The real stable-diffusion.cpp on a tiny random model: equal pictures, refusals, survival."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from farm.engines import missing_packages
from farm.errors import FarmError, JobCancelled
from farm.samplers import SAMPLERS
from tests import sdcpp_models as models
from tests.sdcpp_kit import PARTS, Kit, config, spec
from workers.engine import EngineConfig
from workers.messages import Failed, Progress, Rendered, Started

if missing_packages("sdcpp"):
    pytest.skip("stable-diffusion.cpp is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """The one worker that must survive everything here."""
    made = Kit(tmp_path_factory.mktemp("kit") / "log", config(models.klein()))
    yield made
    made.child.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Callable[[EngineConfig], Kit]]:
    made: list[Kit] = []

    def start(told: EngineConfig) -> Kit:
        made.append(Kit(tmp_path / f"log-{len(made)}", told))
        return made[-1]

    yield start
    for one in made:
        one.child.close()


# -------------------------------------------------------------------------- pictures
def test_info_names_what_the_pictures_depend_on(kit: Kit) -> None:
    assert (kit.info.device, kit.info.micro_batch, kit.info.interruptible) == ("cpu", 1, False)
    versions = kit.info.versions
    assert versions["stable-diffusion-cpp-python"] == "0.4.7"
    assert (versions["wtype"], versions["rng"], versions["threads"]) == ("default", "cuda", "2")
    assert len(versions["build"]) == 16
    assert "AVX" in versions["cpu"] or os.uname().machine != "x86_64"


def test_the_job_decides_the_picture(kit: Kit) -> None:
    first = kit.picture()
    assert kit.picture() == first
    differing: list[dict[str, Any]] = [
        {"seed": 2}, {"seed": 2**63 - 1}, {"seed": 2**32 + 1}, {"steps": 3}, {"prompt": "a dog"},
        {"guidance_scale": 4.0}, {"guidance_scale": 4.0, "negative_prompt": "red"},
    ]  # fmt: skip
    seen = {first, *(kit.picture(**params) for params in differing)}
    assert len(seen) == len(differing) + 1
    assert kit.picture(guidance_scale=0.0) == first, "up to 1 there is no guidance"
    assert kit.picture() == first


def test_other_processes_and_numbers_of_threads_give_the_same_bytes(
    kit: Kit, other: Callable[[EngineConfig], Kit]
) -> None:
    expected = kit.picture(guidance_scale=3.0)
    single = other(config(models.klein(), threads=1))
    assert single.picture(guidance_scale=3.0) == expected
    assert single.info.versions["threads"] == "1"
    assert single.info.weights_sha256 == kit.info.weights_sha256


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (16, 48), (80, 112)])
def test_sizes_are_exact(kit: Kit, size: tuple[int, int]) -> None:
    result = kit.render(width=size[0], height=size[1])
    assert isinstance(result, np.ndarray)
    assert result.shape == (size[1], size[0], 3)
    assert result.std() > 1


def test_a_size_that_the_library_would_round_is_refused(kit: Kit) -> None:
    result = kit.render(width=72, height=40)
    assert isinstance(result, FarmError)
    assert (result.code, result.message) == (
        "ERR_INVALID_PARAMETER",
        "size 72x40: this model takes multiples of 16, the next is 80x48",
    )


def test_samplers_have_the_farms_names(kit: Kit) -> None:
    results = {name: kit.render(scheduler=name, steps=4) for name in SAMPLERS}
    done = {name: r.tobytes() for name, r in results.items() if isinstance(r, np.ndarray)}
    assert set(done) == {
        "ddim", "euler", "euler_a", "heun", "dpm2", "dpm++_2m", "dpm++_2m_karras", "lcm", "tcd",
        "flow_euler", "flow_heun",
    }  # fmt: skip
    assert done["flow_euler"] == done["euler"] == kit.picture(steps=4)
    assert done["flow_heun"] == done["heun"]
    assert len(set(done.values())) >= 7
    assert done["euler_a"] != done["euler"], "an ancestral sampler adds noise"
    refused = results["unipc"]
    assert isinstance(refused, FarmError)
    assert refused.code == "ERR_INVALID_PARAMETER"
    assert refused.message.startswith("scheduler unipc: engine sdcpp can do ddim, euler, euler_a")
    one_step = {name: kit.render(scheduler=name, steps=1) for name in done}
    told = {name: r.message for name, r in one_step.items() if isinstance(r, FarmError)}
    assert told == {"dpm++_2m_karras": "steps: at least 2 with scheduler dpm++_2m_karras, got 1"}


def test_gguf_and_weight_types(kit: Kit, other: Callable[[EngineConfig], Kit]) -> None:
    quantised = other(config(models.klein_gguf("q8_0")))
    assert quantised.picture() != kit.picture()
    converted = other(config(models.klein(), wtype="q4_0", rng="std_default", vae_tiling="16x16"))
    assert converted.info.versions["wtype"] == "q4_0"
    hashes = {one.info.weights_sha256 for one in (kit, quantised, converted)}
    assert len(hashes) == 3
    assert len({one.picture() for one in (kit, quantised, converted)}) == 3


def test_a_model_in_parts_is_the_same_model(kit: Kit, other: Callable[[EngineConfig], Kit]) -> None:
    split = other(config(models.klein_parts(), **PARTS))
    assert split.picture() == kit.picture()
    assert split.info.weights_sha256 != kit.info.weights_sha256


def test_progress_goes_up(kit: Kit) -> None:
    seen = [e.fraction for e in kit.child.render([spec(steps=30)]) if isinstance(e, Progress)]
    assert seen
    assert seen == sorted(seen)
    assert all(0 < fraction <= 1 for fraction in seen)


# ---------------------------------------------------------- one load, and no leak
def test_fifty_jobs_pay_one_load_and_memory_stays(kit: Kit) -> None:
    pid = kit.child.pid
    assert kit.loads() == 1
    assert pid
    jobs = [spec(seed=n, steps=1, width=32, height=32) for n in range(60)]
    assert sum(isinstance(event, Rendered) for event in kit.child.render(jobs[:50])) == 50
    assert (kit.child.pid, kit.loads()) == (pid, 1)
    before = psutil.Process(pid).memory_info().rss
    assert sum(isinstance(event, Rendered) for event in kit.child.render(jobs)) == 60
    after = psutil.Process(pid).memory_info().rss
    assert after < 1.02 * before, f"{before:,} bytes, then {after:,}"


# --------------------------------------------------------------------------- cancel
def test_a_cancel_ends_a_render_at_once(other: Callable[[EngineConfig], Kit]) -> None:
    one = other(config(models.klein()))
    expected = one.picture()
    first, codes = one.child.pid, []
    jobs = [spec(seed=n, steps=500, width=256, height=256) for n in range(2)]
    begun = time.monotonic()
    for event in one.child.render(jobs):
        if isinstance(event, Started):
            one.child.cancel([0, 1])
        if isinstance(event, Failed):
            codes.append(event.error.code)
    assert codes == ["ERR_CANCELLED"] * 2
    assert time.monotonic() - begun < 60, "500 steps of this size take minutes"
    assert one.child.pid != first
    assert one.picture() == expected


def test_what_a_callback_raises_is_raised_and_buffers_are_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stable_diffusion_cpp import _utils as utils

    from workers.engines import sdcpp_native
    from workers.engines.sdcpp_engine import SdcppEngine

    class Steps:
        def __init__(self, error: Exception | None = None) -> None:
            self.seen: list[tuple[int, int]] = []
            self._error = error

        def step(self, done: int, total: int) -> None:
            self.seen.append((done, total))
            if self._error:
                raise self._error

    engine = SdcppEngine(config(models.klein(), threads=1))
    engine.load()
    freed: list[int] = []
    free = sdcpp_native._free
    monkeypatch.setattr(sdcpp_native, "_free", lambda at: (freed.append(at.value), free(at)))
    quiet = Steps()
    (before,) = engine.render([spec(steps=3)], quiet)
    assert quiet.seen == [(1, 3), (2, 3), (3, 3)]
    for error in (JobCancelled(), ValueError("a bug")):
        watch = Steps(error)
        with pytest.raises(type(error)):
            engine.render([spec(steps=3)], watch)
        assert len(watch.seen) == 1
    (after,) = engine.render([spec(steps=3)], Steps())
    assert isinstance(before, np.ndarray)
    assert np.array_equal(before, after)
    assert len(freed) == 2 * 4, "the pixels and the list of each of four pictures"
    assert all(freed)
    engine.close()
    for file in (utils.outnull_file, utils.errnull_file):  # the binding leaves them open
        file.close()
