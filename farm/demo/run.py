"""`make demo`: a whole farm for a minute. Starts it, renders prompts, shows where the pictures are.

python -m farm.demo.run [--home DIR] [--model NAME[:ENGINE]] [-n PICTURES]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from farm.catalog import load_catalog
from farm.cli.follow import download, follow, summary
from farm.cli.output import clean, note, plural, print_line
from farm.config import Settings, load_settings
from farm.embedded import EmbeddedFarm
from farm.engines import choose_lane
from farm.errors import FarmError
from farm.service import Farm

COLOURS = (
    *("red", "green", "blue", "yellow", "orange", "purple"),
    *("pink", "cyan", "brown", "white", "black", "gray"),
)
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart")
SEED = 20


def prompts(n: int) -> list[str]:
    """`n` prompts with every colour and shape in turn, each on a background of another colour."""
    chosen = []
    pick = random.Random(SEED)
    for place in range(n):
        colour, shape = COLOURS[place % len(COLOURS)], SHAPES[place % len(SHAPES)]
        ground = pick.choice([other for other in COLOURS if other != colour])
        article = "an" if colour[0] in "aeiou" else "a"
        under = "an" if ground[0] in "aeiou" else "a"
        chosen.append(f"{article} {colour} {shape} on {under} {ground} background")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 only if every picture was rendered."""
    parser = argparse.ArgumentParser(prog="python -m farm.demo.run", description="Show the farm.")
    parser.add_argument("--home", type=Path, default=Path("farm-data/demo"))
    parser.add_argument("--model", default="shapes")
    parser.add_argument("-n", type=int, default=32, help="pictures; default 32")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        settings = _own_settings(args.home)
        lane = choose_lane(load_catalog(settings.catalog_path, settings.models_path), args.model)
        note(f"starting a farm in {args.home}: broker, dispatcher, one worker")
        with EmbeddedFarm(settings, [lane], say=note), Farm(settings) as farm:
            return _show(farm, settings, lane.model, args.n)
    except FarmError as error:
        sys.stderr.write(f"error: {error.message} ({error.code})\n")
        return 1
    except KeyboardInterrupt:
        note("interrupted; all is stopped")
        return 130


def _own_settings(home: Path) -> Settings:
    """Whatever farm the environment leads to, the demo stays in its own home."""
    nothing = {"database_url": None, "broker_url": None, "blobs_url": None}
    return load_settings(home=home).model_copy(update=nothing)


def _interrupt(*_: Any) -> None:
    """SIGTERM is a Ctrl-C: the farm's processes are stopped in order."""
    raise KeyboardInterrupt


def _show(farm: Farm, settings: Settings, model: str, n: int) -> int:
    """Submit, follow, fetch; the exit code."""
    batch = farm.submit(prompts(n), model=model, name="demo", owner="demo", seed=SEED)
    note(f"submitted {plural(n, 'prompt')} as batch {batch.id}")
    status = follow(farm, [batch.id])[0]
    pictures = settings.home / "pictures" / batch.id
    sheet = settings.home / "pictures" / f"{batch.id}.png"
    download(farm, status, pictures)
    farm.contact_sheet(batch.id, sheet)
    note(summary(status))
    for job in farm.jobs(batch.id, ["failed"]):
        note(f"failed: {clean(job.spec['prompt'])}: {clean(job.error)}")
    print_line(f"pictures:      {pictures}/")
    print_line(f"contact sheet: {sheet}")
    return 0 if status.counts["succeeded"] == n else 1


if __name__ == "__main__":
    sys.exit(main())
