"""A VAE that overflows, one in a dtype of its own, and one that a failed call left in another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from farm.catalog import Weights
from farm.errors import BadImage, OutOfMemory
from tests.diffusers_kit import FAMILIES, INPUTS, KINDS, QUIET, Steps, of_kind, spec
from tests.models import tiny
from workers.engine import EngineConfig, Pixels
from workers.engines.diffusers_engine import DiffusersEngine

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:`upcast_vae` is:FutureWarning")]
ALL_KINDS = ("text-to-image", *KINDS)
PARTS = ("encoder", "decoder")


def loaded(family: str, dtype: Any) -> DiffusersEngine:
    weights = Weights(path=tiny(family), dtype=dtype)
    engine = DiffusersEngine(EngineConfig("diffusers", "tiny", weights, threads=1))
    engine.load()
    return engine


def picture(engine: DiffusersEngine, kind: str) -> Pixels:
    (result,) = engine.render([of_kind(kind)], Steps(), INPUTS)
    assert isinstance(result, np.ndarray), result
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_all_kinds_with_a_vae_in_float32_and_the_rest_in_half(family: str) -> None:
    engine = loaded(family, {"default": "bfloat16", "vae": "float32"})
    vae = engine._pipe.vae
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    first = {kind: picture(engine, kind) for kind in ALL_KINDS}
    for kind in ALL_KINDS:
        assert np.array_equal(picture(engine, kind), first[kind])
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "part"),
    [("text-to-image", "decoder"), *((kind, part) for kind in KINDS for part in PARTS)],
)
def test_a_lack_of_memory_within_the_vae_spoils_no_later_picture(
    kind: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded("sdxl", "float16")  # its pipelines decode and encode in float32
    first = {each: picture(engine, each) for each in ALL_KINDS}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(engine._pipe.vae, part), "forward", fail)
        with pytest.raises(OutOfMemory):
            engine.render([of_kind(kind)], Steps(), INPUTS)
    for each in ALL_KINDS:
        assert np.array_equal(picture(engine, each), first[each])


# ------------------------------------------------------------------------- VAE in float32
def overflowing(dtype: Any) -> DiffusersEngine:
    """A VAE whose first layer gives more than the 65,504 of float16, which norms divide again."""
    made = loaded("sd15", dtype)
    with torch.no_grad():
        for parameter in made._pipe.vae.decoder.conv_in.parameters():
            parameter.mul_(300_000)
    return made


def test_a_vae_that_overflows_in_half_precision_decodes_in_float32() -> None:
    made = overflowing("float16")
    vae = made._pipe.vae
    plain = type(vae).decode(vae, torch.ones(1, 4, 8, 8, dtype=torch.float16))
    assert not plain.sample.isfinite().all()
    (picture,) = made.render([spec()], Steps())
    assert isinstance(picture, np.ndarray), picture
    (exact,) = overflowing("float32").render([spec()], Steps())
    assert np.abs(picture.astype(int) - exact).mean() < 3
    assert {p.dtype for p in vae.parameters()} == {torch.float16}
    assert np.array_equal(made.render([spec()], Steps())[0], picture)
    with torch.no_grad():
        vae.decoder.conv_in.bias.fill_(float("nan"))
    assert isinstance(made.render([spec()], Steps())[0], BadImage)
