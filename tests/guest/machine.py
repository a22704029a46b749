"""A real guest for tests: Debian's kernel under qemu's emulator, an initramfs of busybox and the real guest agent.

Kernel and agent are the release's own packages. They are fetched and unpacked once, into HVFUSE_TEST_CACHE (default:
/var/cache/hvfuse-tests), and never installed. What runs in the guest is `INIT`, or what a test says instead.
"""

from __future__ import annotations

import fcntl
import gzip
import lzma
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

CACHE = Path(os.environ.get("HVFUSE_TEST_CACHE", "/var/cache/hvfuse-tests"))
KERNEL = "linux-image-cloud-amd64"
AGENT = "qemu-guest-agent"
BOOT_SECONDS = 90.0

MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("virtio_blk", "virtio_console"),
    *("crc16", "crc32c_generic", "mbcache", "jbd2", "ext4"),
    *("evdev", "button"),
)
"""What the kernel may have as modules, and may have built in."""

INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
# Each finds what it needs on one of the rounds, whatever their order.
for round in 1 2 3 4 5; do
    for module in /modules/*.ko; do insmod $module 2>/dev/null; done
done
until [ -b /dev/vda ]; do sleep 0.1; done
mount -t ext4 /dev/vda /data || echo MOUNT-FAILED
for port in /sys/class/virtio-ports/*; do
    [ "$(cat $port/name)" = org.qemu.guest_agent.0 ] && agent=/dev/${port##*/}
done
for event in /dev/input/event*; do
    (head -c 1 $event >/dev/null && echo POWER-BUTTON && umount /data; sync; poweroff -f) &
done
/usr/sbin/qemu-ga -m virtio-serial -p $agent -t /run &
n=0
while true; do
    n=$((n + 1))
    dd if=/dev/zero of=/data/file$((n % 30)) bs=4k count=$((n % 7 + 1)) 2>/dev/null
    echo "line $n" >>/data/journal
    mkdir -p /data/dir$((n % 11))
    mv /data/file$((n % 30)) /data/dir$((n % 11))/
    [ $((n % 5)) = 0 ] && sync
    echo "WROTE $n"
done
"""


class Guest:
    """A running guest with one disk, an ext4 that it never ceases to write to.

    `agent`: the socket of its guest agent. Ends with the `with` block, by a kill: like a power cut.
    """

    def __init__(self, disk: Path, directory: Path) -> None:
        self.agent = directory / "agent.sock"
        self.console = directory / "console"
        kernel, initramfs = prepare()
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-display", "none"),
                *("-nodefaults", "-no-reboot", "-kernel", str(kernel), "-initrd", str(initramfs)),
                *("-append", "console=ttyS0 quiet panic=-1", "-serial", f"file:{self.console}"),
                *("-drive", f"file={disk},format=raw,if=virtio,cache=none,werror=stop,rerror=stop"),
                *("-chardev", f"socket,path={self.agent},server=on,wait=off,id=agent", "-device", "virtio-serial"),
                *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            ],
            stdin=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def wait_until_it_writes(self) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while self.written() < 20:
            assert self._process.poll() is None, f"qemu has ended\n{self.said()}"
            assert time.monotonic() < end, f"the guest does not come up\n{self.said()}"
            time.sleep(0.1)

    def written(self) -> int:
        """How many lines of its journal the guest has written."""
        return written(self.said())

    def said(self) -> str:
        """What came over the serial line so far."""
        return self.console.read_text(errors="replace") if self.console.exists() else ""


def written(said: str) -> int:
    """How many lines of its journal a guest has written that said this over its serial line."""
    return max((int(number) for number in re.findall(r"WROTE (\d+)\r?\n", said)), default=0)


def prepare(init: str = INIT, *, name: str = "initramfs", programs: Sequence[str] = ("qemu-ga",)) -> tuple[Path, Path]:
    """The paths of kernel and initramfs, made at need. `init`: what runs in the guest; `name`: of the initramfs,
    one for each init; `programs`: "qemu-ga", or what is installed here; with their libraries."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel = _unpacked(KERNEL)
        (image,) = kernel.glob("boot/vmlinuz-*")
        initramfs = CACHE / f"{name}.gz"
        beside = CACHE / f"{name}.new"
        found = [_program(program) for program in programs]
        beside.write_bytes(gzip.compress(b"".join(_archive(_contents(kernel, init, found))), 1))
        beside.replace(initramfs)
    # A test that runs at the same time may replace it once more by the same: qemu has it open by then, or reads that.
    return image, initramfs


def _unpacked(package: str) -> Path:
    """The directory with what the package holds, fetched at need."""
    directory = CACHE / package
    if not directory.exists():
        beside = CACHE / f"{package}.new"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            _fetch(package, beside)
        except subprocess.CalledProcessError:
            _run("apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "update")
            _fetch(package, beside)
        (archive,) = beside.glob("*.deb")
        _run("dpkg", "-x", str(archive), str(beside))
        archive.unlink()
        beside.rename(directory)
    return directory


def _fetch(package: str, directory: Path) -> None:
    if package == KERNEL:  # which holds nothing but the name of the newest
        named = re.findall(r"Depends: (linux-image-\d\S+)", _run("apt-cache", "depends", package))
        if not named:
            raise subprocess.CalledProcessError(1, "apt-cache")
        package = named[0]
    _run("apt-get", "-q", "download", package, cwd=directory)


def _run(*words: str, cwd: Path | None = None) -> str:
    return subprocess.run(words, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _program(name: str) -> Path:
    if name == "qemu-ga":
        return _unpacked(AGENT) / "usr/sbin/qemu-ga"
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert path is not None, f"there is no {name} here"
    return Path(path)


def _contents(kernel: Path, init: str, programs: Sequence[Path]) -> Mapping[str, bytes | None]:
    """What the guest's root holds: by path the file's bytes, None for a directory."""
    busybox = _program("busybox")
    found: dict[str, bytes | None] = dict.fromkeys(
        ("bin", "dev", "proc", "sys", "run", "data", "modules", "usr", "usr/sbin", "lib", "lib64", "etc", "tmp")
    )
    found |= {"init": init.encode(), "bin/busybox": busybox.read_bytes()}
    found |= {f"usr/sbin/{program.name}": program.read_bytes() for program in programs}
    for library in sorted(set().union(*map(_libraries, (busybox, *programs)))):
        for parent in reversed(library.relative_to("/").parents[:-1]):
            found.setdefault(str(parent))
        found[str(library.relative_to("/"))] = library.read_bytes()
    for number, name in enumerate(MODULES):
        for path in kernel.glob(f"**/{name}.ko*"):
            data = path.read_bytes()
            found[f"modules/{number:02d}-{name}.ko"] = lzma.decompress(data) if path.suffix == ".xz" else data
    return found


def _libraries(program: Path) -> set[Path]:
    """The shared libraries of a program, its loader among them; none if it is static."""
    listed = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    assert "not found" not in listed, f"{program} lacks a library here:\n{listed}"
    return {Path(word) for word in listed.split() if word.startswith("/") and os.path.exists(word)}


def _archive(contents: Mapping[str, bytes | None]) -> Iterator[bytes]:
    """A cpio archive in the "newc" format, as the kernel reads it."""
    for number, (name, data) in enumerate([*contents.items(), ("TRAILER!!!", b"")], 1):
        mode = 0o040755 if data is None else 0o100755
        body, named = data or b"", name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(named), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + named
        yield head + bytes(-len(head) % 4) + body + bytes(-len(body) % 4)


@contextmanager
def booted(disk: Path, directory: Path) -> Iterator[Guest]:
    """A guest that is up and writes to `disk`. `directory`: for its sockets; a short path."""
    with Guest(disk, directory) as guest:
        guest.wait_until_it_writes()
        yield guest
