"""The source is lost: failover from the store alone, wherever that lies by now; and what becomes of a source that
comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.control.records import Records
from hvfuse.target.journal import PointReader
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.e2e.conftest import Installation, mounts_below, processes_of, wait_until
from tests.target.model import SECOND, Source

pytestmark = pytest.mark.mount

POINTS = int(os.environ.get("HVFUSE_TEST_POINTS", "2880"))
"""In the store of a VM that fails over: a day of points every 30 seconds."""
MOST_SECONDS = float(os.environ.get("HVFUSE_TEST_FAILOVER_SECONDS", "60"))
"""Within which the disks have to be there. 5 is what is promised, of a machine that is not busy with other tests."""
MIB, BLOCK, SIZE = 1 << 20, 1 << 16, 16 << 20
CONFIG = '[replication]\ntarget = "{}"\nfrequency = "1s"\nhard_limit = 1000\nresync_window = "always"\nfence = "{}"\n'


class Site:
    """`source` ships to a store that is `home`'s in the end. A third home has neither."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source, self.home, self.third = (Installation(root / name) for name in ("source", "home", "third"))
        self.first_store = root / "first" / "store"
        for directory in (self.source.disks / "web", self.home.root, self.third.root, self.first_store.parent):
            directory.mkdir(parents=True)
        (self.third.root / "hvfuse.toml").write_text(f'[paths]\nstore = "{self.store}"\n')
        (self.home.root / "hvfuse.toml").write_text('[replication]\nfrequency = "1s"\n')

    @property
    def store(self) -> Path:
        return self.home.root / "store"

    def aim(self, target: Path, fence: str = "local") -> None:
        (self.source.root / "hvfuse.toml").write_text(CONFIG.format(target, fence))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for home in (made.source, made.home, made.third):
        home.close()
    for mount in mounts_below(tmp_path):
        subprocess.run(["umount", "-l", mount], capture_output=True, check=False)


# From a store with many points ------------------------------------------------------------------------------------


def filled(store_path: Path, kept: range) -> dict[str, bytes]:
    """Make a store of POINTS points of "web"; returns what the disk was at those with a number in `kept`, oldest
    first."""
    model, found = Source("web", {"root.raw": MIB}, seed=3), {}
    model.now_ns = time.time_ns() - POINTS * 30 * SECOND
    model.write("root.raw", 0, model.random.randbytes(MIB // 2))
    # In memory: what is durable is not asked here, and a sync for each point would take a minute.
    with Store(str(store_path)) as store:
        replica = LocalReplica(store, "web")
        model.copy_to(replica)
        for number in range(POINTS):
            model.write("root.raw", 512 * model.random.randrange(MIB // 512 - 8), model.random.randbytes(4096))
            point = model.ship_to(replica)
            disks = model.history.pop(point)
            if number in kept or number == POINTS - 1:
                found[point] = disks["root.raw"]
    return found


@pytest.fixture(scope="module")
def store_of_many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    memory = Path(f"/dev/shm/hvfuse-test-{os.getpid()}")
    memory.mkdir()
    try:
        models = filled(memory / "store", range(POINTS // 3, POINTS, POINTS // 3 - 1))
        return Path(shutil.move(memory / "store", tmp_path_factory.mktemp("many") / "store")), models
    finally:
        shutil.rmtree(memory)


@pytest.fixture
def many(site: Site, store_of_many: tuple[Path, dict[str, bytes]]) -> tuple[Site, dict[str, bytes]]:
    store, models = store_of_many
    subprocess.run(["cp", "-a", "--sparse=always", store, site.store], check=True)
    return site, models


def shown(home: Installation) -> bytes:
    return (home.mnt / "web" / "root.raw").read_bytes()


def test_any_of_many_points_is_there_at_once_and_another_home_is_told_who_has_it(
    many: tuple[Site, dict[str, bytes]], tmp_path: Path
) -> None:
    site, models = many
    home, points = site.home, list(models)
    latest = home.json("point", "list", "web")["points"][-1]["id"]
    began = time.monotonic()
    told = home.json("failover", "unplanned", "web", "--yes")
    took = time.monotonic() - began
    print(f"{POINTS} points: failed over in {took:.2f} s")
    assert took < MOST_SECONDS
    assert (told["point"], told["state"]) == (latest, "FailedOverWaitingCompletion")
    assert shown(home) == models[latest]
    write_at(home.mnt / "web" / "root.raw", 4096, b"new" * 1000)

    for number in range(2):  # tests stand beside it, and neither sees what is written to it
        home.test_failover("web", tmp_path / f"trial{number}", points[number])
        write_at(tmp_path / f"trial{number}" / "root.raw", 0, b"trial")
    home.test_failover("web", tmp_path / "clean", points[0])
    assert (tmp_path / "clean" / "root.raw").read_bytes() == models[points[0]]

    assert str(home.root) in site.third.hvfuse("failover", "unplanned", "web", "--yes", code=13)
    assert str(home.root) in site.third.hvfuse("failover", "cancel", "web", "--yes", code=13)
    for point in points:
        home.hvfuse("failover", "change-point", "web", "--point", point, "--yes")
        assert shown(home) == models[point], "without what was written at the other point"
    home.hvfuse("failover", "cleanup", "--all")
    home.hvfuse("failover", "cancel", "web", "--yes")
    assert not (home.disks / "web").exists() and mounts_below(home.root) == []
    site.third.hvfuse("failover", "unplanned", "web", "--yes")
    assert shown(site.third) == shown_by_store(site.store, latest)
    site.third.hvfuse("failover", "cancel", "web", "--yes")


def test_a_dry_run_of_any_flow_tells_its_steps_and_changes_nothing(many: tuple[Site, dict[str, bytes]]) -> None:
    site, models = many
    point = next(iter(models))

    def dry(*words: str) -> None:
        before = state_of(site.store)
        told = site.home.json(*words, "--dry-run")
        assert told["dry_run"] and told["vm"] == "web" and len(told["steps"]) >= 2
        assert all(set(step) == {"name", "what"} for step in told["steps"])
        assert state_of(site.store) == before

    for kind in ("planned", "unplanned"):
        dry("failover", kind, "web")
    site.home.hvfuse("failover", "unplanned", "web", "--yes")
    for words in (("commit", "web"), ("cancel", "web"), ("change-point", "web", "--point", point)):
        dry("failover", *words)
    site.home.hvfuse("failover", "commit", "web", "--wait", "--yes")
    dry("replication", "reverse", "web")


def state_of(store: Path) -> object:
    with Store(str(store), create=False, read_only=True) as opened:
        return opened.vm("web")


def shown_by_store(store: Path, point: str) -> bytes:
    with Store(str(store), create=False, read_only=True) as opened:
        reader = PointReader(opened, "web", point)
        try:
            return bytes(reader.pread("root.raw", 0, SIZE))
        finally:
            reader.close()


# The source comes back --------------------------------------------------------------------------------------------


def write_at(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


def refuses(path: Path) -> bool:
    """Whether a disk refuses writes with EROFS."""
    try:
        write_at(path, 0, b"x")
    except OSError as error:
        assert error.errno == 30, error
        return True
    return False


def lost_under_load(site: Site) -> tuple[str, bytes]:
    """Kill the source at once, all of it, while fio writes and cycles ship, and move both homes' directories. Returns
    an older point, and what the disk was then."""
    source, disk = site.source, site.source.mnt / "web" / "root.raw"
    (source.disks / "web" / "root.raw").write_bytes(os.urandom(SIZE))
    site.aim(site.first_store)
    source.start()
    source.wait_for_state("web")
    write_at(disk, MIB, os.urandom(MIB))
    older, model = source.json("replicate", "web")["point"], disk.read_bytes()
    fio = subprocess.Popen(
        ["fio", "--name=load", f"--filename={disk}", "--rw=randwrite", "--bs=16k", "--offset=4M", "--size=4M",
         "--rate=2M", "--fsync=8", "--time_based", "--runtime=60"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        seen = len(source.json("point", "list", "web")["points"])
        wait_until(lambda: len(source.json("point", "list", "web")["points"]) >= seen + 2, source.logs)
        for pid in processes_of(source.root):
            os.kill(pid, signal.SIGKILL)
        source.buried()
        assert fio.wait(20) != 0, "its disk is gone"
    finally:
        fio.kill()
        fio.wait()
    for mount in mounts_below(source.root):
        subprocess.run(["umount", "-l", mount], check=True)
    source.root.rename(site.root / "away")
    site.first_store.rename(site.store)
    return older, model


def test_a_lost_source_comes_back_to_a_fence_and_only_differences_travel(site: Site) -> None:
    older, model = lost_under_load(site)
    source, home = site.source, site.home
    latest = home.json("point", "list", "web")["points"][-1]["id"]
    told = home.json("failover", "unplanned", "web", "--yes")
    assert told["point"] == latest and told["mountpoint"] == str(home.mnt / "web")
    expected = shown_by_store(site.store, latest)
    assert shown(home) == expected != model and expected[: 4 * MIB] == model[: 4 * MIB]
    write_at(home.mnt / "web" / "root.raw", 0, b"this is dropped")
    home.hvfuse("failover", "cancel", "web", "--yes")

    home.hvfuse("failover", "unplanned", "web", "--point", older, "--yes")
    assert shown(home) == model
    written = os.urandom(MIB)
    write_at(home.mnt / "web" / "root.raw", 10 * MIB, written)
    home.hvfuse("failover", "commit", "web", "--wait", "--yes")
    assert shown(home) == model[: 10 * MIB] + written + model[11 * MIB :]

    (site.root / "away").rename(source.root)
    _serves_as_the_fence_says(site)
    _is_told_and_refused(site)
    _turns_round(site)


def _serves_as_the_fence_says(site: Site) -> None:
    """Its target is not there any more: nobody can tell it what has happened."""
    source, disk = site.source, site.source.mnt / "web" / "root.raw"
    for fence in ("local", "strict"):
        site.aim(site.first_store, fence)
        source.hvfuse("mount", "web")
        assert refuses(disk) is (fence == "strict")
        told = json.dumps(source.status("web"))
        assert str(site.first_store) in told
        assert ("strict" in told) is (fence == "strict"), told
        source.hvfuse("umount", "web")


def _is_told_and_refused(site: Site) -> None:
    source, disk = site.source, site.source.mnt / "web" / "root.raw"
    site.aim(site.store)
    source.hvfuse("mount", "web")
    assert refuses(disk)
    source.hvfuse("replicate", "web", code=16)
    said = source.hvfuse("status", "web", code=3)
    assert str(site.home.root) in said and "read-only" in said
    assert "hvfuse replication reverse web" in said and "hvfuse replication disable web" in said
    source.hvfuse("umount", "web")
    source.start()
    wait_until((source.mnt / "web" / "root.raw").exists, source.logs)
    time.sleep(3)  # the fence is looked at again, and a cycle would have been due
    assert refuses(disk)
    assert source.status("web")["state"] == "FailedOver"
    source.hvfuse("replicate", "web", code=16)


def _turns_round(site: Site) -> None:
    source, home = site.source, site.home
    before, after = (source.mnt / "web" / "root.raw").read_bytes(), shown(home)
    differing = sum(before[at : at + BLOCK] != after[at : at + BLOCK] for at in range(0, SIZE, BLOCK)) * BLOCK
    assert MIB <= differing < SIZE // 2
    home.start()
    source.hvfuse("replication", "reverse", "web", "--yes")
    home.hvfuse("replication", "reverse", "web", "--yes")
    home.wait_for_state("web")
    with Records(str(home.root / "state" / "records")) as records:
        sent = (records.read("web").last_copy or {})["bytes_sent"]
    assert isinstance(sent, int) and MIB <= sent < 1.05 * differing
    assert home.json("verify", "web", "--all")["mismatch_bytes"] == 0
    home.stop()
    source.stop()


def test_a_planned_failover_that_is_prepared_is_prepared_when_it_is_asked_for_again(site: Site) -> None:
    source = site.source
    (source.disks / "web" / "root.raw").write_bytes(bytes(MIB))
    site.aim(site.store)
    source.hvfuse("mount", "web")
    source.hvfuse("replicate", "web")
    told = source.json("failover", "planned", "web", "--yes")
    assert source.json("failover", "planned", "web", "--yes") == told
    assert site.home.json("failover", "planned", "web", "--yes")["point"] == told["point"]
