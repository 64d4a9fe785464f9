"""The rows of a Parquet file as JSON lines, read in a process of its own.

A few kilobytes of Parquet unpack to any number of gigabytes, in one cell if they like, and what
reads them is native code. So this file is run by itself, within MOST_MEMORY, and whoever
started it lives on (format: https://parquet.apache.org/docs/file-format/).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys

MOST_MEMORY = 4 << 30  # bytes of address space; Arrow and Python themselves map about one GiB
ROWS = 2_000  # read at once
NO_PARQUET, BROKEN = 3, 4  # exit codes: it is no such file; a row cannot be read


def main() -> int:
    """Standard input, which must be a file, to standard output; why not to standard error."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others map far more than they use
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    import pyarrow
    import pyarrow.parquet

    faults = (pyarrow.ArrowException, OSError, MemoryError)
    try:
        table = pyarrow.parquet.ParquetFile(sys.stdin.buffer)
    except faults as error:
        return _told(error, NO_PARQUET)
    try:
        for batch in table.iter_batches(batch_size=ROWS, use_threads=False):
            for row in batch.to_pylist():
                sys.stdout.write(json.dumps(row, default=_no_json) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # nobody wants more
    except faults as error:
        sys.stdout.flush()
        return _told(error, BROKEN)
    return 0


def _no_json(value: object) -> object:
    """What no field of a row is; its check refuses it by this name."""
    return {type(value).__name__: None}


def _told(error: BaseException, code: int) -> int:
    lines = str(error).splitlines()
    told = "it takes too much memory" if isinstance(error, MemoryError) else (lines or ["?"])[0]
    sys.stderr.write(told[:120])
    return code


if __name__ == "__main__":
    ended = main()
    sys.stderr.flush()
    os._exit(ended)  # a thread of Arrow's that still runs at a plain exit aborts the process
