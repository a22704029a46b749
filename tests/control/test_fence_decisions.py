"""Two who decide at the same time whether a VM's disks are held."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from hvfuse import wire
from hvfuse.control import planned
from hvfuse.control.config import VmPolicy
from hvfuse.control.fence import Fence
from hvfuse.control.home import Home
from hvfuse.control.records import Records
from hvfuse.control.site import Site
from hvfuse.states import Event, ReplicationState
from hvfuse.system import SystemClock
from hvfuse.target.store import Store


def test_a_look_that_began_before_a_planned_failover_does_not_let_its_disks_go(tmp_path: Path) -> None:
    root = str(tmp_path)
    home = Home(root=root, disks=f"{root}/disks", mnt=f"{root}/mnt", store=f"{root}/store", state=f"{root}/state")
    home.make()
    Path(home.folder("web")).mkdir()
    home.make_vm("web")
    Store(home.store).close()
    told: dict[str, Any] = {"held": None}

    def tracker(message: wire.Message) -> wire.Message:
        if message["op"] != "status":
            told["held"] = message.get("reason")
        return dict(told)

    with Records(home.records) as records:
        records.apply("web", Event.ENABLE)
        records.apply("web", Event.COMMIT_POINT, point="p")
        site = Site(home=home, policy=VmPolicy(), vm="web", records=records, clock=SystemClock())
        holding = threading.Thread(target=planned._hold, args=(site,))

        def store_path() -> str:
            if not holding.ident:  # the record has been read by now
                holding.start()
                holding.join(0.5)
            return home.store

        listener = wire.Listener(home.tracker_socket("web"), tracker, name="tracker")
        try:
            Fence(home, "web", records, store_path=store_path, is_strict=lambda: False).enforce()
            holding.join(20)
        finally:
            listener.close()
        assert records.read("web").state is ReplicationState.PREPARED_FOR_FAILOVER
        assert told["held"] == records.read("web").held == planned.HELD
