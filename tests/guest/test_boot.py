"""A Linux guest that is booted by its settings, and that shuts down when its power button is pressed."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from hvfuse.control.boot import Ending, boot_failed_over, is_running, shut_down
from hvfuse.control.config import Config
from hvfuse.control.config_text import parse
from hvfuse.control.guest_settings import Mode
from tests.guest.machine import BOOT_SECONDS, prepare, written

pytestmark = pytest.mark.guest

CONFIG = """
[vm.web01.guest]
qemu = [
    "qemu-system-x86_64", "-nodefaults", "-no-reboot", "-accel", "tcg", "-cpu", "max", "-m", "256",
    "-kernel", "KERNEL", "-initrd", "INITRAMFS", "-append", "console=ttyS0 quiet panic=-1",
    "-serial", "file:{state}/console", "-drive", "file={disk:root.raw},format=raw,if=virtio,cache=none",
    "-chardev", "socket,path={state}/agent,server=on,wait=off,id=agent", "-device", "virtio-serial",
    "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
]
after_boot = ["touch", "/dev/null"]
"""


def test_a_guest_boots_from_its_settings_and_shuts_down_by_its_power_button(tmp_path: Path) -> None:
    disk = tmp_path / "root.raw"
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk], check=True)
    kernel, initramfs = prepare()
    text = CONFIG.replace("KERNEL", str(kernel)).replace("INITRAMFS", str(initramfs))
    policy = parse("hvfuse.toml", text).policy("web01")
    with tempfile.TemporaryDirectory(prefix="hvfuse-") as root:
        guest = boot_failed_over(
            *(Config().home(root), policy, "web01"), mode=Mode.TEST, point="1", directory=str(tmp_path), networks={}
        )
        try:
            console = Path(guest.state_dir) / "console"
            until = time.monotonic() + BOOT_SECONDS
            while written(console.read_text(errors="replace")) < 5:
                assert is_running(guest.state_dir)
                assert time.monotonic() < until, console.read_text(errors="replace")
                time.sleep(0.1)
            assert shut_down(guest.state_dir, 60) is Ending.SHUT_DOWN, console.read_text(errors="replace")
            assert "POWER-BUTTON" in console.read_text(errors="replace")
            assert not is_running(guest.state_dir)
        finally:
            shut_down(guest.state_dir, 0)
    assert subprocess.run(["e2fsck", "-fy", disk], capture_output=True).returncode in (0, 1)
