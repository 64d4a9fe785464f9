"""What may be said of a batch: bounded texts and numbers, whoever submits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from farm.config import Settings
from farm.errors import InvalidParameter
from farm.service import Farm
from farm.submitting import Plan
from tests.runner_kit import NoBroker


@pytest.mark.parametrize(
    "about",
    [{"name": "x" * 201}, {"name": ["x"]}, {"name": "\ud800"}, {"owner": "a\0"}, {"owner": None},
     {"priority": 10**7}, {"priority": 0.5}, {"priority": True}, {"priority": float("nan")},
     {"after": 7}, {"expires_s": -1.0}, {"expires_s": float("nan")}, {"expires_s": 1e18},
     {"expires_s": "soon"}, {"eager": []}, {"reuse": {}}],
    ids=ascii,
)  # fmt: skip
def test_what_no_batch_can_be_is_refused(about: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(about))):
        Plan(**about)


def test_a_files_strange_name_still_makes_a_batch(tmp_path: Path) -> None:
    path = tmp_path / ("a\x1b[31m" + "b" * 220 + ".txt")
    path.write_text("a red circle\n")
    with Farm(Settings(home=tmp_path / "home")) as farm:
        farm.check_schema()
        farm.__dict__["broker"] = NoBroker()
        name = farm.submit_file(path).name
    assert name.isprintable()
    assert len(name) == 200
