"""The Celery side of a worker, without a broker."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import pytest
from celery.exceptions import CPendingDeprecationWarning

from farm.broker import make_app
from tests.store_kit import LANE
from workers.app import _celery_worker


@pytest.fixture
def own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        yield
    logging.captureWarnings(False)


@pytest.mark.usefixtures("own_warnings")
def test_what_celery_says_at_each_lost_connection_is_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _celery_worker(make_app("redis://127.0.0.1:1/0"), LANE)
    warnings.warn("will change in 6.0", CPendingDeprecationWarning, stacklevel=1)
    warnings.warn("others are logged", UserWarning, stacklevel=1)
    assert "others are logged" in caplog.text
    assert "will change" not in caplog.text
