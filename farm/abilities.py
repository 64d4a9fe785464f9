"""What each engine can do with which family of models: what it cannot is refused at submit.

An engine refuses it too, should a job get there: a family of `other` says nothing of the model.
"""

from __future__ import annotations

from typing import NamedTuple

from farm.catalog import Catalog, Family, ModelEntry
from farm.samplers import SAMPLERS
from farm.spec import JobSpec, Kind, engine_refuses


class Abilities(NamedTuple):
    """Beyond text-to-image."""

    kinds: tuple[Kind, ...] = ("image-to-image", "inpainting")
    loras: bool = True
    clip_skip: bool = False


_WITH_CLIP = Abilities(clip_skip=True)
_ALL_FAMILIES: dict[str, Abilities] = {"fake": _WITH_CLIP, "diffusers": Abilities()}
_ABILITIES: dict[tuple[str, Family], Abilities] = {
    **{("diffusers", f): _WITH_CLIP for f in ("sd1", "sd-turbo", "sdxl", "sd3", "other")},
    **{("sdcpp", f): _WITH_CLIP for f in ("sd1", "sd-turbo", "sdxl", "sd3", "other")},
}


def abilities(engine: str, family: Family) -> Abilities:
    """What an engine can do with models of a family."""
    return _ABILITIES.get((engine, family)) or _ALL_FAMILIES.get(engine, Abilities())


def refusals(engine: str, family: Family, spec: JobSpec) -> dict[str, str]:
    """Fields of a job that an engine cannot do with models of a family -> what was expected."""
    can = abilities(engine, family)
    bad: dict[str, str] = {}
    if spec.kind != "text-to-image" and spec.kind not in can.kinds:
        field = "mask_image" if spec.mask_image else "init_image"
        bad[field] = f"none: engine {engine} has no {spec.kind} for family {family}"
    if spec.loras and not can.loras:
        bad["loras"] = f"none: engine {engine} takes no LoRA for family {family}"
    if spec.clip_skip and not can.clip_skip:
        bad["clip_skip"] = f"none: engine {engine} has no clip skip for family {family}"
    for name in ("prompt", "negative_prompt"):
        if why := engine_refuses(engine, getattr(spec, name)):
            bad[name] = f"a text that engine {engine} takes: {why}"
    if engine == "sdcpp" and spec.scheduler and SAMPLERS[spec.scheduler].sdcpp is None:
        names = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.sdcpp)
        bad["scheduler"] = f"one of {names} on engine sdcpp"
    return bad


def narrowed(spec: JobSpec, entry: ModelEntry, catalog: Catalog) -> JobSpec | dict[str, str]:
    """The job, bound to one engine where only that can do it; else its fields that are refused."""
    if wrong := _wrong_loras(spec, catalog):
        return {"loras": wrong}
    if spec.engine and spec.engine not in entry.engines:
        return {"engine": f"one of {', '.join(entry.engines)}, or nothing for any"}
    asked = [spec.engine] if spec.engine else list(entry.engines)
    refused = {engine: refusals(engine, entry.family, spec) for engine in asked}
    able = [engine for engine in asked if not refused[engine]]
    if not able:
        return refused[asked[0]]
    if len(able) == len(asked):
        return spec
    return spec.model_copy(update={"engine": able[0]})


def _wrong_loras(spec: JobSpec, catalog: Catalog) -> str | None:
    fitting = catalog.loras_for(spec.model)
    if all(name in fitting for name, _ in spec.loras):
        return None
    known = ", ".join(sorted(fitting)) or "the catalogue has none"
    return f"LoRAs for model {spec.model}: {known}"
