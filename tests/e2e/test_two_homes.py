"""Two homes: one ships a VM to the other's store, and both know where the VM's points are."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.control.config import Config
from tests.e2e.conftest import Installation, identical, mounts_below, qemu_io, wait_until
from tests.e2e.test_main_job import make_disk

CONFIG = '[replication]\nfrequency = "1h"\nresync_window = "always"\ntarget = "{}"\n'


class Pair:
    """`source` ships to the store of `target`, which has never heard of it."""

    def __init__(self, root: Path) -> None:
        self.source = Installation(root / "source")
        self.target = Installation(root / "target")
        self.store = self.target.root / "store"
        for home in (self.source, self.target):
            home.root.mkdir()
        self.aim(self.store)

    def aim(self, target: Path | str) -> None:
        (self.source.root / "hvfuse.toml").write_text(CONFIG.format(target))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for home in (made.source, made.target):
        home.close()
    assert mounts_below(tmp_path) == []


@pytest.fixture
def disk(pair: Pair) -> Path:
    """Of a VM that is mounted, written to, and shipped."""
    name, fmt = make_disk(pair.source.disks / "web", "raw", size="8M")
    pair.source.hvfuse("mount", "web")
    path = pair.source.mnt / "web" / name
    qemu_io(path, fmt, "write -P 0xaa 0 1M", "flush")
    pair.source.hvfuse("replicate", "web")
    return path


def entry(home: Installation, vm: str = "web") -> dict[str, object]:
    done = subprocess.run(
        home.command("status", "--json"), cwd="/", env=home.environment(), capture_output=True, text=True
    )
    return {one["name"]: one for one in json.loads(done.stdout)["vms"]}[vm]


def test_both_homes_work_on_the_store_that_one_of_them_ships_to(pair: Pair, disk: Path, tmp_path: Path) -> None:
    source, target = pair.source, pair.target
    assert not (source.root / "store").exists(), "nothing is made in the place of the store that is not used"
    points = source.json("point", "list", "web")
    assert points == target.json("point", "list", "web") and len(points["points"]) == 1
    assert source.json("verify", "web", "--all")["mismatch_bytes"] == 0

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    source.test_failover("web", mine)
    assert identical(disk, mine / disk.name, "raw")
    qemu_io(mine / disk.name, "raw", "write -P 0x11 0 64k", "flush")
    target.test_failover("web", theirs)
    assert identical(disk, theirs / disk.name, "raw"), "each has its own overlay"
    for home in (source, target):
        for words in ((), ("web",)):
            tests = home.json("failover", "list", *words)["tests"]
            assert [(test["vm"], test["store"], test["alive"]) for test in tests] == [
                ("web", str(pair.store), True)
            ] * 2
    assert entry(source)["role"] == "source" and entry(source)["tests"] == 2
    replica = entry(target)
    assert (replica["role"], replica["state"], replica["points"], replica["tests"]) == ("replica", "Replicating", 1, 2)
    assert replica["latest_point"] == points["points"][0]["id"]
    for words in ((), ("web",)):
        said = target.hvfuse("status", *words)
        assert "replica" in said and str(replica["latest_point"]) in said and "enable" not in said

    target.hvfuse("failover", "cleanup", "--all")
    assert not list((pair.store / "overlays").iterdir())
    assert source.json("failover", "list")["tests"] == []
    assert "lies elsewhere" in source.hvfuse("store", "info", code=5)
    assert [vm["name"] for vm in target.json("store", "info")["vms"]] == ["web"]


def test_tests_with_the_same_id_in_two_stores_are_told_apart_by_the_vm(pair: Pair, disk: Path, tmp_path: Path) -> None:
    source = pair.source
    make_disk(source.disks / "db", "raw", size="8M")
    with open(source.root / "hvfuse.toml", "a") as file:
        file.write('[vm.db]\ntarget = "own"\n')
    source.hvfuse("mount", "db")
    source.hvfuse("replicate", "db")
    source.test_failover("web", tmp_path / "web")
    source.test_failover("db", tmp_path / "db")
    tests = source.json("failover", "list")["tests"]
    assert [(test["vm"], test["id"], test["store"]) for test in tests] == [
        ("db", 1, str(source.root / "store")), ("web", 1, str(pair.store)),
    ]  # fmt: skip
    assert source.json("store", "info")["elsewhere"] == {"web": str(pair.store)}
    # Now web is to go to the own store, too: what stands in the other is found all the same.
    pair.aim("own")
    assert len(source.json("failover", "list", "web")["tests"]) == 1
    source.hvfuse("failover", "cleanup", "db", "1")
    assert [test["vm"] for test in source.json("failover", "list")["tests"]] == ["web"]
    source.hvfuse("failover", "cleanup", "web", "1")
    assert source.json("failover", "list")["tests"] == []


def test_one_vm_with_the_same_id_in_two_stores_is_ambiguous(pair: Pair, disk: Path, tmp_path: Path) -> None:
    source = pair.source
    source.test_failover("web", tmp_path / "old")
    pair.aim("own")
    source.hvfuse("replicate", "web")
    source.test_failover("web", tmp_path / "new")
    # The store of before is asked as long as the VM is shipped to it; it is named again for this.
    pair.aim(pair.store)
    said = source.hvfuse("failover", "cleanup", "web", "1", code=2)
    assert str(pair.store) in said and str(source.root / "store") in said
    source.hvfuse("failover", "cleanup", "web")
    assert not (tmp_path / "old" / disk.name).exists() and not (tmp_path / "new" / disk.name).exists()


def test_a_running_shipper_goes_to_another_store_when_it_is_told(pair: Pair) -> None:
    source = pair.source
    pair.aim("own")
    make_disk(source.disks / "web", "raw", size="8M")
    source.start()
    source.wait_for_state("web")
    assert not pair.store.exists()
    pair.aim(pair.store)
    wait_until(lambda: pair.store.exists() and entry(pair.target)["points"] == 1, source.logs)
    source.wait_for_state("web")
    assert entry(source)["points"] == 1
    assert source.stop() == 0


def test_a_store_that_is_away_is_told_and_not_replaced_by_an_empty_one(pair: Pair, disk: Path) -> None:
    source = pair.source
    away = pair.store.rename(pair.target.root / "away")
    pair.store.mkdir()  # the mount point
    said = source.hvfuse("replicate", "web", code=11)
    assert str(pair.store) in said and "mount the disk" in said
    assert list(pair.store.iterdir()) == []
    source.hvfuse("point", "list", "web", code=11)
    source.hvfuse("replication", "disable", "web", "--delete-replica", "--yes", code=11)
    reasons = entry(source)["reasons"]
    assert isinstance(reasons, list) and "store-unreachable" in [reason["id"] for reason in reasons]
    pair.store.rmdir()
    away.rename(pair.store)
    source.hvfuse("replicate", "web")
    assert len(source.json("point", "list", "web")["points"]) == 2


def test_a_home_in_the_place_of_its_store_is_refused(pair: Pair) -> None:
    make_disk(pair.source.disks / "web", "raw", size="8M")
    (pair.target.root / "hvfuse.toml").touch()
    pair.aim("../target")
    said = pair.source.hvfuse("replication", "check", "web", code=2)
    assert f'target = "{Config().home(str(pair.target.root)).store}"' in said
    assert str(pair.target.root) in pair.source.hvfuse("point", "list", "web", code=2)
