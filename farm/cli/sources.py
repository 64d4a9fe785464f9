"""Where `farm submit` takes its prompts from: arguments, a template of them, or a prompt file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from farm.cli.context import options
from farm.cli.output import (
    about,
    clean,
    console,
    live,
    note,
    plural,
    print_json,
    print_line,
    short,
)
from farm.errors import Invalid, InvalidPromptFile, RowError, by_code, things_wrong
from farm.units import show_size

if TYPE_CHECKING:
    from farm.preview import Preview
    from farm.service import Farm
    from farm.store.batches import BatchStatus
    from farm.templates import Template

SHOWN_ERRORS = 20


class Source:
    """Raises Invalid where the options do not go together."""

    def __init__(
        self, prompts: list[str], file: str | None, form: str | None, columns: list[str]
    ) -> None:
        if bool(prompts) == (file is not None):
            raise Invalid("give prompts, or a prompt file with --file, and not both")
        if (form or columns) and file is None:
            raise Invalid("--format and --column say how to read --file, which is missing")
        self._prompts, self._file, self._form = prompts, file, form
        self._columns = dict(map(_column, columns))
        self._template: Template | None = None

    def template(
        self, lists: list[str], pick: Any, count: int | None, params: dict[str, Any]
    ) -> None:
        """The one prompt is a template; its negative prompt and seed are taken from `params`."""
        from farm.templates import Template, parse_list

        if len(self._prompts) != 1:
            raise Invalid("--list and --count need one PROMPT, which is the template")
        given: Any = dict(map(parse_list, lists))
        if len(given) != len(lists):
            raise Invalid("--list: a name stands twice")
        negative = params.pop("negative_prompt", None) or ""
        drawn = {"seed": params.pop("seed") or 0} if pick == "sample" else {}
        self._template = Template(
            self._prompts[0],
            given,
            negative,
            pick=pick,
            count=count,
            **drawn,
        )

    def preview(self, farm: Farm, given: dict[str, Any]) -> Preview:
        if self._file is None:
            return farm.preview(self._template or self._prompts, **given)
        how: Any = {"form": self._form, "columns": self._columns or None}
        return farm.preview_file(self._opened, **how, **given)

    def submit(
        self, farm: Farm, given: dict[str, Any], *, eager: bool, key: str | None, as_json: bool
    ) -> BatchStatus:
        """Queue it, with a count that grows on a terminal."""
        bad = _LeftOut()
        with _counter() as progress:
            how: Any = given | {"progress": progress, "eager": eager, "left_out": bad}
            if key is not None:
                how |= {"once": self._once(key, given), "resumed": _tell_resumed}
                how["takeover_s"] = 0.0  # who gives the key again knows that the other is gone
            try:
                return self._submitted(farm, how)
            except InvalidPromptFile as error:
                if bad.shown and not as_json:  # told one by one
                    raise InvalidPromptFile(error.message) from None
                raise
            finally:
                bad.tell()

    def _submitted(self, farm: Farm, how: Any) -> BatchStatus:
        """A single prompt's faults are told in one sentence."""
        from farm.spec import describe

        if self._file is not None:
            columns = self._columns or None
            return farm.submit_file(self._opened, form=self._form, columns=columns, **how)
        try:
            return farm.submit(self._template or self._prompts, **how)
        except InvalidPromptFile as error:
            if len(self._prompts) > 1 or self._template or not error.errors:
                raise
            told = f"{describe(error.errors)}; nothing was queued"
            raise by_code(error.errors[0].code, told) from None

    @property
    def _opened(self) -> Any:
        return sys.stdin.buffer if self._file == "-" else self._file

    def _once(self, key: str, given: dict[str, Any]) -> Any:
        from farm.store.batches import Once

        what = [given, self._form, self._columns]
        told = json.dumps(what, sort_keys=True, default=str)
        return Once(key, hashlib.sha256(told.encode()).hexdigest())


def _column(text: str) -> tuple[str, str]:
    from farm.prompt_files import ROW_FIELDS

    field, equals, name = text.partition("=")
    if not equals or not name or field not in ROW_FIELDS:
        raise Invalid(
            f"--column {text[:60]!r}: expected FIELD=NAME, a FIELD of {', '.join(ROW_FIELDS)}"
        )
    return field, name


def _tell_resumed(total: int) -> None:
    note(f"{plural(total, 'job')} of it were queued before")


class _LeftOut:
    """The bad rows of an eager submit: the first ones are shown, the rest counted."""

    def __init__(self) -> None:
        self._bad = 0

    @property
    def shown(self) -> bool:
        return bool(self._bad) and not options.quiet

    def __call__(self, error: RowError) -> None:
        self._bad += 1
        if self._bad <= SHOWN_ERRORS:
            note(f"left out: {clean(error)}")

    def tell(self) -> None:
        if self._bad > SHOWN_ERRORS:
            note(f"left out: {self._bad - SHOWN_ERRORS:,} more")


@contextlib.contextmanager
def _counter() -> Iterator[Callable[[int], None]]:
    """Shows, on a terminal, how many jobs are queued and how fast they come."""
    if not live(sys.stderr):
        yield lambda total: None
        return
    began = time.monotonic()
    with console(sys.stderr).status("reading prompts") as line:

        def progress(total: int) -> None:
            rate = total / max(time.monotonic() - began, 1e-3)
            line.update(f"{total:,} queued, {rate:,.0f}/s")

        yield progress


def show_preview(found: Preview, as_json: bool) -> None:
    """Print it; raises InvalidPromptFile with the bad rows, if there are any."""
    if as_json:
        print_json(found.as_dict())
    else:
        _show_jobs(found)
    if found.bad:
        raise InvalidPromptFile(things_wrong(found.bad), found.errors)


def _show_jobs(found: Preview) -> None:
    if found.total:
        models = ", ".join(f"{n:,} of {model}" for model, n in sorted(found.by_model.items()))
        print_line(f"{plural(found.total, 'job')}: {models}")
        for sample in found.samples:
            more = {k: v for k, v in sample.items() if k not in ("prompt", "model") and v}
            told = ", ".join(f"{name} {clean(value)}" for name, value in more.items())
            print_line(f"  {short(sample['prompt'], 70)}  ({told})")
        print_line(_estimate(found))
    elif not found.bad:
        print_line("no job")


def _estimate(found: Preview) -> str:
    if found.seconds is None:
        told = f"time: unknown, nothing of {', '.join(found.unknown)} was rendered here yet"
    else:
        told = f"time: {about(found.seconds)} with the workers of now"
    return told + (f"; pictures: about {show_size(found.size_bytes)}" if found.size_bytes else "")
