"""How much memory this process may use, and keeping it to a limit.

The limit is RLIMIT_DATA of setrlimit(2): on Linux all private memory that is written to, of every
allocator. An allocation beyond it fails as it does when memory is out, and the kernel kills nobody.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from farm.errors import InvalidConfig

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def limit_memory(limit: int | None) -> int:
    """Keep this process to `limit` bytes; returns the bytes it may use, by limit or machine.

    Raises InvalidConfig where the system has no such limit.
    """
    if limit is None:
        return machine_memory()
    if sys.platform != "linux":
        raise InvalidConfig(f"memory_limit: {sys.platform} cannot limit a process; leave it out")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    return min(most, machine_memory())


def machine_memory() -> int:
    """Bytes of the machine's memory, or of the container's part of it."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        try:
            told = file.read_text().strip()
        except OSError:
            continue
        found += [int(told)] if told.isdigit() else []
    return min(found)
