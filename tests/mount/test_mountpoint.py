"""How a mount begins and ends: politely, by signals, by a kill, and in whose way it is."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hvfuse import fuse, handshake, mountpoint
from hvfuse.errors import BusyError, HvfuseError, NotFoundError, PrerequisiteError, UsageError
from hvfuse.filesystem import Filesystem
from hvfuse.tracker.folder import Folder
from tests.mount.conftest import REPOSITORY, Mounted

pytestmark = pytest.mark.mount


@pytest.fixture
def started(unmounted: Mounted) -> Mounted:
    """A mount of its own for each test, with the disk `os.vhd` and the file `plain`."""
    for name in ("os.vhd", "plain"):
        (unmounted.folder / name).write_bytes(bytes(1 << 20))
    unmounted.start()
    return unmounted


def killed(mounted: Mounted) -> None:
    assert mounted.process is not None
    mounted.process.kill()
    mounted.process.wait()


@contextmanager
def orphaned(path: Path) -> Iterator[int]:
    """A descriptor whose mount goes away: closing it reports that (ENOTCONN)."""
    fd = os.open(path, os.O_RDWR)
    try:
        yield fd
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_a_failure_to_get_ready_ends_the_mount(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom hvfuse import fuse, filesystem, mountpoint\n"
        "try:\n  fuse.mount(filesystem.Filesystem(), sys.argv[1], on_ready=lambda: 1 / 0)\n"
        "except ZeroDivisionError:\n  print(mountpoint.is_mounted(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "False\n"


def test_the_directory_to_mount_on_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    assert mountpoint.check_mountpoint(str(path)) == str(path)
    assert path.is_dir()
    assert not mountpoint.is_mounted(str(path))


def test_a_directory_with_contents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letters").touch()
    with pytest.raises(BusyError, match="not empty"):
        mountpoint.check_mountpoint(str(tmp_path))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="not a directory"):
            mountpoint.check_mountpoint(str(path))


def test_a_mount_point_in_use_is_refused(started: Mounted) -> None:
    assert mountpoint.is_mounted(str(started.mnt))
    with pytest.raises(BusyError, match="mounted here already"):
        mountpoint.check_mountpoint(str(started.mnt))
    with pytest.raises(BusyError, match="mounted here already"):
        fuse.mount(Filesystem(), str(started.mnt))
    assert (started.mnt / "plain").exists()


def test_unmounting_ends_the_serving_process(started: Mounted) -> None:
    mountpoint.unmount(str(started.mnt))
    started.expect("ended")
    assert not mountpoint.is_mounted(str(started.mnt))
    with pytest.raises(NotFoundError, match="nothing is mounted"):
        mountpoint.unmount(str(started.mnt))


@contextmanager
def held_by_descriptor(mnt: Path) -> Iterator[int]:
    with (mnt / "plain").open("rb"):
        yield os.getpid()


@contextmanager
def held_by_map(mnt: Path) -> Iterator[int]:
    fd = os.open(mnt / "plain", os.O_RDONLY)
    view = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
    os.close(fd)
    yield os.getpid()
    view.close()


@contextmanager
def held_by_directory(mnt: Path) -> Iterator[int]:
    with subprocess.Popen(["cat"], cwd=mnt, stdin=subprocess.PIPE) as process:
        yield process.pid


@pytest.mark.parametrize("holding", [held_by_descriptor, held_by_map, held_by_directory])
def test_a_busy_mount_names_who_holds_it(started: Mounted, holding: object) -> None:
    with holding(started.mnt) as pid:  # type: ignore[operator]
        with pytest.raises(BusyError) as caught:
            mountpoint.unmount(str(started.mnt))
        assert f"(pid {pid})" in str(caught.value)
        assert mountpoint.is_mounted(str(started.mnt))
    mountpoint.unmount(str(started.mnt))
    started.expect("ended")


def test_a_busy_mount_names_a_loop_device(started: Mounted) -> None:
    attach = ["losetup", "--find", "--show", str(started.mnt / "os.vhd")]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        with pytest.raises(BusyError, match=device):
            mountpoint.unmount(str(started.mnt))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_a_lazy_unmount_leaves_open_files_alive(started: Mounted) -> None:
    with (started.mnt / "plain").open("r+b", buffering=0) as file:
        mountpoint.unmount(str(started.mnt), lazy=True)
        assert not mountpoint.is_mounted(str(started.mnt))
        assert file.write(b"alive") == 5
    started.expect("ended")
    assert (started.folder / "plain").read_bytes()[:5] == b"alive"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(started: Mounted, number: signal.Signals) -> None:
    assert started.process is not None
    started.process.send_signal(number)
    started.expect("ended")
    assert started.process.wait() == 0
    assert not mountpoint.is_mounted(str(started.mnt))


def test_a_signal_ends_a_busy_mount_after_writing_back_what_was_mapped(started: Mounted) -> None:
    assert started.process is not None
    with orphaned(started.mnt / "os.vhd") as fd, mmap.mmap(fd, 1 << 20) as view:
        view[:6] = b"mapped"
        started.process.send_signal(signal.SIGTERM)
        started.expect("ended")
        assert started.process.wait() == 0
        assert not mountpoint.is_mounted(str(started.mnt))
        assert (started.folder / "os.vhd").read_bytes()[:6] == b"mapped"
        with pytest.raises(OSError):
            os.pwrite(fd, b"late", 4096)
    assert "in use by" in started.errors()


def test_a_signal_ends_a_mount_that_lives_on_in_another_namespace(started: Mounted) -> None:
    assert started.process is not None
    command = ["unshare", "--mount", "--propagation", "private", "cat", str(started.mnt / "plain"), "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as elsewhere:
        assert elsewhere.stdout is not None
        assert elsewhere.stdout.read(1 << 20) == bytes(1 << 20)
        started.process.send_signal(signal.SIGTERM)
        started.expect("ended")
        assert started.process.wait() == 0


def test_a_second_signal_changes_nothing(started: Mounted) -> None:
    assert started.process is not None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        started.process.send_signal(number)
    started.expect("ended")
    assert started.process.wait() == 0


def test_a_dead_mount_is_cleared_and_mounted_again(started: Mounted) -> None:
    with orphaned(started.mnt / "plain") as held:
        killed(started)
        with pytest.raises(OSError) as caught:
            os.stat(started.mnt / "plain")
        assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(BusyError):
            mountpoint.check_mountpoint(str(started.mnt))
        assert mountpoint.clear_dead_mount(str(started.mnt))
        started.start()
        assert (started.mnt / "plain").read_bytes() == bytes(1 << 20)
        with pytest.raises(OSError) as caught:
            os.read(held, 1)
        assert caught.value.errno == errno.ENOTCONN


def test_a_living_mount_is_not_cleared(started: Mounted, tmp_path: Path) -> None:
    assert not mountpoint.clear_dead_mount(str(started.mnt))
    assert not mountpoint.clear_dead_mount(str(tmp_path / "missing"))
    assert (started.mnt / "plain").exists()


def test_a_mount_point_with_blanks_and_commas_works(unmounted: Mounted) -> None:
    unmounted.mnt = unmounted.root / "my mount,point\\040 ü"
    (unmounted.folder / "plain").touch()
    unmounted.start()
    assert mountpoint.is_mounted(str(unmounted.mnt))
    assert os.listdir(unmounted.mnt) == ["plain"]


def test_a_symlink_swapped_in_beneath_is_not_followed(unmounted: Mounted) -> None:
    # The link leads somewhere only as seen from the folder, not as the kernel sees it from the mount.
    unmounted.mnt = unmounted.root / "deep" / "mnt"
    (unmounted.root / "outside").mkdir()
    (unmounted.root / "outside" / "secret").write_text("secret")
    (unmounted.folder / "sub").mkdir()
    (unmounted.folder / "sub" / "secret").write_text("public")
    unmounted.start()
    with (unmounted.mnt / "sub" / "secret").open() as file:
        assert file.read() == "public"
    (unmounted.folder / "sub").rename(unmounted.folder / "moved")
    (unmounted.folder / "sub").symlink_to("../outside")
    for action in (os.stat, os.unlink, lambda path: os.open(path, os.O_RDWR), lambda path: os.truncate(path, 0)):
        with pytest.raises(OSError):
            action(unmounted.mnt / "sub" / "secret")
    with pytest.raises(OSError):
        (unmounted.mnt / "sub" / "new").touch()
    assert os.listdir(unmounted.root / "outside") == ["secret"]
    assert (unmounted.root / "outside" / "secret").read_text() == "secret"


def test_the_server_itself_follows_no_symlink(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    (tmp_path / "folder" / "sub").symlink_to("../outside")
    (tmp_path / "folder" / "file").symlink_to("../outside/secret")
    fd = os.open(tmp_path / "folder", os.O_RDONLY)
    folder = Folder(fd)
    for path in ("/sub/secret", "/file"):
        for action in (
            lambda path: folder.open(path, os.O_RDWR),
            lambda path: folder.truncate(path, 0),
            lambda path: folder.chmod(path, 0o777),
            folder.open_directory,
        ):
            with pytest.raises(OSError):
                action(path)
    with pytest.raises(OSError):
        folder.mkdir("/sub/new", 0o755, uid=0, gid=0)
    assert stat.S_ISLNK(folder.stat("/file").st_mode)
    assert (tmp_path / "outside" / "secret").read_text() == "secret"
    os.close(fd)


def test_the_mount_is_shown_as_what_it_is(started: Mounted) -> None:
    [line] = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(started.mnt) in line]
    source, _, kind, options, *_ = line.split()
    assert (source, kind) == ("hvfuse", "fuse.hvfuse")
    assert {"rw", "nosuid", "nodev", "default_permissions", "allow_other"} <= set(options.split(","))


@pytest.mark.parametrize(
    ("error", "expected"),
    [("RuntimeError", "EIO"), ("HvfuseError", "EIO"), ("NoSpaceError", "ENOSPC"), ("OSError", "EDQUOT")],
)
def test_errors_become_errnos_and_bugs_are_logged(started: Mounted, error: str, expected: str) -> None:
    with (started.mnt / "os.vhd").open("r+b", buffering=0) as file, pytest.raises(OSError) as caught:
        file.write(b"raise:" + error.encode())
    assert errno.errorcode[caught.value.errno or 0] == expected
    assert ("Traceback" in started.errors()) == (error == "RuntimeError")


def test_the_kernel_takes_our_own_first_reply(started: Mounted) -> None:
    (started.mnt / "plain").read_bytes()
    assert "FUSE_INIT" not in started.errors()


def test_the_first_reply_has_the_kernels_layout() -> None:
    reply = handshake.init_reply(flags=0x01020304, max_write=1 << 20, max_readahead=1 << 17, max_background=64)
    assert (
        reply.hex()
        == (
            "50000000 00000000 0200000000000000"  # length, error, number of the request
            "07000000 21000000 00000200 04030201"  # version, read-ahead, flags
            "4000 3000 00001000 01000000 0001"  # background, congestion, write size, time, pages
        ).replace(" ", "")
        + "00" * 34
    )


def imported(patch: str) -> str:
    """What importing the binding raises after `patch` was run."""
    program = (
        f"import ctypes.util\n{patch}\ntry:\n  import hvfuse.fuse\nexcept Exception as e:\n  print(type(e).__name__, e)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout


def test_without_libfuse_3_there_is_a_hint() -> None:
    assert imported("ctypes.util.find_library = lambda name: None").startswith("PrerequisiteError libfuse 3 is not")


def test_libfuse_2_is_refused_or_not_loaded_where_both_are() -> None:
    if os.path.exists("/lib/x86_64-linux-gnu/libfuse.so.2"):
        assert imported("ctypes.util.find_library = lambda name: 'libfuse.so.2'").startswith(
            "PrerequisiteError libfuse 2"
        )
    assert imported("import os; os.environ['FUSE_LIBRARY_PATH'] = 'libfuse.so.2'") == ""


def test_without_dev_fuse_there_is_a_hint(tmp_path: Path) -> None:
    program = (
        "from hvfuse import fuse, filesystem\n"
        "try:\n  fuse.mount(filesystem.Filesystem(), '/nowhere')\nexcept Exception as e:\n  print(type(e).__name__, e)"
    )
    script = f'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec {sys.executable} -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", program],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "PrerequisiteError /dev/fuse does not exist\n"


def test_without_root_there_is_a_hint(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        os.setuid(4242)
        code = 1
        for action in (lambda: fuse.mount(Filesystem(), "/nowhere"), lambda: mountpoint.unmount("/proc")):
            try:
                action()
            except PrerequisiteError:
                code = 0
            except HvfuseError:
                code = 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
