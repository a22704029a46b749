"""`hvfuse policy`, and a shipper that follows the configuration while it runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hvfuse import wire
from hvfuse.control.daemon import serving_pid
from tests.cli.conftest import CommandLine
from tests.control.children import until

TWO = """\
[replication]
frequency = "1m"

[policy.gold]
frequency = "5s"
throttle = ["mon-fri 08:00-18:00 10MB/s", "50MB/s"]

[vm.web]
policy = "gold"
daily = 7
exclude = ["swap.vhd"]
"""


def configure(hvfuse: CommandLine, text: str) -> Path:
    path = hvfuse.root / "hvfuse.toml"
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
    return path


def test_the_settings_of_a_vm_are_shown_with_their_sources(hvfuse: CommandLine) -> None:
    configure(hvfuse, TWO)
    assert hvfuse("policy", "show", "web") == 0
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in hvfuse.out.splitlines()}
    assert shown["SETTING"].split() == ["VALUE", "FROM"]
    assert shown["frequency"].split("  ")[0] == '"5s"'
    assert shown["frequency"].endswith("[policy.gold], line 5")
    assert shown["throttle"] == '["mon-fri 08:00-18:00 10MB/s", "50MB/s"]  [policy.gold], line 6'
    assert shown["daily"].endswith("[vm.web], line 10")
    assert shown["compression"].split() == ["1", "default"]
    found = hvfuse.json("policy", "show", "web")
    assert list(found) == ["vm", "settings"]
    assert {"key": "daily", "value": 7, "source": {"table": "vm.web", "line": 10}} in found["settings"]
    assert {"key": "hourly", "value": 24, "source": {"table": None, "line": None}} in found["settings"]


def test_without_a_vm_the_defaults_come_first_and_then_what_others_have_of_their_own(hvfuse: CommandLine) -> None:
    configure(hvfuse, TWO)
    hvfuse.add_vm("plain")
    assert hvfuse("policy", "show") == 0
    rows = [line.split() for line in hvfuse.out.splitlines()]
    assert ["(any", "VM)", "frequency", '"1m"', "[replication],", "line", "2"] in rows
    assert ["plain", "as", "any", "VM"] in rows
    web = [row[1] for row in rows if row[0] == "web"]
    assert web == ["frequency", "throttle", "daily", "exclude"]
    found = hvfuse.json("policy", "show")
    assert list(found) == ["file", "default", "vms"]
    assert [vm["name"] for vm in found["vms"]] == ["plain", "web"]
    assert [len(vm["settings"]) for vm in found["vms"]] == [len(found["default"]) + 1] * 2


def test_a_home_without_a_file_shows_the_defaults(hvfuse: CommandLine) -> None:
    assert hvfuse("policy", "show") == 0
    assert all(line.endswith("default") for line in hvfuse.out.splitlines()[1:])
    assert hvfuse("policy", "show", "other") == 5
    assert hvfuse("policy", "check") == 5


def test_a_configuration_is_proved_before_it_is_put_in_place(hvfuse: CommandLine, tmp_path: Path) -> None:
    path = configure(hvfuse, TWO)
    hvfuse.add_vm("web")
    assert hvfuse("policy", "check") == 0
    assert (hvfuse.out, hvfuse.err) == (f"{path} is sound: 1 policy, 1 VM with settings of their own\n", "")
    other = tmp_path / "other.toml"
    other.write_text(TWO + "[vm.wbe]\n")
    assert hvfuse("policy", "check", str(other)) == 0
    assert hvfuse.err == "there is no VM wbe yet, of which it speaks\n"
    assert hvfuse.json("policy", "check", str(other)) == {
        "file": str(other), "valid": True, "policies": ["gold"], "vms": ["wbe", "web"], "unknown_vms": ["wbe"],
    }  # fmt: skip
    other.write_text(TWO + 'frequency = "2h"\n')
    assert hvfuse("policy", "check", str(other)) == 2
    assert hvfuse.err.startswith(f'hvfuse: {other}:12: [vm.web] frequency: "2h" is not a duration from "1s" to "1h"')
    assert hvfuse.json("policy", "check", str(other), code=2)["error"]["exit_code"] == 2
    other.write_bytes(b"\n\xff")
    assert hvfuse("policy", "check", str(other)) == 2
    assert f"{other}:2: this is not UTF-8" in hvfuse.err
    assert hvfuse("policy", "check", str(tmp_path / "none.toml")) == 5


# While a shipper runs -----------------------------------------------------------------------------------------


@pytest.fixture
def log(hvfuse: CommandLine) -> Callable[[], str]:
    """What the VM's shipper has said."""
    return (hvfuse.root / "state" / "vms" / "vm" / "shipper.log").read_text


@pytest.mark.mount
def test_a_running_shipper_follows_frequency_and_retention_and_outlives_a_faulty_edit(
    hvfuse: CommandLine, log: Callable[[], str]
) -> None:
    configure(hvfuse, '[replication]\nfrequency = "1h"\n')
    hvfuse.add_vm("vm")
    assert hvfuse("mount", "vm") == 0
    socket = hvfuse.ship("vm")

    def cycle() -> int:
        return int(wire.request(socket, "status").get("cycle") or 0)

    def points() -> int:
        return len(hvfuse.json("point", "list", "vm")["points"])

    pid = serving_pid(socket)
    until(lambda: cycle() == 1)
    for _ in range(4):
        wire.request(socket, "cycle")
    assert (cycle(), points()) == (5, 5)
    configure(hvfuse, '[replication]\nfrequency = "1s"\n')
    until(lambda: cycle() >= 7)
    assert points() >= 7
    path = configure(hvfuse, '[replication]\nfrequency = "1h"\n\n[retention]\nkeep_all = "1x"\n')
    fault = f'{path}:5: [retention] keep_all: "1x" is not a duration'
    until(lambda: fault in log())
    at = cycle()
    until(lambda: cycle() >= at + 2)
    configure(hvfuse, '[vm.vm]\nfrequency = "1s"\nkeep_all = "0s"\nhourly = 0\n')
    until(lambda: points() == 1)
    assert "the policy has changed: retention" in log()
    assert log().count(fault) == 1
    assert pid == serving_pid(socket), "all of that without a restart"


@pytest.mark.mount
def test_a_running_shipper_follows_its_throttle(hvfuse: CommandLine, log: Callable[[], str]) -> None:
    configure(hvfuse, '[replication]\nfrequency = "1h"\ncompression = 0\n')
    disk = hvfuse.add_vm("vm", 8 << 20)
    assert hvfuse("mount", "vm") == 0
    hvfuse.ship("vm")
    hvfuse.json("replicate", "vm")
    configure(hvfuse, '[replication]\nfrequency = "1h"\ncompression = 0\nthrottle = "1MB/s"\n')
    until(lambda: "the policy has changed: throttle" in log())
    with open(disk, "r+b") as file:
        file.write(os.urandom(3 << 20))
    report = hvfuse.json("replicate", "vm")
    assert report["bytes_sent"] >= 3 << 20
    burst = 1.1e6  # one second's worth, or one frame of 1 MiB
    assert (report["bytes_sent"] - burst) / report["seconds"] <= 1e6


@pytest.mark.mount
def test_a_throttle_applies_without_a_shipper_too(hvfuse: CommandLine) -> None:
    configure(hvfuse, '[vm.vm]\ncompression = 0\nthrottle = ["mon-sun 500KB/s"]\n')
    disk = hvfuse.add_vm("vm", 4 << 20)
    assert hvfuse("mount", "vm") == 0
    hvfuse.json("replicate", "vm")
    with open(disk, "r+b") as file:
        file.write(os.urandom(1500 << 10))
    report = hvfuse.json("replicate", "vm")
    assert report["bytes_sent"] >= 1500 << 10
    assert (report["bytes_sent"] - 1.1e6) / report["seconds"] <= 0.5e6
