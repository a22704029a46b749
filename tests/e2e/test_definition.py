"""A VM's definition ships with its points; another home has it from the store alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvfuse.control import definition
from hvfuse.control.config import VmPolicy
from hvfuse.control.config_file import load
from hvfuse.target.store import Store
from tests.e2e.conftest import Installation, mounts_below, qemu_io, wait_until

pytestmark = pytest.mark.mount

FIRST = """\
[replication]
frequency = "1h"
hard_limit = 1000
resync_window = "always"
[policy.gold]
compression = 5
daily = 7
[vm.vm1]
policy = "gold"
exclude = ["swap.raw"]
[vm.vm1.guest]
freeze = ["/bin/true", "vm1"]
thaw = ["/bin/true"]
"""
SECOND = FIRST.replace("compression = 5", "compression = 7").replace(
    'freeze = ["/bin/true", ', 'freeze = ["/bin/echo", '
)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path / "target")
    made.root.mkdir()
    yield made
    made.close()
    assert mounts_below(made.root) == []


def write(installation: Installation, text: str) -> None:
    new = installation.root / "hvfuse.toml.new"
    new.write_text(text)
    os.replace(new, installation.root / "hvfuse.toml")


def point(source: Installation, at: int) -> str:
    """A recovery point of one more write; its id."""
    qemu_io(source.mnt / "vm1" / "data.raw", "raw", f"write -P 7 {at}k 4k", "flush")
    source.hvfuse("replicate", "vm1")
    return str(source.json("point", "list", "vm1")["points"][-1]["id"])


def policy_at(root: Path) -> VmPolicy:
    found = load(str(root)).policy("vm1")
    return VmPolicy(**{name: getattr(found, name) for name in VmPolicy.__slots__ if name not in ("protect", "initial")})


def test_a_second_home_adopts_what_the_source_said_at_a_point_with_the_source_gone(
    installation: Installation, target: Installation
) -> None:
    source = installation
    (source.disks / "vm1").mkdir(parents=True)
    with open(source.disks / "vm1" / "data.raw", "wb") as file:
        file.truncate(1 << 20)
    paths = f'[paths]\nstore = "{target.root / "store"}"\n'
    write(source, paths + FIRST)
    source.hvfuse("mount", "vm1")
    oldest, said = point(source, 4), [policy_at(source.root)]
    write(source, paths + SECOND)
    said.append(policy_at(source.root))
    # A shipper that runs takes the change over within seconds; what `replicate` starts anew has it at once.
    points = [oldest]
    digests = lambda: {each["definition"] for each in source.json("point", "list", "vm1")["points"]}  # noqa: E731
    wait_until(lambda: points.append(point(source, 8)) or len(digests()) == 2, source.logs)  # type: ignore[func-returns-value]
    assert said[0] != said[1] and None not in digests()
    source.close()

    home = load(str(target.root)).home(str(target.root))
    with Store(home.store, create=False) as store:
        for chosen, expected in ((points[0], said[0]), (points[-1], said[1])):
            data = store.definition("vm1", chosen)
            assert data is not None
            definition.adopt(home, "vm1", data, point=chosen)
            assert policy_at(target.root) == expected
            shown = {each["key"]: each for each in target.json("policy", "show", "vm1")["settings"]}
            assert shown["compression"]["value"] == expected.compression
            assert shown["compression"]["source"]["definition"] == f"travelled with recovery point {chosen}"
            assert shown["protect"]["source"] == {"table": None, "line": None}
            assert shown["guest.freeze"]["value"][0] == (expected.guest.freeze[0] if expected.guest else "")
    write(target, "[vm.vm1]\ncompression = 2\n")
    text = target.hvfuse("policy", "show", "vm1")
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["compression"].endswith("[vm.vm1], line 2")
    assert lines["daily"].endswith(f"travelled with recovery point {points[-1]}")
    assert target.json("store", "check")["ok"]
    Path(definition.path_of(home, "vm1")).write_text(json.dumps({"version": 9}))
    assert "version 9" in notes_at(target)


def notes_at(target: Installation) -> str:
    """What `hvfuse policy show` notes of a definition that does not apply."""
    done = subprocess.run(
        target.command("policy", "show", "vm1"), env=target.environment(), cwd="/", capture_output=True, text=True
    )
    return done.stderr
