"""`hvfuse mount` and `hvfuse umount`, with a real tracker behind them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from hvfuse.control.daemon import serving_pid, wait_for_end
from hvfuse.control.supervisor import only_supervisor
from tests.cli.conftest import CommandLine

pytestmark = pytest.mark.mount


def test_a_vm_is_mounted_once_and_unmounted_once(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    first = hvfuse.json("mount", "vm")
    assert first == {
        "vm": "vm", "mountpoint": str(disk.parent), "pid": first["pid"], "already_mounted": False
    }  # fmt: skip
    assert os.listdir(disk.parent) == ["os.raw"]
    assert hvfuse.json("mount", "vm") == {**first, "already_mounted": True}
    assert hvfuse("mount", "vm") == 0
    assert hvfuse.out == f"vm is already mounted at {disk.parent}\n"
    assert hvfuse("umount", "vm") == 0
    assert not os.path.ismount(disk.parent)
    assert wait_for_end(first["pid"], 0)
    assert hvfuse("umount", "vm") == 5
    assert hvfuse.err.startswith("hvfuse: vm is not mounted")


def test_the_first_use_writes_a_commented_configuration(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    assert "# frequency" in (hvfuse.root / "hvfuse.toml").read_text()


def test_a_mount_in_use_is_kept_and_the_user_of_it_named(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    with open(disk, "rb"):
        assert hvfuse("umount", "vm") == 6
        assert f"(pid {os.getpid()})" in hvfuse.err
        assert os.path.ismount(disk.parent)
    assert hvfuse("umount", "vm") == 0


def test_force_ends_a_mount_in_use(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    used = os.open(disk, os.O_RDONLY)
    assert hvfuse("umount", "vm", "--force") == 0
    assert not os.path.ismount(disk.parent)
    with pytest.raises(OSError, match="not connected"):
        os.close(used)


def test_what_a_killed_tracker_left_is_cleared(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    for way in ("umount", "mount"):
        pid = hvfuse.json("mount", "vm")["pid"]
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid, 20)
        with pytest.raises(OSError, match="not connected"):
            os.stat(disk)
        assert hvfuse(way, "vm") == 0, hvfuse.err
    assert disk.stat().st_size == 1 << 20


BAD_DISKS = {
    "truncated VHD": ("os.vhd", b"conectix" + bytes(300), 7),
    "foreign image": ("os.img", b"QFI\xfb" + bytes(600), 8),
}


@pytest.mark.parametrize("case", BAD_DISKS)
def test_a_disk_that_cannot_be_tracked_is_refused_by_name_and_left_alone(case: str, hvfuse: CommandLine) -> None:
    name, content, code = BAD_DISKS[case]
    folder = hvfuse.root / "disks" / "vm"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    assert hvfuse("mount", "vm") == code
    assert str(folder / name) in hvfuse.err.splitlines()[0]
    assert not os.path.ismount(hvfuse.root / "mnt" / "vm")
    assert (folder / name).read_bytes() == content
    assert serving_pid(str(hvfuse.root / "state" / "vms" / "vm" / "tracker.sock")) is None


def test_a_mount_point_that_has_contents_or_is_a_mount_is_refused(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    disk.parent.mkdir(parents=True)
    (disk.parent / "precious").write_text("x")
    assert hvfuse("mount", "vm") == 6
    assert "not empty" in hvfuse.err
    (disk.parent / "precious").unlink()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(disk.parent)], check=True)
    try:
        assert hvfuse("mount", "vm") == 6
        assert "mounted here already" in hvfuse.err
    finally:
        subprocess.run(["umount", str(disk.parent)], check=True)


def test_without_a_disk_there_is_nothing_to_mount(hvfuse: CommandLine) -> None:
    (hvfuse.root / "disks" / "vm").mkdir(parents=True)
    assert hvfuse("mount", "vm") == 5
    assert "no disk" in hvfuse.err
    assert hvfuse("mount", "other") == 5
    assert "there is no VM other" in hvfuse.err


def test_umount_leaves_the_mounts_of_a_running_supervisor_to_it(hvfuse: CommandLine, tmp_path: Path) -> None:
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    from hvfuse.control.config_file import load

    with only_supervisor(load(str(hvfuse.root)).home(str(hvfuse.root))):
        assert hvfuse("umount", "vm") == 6
        assert f"with pid {os.getpid()}" in hvfuse.err
    assert hvfuse("umount", "vm") == 0


def test_a_vm_whose_folder_was_renamed_can_be_unmounted_all_the_same(hvfuse: CommandLine) -> None:
    disk = hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    os.rename(hvfuse.root / "disks" / "vm", hvfuse.root / "elsewhere")
    assert hvfuse("umount", "vm") == 0, hvfuse.err
    assert not os.path.ismount(disk.parent)
    assert hvfuse("umount", "nosuch") == 5
    assert "there is no VM nosuch" in hvfuse.err
