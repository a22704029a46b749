"""`hvfuse seed` on a VM that is mounted without `hvfuse run`, and in a home of the target's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from hvfuse import system, wire
from hvfuse.control.records import Records
from hvfuse.shipper.orders import Orders
from hvfuse.states import Event
from hvfuse.target.journal import PointReader
from hvfuse.target.store import Store
from tests.cli.conftest import CommandLine
from tests.e2e.conftest import wait_until

MIB = 1 << 20


@pytest.fixture
def target(tmp_path: Path, hvfuse: CommandLine, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The other home, into whose store the source's VMs are replicated."""
    (hvfuse.root / "hvfuse.toml").write_text(f'[paths]\nstore = "{tmp_path / "target" / "store"}"\n')
    return CommandLine(tmp_path / "target", capsys)


@pytest.fixture
def disk(hvfuse: CommandLine, target: CommandLine) -> Path:
    disk = hvfuse.add_vm("vm", 4 * MIB)
    with open(hvfuse.root / "disks" / "vm" / "os.raw", "r+b") as file:
        file.write(os.urandom(2 * MIB))
    assert hvfuse("mount", "vm") == 0
    return disk


def write(disk: Path, text: bytes, offset: int = 0) -> None:
    with open(disk, "r+b") as file:
        file.seek(offset)
        file.write(text)


def newest(target: CommandLine, vm: str = "vm") -> bytes:
    with Store(str(target.root / "store"), create=False, read_only=True) as store:
        reader = PointReader(store, vm, store.point(vm).id)
        try:
            return reader.pread("os.raw", 0, reader.disks[0].size)
        finally:
            reader.close()


def orders(hvfuse: CommandLine) -> str | None:
    with Records(str(hvfuse.root / "state" / "records")) as records:
        return records.orders("vm").seed


@pytest.mark.mount
def test_what_is_written_after_an_export_follows_the_import(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    medium = tmp_path / "medium"
    done = hvfuse.json("seed", "export", "vm", str(medium))
    assert list(done) == [
        "vm", "directory", "generation", "bytes_total", "bytes_sent", "frames_sent", "frames_held", "frames",
        "medium_bytes", "files", "seconds", "already",
    ]  # fmt: skip
    assert (done["vm"], done["directory"], done["bytes_total"], done["already"]) == ("vm", str(medium), 4 * MIB, False)
    assert 2 * MIB < done["medium_bytes"] < 2.1 * MIB
    assert orders(hvfuse) == done["generation"]
    assert sorted(os.listdir(medium)) == ["frames-00000.hvs", "manifest.json"]
    assert hvfuse("seed", "export", "vm", str(medium)) == 0
    assert "vm: was exported before: 2 MiB in 1 file\n" in hvfuse.out
    write(disk, b"written while the medium travels", 3 * MIB)
    assert hvfuse("replicate", "vm") != 0
    assert "waits for a seed" in hvfuse.err

    came = target.json("seed", "import", str(medium))
    assert list(came) == [
        "vm", "directory", "generation", "disks", "bytes_total", "medium_bytes", "frames", "frames_put", "frames_held",
        "bytes_read", "seconds", "already",
    ]  # fmt: skip
    assert (came["vm"], came["generation"], came["disks"]) == ("vm", done["generation"], ["os.raw"])
    assert (came["frames_put"], came["frames_held"], came["already"]) == (done["frames"], 0, False)
    again = target.json("seed", "import", str(medium))
    assert (again["already"], again["frames_put"], again["bytes_read"]) == (True, 0, 0)
    cycle = hvfuse.json("replicate", "vm")
    assert cycle["bytes_sent"] < 5000
    assert newest(target) == disk.read_bytes()
    assert orders(hvfuse) is None
    assert target("seed", "import", str(medium)) == 0
    assert target.out == "vm: was imported before\n"
    assert hvfuse("seed", "export", "vm", str(tmp_path / "another")) == 2
    assert "has a replica already" in hvfuse.err and "hvfuse resync vm" in hvfuse.err
    assert not (tmp_path / "another").exists()


@pytest.fixture
def own_disk(hvfuse: CommandLine) -> Path:
    """The disk of a VM that is replicated into its home's own store."""
    disk = hvfuse.add_vm("vm", 4 * MIB)
    write(hvfuse.root / "disks" / "vm" / "os.raw", os.urandom(2 * MIB))
    assert hvfuse("mount", "vm") == 0
    return disk


@pytest.mark.mount
@pytest.mark.parametrize("insisting", [[], ["--now"]], ids=["resync", "resync --now"])
def test_a_resynchronisation_knows_that_the_seed_has_arrived(
    hvfuse: CommandLine, own_disk: Path, tmp_path: Path, insisting: list[str]
) -> None:
    assert hvfuse("seed", "export", "vm", str(tmp_path / "medium")) == 0
    write(own_disk, b"meanwhile")
    assert hvfuse("resync", "vm") == 1
    assert hvfuse("seed", "import", str(tmp_path / "medium")) == 0
    assert hvfuse("resync", "vm", *insisting) == 0
    assert hvfuse.err == "vm: the seed has arrived: what was written since the export is sent now\n"
    first, second = hvfuse.out.splitlines()
    assert first.startswith("vm: recovery point ") and second == "vm: replication goes on from the seed"
    assert newest(hvfuse) == own_disk.read_bytes()
    assert hvfuse.json("status")["vms"][0]["state"] == "Replicating"


@pytest.mark.mount
def test_copies_that_were_taken_are_a_seed_that_has_arrived(
    hvfuse: CommandLine, own_disk: Path, tmp_path: Path
) -> None:
    (hvfuse.root / "hvfuse.toml").write_text('[replication]\ninitial = "seed"\n')
    assert hvfuse("resync", "vm") == 1
    (tmp_path / "copies").mkdir()
    shutil.copy(hvfuse.root / "disks" / "vm" / "os.raw", tmp_path / "copies")
    assert hvfuse("seed", "import", str(tmp_path / "copies"), "--existing", "vm") == 0
    assert hvfuse.json("resync", "vm")["copied"] is True
    assert newest(hvfuse) == own_disk.read_bytes()


@pytest.mark.mount
@pytest.mark.parametrize("existing", [False, True])
def test_an_import_into_the_homes_own_store_wakes_the_shipper(
    hvfuse: CommandLine, own_disk: Path, tmp_path: Path, existing: bool
) -> None:
    (hvfuse.root / "hvfuse.toml").write_text('[replication]\nfrequency = "1h"\ninitial = "seed"\nresync = "manual"\n')
    hvfuse.ship("vm")
    medium = tmp_path / "medium"
    medium.mkdir()
    if existing:
        shutil.copy(hvfuse.root / "disks" / "vm" / "os.raw", medium)
        assert hvfuse("seed", "import", str(medium), "--existing", "vm") == 0
    else:
        assert hvfuse("seed", "export", "vm", str(medium)) == 0
        assert hvfuse("seed", "import", str(medium)) == 0

    def is_joined() -> bool:
        return bool(hvfuse.json("status")["vms"][0]["state"] == "Replicating")

    wait_until(is_joined, lambda: hvfuse.out)
    assert newest(hvfuse) == own_disk.read_bytes()


@pytest.mark.mount
def test_an_import_that_is_not_the_one_waited_for_takes_nothing_back(
    hvfuse: CommandLine, own_disk: Path, tmp_path: Path
) -> None:
    assert hvfuse("seed", "export", "vm", str(tmp_path / "medium")) == 0
    hvfuse.ship("vm")
    with Records(str(hvfuse.root / "state" / "records")) as records:
        records.change_orders("vm", lambda orders: Orders(seed="ab" * 16))
    assert hvfuse("seed", "import", str(tmp_path / "medium")) == 0
    assert orders(hvfuse) == "ab" * 16


@pytest.mark.mount
def test_an_import_that_nobody_watches_tells_its_progress_and_what_to_do_after_ctrl_c(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    medium = str(tmp_path / "medium")
    copies = str(tmp_path / "copies")
    assert hvfuse("seed", "export", "vm", medium) == 0
    os.mkdir(copies)
    shutil.copy(hvfuse.root / "disks" / "vm" / "os.raw", copies)

    def interrupt(label: str, call: str, size: int) -> None:
        if label in ("store:image", "adopt:clone"):
            raise KeyboardInterrupt

    system.install(interrupt)
    try:
        assert target("seed", "import", medium) == 130
        assert "vm: stopped; the same command goes on\n" in target.err
        assert target("seed", "import", copies, "--existing", "copy") == 130
        assert "copy: stopped; the same command begins again\n" in target.err
    finally:
        system.install(None)
    assert target("seed", "import", medium) == 0
    lines = target.err.splitlines()
    size = lines[-1].split(" of ")[1]
    assert f"vm: verifying the medium, 100 %, {size} of {size}" in lines
    assert lines[-1] == f"vm: importing, 100 %, {size} of {size}"
    assert target("seed", "import", copies, "--existing", "copy") == 0
    assert target.err.endswith("copy: copying, 100 %, 4 MiB of 4 MiB\n")
    assert len(target.err.splitlines()) <= 10


@pytest.mark.mount
def test_logs_that_are_lost_while_the_medium_travels_leave_their_regions_to_be_compared(
    hvfuse: CommandLine, target: CommandLine, tmp_path: Path
) -> None:
    config = hvfuse.root / "hvfuse.toml"
    config.write_text(config.read_text() + "[replication]\nsoft_limit = 1\n")
    disk = hvfuse.add_vm("vm", 64 * MIB)
    with open(hvfuse.root / "disks" / "vm" / "os.raw", "r+b") as file:
        file.write(os.urandom(40 * MIB))
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("seed", "export", "vm", str(tmp_path / "medium")) == 0
    for _ in range(6):
        write(disk, os.urandom(2 * MIB), 50 * MIB)
    told = wire.request(str(hvfuse.root / "state" / "vms" / "vm" / "tracker.sock"), "status")
    assert told["resyncing"] and told["resync_required"], "the logs must have passed the soft limit"
    assert target("seed", "import", str(tmp_path / "medium")) == 0
    assert hvfuse("replicate", "vm") == 0
    assert newest(target) == disk.read_bytes()
    with Records(str(hvfuse.root / "state" / "records")) as records:
        copied = records.read("vm").last_copy
    assert copied is not None and copied["regions"]
    assert 2 * MIB < int(str(copied["bytes_sent"])) < 4 * MIB


@pytest.mark.mount
def test_a_medium_that_gets_full_is_gone_on_with_when_it_is_larger(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium = tmp_path / "medium"
    medium.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "none", medium], check=True)
    try:
        assert hvfuse("seed", "export", "vm", str(medium)) == 9
        assert "are free; vm will take about 2 MiB" in hvfuse.err
        assert os.listdir(medium) == [] and orders(hvfuse) is None
        monkeypatch.setattr("hvfuse.shipper.export.DOUBT", 0.0)
        assert hvfuse("seed", "export", "vm", str(medium)) == 9
        assert f"{medium}: the medium is full" in hvfuse.err
        assert "the same command goes on" in hvfuse.err
        subprocess.run(["mount", "-o", "remount,size=8m", medium], check=True)
        generation = orders(hvfuse)
        assert hvfuse.json("seed", "export", "vm", str(medium))["generation"] == generation
        assert target("seed", "import", str(medium)) == 0
    finally:
        subprocess.run(["umount", medium], check=True)
    assert hvfuse("replicate", "vm") == 0
    assert newest(target) == disk.read_bytes()


@pytest.mark.mount
def test_a_cancelled_export_is_not_waited_for(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    assert hvfuse("seed", "cancel", "vm") == 0
    assert hvfuse.out == "vm: no export is waited for\n"
    medium = tmp_path / "medium"
    assert hvfuse("seed", "export", "vm", str(medium)) == 0
    assert f"hvfuse seed import {medium}" in hvfuse.out
    assert hvfuse.json("seed", "cancel", "vm")["cancelled"] is True
    assert orders(hvfuse) is None
    assert hvfuse("replicate", "vm") == 0
    assert newest(target) == disk.read_bytes()
    assert target("seed", "import", str(medium)) == 0
    assert target.out == "vm: was imported before\n", "the copy went over the network in the same generation"
    assert hvfuse("seed", "cancel", "nosuch") == 5


@pytest.mark.mount
@pytest.mark.parametrize("with_shipper", [False, True])
def test_of_an_export_that_is_given_up_no_progress_is_shown(
    hvfuse: CommandLine, own_disk: Path, tmp_path: Path, with_shipper: bool
) -> None:
    medium = str(tmp_path / "medium")
    assert hvfuse("seed", "export", "vm", medium) == 0
    if with_shipper:
        (hvfuse.root / "hvfuse.toml").write_text('[replication]\ninitial = "seed"\n')
        hvfuse.ship("vm")
    generation = orders(hvfuse)
    with Records(str(hvfuse.root / "state" / "records")) as records:
        records.update("vm", progress=0.25, copy={
            "kind": "export", "generation": generation, "pass": 1, "bytes_total": 4096, "bytes_done": 1024,
            "bytes_sent": 512, "bytes_saved": 512, "seconds": 1.0, "bytes_per_second": 1.0, "seconds_left": 3.0,
        })  # fmt: skip
    assert hvfuse("seed", "cancel", "vm") == 0
    (vm,) = hvfuse.json("status")["vms"]
    assert vm["copy"] is None or vm["copy"]["kind"] == "initial"
    if not with_shipper:
        assert vm["state"] == "ReadyForInitialReplication"
        assert hvfuse("resync", "vm") == 0, "nothing is waited for"


@pytest.mark.mount
def test_an_import_under_another_name_and_over_another_replica(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    medium = tmp_path / "medium"
    assert hvfuse("seed", "export", "vm", str(medium)) == 0
    assert target("seed", "import", str(medium), "--name", "../vm") == 2
    assert target.json("seed", "import", str(medium), "--name", "copy")["vm"] == "copy"
    assert hvfuse("seed", "cancel", "vm") == 0
    # The copy over the network is made anew elsewhere, so that the medium's is another one.
    shutil.rmtree(medium)
    assert hvfuse("umount", "vm") == 0
    write(hvfuse.root / "disks" / "vm" / "os.raw", b"behind the mount")
    assert hvfuse("mount", "vm") == 0
    assert hvfuse("seed", "export", "vm", str(medium)) == 0
    assert target("seed", "import", str(medium), "--name", "copy") == 2
    assert "copy: the store has a replica of it already" in target.err
    assert "hvfuse resync" in target.err


@pytest.mark.mount
def test_a_damaged_or_unfinished_medium_changes_nothing_in_the_store(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    medium = tmp_path / "medium"

    def stop(label: str, call: str, size: int) -> None:
        if label == "seed:table":
            raise OSError(5, "Input/output error")

    system.install(stop)
    try:
        assert hvfuse("seed", "export", "vm", str(medium)) == 1
    finally:
        system.install(None)
    assert target("seed", "import", str(medium)) == 2
    assert "not finished" in target.err and "hvfuse seed export vm DIR" in target.err
    assert hvfuse.json("seed", "export", "vm", str(medium))["frames_held"] > 0
    path = medium / "frames-00000.hvs"
    raw = bytearray(path.read_bytes())
    raw[MIB] ^= 4
    path.write_bytes(raw)
    answer = target.json("seed", "import", str(medium), code=7)
    assert answer["error"]["type"] == "CorruptError"
    offset = int(answer["error"]["message"].removeprefix(f"{path}: damaged at byte ").split(":")[0])
    assert offset <= MIB < offset + 65536
    assert target.json("store", "info")["vms"] == []
    raw[MIB] ^= 4
    path.write_bytes(raw)
    assert target("seed", "import", str(medium)) == 0
    assert hvfuse("replicate", "vm") == 0
    assert newest(target) == disk.read_bytes()


@pytest.mark.mount
def test_copies_that_are_at_the_target_already_leave_only_differences_to_be_sent(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    shutil.copy(hvfuse.root / "disks" / "vm" / "os.raw", copies)
    write(disk, os.urandom(100_000), MIB)
    came = target.json("seed", "import", str(copies), "--existing", "vm")
    assert (came["vm"], came["disks"], came["bytes_total"], came["already"]) == ("vm", ["os.raw"], 4 * MIB, False)
    hvfuse.json("replicate", "vm")
    with Records(str(hvfuse.root / "state" / "records")) as records:
        copied = records.read("vm").last_copy
    assert copied is not None and 100_000 < int(str(copied["bytes_sent"])) < 300_000
    assert newest(target) == disk.read_bytes()
    assert target("seed", "import", str(copies), "--existing", "vm") == 2
    assert target("seed", "import", str(copies), "--existing", "vm", "--name", "x") == 2


@pytest.mark.mount
def test_an_export_does_not_wait_behind_a_copy_over_the_network(
    hvfuse: CommandLine, target: CommandLine, disk: Path, tmp_path: Path
) -> None:
    shipper = str(hvfuse.root / "state" / "vms" / "vm" / "shipper.sock")
    assert hvfuse("status") == 0
    with Records(str(hvfuse.root / "state" / "records")) as records:
        records.apply("vm", Event.ENABLE, Event.START, copy={"kind": "initial"})
    with closing(wire.Listener(shipper, lambda message: {}, name="shipper")):
        assert hvfuse("seed", "export", "vm", str(tmp_path / "m")) == 6
    assert "hvfuse resync vm --suspend" in hvfuse.err
    # Nobody is at it any more: it is exported instead.
    assert hvfuse("seed", "export", "vm", str(tmp_path / "m")) == 0


def test_what_is_no_export_is_not_imported(hvfuse: CommandLine, tmp_path: Path) -> None:
    assert hvfuse("seed", "import", str(tmp_path / "nowhere")) == 5
    (tmp_path / "holiday.jpg").touch()
    assert hvfuse("seed", "import", str(tmp_path)) == 5
    assert "there is no export in it" in hvfuse.err
    assert hvfuse("seed", "import", str(tmp_path), "--existing", "vm") == 2


def test_what_is_not_mounted_is_not_exported(hvfuse: CommandLine, tmp_path: Path) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("seed", "export", "vm", str(tmp_path / "m")) == 11
    assert hvfuse.err.endswith("hint: hvfuse mount vm\n")
    assert hvfuse("seed", "export", "nosuch", str(tmp_path / "m")) == 5
    assert not (tmp_path / "m").exists()
