"""Fixtures of the tracker's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hvfuse import system


@pytest.fixture
def injector() -> Iterator[None]:
    """For a test that installs one: nothing of it is left."""
    yield
    system.install(None)
