"""The end of a run: the card, the metadata, the recipe and the manifest beside the shards."""

from __future__ import annotations

import hashlib
from collections import Counter
from importlib.metadata import version
from typing import Any, NamedTuple

from farm.blobs import README, BlobStore
from farm.catalog import Catalog
from farm.datasets.about import About, ModelAbout
from farm.datasets.card import card
from farm.datasets.croissant import FileAbout, croissant
from farm.datasets.place import remove
from farm.datasets.recipe import Recipe
from farm.datasets.stats import CROISSANT, LAYOUT, MANIFEST, RECIPE, Stats, json_bytes, stats_key


class Made(NamedTuple):
    """What made a dataset: the run's label, its batch, and the date when that began."""

    label: str
    batch: str
    published: str


class Contents:
    """What the shards hold, as their stats tell it: sums, and an entry each for the manifest."""

    def __init__(self) -> None:
        self.shards: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.made: dict[str, Counter[str]] = {}
        self.files: dict[str, tuple[int, int]] = {}
        self.signed = 0

    def add(self, stats: Stats) -> None:
        """Take a shard's stats, in order."""
        data = json_bytes(stats)
        told = {
            "key": stats_key(stats["shard"]),
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
        }
        files = stats["files"]
        listed = [one for one in files if not one["key"].startswith("imagefolder/")]
        listed += [one for one in files if one["key"].endswith("/metadata.jsonl")]
        entry = {"shard": stats["shard"], "rows": stats["rows"], "counts": stats["counts"]}
        self.shards.append(entry | {"stats": told, "files": listed})
        self.counts.update(stats["counts"])
        self.signed += stats["signed"]
        for name, counted in stats["made"].items():
            self.made.setdefault(name, Counter()).update(counted)
        for one in files:
            form = one["key"].partition("/")[0]
            n, size = self.files.get(form, (0, 0))
            self.files[form] = (n + 1, size + one["size"])


def finish(
    place: BlobStore,
    catalog: Catalog,
    recipe: Recipe,
    contents: Contents,
    run: Made,
) -> None:
    """Write what stands beside the shards, the manifest last; files of no shard are deleted."""
    about = _about(catalog, recipe, contents, run)
    files = [FileAbout(**one) for shard in contents.shards for one in shard["files"]]
    loose = {
        README: (card(about).encode(), "text/markdown"),
        CROISSANT: (json_bytes(croissant(about, files)), "application/ld+json"),
        RECIPE: (recipe.public_text.encode(), "application/toml"),
    }
    for key, (data, kind) in loose.items():
        place.put(key, data, kind)
    manifest = {
        "layout": LAYOUT,
        "name": recipe.name,
        "label": run.label,
        "version": version("renderfarm"),
        "batch": run.batch,
        "recipe_sha256": recipe.public_sha256,
        "formats": list(recipe.formats),
        "rows": sum(contents.counts.values()),
        "counts": dict(contents.counts),
        "shards": contents.shards,
        "files": [
            {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for key, (data, _) in loose.items()
        ],
    }
    _remove_leftovers(place, contents)
    place.put(MANIFEST, json_bytes(manifest), "application/json")


def _about(catalog: Catalog, recipe: Recipe, contents: Contents, run: Made) -> About:
    made = {name: contents.made.get(name, Counter()) for name in ("sizes", "forms")}
    return About(
        name=recipe.name,
        section=recipe.card,
        models=tuple(_models(catalog, contents)),
        formats=recipe.formats,
        columns=recipe.columns,
        rows=contents.counts["accepted"],
        counts=dict(contents.counts),
        shards=len(contents.shards),
        sizes=dict(made["sizes"]),
        forms=tuple(sorted(made["forms"])) or ("png",),
        files=contents.files,
        recipe=recipe.public_text,
        published=run.published,
        signed=0 < contents.signed == contents.counts["accepted"],
    )


def _models(catalog: Catalog, contents: Contents) -> list[ModelAbout]:
    engines: dict[str, list[str]] = {}
    for lane in sorted(contents.made.get("models", ())):
        model, _, engine = lane.partition(":")
        engines.setdefault(model, []).append(engine)
    found: list[tuple[Any, str, tuple[str, ...]]] = [
        (catalog.models.get(name), name, tuple(some)) for name, some in engines.items()
    ]
    found += [(catalog.loras.get(n), n, ()) for n in sorted(contents.made.get("loras", ()))]
    names = ("licence", "licence_url", "terms", "attribution", "description")
    return [
        ModelAbout(name, **{n: getattr(entry, n, "") for n in names}, engines=some)
        if entry
        else ModelAbout(name, "unknown: it is no longer in the catalogue", engines=some)
        for entry, name, some in found
    ]


def _remove_leftovers(place: BlobStore, contents: Contents) -> None:
    """Shards beyond the last one, files of formats that the recipe no longer has, and what killed
    runs left aside."""
    with place.aside():
        pass
    shards = {f"{shard['shard']:05d}" for shard in contents.shards}
    formats = {*contents.files, "stats"}

    def gone(key: str) -> bool:
        form, _, name = key.partition("/")
        number = name.partition("/")[0].partition(".")[0].rpartition("-")[2]
        return form not in formats or number not in shards

    remove(place, gone)
