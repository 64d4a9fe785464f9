"""The farm against a bare loop over the same pipeline, weights, micro-batches and threads."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from farm.catalog import Lane, load_catalog
from farm.config import Settings
from farm.demo.run import prompts
from farm.embedded import EmbeddedFarm
from farm.service import Farm

LANE = Lane("shapes", "diffusers")


def overhead(home: Path, pictures: int, rounds: int) -> list[tuple[str, str, str, str]]:
    """Rows of the table: seconds a picture, and of a batch of one picture from submit to done."""
    wanted, bare = prompts(pictures), _Bare(home / "bare")
    settings = Settings(home=home / "farm")
    loop_s, farm_s, lone_s, one_s = [], [], [], []
    with EmbeddedFarm(settings, [LANE]), Farm(settings) as farm:
        _farm_run(farm, wanted[:32])
        bare.run(wanted[:32])
        for _ in range(rounds):
            loop_s.append(bare.run(wanted))
            farm_s.append(_farm_run(farm, wanted))
            one_s.append(bare.run(wanted[:1]))
            lone_s.append(_farm_run(farm, wanted[:1], from_submit=True))
    a, b = (statistics.median(x) / pictures for x in (farm_s, loop_s))
    c, d = statistics.median(lone_s), statistics.median(one_s)
    return [
        (f"a picture of {pictures}, 64x64 on the CPU", f"{a:.4f} s", f"bare loop {b:.4f} s",
         f"{a / b:.2f}"),
        ("one picture, from submit to recorded", f"{c:.3f} s", f"bare call {d:.3f} s",
         f"{c / d:.2f}"),
    ]  # fmt: skip


def _farm_run(farm: Farm, wanted: list[str], *, from_submit: bool = False) -> float:
    batch = farm.submit(wanted, seed=1, model=LANE.model, reuse=False)
    *_, status = farm.watch(batch.id, poll_s=0.02 if from_submit else 0.2)
    assert status.counts["succeeded"] == len(wanted)
    assert status.finished_at
    assert status.started_at
    return status.finished_at - (status.created_at if from_submit else status.started_at)


class _Bare:
    """DiffusionPipeline in a loop, PNG files by Pillow: what one writes in an afternoon."""

    def __init__(self, out: Path) -> None:
        import torch
        from diffusers import DiffusionPipeline

        entry = load_catalog().get(LANE.model)
        weights = load_catalog().weights(LANE)
        self.out, self.torch, self.defaults = out, torch, entry.defaults
        self.size = weights.micro_batch or 1
        if weights.threads:  # as the farm's worker has
            torch.set_num_threads(weights.threads)
        self.pipe: Any = DiffusionPipeline.from_pretrained(
            weights.path, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        self.pipe.set_progress_bar_config(disable=True)
        out.mkdir(parents=True)

    def run(self, wanted: list[str]) -> float:
        began = time.monotonic()
        for start in range(0, len(wanted), self.size):
            some = wanted[start : start + self.size]
            images = self.pipe(
                prompt=list(some), width=self.defaults.width, height=self.defaults.height,
                num_inference_steps=self.defaults.steps,
                guidance_scale=self.defaults.guidance_scale,
                generator=[self.torch.Generator("cpu").manual_seed(1) for _ in some],
            ).images  # fmt: skip
            for place, image in enumerate(images, start):
                image.save(self.out / f"{place}.png")
        return time.monotonic() - began
