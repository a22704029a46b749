"""A held VM through its mount: programs that write, a file system on a loop device, maps, and who has disks open."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvfuse import wire
from hvfuse.errors import BusyError
from hvfuse.tracker.service import SOCKET_NAME
from tests.mount.conftest import REPOSITORY, Mounted
from tests.tracker.test_vm import replayed

pytestmark = pytest.mark.mount

MIB = 1 << 20
REASON = "it was failed over"
BLOCK = 4096
BLOCKS = 512


class Tracked(Mounted):
    """`os.raw` is tracked, `swap.raw` is not, `notes.txt` is no disk."""

    def serve(self, *held: str) -> None:
        self.run("tests.mount.serving_tracker", self.folder, self.journals, self.mnt, *held)

    def ask(self, op: str, **fields: object) -> wire.Message:
        return wire.request(str(self.journals / SOCKET_NAME), op, **fields)


@pytest.fixture
def vm(unmounted: Mounted) -> Tracked:
    unmounted.__class__ = Tracked
    assert isinstance(unmounted, Tracked)
    for name in ("os.raw", "swap.raw"):
        with (unmounted.folder / name).open("wb") as file:
            file.truncate(64 * MIB)
    (unmounted.folder / "notes.txt").write_text("notes")
    return unmounted


def code(action: Callable[[], object]) -> int:
    try:
        action()
    except OSError as error:
        return error.errno or -1
    return 0


def wait_until(holds: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def pattern(number: int) -> int:
    return number % 250 + 1


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="needs qemu-io")
def test_every_write_that_qemu_had_acknowledged_is_on_the_disk_and_in_the_logs_and_every_later_one_fails(
    vm: Tracked,
) -> None:
    vm.serve()
    vm.ask("begin", generation=uuid.uuid4().hex)
    before = (vm.folder / "os.raw").read_bytes()
    qemu = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(vm.mnt / "os.raw")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert qemu.stdin is not None and qemu.stdout is not None
    answers: list[str] = []
    reader = threading.Thread(target=lambda: answers.extend(qemu.stdout))  # type: ignore[arg-type]
    reader.start()
    sent, at_hold, holder = 0, b"", threading.Thread(target=lambda: vm.ask("hold", reason=REASON))
    try:
        while not at_hold or sum("failed" in line for line in answers) < 100:
            offset = sent * 7 % BLOCKS * BLOCK
            qemu.stdin.write(f"write -P {pattern(sent)} {offset} {BLOCK}\n")
            qemu.stdin.flush()
            sent += 1
            if holder.ident is None and len(answers) > 500:
                holder.start()
            if holder.ident is not None and not holder.is_alive() and not at_hold:
                at_hold = (vm.folder / "os.raw").read_bytes()
        qemu.stdin.close()
        reader.join(20)
    finally:
        qemu.kill()
        qemu.wait()
        qemu.stdout.close()
    results = [
        "wrote" in line
        for line in answers
        if re.search(r"wrote \d+/\d+ bytes|write failed: Read-only file system", line)
    ]
    assert len(results) == sent, answers[-5:]
    done = results.index(False)
    assert done >= 100 and not any(results[done:]), "once one was refused, all are"
    expected = bytearray(before)
    for number in range(done):
        offset = number * 7 % BLOCKS * BLOCK
        expected[offset : offset + BLOCK] = bytes([pattern(number)]) * BLOCK
    assert (vm.folder / "os.raw").read_bytes() == at_hold == expected
    vm.ask("rotate")
    assert replayed(str(vm.folder), "os.raw", before) == expected
    assert (vm.mnt / "os.raw").read_bytes() == expected, "the kernel's pages show nothing else"


def test_buffered_and_direct_writes_are_refused_while_they_are_made(vm: Tracked) -> None:
    vm.serve()
    for name in ("os.raw", "swap.raw"):
        path = vm.mnt / name
        buffered, direct = (os.open(path, os.O_RDWR | flag) for flag in (0, os.O_DIRECT))
        assert os.pread(buffered, BLOCK, 0) == bytes(BLOCK)  # a page of the kernel's
        page = mmap.mmap(-1, BLOCK)
        page.write(b"x" * BLOCK)
        vm.ask("hold", reason=REASON)
        assert code(lambda fd=buffered: os.pwrite(fd, b"x" * 10, 5)) == errno.EROFS
        assert code(lambda fd=buffered: os.pwrite(fd, b"x" * MIB, 512)) == errno.EROFS
        assert code(lambda fd=direct, page=page: os.pwritev(fd, [page], 0)) == errno.EROFS
        assert code(lambda fd=buffered: os.ftruncate(fd, 5)) == errno.EROFS
        assert code(lambda path=path: os.truncate(path, 5)) == errno.EROFS
        assert code(lambda fd=buffered: os.posix_fallocate(fd, 0, BLOCK)) == errno.EROFS
        assert os.pread(buffered, MIB, 0) == bytes(MIB), "what was refused is not shown"
        os.fsync(buffered)
        vm.ask("unhold")
        assert os.pwrite(buffered, b"again", 0) == os.pwritev(direct, [memoryview(page)[:512]], 512) - 507
        assert (vm.folder / name).read_bytes()[:1024] == b"again" + bytes(507) + b"x" * 512
        os.close(buffered)
        os.close(direct)


def test_what_is_stored_in_a_map_before_is_kept_and_afterwards_refused_at_msync(vm: Tracked) -> None:
    vm.serve()
    with (vm.mnt / "os.raw").open("r+b") as file, mmap.mmap(file.fileno(), MIB) as view:
        view[:6] = b"before"
        vm.ask("hold", reason=REASON)
        assert (vm.folder / "os.raw").read_bytes()[:6] == b"before"
        view[BLOCK : BLOCK + 5] = b"after"
        assert code(view.flush) in (errno.EIO, errno.EROFS)
    assert (vm.folder / "os.raw").read_bytes()[BLOCK : BLOCK + 5] == bytes(5)


def test_names_of_disks_stay_as_they_are_and_other_files_do_not(vm: Tracked) -> None:
    vm.serve()
    reader = os.open(vm.mnt / "swap.raw", os.O_RDONLY)  # so that its removal would be a hiding
    vm.ask("hold", reason=REASON)
    refused: list[Callable[[], object]] = [
        (vm.mnt / "swap.raw").unlink,
        (vm.mnt / "os.raw").unlink,
        lambda: (vm.mnt / "new.raw").write_bytes(b"x"),
        lambda: os.mknod(vm.mnt / "new.raw"),
        lambda: os.symlink("notes.txt", vm.mnt / "new.raw"),
        lambda: os.link(vm.mnt / "notes.txt", vm.mnt / "new.raw"),
        lambda: os.rename(vm.mnt / "notes.txt", vm.mnt / "swap.raw"),
        lambda: os.rename(vm.mnt / "notes.txt", vm.mnt / "new.vhd"),
        lambda: os.rename(vm.mnt / "swap.raw", vm.mnt / "swap.old"),
        lambda: (vm.mnt / "os.raw").open("r+b"),
        lambda: (vm.mnt / "swap.raw").open("wb"),
    ]
    assert [code(action) for action in refused] == [errno.EROFS] * len(refused)
    (vm.mnt / "notes.txt").write_text("other")
    (vm.mnt / "notes.txt").rename(vm.mnt / "renamed.txt")
    (vm.mnt / "renamed.txt").unlink()
    os.chmod(vm.mnt / "os.raw", 0o600)
    assert sorted(os.listdir(vm.mnt)) == ["os.raw", "swap.raw"]
    os.close(reader)


@pytest.fixture
def loop(vm: Tracked, tmp_path: Path) -> Iterator[Path]:
    """The tracked disk as a mounted ext4."""
    if not shutil.which("mkfs.ext4") or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs mkfs.ext4 and loop devices")
    vm.serve()
    subprocess.run(["mkfs.ext4", "-q", "-F", vm.mnt / "os.raw"], check=True)
    mounted = tmp_path / "guest"
    mounted.mkdir()
    subprocess.run(["mount", "-o", "loop,commit=1,errors=remount-ro", vm.mnt / "os.raw", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def is_refused(path: Path) -> bool:
    """Whether what is written there, durably, fails."""
    with contextlib.suppress(OSError), path.open("wb") as file:
        file.write(b"x" * BLOCK)
        file.flush()
        os.fsync(file.fileno())
        return False
    return True


def test_a_file_system_on_a_held_disk_turns_read_only_and_is_still_read(vm: Tracked, loop: Path) -> None:
    (loop / "kept").write_bytes(b"kept" * MIB)
    libc = ctypes.CDLL(None)
    libc.sync()
    device = next(name for name in os.listdir("/sys/block") if str(vm.mnt / "os.raw") in backing(name))
    with pytest.raises(BusyError, match=f"in use by /dev/{device}"):
        vm.ask("hold", reason=REASON, only_if_unused=True)
    assert not is_refused(loop / "possible")
    vm.ask("hold", reason=REASON)
    image = (vm.folder / "os.raw").read_bytes()
    wait_until(lambda: is_refused(loop / "refused"))
    wait_until(lambda: code((loop / "another").touch) == errno.EROFS)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (loop / "kept").read_bytes() == b"kept" * MIB
    assert (vm.folder / "os.raw").read_bytes() == image


def backing(device: str) -> str:
    try:
        return Path(f"/sys/block/{device}/loop/backing_file").read_text()
    except OSError:
        return ""


def test_a_vm_that_starts_held_is_so_before_anybody_can_open_a_disk(vm: Tracked) -> None:
    vm.serve(REASON)
    status = vm.ask("status")
    assert (status["held"], status["open_disks"]) == (REASON, 0)
    for name in ("os.raw", "swap.raw"):
        assert code(lambda name=name: os.open(vm.mnt / name, os.O_RDWR)) == errno.EROFS
        assert (vm.mnt / name).read_bytes() == bytes(64 * MIB)
    vm.ask("unhold")
    with (vm.mnt / "os.raw").open("r+b") as file:
        file.write(b"a guest")
    assert (vm.folder / "os.raw").read_bytes()[:7] == b"a guest"
    assert vm.ask("status")["held"] is None


@pytest.mark.parametrize("name", ["os.raw", "swap.raw"])
def test_whoever_has_a_disk_open_is_named_and_nobody_else(vm: Tracked, name: str) -> None:
    vm.serve()
    sleeps = "import sys, time; file = open(sys.argv[1], 'rb'); print('open', flush=True); time.sleep(60)"

    def started(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", sleeps, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        return process

    user, other = started(vm.mnt / name), started(vm.mnt / "notes.txt")
    try:
        with pytest.raises(BusyError) as caught:
            vm.ask("hold", reason=REASON, only_if_unused=True)
        assert f"(pid {user.pid})" in str(caught.value) and str(other.pid) not in str(caught.value)
        status = vm.ask("status")
        assert (status["held"], status["open_disks"]) == (None, 1)
        assert code(lambda: os.close(os.open(vm.mnt / name, os.O_RDWR))) == 0
        user.kill()
        user.wait()
        vm.ask("hold", reason=REASON, only_if_unused=True)
        assert vm.ask("status")["held"] == REASON
    finally:
        for process in (user, other):
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def open_and_write(path: str, until: float, sums: multiprocessing.SimpleQueue[tuple[int, int, int]]) -> None:
    """Open, write, close, again and again; tells how often that was done, how often the opening was refused, and how
    often a handle that was opened could not write."""
    done = refused = broken = 0
    while time.monotonic() < until:
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            assert error.errno == errno.EROFS
            refused += 1
            time.sleep(0.001)
            continue
        for _ in range(3):
            if code(lambda fd=fd: os.pwrite(fd, b"x", 0)):
                broken += 1
        os.close(fd)
        done += 1
        time.sleep(0.003)
    sums.put((done, refused, broken))


def test_a_vm_held_only_if_unused_is_never_so_while_a_handle_can_write(vm: Tracked) -> None:
    vm.serve()
    context = multiprocessing.get_context("fork")
    sums: multiprocessing.SimpleQueue[tuple[int, int, int]] = context.SimpleQueue()
    until = time.monotonic() + 3
    writers = [
        context.Process(target=open_and_write, args=(str(vm.mnt / name), until, sums))
        for name in ("os.raw", "swap.raw")
    ]
    for writer in writers:
        writer.start()
    held = busy = 0
    while time.monotonic() < until:
        try:
            vm.ask("hold", reason=REASON, only_if_unused=True)
            held += 1
            image = (vm.folder / "os.raw").stat().st_mtime_ns
            time.sleep(0.005)
            assert (vm.folder / "os.raw").stat().st_mtime_ns == image
            vm.ask("unhold")
        except BusyError:
            busy += 1
    for writer in writers:
        writer.join(10)
        assert writer.exitcode == 0
    told = [sums.get() for _ in writers]
    assert held > 5 and all(done > 5 for done, _, _ in told), (held, busy, told)
    assert sum(refused for _, refused, _ in told) > 0, (held, busy, told)
    assert [broken for _, _, broken in told] == [0, 0], (held, busy, told)
