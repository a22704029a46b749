"""Who may ship a VM."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvfuse.control import protected
from hvfuse.control.config import VmPolicy
from hvfuse.control.records import Records
from hvfuse.errors import StateError
from hvfuse.states import ReplicationState


def test_a_vm_that_was_failed_over_to_here_is_not_enabled_before_it_has_disks(tmp_path: Path) -> None:
    folder = tmp_path / "web"
    (folder / ".failover").mkdir(parents=True)
    with Records(str(tmp_path / "records")) as records:
        with pytest.raises(StateError, match="failed over to here"):
            protected.begin(records, "web", VmPolicy(), folder=str(folder))
        assert records.read("web").state is ReplicationState.DISABLED
        (folder / ".failover").rmdir()
        protected.begin(records, "web", VmPolicy(), folder=str(folder))
        assert records.read("web").state is ReplicationState.READY_FOR_INITIAL_REPLICATION
