"""`hvfuse run` without its faces: real processes that behave like trackers and shippers."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse import system
from hvfuse.control.arrivals import STILL_SECONDS
from hvfuse.control.config import Config
from hvfuse.control.daemon import Daemon, serving_pid
from hvfuse.control.home import Home
from hvfuse.control.records import Records
from hvfuse.control.sample import make_sample
from hvfuse.control.supervisor import SCAN_SECONDS, Supervisor, find_vms, only_supervisor, require_no_supervisor
from hvfuse.errors import BusyError
from hvfuse.formats.image import ImageFormat, probe
from hvfuse.states import Event, ReplicationState
from hvfuse.system import Clock
from tests.control.children import LATECOMER, REFUSER, HandClock, server, until


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Config().home(str(tmp_path))
    home.make()
    return home


@pytest.fixture
def records(home: Home) -> Iterator[Records]:
    with Records(home.records) as records:
        yield records


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def add_vm(home: Home, vm: str, disk: str = "os.raw") -> None:
    folder = Path(home.folder(vm))
    folder.mkdir(exist_ok=True)
    (folder / disk).write_bytes(bytes(512))
    os.utime(folder / disk, (0, 0))  # long ago, also by the clock of the tests


def story(home: Home) -> Path:
    return Path(home.root) / "story"


@pytest.fixture
def make(home: Home, records: Records, clock: HandClock) -> Iterator[Callable[[], Supervisor]]:
    made: list[Supervisor] = []

    def daemon(role: str) -> Callable[..., Daemon]:
        def of(home: Home, vm: str, *, clock: Clock) -> Daemon:
            path = os.path.join(home.state_dir(vm), f"{role}.sock")
            refuser = {"corrupt": REFUSER, "late": LATECOMER}.get(vm) if role == "tracker" else None
            command = [sys.executable, "-c", refuser] if refuser else server(path, str(story(home)))
            return Daemon(role, command, socket_path=path, log_path=home.log(vm, role), clock=clock)

        return of

    def factory(**options: Callable[[str], bool]) -> Supervisor:
        daemons = {"tracker": daemon("tracker"), "shipper": daemon("shipper")}
        made.append(Supervisor(home, records, clock=clock, **daemons, **options))
        return made[-1]

    yield factory
    for supervisor in made:
        for keeper in supervisor.vms.values():
            for process in (keeper.tracker, keeper.shipper):
                process.send(signal.SIGKILL)
                until(lambda process=process: process.check() or not process.is_running)


def all_ready(supervisor: Supervisor, *names: str) -> bool:
    supervisor.tick()
    keepers = [supervisor.vms.get(name) for name in names]
    return all(keeper is not None and keeper.tracker.is_ready and keeper.shipper.is_ready for keeper in keepers)


def test_a_vm_is_a_folder_with_a_disk_and_a_fit_name(home: Home) -> None:
    add_vm(home, "b", "DATA.VHD")
    add_vm(home, "a", "x.img")
    (Path(home.disks) / "empty").mkdir()
    (Path(home.disks) / "notes").mkdir()
    (Path(home.disks) / "notes" / "readme.txt").touch()
    (Path(home.disks) / ".hidden").mkdir()
    (Path(home.disks) / ".hidden" / "x.raw").touch()
    (Path(home.disks) / "lone.vhd").touch()
    assert find_vms(home) == ["a", "b"]
    assert find_vms(Config().home(home.root + "/nowhere")) == []


def test_a_newcomer_gets_a_sample_and_nobody_else_does(home: Home, make: Callable[[], Supervisor]) -> None:
    assert make().prepare() == "sample"
    info = probe(os.path.join(home.folder("sample"), "sample.vhd"))
    assert (info.format, info.virtual_size) == (ImageFormat.VHD_DYNAMIC, 1 << 30)
    assert info.file_size < 1 << 20
    assert os.listdir(home.folder("sample")) == ["sample.vhd"]
    assert make().prepare() is None


def test_a_sample_that_was_cut_short_is_made_anew(home: Home) -> None:
    folder = Path(home.folder("sample"))
    folder.mkdir()
    (folder / ".sample.vhd.tmp").write_bytes(b"half of it")
    assert find_vms(home) == []
    make_sample(home.disks)
    assert find_vms(home) == ["sample"]
    assert os.listdir(folder) == ["sample.vhd"]


def test_a_new_vm_that_the_policy_leaves_to_an_administrator_is_mounted_and_not_replicated(
    home: Home, records: Records, clock: HandClock, make: Callable[..., Supervisor]
) -> None:
    supervisor = make(protects=lambda vm: vm != "a")
    add_vm(home, "a")
    add_vm(home, "b")
    until(lambda: all_ready(supervisor, "b"))
    until(lambda: supervisor.tick() or supervisor.vms["a"].tracker.is_ready)
    for _ in range(3):
        clock.at += SCAN_SECONDS + STILL_SECONDS
        supervisor.tick()
    assert not supervisor.vms["a"].shipper.is_running
    assert records.read("a").state is ReplicationState.DISABLED
    records.apply("a", Event.ENABLE)
    until(lambda: all_ready(supervisor, "a"))


def test_a_disabled_vm_has_its_shipper_ended_and_its_mount_served_until_somebody_unmounts_it(
    home: Home, records: Records, clock: HandClock, make: Callable[..., Supervisor]
) -> None:
    add_vm(home, "a")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a"))
    keeper, served = supervisor.vms["a"], supervisor.vms["a"].tracker.pid
    records.apply("a", Event.DISABLE, enabled=False)
    until(lambda: supervisor.tick() or not keeper.shipper.is_running)
    clock.at += 100
    supervisor.tick()
    assert (keeper.tracker.pid, keeper.shipper.is_running) == (served, False)
    keeper.tracker.send(signal.SIGKILL)  # a mount that breaks is made whole
    until(lambda: keeper.tracker.check() or not keeper.tracker.is_running)
    clock.at += 100
    until(lambda: supervisor.tick() or (keeper.tracker.is_ready and keeper.tracker.pid != served))
    keeper.tracker.send(signal.SIGTERM)  # one that ends well was meant to
    until(lambda: supervisor.tick() or not keeper.tracker.is_running)
    clock.at += 100
    supervisor.tick()
    assert not keeper.tracker.is_running
    assert records.read("a").tracker_error is None
    assert (records.read("a").state, records.read("a").enabled) == (ReplicationState.DISABLED, False)
    records.apply("a", Event.ENABLE, enabled=True)
    until(lambda: all_ready(supervisor, "a"))


def test_one_that_was_disabled_is_mounted_by_the_next_supervisor_too_and_not_enabled(
    home: Home, records: Records, make: Callable[..., Supervisor]
) -> None:
    add_vm(home, "a")
    records.update("a", enabled=False)
    supervisor = make()
    until(lambda: supervisor.tick() or ("a" in supervisor.vms and supervisor.vms["a"].tracker.is_ready))
    supervisor.tick()
    assert not supervisor.vms["a"].shipper.is_running
    assert records.read("a").state is ReplicationState.DISABLED


def test_a_vm_that_was_taken_up_once_is_whatever_the_policy_says_by_now(
    home: Home, clock: HandClock, make: Callable[..., Supervisor]
) -> None:
    add_vm(home, "a")
    until(lambda: all_ready(make(), "a"))
    supervisor = make(protects=lambda vm: False)
    until(lambda: all_ready(supervisor, "a"))


def test_a_second_supervisor_of_the_same_home_is_refused_by_pid(home: Home) -> None:
    require_no_supervisor(home)
    with only_supervisor(home):
        code = (
            "import sys; from hvfuse.control.config import Config; from hvfuse.control.supervisor import *\n"
            "from hvfuse.errors import BusyError\n"
            "try:\n    with only_supervisor(Config().home(sys.argv[1])): pass\n"
            "except BusyError as error: print(error); sys.exit(error.exit_code)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, home.root], check=False, capture_output=True, text=True)
        assert done.returncode == 6
        assert f"pid {os.getpid()}" in done.stdout
        with pytest.raises(BusyError):
            require_no_supervisor(home)
    require_no_supervisor(home)
    with only_supervisor(home):
        pass


def test_who_only_asks_for_a_supervisor_is_taken_for_none(home: Home) -> None:
    with only_supervisor(home):
        pass
    with open(home.run_lock, encoding="ascii") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        require_no_supervisor(home)


def test_every_vm_gets_a_tracker_and_then_a_shipper_and_new_ones_are_noticed(
    home: Home, clock: HandClock, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "a")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a"))
    add_vm(home, "b")
    supervisor.tick()
    assert list(supervisor.vms) == ["a"]
    for _ in range(3):
        clock.at += SCAN_SECONDS
        supervisor.tick()
    until(lambda: all_ready(supervisor, "a", "b"))
    supervisor.stop(asked=lambda: 1, tell=print)


def test_a_disk_that_is_still_being_copied_in_is_left_alone_until_it_stands_still(
    home: Home, clock: HandClock, make: Callable[[], Supervisor]
) -> None:
    supervisor = make()
    supervisor.tick()
    for size in range(1, 6):
        add_vm(home, "late")
        os.truncate(Path(home.folder("late")) / "os.raw", 512 * size)
        os.utime(Path(home.folder("late")) / "os.raw", (size, size))
        clock.at += SCAN_SECONDS
        supervisor.tick()
        assert not supervisor.vms
    add_vm(home, "late", "data.raw")
    clock.at += SCAN_SECONDS
    supervisor.tick()
    assert not supervisor.vms
    clock.at += STILL_SECONDS
    supervisor.tick()
    assert list(supervisor.vms) == ["late"]
    supervisor.stop(asked=lambda: 1, tell=print)


def test_at_start_only_a_folder_that_was_written_to_just_now_has_to_wait(
    home: Home, records: Records, clock: HandClock, make: Callable[[], Supervisor]
) -> None:
    for vm in ("old", "fresh", "known"):
        add_vm(home, vm)
    for vm in ("fresh", "known"):
        os.utime(Path(home.folder(vm)) / "os.raw", (clock.at - 1, clock.at - 1))
    records.apply("known", Event.ENABLE, Event.COMMIT_POINT)
    supervisor = make()
    supervisor.tick()
    assert list(supervisor.vms) == ["known", "old"]
    supervisor.stop(asked=lambda: 1, tell=print)


def test_the_sample_is_taken_up_at_once(make: Callable[[], Supervisor]) -> None:
    supervisor = make()
    supervisor.prepare()
    supervisor.tick()
    assert list(supervisor.vms) == ["sample"]
    supervisor.stop(asked=lambda: 1, tell=print)


def test_a_vm_that_cannot_start_is_recorded_with_its_cause_and_the_others_go_on(
    home: Home, records: Records, clock: HandClock, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "corrupt")
    add_vm(home, "fine")
    supervisor = make()
    until(lambda: all_ready(supervisor, "fine") and records.read("corrupt").tracker_error)
    assert records.read("corrupt").tracker_error == "os.vhd: footer checksum does not match"
    assert records.read("fine").tracker_error is None
    assert not supervisor.vms["corrupt"].shipper.is_running
    supervisor.stop(asked=lambda: 1, tell=print)


def test_a_tracker_that_came_too_late_is_no_failure_while_another_one_serves(
    home: Home, records: Records, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "late")
    home.make_vm("late")
    supervisor = make()
    with system.exclusive_lock(home.tracker_lock("late")) as had:
        assert had
        until(lambda: supervisor.tick() or supervisor.vms["late"].tracker.failure)
        supervisor.tick()
        assert records.read("late").tracker_error is None
    supervisor.tick()
    assert records.read("late").tracker_error == "late: another process serves it"


def test_a_vm_that_cannot_even_be_begun_does_not_keep_the_others_from_their_turn(
    home: Home, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "a")
    add_vm(home, "b")
    (Path(home.state) / "vms").mkdir(mode=0o700)
    (Path(home.state) / "vms" / "a").touch()
    supervisor = make()
    with pytest.raises(FileExistsError):
        supervisor.tick()
    until(lambda: all_ready(supervisor, "b"))
    supervisor.stop(asked=lambda: 1, tell=print)


def test_an_error_of_last_time_is_cleared_when_the_tracker_serves(
    home: Home, records: Records, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "a")
    records.update("a", tracker_error="old", shipper_error="old")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a"))
    assert (records.read("a").tracker_error, records.read("a").shipper_error) == (None, None)


def test_why_a_process_does_not_run_is_recorded_again_when_somebody_took_it_back(
    home: Home, records: Records, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "corrupt")
    supervisor = make()
    for _ in range(2):  # as disabling and enabling it does
        records.update("corrupt", tracker_error=None)
        until(lambda: supervisor.tick() or records.read("corrupt").tracker_error)


def test_a_supervisor_that_adopts_what_runs_has_no_news_of_it(
    home: Home, records: Records, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "a")
    first, second = make(), make()
    until(lambda: all_ready(first, "a"))
    first.tick()
    told = [event.text for event in records.events.after(0) if event.kind == "process"]
    until(lambda: all_ready(second, "a"))
    second.tick()
    assert [event.text for event in records.events.after(0) if event.kind == "process"] == told


def test_processes_that_outlived_their_supervisor_are_adopted(home: Home, make: Callable[[], Supervisor]) -> None:
    add_vm(home, "a")
    first, second = make(), make()
    until(lambda: all_ready(first, "a"))
    pids = (first.vms["a"].tracker.pid, first.vms["a"].shipper.pid)
    until(lambda: all_ready(second, "a"))
    assert (second.vms["a"].tracker.pid, second.vms["a"].shipper.pid) == pids
    second.stop(asked=lambda: 1, tell=print)
    assert sorted(story(home).read_text().splitlines()) == ["a shipper.sock ended", "a tracker.sock ended"]


def test_a_shipper_that_outlived_its_supervisor_ends_though_its_tracker_and_folder_are_gone(
    home: Home, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "a")
    first = make()
    until(lambda: all_ready(first, "a"))
    first.vms["a"].tracker.send(signal.SIGKILL)
    os.rename(home.folder("a"), home.root + "/elsewhere")
    second = make()
    until(lambda: serving_pid(home.tracker_socket("a")) is None)
    assert second.vms["a"].shipper.pid == first.vms["a"].shipper.pid
    second.stop(asked=lambda: 1, tell=print)
    assert serving_pid(home.shipper_socket("a")) is None
    assert story(home).read_text() == "a shipper.sock ended\n"


def test_the_shippers_end_before_the_trackers(home: Home, make: Callable[[], Supervisor]) -> None:
    add_vm(home, "a")
    add_vm(home, "b")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a", "b"))
    supervisor.stop(asked=lambda: 1, tell=print)
    ended = [line.split()[1] for line in story(home).read_text().splitlines()]
    assert ended == ["shipper.sock", "shipper.sock", "tracker.sock", "tracker.sock"]


def test_a_mount_in_use_is_waited_for_and_told_once(home: Home, make: Callable[[], Supervisor]) -> None:
    add_vm(home, "a")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a"))
    busy = Path(f"{story(home)}.busy")
    busy.touch()
    told: list[str] = []
    turns = 0

    def asked() -> int:
        nonlocal turns
        turns += 1
        if turns == 60:
            busy.unlink()
        return 1

    supervisor.stop(asked=asked, tell=told.append)
    assert told == ["a: in use by qemu (pid 7)"]
    assert turns >= 60


def test_asked_twice_a_mount_in_use_is_ended_all_the_same(home: Home, make: Callable[[], Supervisor]) -> None:
    add_vm(home, "a")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a"))
    Path(f"{story(home)}.busy").touch()
    told: list[str] = []
    supervisor.stop(asked=lambda: 1 + len(told), tell=told.append)
    assert story(home).read_text().splitlines()[-1] == "a tracker.sock ended"


def test_a_tracker_that_hangs_can_be_left_behind(home: Home, make: Callable[[], Supervisor]) -> None:
    add_vm(home, "a")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a"))
    pid = supervisor.vms["a"].tracker.pid
    Path(f"{story(home)}.busy").touch()
    with pytest.raises(BusyError, match=rf"a \(pid {pid}\)"):
        supervisor.stop(asked=lambda: 3, tell=print)


def test_a_tracker_that_hangs_keeps_no_other_from_ending_and_can_be_forced(
    home: Home, make: Callable[[], Supervisor]
) -> None:
    add_vm(home, "a")
    add_vm(home, "b")
    supervisor = make()
    until(lambda: all_ready(supervisor, "a", "b"))
    stuck = supervisor.vms["a"].tracker
    stuck.send(signal.SIGSTOP)
    turns = 0

    def asked() -> int:
        nonlocal turns
        turns += 1
        if turns == 100:
            assert not supervisor.vms["b"].tracker.is_running
            stuck.send(signal.SIGCONT)
            return 2
        return 1 if turns < 100 else 2

    supervisor.stop(asked=asked, tell=print)
    assert story(home).read_text().splitlines()[-2:] == ["b tracker.sock ended", "a tracker.sock ended"]
