"""The drill of docs/drill.md, as it stands there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import drill
from tests.e2e.conftest import REPOSITORY, mounts_below

pytestmark = pytest.mark.mount


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[drill.Terminal]:
    made = drill.Terminal(tmp_path)
    yield made
    made.close()
    assert mounts_below(tmp_path) == []


def test_the_drill_of_the_page_loses_nothing_and_sends_back_hardly_more_than_was_written(
    terminal: drill.Terminal,
) -> None:
    found = drill.session(terminal)
    assert found.orders == "order 1: paid\norder 2: paid\norder 4: paid, on the target\n"
    assert found.written >= drill.NEW_BYTES
    assert drill.NEW_BYTES <= found.sent < 1.5 * found.written
    page = (REPOSITORY / "docs" / "drill.md").read_text()
    assert drill.page_commands(page) == drill.commands_on_page(terminal), "run tools/drill"
