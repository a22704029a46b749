"""The control plane's records, with several processes at them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from hvfuse.control import statistics
from hvfuse.control.records import CycleRecord, Records, VmRecord
from hvfuse.errors import CorruptError, StateError, UnsupportedError
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event, ReplicationState

from .children import HandClock


def cycle(number: int) -> CycleRecord:
    return CycleRecord(
        cycle=number, point=f"p-{number}", time_ns=number, bytes_logged=3, bytes_coalesced=2, bytes_sent=1, seconds=0.5
    )


def test_a_vm_without_a_record_was_never_replicated(tmp_path: Path) -> None:
    with Records(str(tmp_path / "r")) as records:
        assert records.read("vm") == VmRecord(state=ReplicationState.DISABLED)
        assert records.names() == []


def test_fields_change_one_by_one_and_survive_reopening(tmp_path: Path) -> None:
    with Records(str(tmp_path), clock=HandClock()) as records:
        records.of("vm").apply(Event.ENABLE, Event.COMMIT_POINT, cycle=3, point="p-3")
        records.of("vm").update(error="no space", hint="make room")
        records.of("vm2").update(progress=0.25)
    with Records(str(tmp_path)) as records:
        assert records.read("vm") == VmRecord(
            state=ReplicationState.REPLICATING, cycle=3, point="p-3", error="no space", hint="make room",
            counted_ns=HandClock().now_ns(),
        )  # fmt: skip
        assert records.of("vm2").read().progress == 0.25
        assert records.names() == ["vm", "vm2"]


def test_a_field_that_does_not_exist_cannot_be_set(tmp_path: Path) -> None:
    with Records(str(tmp_path)) as records:
        with pytest.raises(TypeError):
            records.update("vm", stat="x")
        assert records.names() == []


def test_cycles_are_kept_in_order_up_to_the_limit_and_apart_by_vm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "CYCLES_KEPT", 5)
    with Records(str(tmp_path)) as records:
        for number in range(1, 9):
            records.add_cycle("vm", cycle(number))
        records.add_cycle("vm2", cycle(1))
        assert [kept.cycle for kept in records.cycles("vm")] == [4, 5, 6, 7, 8]
        assert records.cycles("vm2") == [cycle(1)]
        assert records.cycles("v") == []


def test_a_shippers_report_becomes_a_cycle_record(tmp_path: Path) -> None:
    report = CycleReport(
        vm="vm", point="p-7", generation=bytes(16), cycle=7, sealed_ns=7, bytes_logged=3, bytes_coalesced=2,
        bytes_zero=0, bytes_sent=1, frames_sent=1, frames_held=0, seconds=0.5,
    )  # fmt: skip
    clock = HandClock()
    clock.at = 60.0
    with Records(str(tmp_path), clock=clock) as records:
        records.of("vm").cycle(report)
        assert records.cycles("vm") == [replace(cycle(7), latency=(60 * 10**9 - 7) / 1e9)]


def test_a_cycle_and_what_changes_with_it_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    with Records(str(tmp_path), clock=HandClock()) as records:
        records.apply("vm", Event.ENABLE, Event.START)
        records.add_cycle("vm", cycle(3), Event.COMMIT_POINT, cycle=3, point="p-3")
        record = records.read("vm")
        assert (record.state, record.cycle, record.point) == (ReplicationState.REPLICATING, 3, "p-3")
        assert record.last_applied_time_ns == record.counted_ns == HandClock().now_ns()
        records.apply("vm", Event.DISABLE, enabled=False)
        with pytest.raises(StateError, match="disabled"):
            records.add_cycle("vm", cycle(4), Event.COMMIT_POINT, cycle=4, point="p-4")
        assert (records.read("vm").cycle, [kept.cycle for kept in records.cycles("vm")]) == (3, [3])


def test_what_changes_nothing_is_not_written(tmp_path: Path) -> None:
    with Records(str(tmp_path)) as records:
        records.apply("vm", Event.ENABLE, Event.COMMIT_POINT, error="no space", orders=Orders(paused=True))
        records.apply("vm", Event.SUSPEND, error=None)
        before = transactions(str(tmp_path))
        for _ in range(3):
            records.apply("vm", Event.SUSPEND, error=None)
            records.update("vm", orders=Orders(paused=True))
            records.change_orders("vm", Orders.pause)
        assert transactions(str(tmp_path)) == before
        records.apply("vm", Event.RESUME)
        assert transactions(str(tmp_path)) == before + 1


def transactions(path: str) -> int:
    """How many were committed, as another process sees it."""
    code = "import lmdb, sys; print(lmdb.open(sys.argv[1], readonly=True).info()['last_txnid'])"
    return int(subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout)


WRITER = """
import sys
from hvfuse.control.records import Records
with Records(sys.argv[1]) as records:
    number = 0
    while True:
        number += 1
        records.update(sys.argv[2], cycle=number, point=f"p-{number}")
        print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_what_it_had_finished_and_blocks_nobody(tmp_path: Path) -> None:
    with Records(str(tmp_path)) as records:
        for round_number in range(3):
            writers = [
                subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), f"vm{n}"], stdout=subprocess.PIPE)
                for n in range(2)
            ]
            finished = []
            for writer in writers:
                assert writer.stdout is not None
                for _ in range(round_number * 3 + 2):
                    last = writer.stdout.readline()
                os.kill(writer.pid, signal.SIGKILL)
                rest = writer.stdout.read().split()
                finished.append(int(rest[-1]) if rest else int(last))
                writer.wait()
                writer.stdout.close()
            for number, least in enumerate(finished):
                record = records.update(f"vm{number}", progress=0.5)
                assert record.cycle >= least
                assert record.point == f"p-{record.cycle}"


def test_orders_and_the_progress_of_a_copy_survive_reopening(tmp_path: Path) -> None:
    ordered = Orders(at_ns=5, full=True, suspended=True, seed="ab" * 16)
    copy = {"kind": "resync", "pass": 2, "bytes_total": 10, "seconds_left": None}
    with Records(str(tmp_path)) as records:
        assert records.of("vm").orders() == Orders()
        records.of("vm").update(orders=ordered, copy=copy, copy_due_ns=7)
        records.of("other").update(copy=copy)
    with Records(str(tmp_path)) as records:
        assert records.of("vm").orders() == ordered
        assert records.orders("other") == Orders()
        assert (records.of("vm").copy_progress(), records.read("vm").copy_due_ns) == (copy, 7)
        records.of("vm").update(orders=Orders(), copy=None, copy_due_ns=None)
        assert records.read("vm") == VmRecord(orders=Orders().as_json())


ORDERER = """
import sys
from dataclasses import replace
from hvfuse.control.records import Records
with Records(sys.argv[1]) as records:
    for _ in range(60):
        if sys.argv[2] == "orders":
            records.change_orders("vm", lambda orders: replace(orders, at_ns=(orders.at_ns or 0) + 1))
        else:
            records.update("vm", **{sys.argv[2]: getattr(records.read("vm"), sys.argv[2]) + 1})
"""


def test_several_processes_that_change_one_record_lose_nothing_of_each_other(tmp_path: Path) -> None:
    with Records(str(tmp_path)) as records:
        records.update("vm", copy_due_ns=0)
        fields = ["orders", "orders", "cycle", "copy_due_ns"]
        writers = [subprocess.Popen([sys.executable, "-c", ORDERER, str(tmp_path), field]) for field in fields]
        assert [writer.wait(60) for writer in writers] == [0] * 4
        record = records.read("vm")
    assert (record.orders["at_ns"], record.cycle, record.copy_due_ns) == (120, 60, 60)


def test_records_of_another_version_are_refused(tmp_path: Path) -> None:
    Records(str(tmp_path)).close()
    env = lmdb.open(str(tmp_path), map_size=1 << 30)
    with env.begin(write=True) as txn:
        txn.put(b"version", b'{"version": 2}')
    env.close()
    with pytest.raises(UnsupportedError, match="version 2"):
        Records(str(tmp_path))


def test_damage_is_named_and_not_overwritten(tmp_path: Path) -> None:
    Records(str(tmp_path)).close()
    env = lmdb.open(str(tmp_path), map_size=1 << 30)
    with env.begin(write=True) as txn:
        txn.put(b"vm/a", b"{")
        txn.put(b"vm/b", b'{"state": "Dancing"}')
    env.close()
    with Records(str(tmp_path)) as records:
        for vm in ("a", "b"):
            with pytest.raises(CorruptError):
                records.read(vm)
            with pytest.raises(CorruptError):
                records.update(vm, cycle=1)


def test_a_file_that_is_no_lmdb_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(CorruptError, match=str(tmp_path)):
        Records(str(tmp_path))


def test_what_a_later_version_added_is_kept(tmp_path: Path) -> None:
    Records(str(tmp_path)).close()
    env = lmdb.open(str(tmp_path), map_size=1 << 30)
    with env.begin(write=True) as txn:
        txn.put(b"vm/a", b'{"state": "Replicating", "colour": "blue"}')
    env.close()
    with Records(str(tmp_path)) as records:
        records.update("a", cycle=4)
    env = lmdb.open(str(tmp_path), map_size=1 << 30)
    with env.begin() as txn:
        assert b'"colour": "blue"' in txn.get(b"vm/a")
    env.close()


def test_records_open_and_read_while_another_process_writes(tmp_path: Path) -> None:
    with Records(str(tmp_path)) as records:
        records.update("a", cycle=4)
    code = (
        "import lmdb, sys\n"
        "env = lmdb.open(sys.argv[1], map_size=1 << 30)\n"
        "with env.begin(write=True):\n    print('writing', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with Records(str(tmp_path)) as records:
            assert records.read("a").cycle == 4
        assert writer.poll() is None
        writer.communicate()
