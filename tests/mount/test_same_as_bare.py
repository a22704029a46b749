"""Each operation done through the mount and in a bare directory of the same filesystem: same outcome, same tree."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.mount.conftest import Mounted

pytestmark = pytest.mark.mount

Case = Callable[[Path], object]
CASES: dict[str, Case] = {}

UID = 4242
TARGET_OF_FIFTY = "t" * 50


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def failure(action: Callable[[], object]) -> str:
    """The errno's name, or "done"."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "done"


def as_user(action: Callable[[], object], *, uid: int = UID, umask: int = 0o022) -> str:
    """The same, done by another user in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.umask(umask)
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            action()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode[code] if code else "done"


def make(path: Path, content: bytes = b"", mode: int = 0o644) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def tree(top: Path) -> list[tuple[Any, ...]]:
    """Everything below `top` that should not depend on where it lies."""
    found = []
    for directory, names, files in os.walk(top):
        for name in sorted(names + files):
            path = Path(directory, name)
            status = path.lstat()
            found.append(
                (
                    str(path.relative_to(top)),
                    oct(status.st_mode),
                    status.st_nlink,
                    status.st_uid,
                    status.st_gid,
                    status.st_size if not path.is_dir() else None,
                    status.st_rdev,
                    os.readlink(path) if path.is_symlink() else None,
                    path.read_bytes() if stat.S_ISREG(status.st_mode) else None,
                    [
                        (n, os.getxattr(path, n, follow_symlinks=False))
                        for n in os.listxattr(path, follow_symlinks=False)
                    ],
                )
            )
    return sorted(found)


# Files


@case
def open_missing(d: Path) -> object:
    return failure((d / "no").read_bytes)


@case
def create_exclusively_twice(d: Path) -> object:
    def create() -> None:
        os.close(os.open(d / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))

    return failure(create), failure(create)


@case
def create_under_a_file(d: Path) -> object:
    make(d / "f")
    return failure(lambda: make(d / "f" / "g"))


@case
def create_in_a_missing_directory(d: Path) -> object:
    return failure(lambda: make(d / "no" / "g"))


@case
def names_of_any_bytes(d: Path) -> object:
    for name in (b"\xff\xfe", b"new\nline", "ünïcode".encode(), b"a" * 255, b".fuse_hidden0000000100000001", b"-"):
        make(Path(os.fsdecode(os.fsencode(d) + b"/" + name)), name)
    return failure(lambda: make(d / ("a" * 256)))


@case
def write_read_only_descriptor(d: Path) -> object:
    fd = os.open(make(d / "f"), os.O_RDONLY)
    try:
        return failure(lambda: os.write(fd, b"x")), failure(lambda: os.ftruncate(fd, 3))
    finally:
        os.close(fd)


@case
def truncated_on_opening(d: Path) -> object:
    make(d / "f", b"content")
    os.close(os.open(d / "f", os.O_WRONLY | os.O_TRUNC))
    return (d / "f").stat().st_size


@case
def appended_by_two(d: Path) -> object:
    with (d / "f").open("ab", buffering=0) as one, (d / "f").open("ab", buffering=0) as two:
        for i in range(4):
            (one, two)[i % 2].write(b"%d" % i)
    return (d / "f").read_bytes()


@case
def append_then_write_at_offset(d: Path) -> object:
    fd = os.open(d / "f", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    os.write(fd, b"12345678")
    os.pwrite(fd, b"x", 2)  # appends all the same on Linux
    data = os.pread(fd, 100, 0)
    os.close(fd)
    return data


@case
def truncate_both_ways(d: Path) -> object:
    make(d / "f", b"0123456789")
    os.truncate(d / "f", 4)
    os.truncate(d / "f", 8)
    return (d / "f").read_bytes(), failure(lambda: os.truncate(d / "f", -1)), failure(lambda: os.truncate(d, 0))


@case
def holes_are_found(d: Path) -> object:
    with (d / "f").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"x" * 4096)
        file.truncate(4 << 20)
    fd = os.open(d / "f", os.O_RDONLY)
    found = [os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 1 << 20, os.SEEK_HOLE), os.lseek(fd, 0, os.SEEK_END)]
    beyond = failure(lambda: os.lseek(fd, 2 << 20, os.SEEK_DATA)), failure(lambda: os.lseek(fd, 9 << 20, os.SEEK_HOLE))
    os.close(fd)
    return found, beyond, (d / "f").stat().st_blocks


@case
def allocated(d: Path) -> object:
    fd = os.open(d / "f", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(fd, 0, 100_000)
    status = os.fstat(fd)
    os.close(fd)
    return status.st_size, status.st_blocks


@case
def mapped_and_changed(d: Path) -> object:
    make(d / "f", bytes(10_000))
    with (d / "f").open("r+b") as file, mmap.mmap(file.fileno(), 10_000) as view:
        view[5000:5005] = b"hello"
        view.flush()
        return file.read()[4998:5007]


@case
def mapped_on_an_appending_descriptor(d: Path) -> object:
    make(d / "f", b"a" * 4096)
    fd = os.open(d / "f", os.O_RDWR | os.O_APPEND)
    with mmap.mmap(fd, 4096) as view:
        view[0:1] = b"c"
    os.fsync(fd)
    os.close(fd)
    return (d / "f").stat().st_size, (d / "f").read_bytes()[:2]


@case
def mapped_while_read(d: Path) -> object:
    make(d / "f", b"a" * 4096)
    with (d / "f").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 4096) as view:
        file.write(b"bbb")
        seen = view[:4]
        view[0:1] = b"c"
        return seen, os.pread(file.fileno(), 4, 0)


@case
def unlinked_while_open(d: Path) -> object:
    with (d / "f").open("w+b", buffering=0) as file:
        file.write(b"content")
        (d / "f").unlink()
        make(d / "f", b"another")
        status = os.fstat(file.fileno())
        os.fchmod(file.fileno(), 0o600)
        os.ftruncate(file.fileno(), 5)
        os.setxattr(file.fileno(), "user.a", b"1")
        os.utime(file.fileno(), ns=(1, 2))
        os.fsync(file.fileno())
        after = os.fstat(file.fileno())
        again = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        data = os.read(again, 100)
        os.close(again)
        listed = sorted(os.listdir(d))
        link = failure(lambda: os.link(f"/proc/self/fd/{file.fileno()}", d / "g", follow_symlinks=True))
        return status.st_nlink, oct(after.st_mode), after.st_size, after.st_mtime_ns, data, listed, link


@case
def removed_directory_of_an_open_file(d: Path) -> object:
    (d / "sub").mkdir()
    with (d / "sub" / "f").open("w+b", buffering=0) as file:
        file.write(b"content")
        (d / "sub" / "f").unlink()
        (d / "sub").rmdir()
        return os.pread(file.fileno(), 10, 0)


@case
def renamed_over_while_open(d: Path) -> object:
    make(d / "new", b"new")
    with (d / "f").open("w+b", buffering=0) as file:
        file.write(b"old")
        os.rename(d / "new", d / "f")
        return os.pread(file.fileno(), 10, 0), os.fstat(file.fileno()).st_nlink, (d / "f").read_bytes()


@case
def unlinked_while_open_twice(d: Path) -> object:
    with (d / "f").open("w+b", buffering=0) as one, (d / "f").open("r+b", buffering=0) as two:
        (d / "f").unlink()
        one.write(b"shared")
        one.close()
        return os.fstat(two.fileno()).st_size, two.read()


@case
def hiding_names_are_names(d: Path) -> object:
    name = ".fuse_hidden" + "0" * 16
    make(d / "f", b"1")
    os.rename(d / "f", d / name)
    return os.listdir(d)


@case
def locks_exclude(d: Path) -> object:
    make(d / "f")
    with (d / "f").open("r+b") as one, (d / "f").open("r+b") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        taken = failure(lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.lockf(one, fcntl.LOCK_EX)
        return taken, as_user(lambda: None), failure(lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))


@case
def copied_by_the_kernel(d: Path) -> object:
    make(d / "a", os.urandom(0) + b"xyz" * 5000)
    with (d / "a").open("rb") as source, (d / "b").open("wb") as target:
        while os.sendfile(target.fileno(), source.fileno(), None, 1 << 20):
            pass
    return (d / "b").read_bytes() == (d / "a").read_bytes()


# Names


@case
def hard_links_share(d: Path) -> object:
    make(d / "a", b"1")
    os.link(d / "a", d / "b")
    counts = [(d / name).stat().st_nlink for name in "ab"]
    (d / "a").write_bytes(b"22")
    same = (d / "b").read_bytes(), (d / "a").stat().st_ino == (d / "b").stat().st_ino
    (d / "a").unlink()
    return counts, same, (d / "b").stat().st_nlink, failure(lambda: os.link(d / "b", d / "b"))


@case
def link_to_a_directory(d: Path) -> object:
    (d / "sub").mkdir()
    return failure(lambda: os.link(d / "sub", d / "b")), failure(lambda: os.link(d / "no", d / "b"))


@case
def symlinks(d: Path) -> object:
    os.symlink("target", d / "dangling")
    os.symlink("sub", d / "relative")
    os.symlink("loop", d / "loop")
    os.symlink(TARGET_OF_FIFTY, d / "long")
    (d / "sub").mkdir()
    make(d / "relative" / "f", b"through")
    os.link(d / "dangling", d / "second", follow_symlinks=False)
    return (
        failure((d / "dangling").read_bytes),
        failure((d / "loop").read_bytes),
        failure(lambda: os.symlink("x", d / "sub")),
        failure(lambda: os.readlink(d / "sub")),
        (d / "long").lstat().st_size,
        failure(lambda: os.open(d / "relative", os.O_RDONLY | os.O_NOFOLLOW)),
        failure(lambda: os.rmdir(d / "relative")),
    )


@case
def special_files(d: Path) -> object:
    os.mkfifo(d / "fifo", 0o600)
    os.mknod(d / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(d / "block", stat.S_IFBLK | 0o660, os.makedev(259, 300))
    os.mknod(d / "plain", stat.S_IFREG | 0o600)
    os.mknod(d / "socket", stat.S_IFSOCK | 0o600)
    return failure(lambda: os.mkfifo(d / "fifo"))


@case
def directories(d: Path) -> object:
    (d / "a").mkdir(mode=0o750)
    make(d / "a" / "f")
    return (
        failure((d / "a").mkdir),
        failure((d / "a").rmdir),
        failure((d / "no").rmdir),
        failure((d / "a").unlink),
        failure((d / "a" / "f").rmdir),
        failure(lambda: os.listdir(d / "a" / "f")),
        failure(lambda: os.rmdir(d / "a" / ".")),
        failure(lambda: os.open(d / "a", os.O_WRONLY)),
        (d / "a").stat().st_nlink,
    )


@case
def renames(d: Path) -> object:
    (d / "full").mkdir()
    (d / "empty").mkdir()
    make(d / "full" / "f", b"1")
    make(d / "g", b"2")
    return (
        failure(lambda: os.rename(d / "empty", d / "full")),
        failure(lambda: os.rename(d / "full", d / "full" / "inside")),
        failure(lambda: os.rename(d / "g", d / "full")),
        failure(lambda: os.rename(d / "full", d / "g")),
        failure(lambda: os.rename(d / "no", d / "x")),
        failure(lambda: os.rename(d / "full", d / "empty")),
        failure(lambda: os.rename(d / "g", d / "empty" / "f")),
        failure(lambda: os.rename(d / "empty" / "f", d / "empty" / "f")),
    )


def renameat2(old: Path, new: Path, flags: int) -> str:
    if ctypes.CDLL(None, use_errno=True).renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) == 0:
        return "done"
    return errno.errorcode[ctypes.get_errno()]


@case
def renames_with_flags(d: Path) -> object:
    no_replace, exchange = 1, 2
    make(d / "a", b"1")
    make(d / "b", b"22")
    (d / "sub").mkdir()
    done = [
        renameat2(d / "a", d / "b", no_replace),
        renameat2(d / "a", d / "c", no_replace),
        renameat2(d / "c", d / "no", exchange),
        renameat2(d / "b", d / "sub", exchange),
        renameat2(d / "c", d / "b", no_replace | exchange),
        renameat2(d / "c", d / "x", 64),
    ]
    with (d / "c").open("rb") as c, (d / "sub").open("rb") as other:
        done.append(renameat2(d / "c", d / "sub", exchange))
        return done, c.read(), other.read(), (d / "c").read_bytes()


@case
def listing_is_complete_and_typed(d: Path) -> object:
    for i in range(500):
        make(d / f"{i:03}-{'x' * 60}")
    (d / "sub").mkdir()
    os.symlink("x", d / "link")
    with os.scandir(d) as entries:
        kinds = sorted((e.name, e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries)
    with os.scandir(d) as entries:
        inodes = all(e.inode() == os.lstat(e.path).st_ino for e in entries)
    return kinds, inodes


@case
def directory_fsync(d: Path) -> object:
    fd = os.open(d, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return failure(lambda: os.fsync(fd))
    finally:
        os.close(fd)


# Owners, modes, times, attributes


@case
def created_by_a_user(d: Path) -> object:
    d.chmod(0o777)

    def act() -> None:
        os.mkdir(d / "dir", 0o777)
        os.close(os.open(d / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkfifo(d / "fifo", 0o666)
        os.symlink("x", d / "link")

    return as_user(act, umask=0o027)


@case
def created_with_special_bits(d: Path) -> object:
    os.close(os.open(d / "f", os.O_CREAT | os.O_WRONLY, 0o6755))
    os.mkdir(d / "sub", 0o1777)
    (d / "sub").chmod(0o1777)


@case
def group_is_inherited(d: Path) -> object:
    os.chown(d, 0, 777)
    d.chmod(0o2777)

    def act() -> None:
        os.mkdir(d / "sub")
        make(d / "sub" / "f")
        os.mkfifo(d / "fifo")

    return as_user(act)


@case
def sticky_directory(d: Path) -> object:
    d.chmod(0o1777)
    make(d / "f", mode=0o666)
    mine = as_user(lambda: make(d / "g"))
    return (
        mine,
        as_user((d / "f").unlink),
        as_user(lambda: os.rename(d / "g", d / "f")),
        as_user((d / "g").unlink, uid=UID + 1),
        as_user((d / "g").unlink),
    )


@case
def permissions(d: Path) -> object:
    make(d / "secret", b"1", mode=0o600)
    make(d / "shown", b"1", mode=0o644)
    (d / "closed").mkdir(mode=0o700)
    make(d / "closed" / "f")
    return (
        as_user((d / "secret").read_bytes),
        as_user((d / "shown").read_bytes),
        as_user(lambda: make(d / "shown", b"2")),
        as_user((d / "closed" / "f").read_bytes),
        as_user(lambda: make(d / "new")),
        as_user(lambda: (d / "shown").chmod(0o777)),
        as_user(lambda: os.chown(d / "shown", UID, UID)),
        as_user(lambda: os.utime(d / "shown")),
        as_user(lambda: os.truncate(d / "shown", 0)),
        as_user(lambda: os.setxattr(d / "shown", "user.a", b"1")),
        as_user((d / "shown").unlink),
    )


@case
def owner_rules(d: Path) -> object:
    make(d / "f", mode=0o6755)
    os.chown(d / "f", UID, UID)
    dropped = oct((d / "f").stat().st_mode)
    (d / "f").chmod(0o6755)
    d.chmod(0o777)
    return (
        dropped,
        as_user(lambda: os.chown(d / "f", UID + 1, -1)),
        as_user(lambda: os.chown(d / "f", -1, UID + 1)),
        as_user(lambda: os.chown(d / "f", UID, UID)),
        oct((d / "f").stat().st_mode),
        failure(lambda: os.chown(d / "no", 0, 0)),
        failure(lambda: os.lchown(d / "f", -1, 5)),
    )


@case
def writing_takes_set_user_id_away(d: Path) -> object:
    d.chmod(0o777)
    modes = []
    changes: list[Callable[[Path], object]] = [
        lambda path: os.truncate(path, 1),
        lambda path: path.write_bytes(b"new"),
        lambda path: os.pwrite(os.open(path, os.O_WRONLY), b"x", 0),
        lambda path: os.posix_fallocate(os.open(path, os.O_WRONLY), 0, 99),
    ]
    for number, change in enumerate(changes):
        for by_root in (False, True):
            path = make(d / f"f{number}{by_root}", b"123", mode=0o6777)
            failure(lambda change=change, path=path: change(path)) if by_root else as_user(
                lambda change=change, path=path: change(path)
            )
            modes.append(oct(path.stat().st_mode))
    return modes


@case
def times_are_exact(d: Path) -> object:
    make(d / "f")
    os.utime(d / "f", ns=(1_600_000_000_123_456_789, 1_500_000_000_987_654_321))
    status = (d / "f").stat()
    before = time.time_ns() - 10**9
    os.utime(d / "f")
    os.symlink("f", d / "link")
    os.utime(d / "link", ns=(1, 2), follow_symlinks=False)
    link = (d / "link").lstat()
    return (
        (status.st_atime_ns, status.st_mtime_ns),
        (d / "f").stat().st_mtime_ns >= before,
        (link.st_atime_ns, link.st_mtime_ns),
        failure(lambda: os.utime(d / "f", ns=(-1, 3 * 10**18))),
    )


@case
def one_time_is_set_without_the_other(d: Path) -> object:
    make(d / "f")
    for option, when in (("-a", "@7.5"), ("-m", "@9.25"), ("-a", "@11")):
        subprocess.run(["touch", option, "-d", when, d / "f"], check=True)
    status = (d / "f").stat()
    return status.st_atime_ns, status.st_mtime_ns


@case
def listing_goes_on_while_names_come_and_go(d: Path) -> object:
    for i in range(300):
        make(d / f"old{i:03}")
    seen = []
    with os.scandir(d) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number == 10:
                make(d / "new")
                (d / "old299").unlink()
    return len(set(seen)) == len(seen), {f"old{i:03}" for i in range(299)} <= set(seen)


@case
def times_move_with_changes(d: Path) -> object:
    make(d / "f", b"1")
    old = 10**18
    moved = []
    for change in (
        lambda: (d / "f").write_bytes(b"2"),
        lambda: os.truncate(d / "f", 7),
        lambda: (d / "f").chmod(0o600),
    ):
        os.utime(d / "f", ns=(old, old))
        changed = (d / "f").stat().st_ctime_ns
        time.sleep(0.005)  # a filesystem's clock ticks this coarsely
        change()
        status = (d / "f").stat()
        moved.append((status.st_mtime_ns > old, status.st_ctime_ns > changed))
    return moved


@case
def extended_attributes(d: Path) -> object:
    make(d / "f")
    (d / "sub").mkdir()
    os.symlink("f", d / "link")
    os.setxattr(d / "f", "user.a", b"\0binary\xff")
    os.setxattr(d / "f", "trusted.t", b"2")
    os.setxattr(d / "f", "security.s", b"3")
    os.setxattr(d / "sub", "user.d", b"")
    os.setxattr(d / "link", "trusted.l", b"4", follow_symlinks=False)
    return (
        sorted(os.listxattr(d / "f")),
        failure(lambda: os.setxattr(d / "f", "user.a", b"", os.XATTR_CREATE)),
        failure(lambda: os.setxattr(d / "f", "user.b", b"", os.XATTR_REPLACE)),
        failure(lambda: os.getxattr(d / "f", "user.none")),
        failure(lambda: os.removexattr(d / "f", "user.none")),
        failure(lambda: os.removexattr(d / "f", "security.s")),
        failure(lambda: os.setxattr(d / "f", "nonsense", b"")),
        failure(lambda: os.setxattr(d / "f", "user.huge", bytes(60_000))),
        failure(lambda: os.setxattr(d / "link", "user.l", b"", follow_symlinks=False)),
        as_user(lambda: os.getxattr(d / "f", "trusted.t")),
    )


@case
def file_capabilities_go_with_writing(d: Path) -> object:
    make(d / "f", b"1")
    os.setxattr(d / "f", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    before = os.listxattr(d / "f")
    (d / "f").write_bytes(b"2")
    return before, os.listxattr(d / "f")


@case
def space_is_reported(d: Path) -> object:
    status = os.statvfs(d)
    return status.f_bsize, status.f_frsize, status.f_blocks, status.f_files, status.f_namemax


@pytest.mark.parametrize("name", CASES)
def test_the_mount_does_what_a_bare_directory_does(mounted: Mounted, name: str) -> None:
    through, bare = mounted.mnt / name, mounted.bare / name
    outcomes = []
    for directory in (through, bare):
        directory.mkdir()
        outcomes.append(CASES[name](directory))
    assert outcomes[0] == outcomes[1]
    assert tree(through) == tree(bare)
    assert tree(mounted.folder / name) == tree(bare), "the folder beneath holds something else"
