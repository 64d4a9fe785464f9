"""`python -m workers.convert SOURCE TARGET TYPE`: a checkpoint's weights as another type, in GGUF.

`farm models convert` runs it as a child. The last line of its output is JSON: the sizes in bytes,
or why nothing would change, or the code and sentence of what went wrong, with exit status 1.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from farm.errors import FarmError, Invalid, RenderFailed
from farm.models.place import check_space
from farm.weight_files import WTYPES
from workers.engines.checkpoint_files import GGML_BLOCKS, GGML_NAMES, Tensor, checked_tensors

_NUMBERS = {GGML_NAMES[number]: number for number in GGML_NAMES if GGML_NAMES[number] in WTYPES}
_PLAIN = ("f32", "f16", "bf16")


def convert(source: Path, target: Path, wtype: str, *, part: bool = False) -> dict[str, Any]:
    """Write `target`, unless the answer says that nothing would change.

    `part`: the source is no whole checkpoint, and keeps its tensors' names. Raises ModelNotLoaded
    for a broken source or result, EnvironmentFault when the disk is too small, RenderFailed with
    the library's complaint.
    """
    tensors = checked_tensors(source)
    before = _weights_by_kind(tensors)
    most = max(before, key=lambda kind: before[kind])
    if most == wtype or (wtype not in _PLAIN and before[wtype]):
        return {"unchanged": f"its weights are {wtype} already"}
    check_space(target.parent, _most_bytes(tensors, wtype))
    _convert(source, target, _NUMBERS[wtype], part)
    after = _weights_by_kind(checked_tensors(target))
    if after[wtype] <= before[wtype]:
        return {"unchanged": f"none of its tensors has a shape that {wtype} can hold"}
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return {"before": source.stat().st_size, "after": target.stat().st_size}


def _weights_by_kind(tensors: list[Tensor]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for tensor in tensors:
        counted[tensor.kind] += math.prod(tensor.shape)
    return counted


def _most_bytes(tensors: list[Tensor], wtype: str) -> int:
    """No tensor becomes larger than it is, or than the new type makes it."""
    weights, stored = GGML_BLOCKS[_NUMBERS[wtype]]
    return sum(max(t.end - t.begin, math.prod(t.shape) * stored // weights) for t in tensors)


def _convert(source: Path, target: Path, number: int, part: bool) -> None:
    import stable_diffusion_cpp as library

    from workers.engines.sdcpp_native import Log  # its settings go before the library

    log = Log()
    progress = library.sd_progress_callback(lambda step, steps, seconds, data: None)
    library.sd_set_progress_callback(progress, ctypes.c_void_p(0))  # else it draws a bar
    names = (os.fsencode(source), b"", os.fsencode(target))
    if not library.convert(*names, number, b"", not part):
        raise RenderFailed(f"{source}: not converted: {log.said()}")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 1 when it was not converted."""
    parser = argparse.ArgumentParser(prog="python -m workers.convert", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("type", choices=list(_NUMBERS))
    parser.add_argument("--threads", type=int, help="processors to use")
    parser.add_argument("--part", action="store_true", help="no whole checkpoint")
    args = parser.parse_args(argv)
    if args.threads and hasattr(os, "sched_setaffinity"):  # the library takes all it is let
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    try:
        told = convert(args.source, args.target, args.type, part=args.part)
    except FarmError as error:
        told = {"code": error.code, "message": error.message}
    except OSError as error:
        told = {"code": Invalid.code, "message": str(error)}
    print(json.dumps(told), flush=True)
    return int("code" in told)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # not by way of the library's own farewell
