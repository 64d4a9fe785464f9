"""What the farm calls the failures of torch and of the pipelines."""

from __future__ import annotations

import torch

from farm.errors import EngineCrashed, FarmError, InvalidParameter, OutOfMemory
from workers.engine import said

NO_MEMORY = ("DefaultCPUAllocator", "could not create a primitive")
"""How a CPU's lack of memory is told: by torch's allocator, and by oneDNN under a limit."""


def translated(error: Exception) -> FarmError | None:
    """What the farm calls a failure of torch or of a pipeline; None when it has no name."""
    text = said(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        sign in text for sign in NO_MEMORY
    ):
        return OutOfMemory(text)
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return EngineCrashed(f"the device failed, {text}")
    told = text.lower()  # what the pipelines say of sizes, LCM of more steps than it has
    if isinstance(error, ValueError) and any(s in told for s in ("height", "width", "_steps")):
        return InvalidParameter(text)
    return None
