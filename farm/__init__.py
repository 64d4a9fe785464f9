"""An asynchronous render farm for AI images: all that runs without a GPU and without torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farm.service import Farm

__all__ = ["Farm"]


def __getattr__(name: str) -> Any:
    """`from farm import Farm` loads SQL and Celery only when asked for: an engine needs neither."""
    if name == "Farm":
        from farm.service import Farm

        return Farm
    raise AttributeError(f"module 'farm' has no attribute {name!r}")
