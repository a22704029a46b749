"""How statuses are shown."""

from __future__ import annotations

import os

from tests.cli.conftest import CommandLine


def test_names_and_states_are_whole_however_many_columns_a_pipe_has(
    hvfuse: CommandLine,
) -> None:
    names = [letter * 120 for letter in "ab"]
    for name in names:
        hvfuse.add_vm(name)
    assert hvfuse("status") == 0
    lines = hvfuse.out.splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [[name, "Disabled", "-"] for name in names]
    assert lines[-1] == f"nothing is replicated; next: hvfuse replication enable {names[0]}"


def test_a_name_that_looks_like_markup_is_shown_as_it_is(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("[red]x")
    assert hvfuse("status") == 0
    assert hvfuse.out.splitlines()[1].startswith("[red]x  Disabled")


def test_json_is_ascii_even_for_a_disk_whose_name_is_not_text(hvfuse: CommandLine) -> None:
    hvfuse.add_vm("vm")
    folder = os.fsencode(hvfuse.root / "disks" / "vm")
    os.rename(folder + b"/os.raw", folder + b"/\xff.raw")
    (vm,) = hvfuse.json("status")["vms"]
    assert hvfuse.out.isascii()
    assert [os.fsencode(disk["name"]) for disk in vm["disks"]] == [b"\xff.raw"]


def test_json_that_never_ends_is_refused(hvfuse: CommandLine) -> None:
    assert hvfuse("status", "--watch", "--json") == 2
