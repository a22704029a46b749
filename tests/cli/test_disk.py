"""`hvfuse disk` as a program: what it prints, what it leaves, how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvfuse import system
from hvfuse.cli import disk as command
from hvfuse.cli.main import main
from hvfuse.formats.image import ImageFormat
from tests.formats.disk_samples import content, make, pattern, qemu_io, run, small_dynamic

MIB = 1 << 20


class Ended:
    """How a command ended and what it said."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def fields(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        parsed: dict[str, Any] = json.loads(self.out)
        assert parsed["output_version"] == 1
        return parsed


class Disk:
    """Runs `hvfuse disk ...`."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(["disk", *map(str, arguments)])
        said = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, said.out, said.err)


@pytest.fixture(name="disk")
def _disk(capsys: pytest.CaptureFixture[str]) -> Disk:
    return Disk(capsys)


@pytest.mark.parametrize(
    ("arguments", "image_format", "size"),
    [
        (("a.vhd", "1M"), "vhd-dynamic", MIB),
        (("a.vhd", "1G", "--format", "vhd-fixed"), "vhd-fixed", 1 << 30),
        (("a.vhd", "1000"), "vhd-dynamic", MIB),
        (("a.vhd", "1024", "--exact"), "vhd-dynamic", 1024),
        (("a.raw", "1000"), "raw", 1000),
        (("a.img", "2GiB"), "raw", 2 << 30),
        (("a.img", "3tib", "--format", "raw"), "raw", 3 << 40),
        (("b.img", "5k", "--format", "vhd-fixed"), "vhd-fixed", MIB),
    ],
)
def test_create_makes_what_info_then_tells(
    disk: Disk, tmp_path: Path, arguments: tuple[str, ...], image_format: str, size: int
) -> None:
    path = tmp_path / arguments[0]
    made = disk("create", path, *arguments[1:], "--json")
    assert made.code == 0
    assert (made.fields["format"], made.fields["virtual_size"]) == (image_format, size)
    told = disk("info", path, "--json").fields
    assert (told["format"], told["virtual_size"], told["file_size"]) == (image_format, size, path.stat().st_size)
    assert told["problems"] == told["warnings"] == [] or image_format == "raw"
    assert disk("check", path).code == 0
    assert os.listdir(tmp_path) == [path.name]


def test_create_says_that_it_rounded_and_info_speaks_in_plain_words(disk: Disk, tmp_path: Path) -> None:
    assert "1 MiB (1048576 bytes), rounded up from 1000 bytes" in disk("create", tmp_path / "a.vhd", "1000").out
    told = disk("info", tmp_path / "a.vhd").out
    assert "virtual size       1 MiB (1048576 bytes)" in told
    assert re.search(r"^format +vhd-dynamic$", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("a.vhd", "1GB"), 2, "not a size"),
        (("a.vhd", "-5"), 2, ""),
        (("a.vhd", "0"), 2, "0 bytes"),
        (("a.vhd", "3T"), 2, "2040 GiB"),
        (("a.vhd", "700", "--exact"), 2, "multiple of 512"),
        (("a.vhd", "1M", "--format", "raw"), 2, "promises another format"),
        (("a.vhdx", "1M"), 2, "promises another format"),
        (("a.vhd", "1M", "--format", "qcow2"), 2, "qcow2"),
        (("none/a.vhd", "1M"), 5, "no such directory"),
    ],
)
def test_create_refuses_in_one_line_and_leaves_nothing(
    disk: Disk, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    ended = disk("create", tmp_path / arguments[0], *arguments[1:])
    assert ended.code == code
    assert says in ended.err
    assert len([line for line in ended.err.splitlines() if not line.startswith("  hint:")]) == 1
    assert os.listdir(tmp_path) == []


def test_nothing_is_replaced_unless_it_is_forced_and_then_only_a_plain_file(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"precious")
    refused = disk("create", path, "1M")
    assert (refused.code, path.read_bytes()) == (2, b"precious")
    assert "--force" in refused.err
    assert disk("create", path, "1M", "--force").code == 0
    assert content(path) == bytes(MIB)
    (tmp_path / "link.raw").symlink_to(path)
    assert disk("create", tmp_path / "link.raw", "2M", "--force").code == 2
    assert path.stat().st_size == MIB


def test_a_replicated_disk_is_not_replaced_even_by_force(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(b"precious")
    (tmp_path / "a.raw.hvt").touch()
    refused = disk("create", path, "1M", "--force")
    assert (refused.code, path.read_bytes()) == (2, b"precious")
    assert "replicated" in refused.err


def test_check_ends_with_7_and_names_the_damage(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    small_dynamic(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:600] + b"!" + whole[601:])
    ended = disk("check", path)
    assert ended.code == 7
    assert ended.err == f"hvfuse: {path}: the dynamic header does not match its checksum\n"
    fields = disk("check", path, "--json").fields
    assert (fields["ok"], len(fields["problems"])) == (False, 1)
    path.write_bytes(whole + bytes(512))
    ended = disk("check", path)
    assert (ended.code, "growth was interrupted" in ended.err) == (7, True)
    assert disk("check", path, "--json").fields["ok"] is False
    assert disk("info", path).code == 0
    assert disk("check", path, "--repair").code == 0
    assert disk("check", path).out == f"{path}: ok, vhd-dynamic\n"


def test_check_mentions_a_raw_image_of_an_odd_size(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(1000))
    ended = disk("check", tmp_path / "a.raw")
    assert ended.code == 0
    assert "not a multiple of 512" in ended.err


@pytest.mark.qemu
@pytest.mark.parametrize("target", ["vhd-dynamic", "vhd-fixed", "raw"])
@pytest.mark.parametrize("source", ["vhd-dynamic", "vhd-fixed", "raw"])
def test_convert_copies_between_all_formats_and_all_compare_equal(
    disk: Disk, tmp_path: Path, source: str, target: str
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make(old, 40 * MIB, ImageFormat(source), block_size=2 * MIB)
    qemu = {"raw": "raw"}
    qemu_io(old, ImageFormat(source), "write -P 1 3M 64k", "write -P 2 20M 5k", "write -P 0 30M 1M")
    done = disk("convert", old, new, "--format", target, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.fields["bytes_written"] == (64 << 10) + (8 << 10)
    assert disk("compare", old, new).code == 0
    run("qemu-img", "compare", "-f", qemu.get(source, "vpc"), "-F", qemu.get(target, "vpc"), old, new)
    assert new.stat().st_blocks * 512 < MIB
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]


def test_convert_rounds_a_disk_up_to_what_the_format_can_hold(disk: Disk, tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(pattern(1000))
    assert disk("convert", raw, tmp_path / "a.vhd", "--json").fields["virtual_size"] == 1024
    assert content(tmp_path / "a.vhd") == pattern(1000) + bytes(24)
    done = disk("convert", raw, tmp_path / "b.vhd", "--format", "vhd-fixed", "--whole-mib", "--json")
    assert done.fields["virtual_size"] == MIB
    assert content(tmp_path / "b.vhd") == pattern(1000) + bytes(MIB - 1000)


def test_a_failed_convert_leaves_neither_a_part_nor_the_old_file_changed(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(pattern(5 * MIB))
    (tmp_path / "b.vhd").write_bytes(b"old")

    def no_space(label: str, call: str, size: int) -> None:
        if label == "vhd:data":
            raise OSError(28, "No space left on device")

    system.install(no_space)
    try:
        ended = disk("convert", tmp_path / "a.raw", tmp_path / "b.vhd", "--force")
    finally:
        system.install(None)
    assert ended.code == 9
    assert ended.err == f"hvfuse: {tmp_path}/b.vhd: no space left on device\n"
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "b.vhd"]
    assert (tmp_path / "b.vhd").read_bytes() == b"old"


def test_compare_says_where_disks_begin_to_differ(disk: Disk, tmp_path: Path) -> None:
    one, other = tmp_path / "a.raw", tmp_path / "b.raw"
    one.write_bytes(bytes(5 * MIB))
    for at in (0, 1, 4095, MIB - 1, MIB, 3 * MIB + 77, 5 * MIB - 1):
        with other.open("wb") as file:
            file.truncate(5 * MIB)
            file.seek(at)
            file.write(b"x")
        for pair in ((one, other), (other, one)):
            ended = disk("compare", *pair, "--json")
            assert (ended.code, ended.fields["identical"], ended.fields["first_difference"]) == (1, False, at)
    assert disk("compare", one, other).out == f"different: from byte {5 * MIB - 1} on\n"


def test_a_longer_disk_differs_from_the_byte_where_the_shorter_one_ends(disk: Disk, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    (tmp_path / "b.raw").write_bytes(bytes(8192))
    ended = disk("compare", tmp_path / "a.raw", tmp_path / "b.raw", "--json")
    assert (ended.code, ended.fields["first_difference"], ended.fields["sizes"]) == (1, 4096, [4096, 8192])


def test_a_progress_bar_is_shown_on_a_terminal_and_only_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(pattern(MIB))
    parent, child = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "hvfuse", "disk", "convert", tmp_path / "a.raw", tmp_path / "a.vhd"],
        stdout=subprocess.PIPE,
        stderr=child,
        check=True,
    )
    assert select.select([parent], [], [], 0)[0], "nothing on the terminal"
    shown = os.read(parent, 1 << 16)
    os.close(child)
    os.close(parent)
    assert b"Converting" in shown
    assert done.stdout.decode().startswith(f"{tmp_path}/a.vhd: made, vhd-dynamic, 1 MiB")


def test_sizes_are_read_as_powers_of_1024() -> None:
    read = command.Size().convert
    assert [read(text, None, None) for text in ("4096", "1K", "2m", "3GiB", "1T")] == [
        4096,
        1 << 10,
        2 << 20,
        3 << 30,
        1 << 40,
    ]
