"""What a failover refuses: before it has changed anything, and with the command that leads on."""

from __future__ import annotations

import os
from pathlib import Path

from tests.e2e.conftest import Installation, qemu_io
from tests.e2e.test_two_homes import Pair, disk, entry, pair

__all__ = ["disk", "pair"]


def state(home: Installation) -> object:
    return entry(home)["state"]


def test_a_guest_that_nobody_described_is_told_of_before_the_source_loses_the_vm(pair: Pair, disk: Path) -> None:
    source, target = pair.source, pair.target
    for word, missing in (("--boot", "booted"), ("--validate", "validated")):
        said = target.hvfuse("failover", "unplanned", "web", word, "--yes", code=2)
        assert f"is {missing}" in said
        assert state(target) == "Replicating"
    source.hvfuse("replicate", "web")
    assert not (target.root / "state" / "vms" / "web" / "definition").exists(), "nothing of it is kept"

    # What came with the point counts, and so does what it asks for that is not here.
    with open(source.root / "hvfuse.toml", "a") as file:
        file.write('[vm.web.guest]\nqemu = ["true", "{disk:none.raw}"]\n')
    source.hvfuse("replicate", "web")
    assert "no disk none.raw" in target.hvfuse("failover", "unplanned", "web", "--boot", "--yes", code=2)
    assert state(target) == "Replicating"

    # Where a failover stands, it goes on standing as it was.
    target.hvfuse("failover", "unplanned", "web", "--yes")
    qemu_io(target.mnt / "web" / disk.name, "raw", "write -P 0x11 0 64k", "flush")
    point = target.json("point", "list", "web")["points"][0]["id"]
    target.hvfuse("failover", "change-point", "web", "--point", point, "--boot", "--yes", code=2)
    qemu_io(target.mnt / "web" / disk.name, "raw", "read -P 0x11 0 64k")


def test_a_mount_point_that_holds_something_is_told_of_before_the_source_loses_the_vm(pair: Pair, disk: Path) -> None:
    target = pair.target
    stray = target.mnt / "web" / disk.name
    stray.parent.mkdir(parents=True)
    stray.touch()
    assert "not empty" in target.hvfuse("failover", "unplanned", "web", "--yes", code=6)
    assert state(target) == "Replicating"
    pair.source.hvfuse("replicate", "web")
    stray.unlink()
    target.hvfuse("failover", "unplanned", "web", "--yes")
    target.hvfuse("failover", "unplanned", "web", "--yes")


def test_no_refusal_leads_to_a_failover_that_nobody_wanted(pair: Pair, disk: Path) -> None:
    source, target = pair.source, pair.target
    for home in (source, target):
        for words in (("commit", "web"), ("change-point", "web", "--point", "latest")):
            said = home.hvfuse("failover", *words, "--yes", code=13)
            assert "hvfuse status web" in said and "unplanned" not in said
        said = home.hvfuse("replication", "reverse", "web", "--yes", code=13)
        assert "failed over from here" in said and "hvfuse status web" in said
    assert "no failover is prepared" in source.hvfuse("failover", "cancel", "web", "--yes", code=13)

    source.hvfuse("failover", "planned", "web", "--yes")
    said = source.hvfuse("failover", "unplanned", "web", "--yes", code=13)
    assert "on the target" in said and "hvfuse failover cancel web" in said
    target.hvfuse("failover", "planned", "web")
    source.hvfuse("replicate", "web", code=16)
    assert "failed over to" in source.hvfuse("failover", "cancel", "web", "--yes", code=16)
    target.hvfuse("failover", "commit", "web", "--yes", "--wait")
    said = target.hvfuse("failover", "cancel", "web", "--yes", code=13)
    assert "committed, from which nothing leads back" in said and "replication reverse" in said and "there" not in said


def test_a_disk_that_is_left_out_does_not_make_a_vm_of_what_gave_way(pair: Pair, disk: Path) -> None:
    source, target = pair.source, pair.target
    (source.disks / "web" / "swap.raw").write_bytes(bytes(1 << 20))
    with open(source.root / "hvfuse.toml", "a") as file:
        file.write('[vm.web]\nexclude = ["swap.raw"]\n')
    source.hvfuse("umount", "web")
    source.hvfuse("mount", "web")
    source.hvfuse("replicate", "web")
    source.hvfuse("failover", "planned", "web", "--yes")
    target.hvfuse("failover", "planned", "web")
    target.hvfuse("failover", "commit", "web", "--yes", "--wait")
    source.hvfuse("replication", "reverse", "web", "--yes")
    assert os.listdir(source.disks / "web") == ["swap.raw"]
    source.start()
    assert entry(source)["role"] == "replica"
    assert "already" in source.hvfuse("replication", "reverse", "web", "--yes", code=13)

    target.hvfuse("replication", "reverse", "web")
    target.hvfuse("replicate", "web")
    found = entry(source)
    assert (found["role"], found["state"]) == ("replica", "Replicating")
    target.hvfuse("failover", "planned", "web", "--yes")
    assert not os.path.ismount(source.mnt / "web"), "nothing else is served in its place"
    assert "swap.raw" in source.hvfuse("failover", "planned", "web", code=6)
    assert state(source) == "PreparedForFailover"
    (source.disks / "web" / "swap.raw").rename(source.root / "swap.raw")
    source.hvfuse("failover", "planned", "web")
    source.hvfuse("failover", "commit", "web", "--yes", "--wait")
    assert (source.mnt / "web" / disk.name).exists()
