"""LoRAs on the diffusers engine: by name and weight, without a trace; broken files are told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.errors import InvalidParameter, OutOfMemory
from tests.diffusers_kit import (
    FAMILIES,
    FLOAT32_TOLERANCE,
    INPUTS,
    KINDS,
    LONG,
    QUIET,
    Steps,
    config,
    engine,
    floats,
    of_kind,
    spec,
)
from tests.loras import RANK, in_kohyas_layout, lora
from tests.models import tiny
from workers.engines.diffusers_engine import DiffusersEngine

pytestmark = QUIET


@pytest.fixture(scope="module")
def with_loras(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DiffusersEngine]:
    """Engines with two LoRAs, and one that is only for the text encoder where there is CLIP."""
    made: dict[str, DiffusersEngine] = {}

    def load(family: str) -> DiffusersEngine:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            files = {
                "one": lora(family, folder / "one.safetensors"),
                "two": lora(family, folder / "two.safetensors", ("unet", "transformer"), seed=1),
            }
            if family in ("sd15", "sdxl"):
                files["words"] = lora(family, folder / "words.safetensors", ("text_encoder",))
            made[family] = DiffusersEngine(config(tiny(family), loras=files))
            assert set(made[family].load().loras) == set(files)
        return made[family]

    return load


def styled(
    made: DiffusersEngine, *numbers: int, kind: str = "text-to-image", **loras: float
) -> Any:
    jobs = [of_kind(kind, number, loras=loras) for number in numbers]
    return made.render_floats(jobs, Steps(), INPUTS).images


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_changes_its_own_pictures_only(
    with_loras: Callable[[str], DiffusersEngine], family: str
) -> None:
    made = with_loras(family)
    plain = styled(made, 0)
    one, half, two, both = (
        styled(made, 0, **loras)
        for loras in ({"one": 1}, {"one": 0.5}, {"two": 1}, {"one": 1, "two": 1})
    )
    assert len({p.numpy().tobytes() for p in (plain, one, half, two, both)}) == 5
    assert torch.equal(styled(made, 0, one=0), plain)
    assert torch.equal(styled(made, 0), plain)
    assert torch.equal(styled(made, 0, one=1), one)
    assert torch.equal(styled(made, 0, one=1, two=0), one)
    assert torch.equal(plain, floats(family, [spec()]))


@pytest.mark.parametrize("kind", ["text-to-image", *KINDS])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_neighbours_change_nothing_with_a_lora(
    with_loras: Callable[[str], DiffusersEngine], family: str, kind: str
) -> None:
    made = with_loras(family)
    together = styled(made, 0, 1, 2, kind=kind, one=0.8)
    assert torch.equal(styled(made, 4, 5, 2, kind=kind, one=0.8)[2], together[2])
    alone = styled(made, 2, kind=kind, one=0.8)[0]
    assert (together[2] - alone).abs().max() <= FLOAT32_TOLERANCE
    assert not torch.equal(styled(made, 2, kind=kind)[0], alone)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_lora_of_the_text_encoder_works_on_long_prompts_too(
    with_loras: Callable[[str], DiffusersEngine], family: str
) -> None:
    made = with_loras(family)
    for prompt in ("a red cat", LONG):
        jobs = [spec(prompt=prompt, loras={"words": w}) for w in (0.0, 1.0)]
        plain, changed = (made.render_floats([job], Steps()).images for job in jobs)
        assert not torch.equal(plain, changed)


def test_kohyas_layout_is_read_with_its_alphas(tmp_path: Path) -> None:
    peft = lora("sd15", tmp_path / "peft.safetensors")
    files = {
        "peft": peft,
        "whole": in_kohyas_layout(peft, tmp_path / "whole.safetensors", RANK),
        "half": in_kohyas_layout(peft, tmp_path / "half.safetensors", RANK / 2),
    }
    made = DiffusersEngine(config(tiny("sd15"), loras=files))
    made.load()
    assert torch.equal(styled(made, 0, whole=1), styled(made, 0, peft=1))
    assert torch.equal(styled(made, 0, half=1), styled(made, 0, peft=0.5))


def test_loras_make_room_for_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("workers.engines.diffusers_loras.MOST_LOADED", 2)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")}
    for seed, file in enumerate(files.values()):
        lora("sd15", file, seed=seed)
    made = DiffusersEngine(config(tiny("sd15"), loras=files))
    made.load()
    plain, one = styled(made, 0), styled(made, 0, one=1)
    for name in ("two", "one", "three"):
        styled(made, 0, **{name: 1})
    assert made._loras._loaded == ["one", "three"]
    assert not [key for key, _ in made._pipe.unet.named_parameters() if "lora_two" in key]
    assert torch.equal(styled(made, 0, one=1), one)
    assert torch.equal(styled(made, 0), plain)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _pickled(file: Path) -> None:
    torch.save({"unet.lora_A.weight": torch.ones(2)}, file)


def _other_shapes(file: Path) -> None:
    wrong = {name: torch.ones(3, 3) for name in load_file(file)}
    save_file(wrong, file, {"format": "pt"})


def _nan(file: Path) -> None:
    tensors = {name: t.fill_(float("nan")) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def _some_unknown(file: Path) -> None:
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("unet."))
    tensors = {**tensors, name.replace("to_q", "to_x").replace("to_v", "to_x"): torch.ones(2, 2)}
    save_file(tensors, file, {"format": "pt"})


def _no_lora(file: Path) -> None:
    save_file({"weight": torch.ones(2)}, file, {"format": "pt"})


def _hostile_metadata(file: Path) -> None:
    save_file(load_file(file), file, {"format": "pt", "lora_adapter_metadata": "{]"})


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (Path.unlink, "missing"),
    (lambda f: f.write_bytes(b""), "empty"),
    (lambda f: (f.unlink(), f.mkdir()), "not a regular file"),
    (_cut, "truncated"),
    (_pickled, "neither safetensors nor GGUF"),
    (_other_shapes, "does not fit the model"),
    (_nan, "NaN"),
    (_no_lora, "does not fit the model"),
    (_some_unknown, "does not fit the model"),
    (_hostile_metadata, "does not fit the model"),
    (lambda f: lora("sdxl", f), "does not fit the model"),
    (lambda f: lora("flux", f, ("transformer",)), "does not fit the model"),
]


@pytest.mark.parametrize(("spoil", "told"), BROKEN)
def test_a_broken_lora_fails_its_own_jobs(
    tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    files = {"good": tmp_path / "good.safetensors", "bad": tmp_path / "bad.safetensors"}
    for file in files.values():
        lora("sd15", file)
    spoil(files["bad"])
    made = DiffusersEngine(config(tiny("sd15"), loras=files))
    assert "good" in made.load().loras
    plain = styled(made, 0)
    for _ in range(2):
        with pytest.raises(InvalidParameter, match=rf"loras: bad cannot be used, .*{told}"):
            styled(made, 0, bad=1, good=1)
    assert torch.equal(styled(made, 0), plain)
    assert torch.equal(plain, floats("sd15", [spec()]))
    assert not torch.equal(styled(made, 0, good=1), plain)


def test_no_memory_for_a_lora_is_not_its_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"one": lora("sd15", tmp_path / "one.safetensors")}
    made = DiffusersEngine(config(tiny("sd15"), loras=files))
    made.load()

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(made._pipe, "load_lora_weights", full)
        with pytest.raises(OutOfMemory):
            styled(made, 0, one=1)
    assert not torch.equal(styled(made, 0, one=1), styled(made, 0))


def test_a_lora_that_the_worker_does_not_have() -> None:
    with pytest.raises(InvalidParameter, match="this worker has no file of late"):
        floats("sd15", [spec(loras={"late": 1.0})])


@pytest.fixture(scope="module", autouse=True)
def _forget_engines() -> Iterator[None]:
    yield
    engine.cache_clear()
