"""A guest that keeps records: it writes them one by one to its ext4, each synced before the serial line tells of it.

At each boot it has its file system checked, reads what records there are, tells, and writes on. A record is a line of
fixed length whose last field is a checksum of this and all records before it; each is known from its number alone, so
what is missing, torn or foreign is seen.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.machine import BOOT_SECONDS, prepare

INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for round in 1 2; do
    for module in /modules/*.ko; do insmod $module 2>/dev/null; done
done
until [ -b /dev/vda ]; do sleep 0.1; done
/usr/sbin/e2fsck -p /dev/vda >/run/log 2>&1
replayed=$?
/usr/sbin/e2fsck -fn /dev/vda >>/run/log 2>&1
echo "checked $replayed $?"
mount -t ext4 /dev/vda /data || echo MOUNT-FAILED
touch /data/records
set -- $(awk '
    { n++; c = (c * 31 + n * 7919) % 2147483647
      if ($0 != sprintf("%08d %-400s %010d", n, "record of " n, c)) bad++ }
    END { print n + 0, bad + 0, c + 0 }' /data/records)
n=$1 c=$3
[ $2 = 0 ] || { cat /run/log; tail -n 3 /data/records; }
echo "last $1 bad $2"
for event in /dev/input/event*; do
    (head -c 1 $event >/dev/null && touch /run/pressed) &
done
until [ -e /run/pressed ]; do
    n=$((n + 1))
    c=$(((c * 31 + n * 7919) % 2147483647))
    printf "%08d %-400s %010d\\n" $n "record of $n" $c >/run/record
    if ! dd if=/run/record of=/data/records bs=4k oflag=append conv=notrunc,fsync 2>/run/log; then
        echo WRITE-FAILED
        cat /run/log
        break
    fi
    echo "synced $n"
    # Something for the journal, and blocks that come and go.
    dd if=/dev/urandom of=/data/new bs=4k count=$((n % 7 + 1)) 2>/dev/null
    mv /data/new /data/slot$((n % 11))
    usleep 20000
done
umount /data && echo UNMOUNTED
sync
poweroff -f
"""

_LAST = re.compile(r"last (\d+) bad (\d+)\r?\n")
_CHECKED = re.compile(r"checked (\d+) (\d+)\r?\n")
_SYNCED = re.compile(r"synced (\d+)\r?\n")


@dataclass(frozen=True)
class Report:
    """What the guest found when it booted. `last`: how many records there are; `bad`: that are not as they must be.
    `replayed`, `checked`: exit codes of e2fsck's replay of the journal, and of its whole check after that."""

    last: int
    bad: int
    replayed: int
    checked: int

    @property
    def is_sound(self) -> bool:
        return (self.bad, self.checked) == (0, 0) and self.replayed in (0, 1)


def machine() -> tuple[str, ...]:
    """The command line of a qemu for such a guest, but for its disk, its network and its serial line."""
    kernel, initramfs = prepare(INIT, name="records", programs=("e2fsck",))
    return (
        *("qemu-system-x86_64", "-nodefaults", "-no-reboot", "-accel", "tcg", "-cpu", "max", "-m", "256"),
        *("-kernel", str(kernel), "-initrd", str(initramfs), "-append", "console=ttyS0 quiet panic=-1"),
    )


def synced(said: str) -> int:
    """The last record that was synced, by what came over the serial line."""
    return max((int(number) for number in _SYNCED.findall(said)), default=0)


def reported(said: str) -> Report | None:
    """What the guest told of what it found; None as long as it has not."""
    last, checked = _LAST.search(said), _CHECKED.search(said)
    if last is None or checked is None:
        return None
    return Report(int(last[1]), int(last[2]), int(checked[1]), int(checked[2]))


def wait_for_report(console: Path) -> Report:
    """Wait until a guest has booted. Fails with what it said."""
    end = time.monotonic() + BOOT_SECONDS
    while True:
        said = console.read_text(errors="replace") if console.exists() else ""
        if (found := reported(said)) is not None:
            return found
        assert time.monotonic() < end, f"the guest does not come up\n{said}"
        time.sleep(0.05)


class Writer:
    """A guest that runs as a process of the test's, and what it said when. Ends with the `with` block, by a kill.

    `command`: qemu's, run in `directory`, with `console` there as its serial line.
    """

    def __init__(self, command: Sequence[str], directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.console = directory / "console"
        self.console.unlink(missing_ok=True)
        self._seen: list[tuple[int, int]] = [(0, 0)]
        """(ns since 1970 when it had been seen, last record synced), in order."""
        self._read = 0
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=directory)
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._process.wait()
        self._watch.join()

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """As by a power cut."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)

    def said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def synced(self) -> int:
        return self._seen[-1][1]

    def synced_before(self, time_ns: int) -> int:
        """The last record that was certainly synced at that time (since 1970): it was told of before."""
        return max(number for seen_ns, number in self._seen if seen_ns < time_ns)

    def wait_until_synced(self, number: int) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while self.synced() < number:
            assert self._process.poll() is None, f"qemu has ended\n{self.said()}"
            assert time.monotonic() < end, f"no record {number}\n{self.said()}"
            time.sleep(0.02)

    def _look(self) -> None:
        is_over = False
        while not is_over:
            is_over = self._process.poll() is not None  # and one look after that
            number = self._look_on()
            if number > self._seen[-1][1]:
                self._seen.append((time.time_ns(), number))  # the time after the look: never too early
            time.sleep(0.005)

    def _look_on(self) -> int:
        """The last record of what the guest has said since the last look, by whole lines; 0 for none."""
        if not self.console.exists():
            return 0
        with open(self.console, "rb") as file:
            file.seek(self._read)
            new, _, _ = file.read().rpartition(b"\n")
        self._read += len(new)
        return synced(f"{new.decode(errors='replace')}\n")
