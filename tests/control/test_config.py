"""hvfuse.toml: what it means, and each fault by its line."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from hvfuse.control.config import TEMPLATE, Config
from hvfuse.control.config_file import load, write_template
from hvfuse.control.config_text import parse
from hvfuse.control.guest_settings import GuestSettings
from hvfuse.errors import UsageError
from hvfuse.shipper.window import ALWAYS, Initial, Resync, Window
from hvfuse.target.retention import RetentionPolicy


def test_the_template_means_all_defaults() -> None:
    assert parse("hvfuse.toml", TEMPLATE) == Config()


def test_the_template_with_every_comment_taken_off_is_valid_and_means_the_defaults() -> None:
    lines = [
        line.removeprefix("# ") if " = " in line or line.startswith(("# [vm.", "# [policy.")) else line
        for line in TEMPLATE.splitlines()
    ]
    parsed = parse("hvfuse.toml", "\n".join(lines))
    assert parsed.default == Config().default
    assert (parsed.policies["gold"].frequency, parsed.policies["gold"].retention.keep_all_seconds) == (5.0, 86400)
    web = parsed.policy("web01")
    assert (web.frequency, web.retention.keep_all_seconds, web.app_consistent) == (10.0, 86400, 3600.0)
    assert web.guest == GuestSettings(agent="/run/web01/qga.sock", freeze=(), thaw=(), freeze_timeout=10.0)
    assert parsed.policy("web01").exclude == {"swap.vhd"}
    assert parsed.policy("other") == Config().default
    assert parsed.home("/x") == Config().home("/x")


def test_a_vm_takes_what_it_does_not_say_from_the_general_tables() -> None:
    parsed = parse(
        "hvfuse.toml",
        '[replication]\nfrequency = "2m"\ncompression = 3\n[retention]\nkeep_all = "1d"\ndaily = 7\n'
        '[vm.db]\nfrequency = "1s"\nhourly = 0\n',
    )
    assert (parsed.default.frequency, parsed.default.compression) == (120.0, 3)
    vm = parsed.policy("db")
    assert (vm.frequency, vm.compression) == (1.0, 3)
    assert vm.retention == RetentionPolicy(keep_all_seconds=86400, hourly=0, daily=7)


def test_paths_are_relative_to_the_home() -> None:
    home = parse("hvfuse.toml", '[paths]\nstore = "/srv/replica"\ndisks = "../vms"\n').home("/a/home")
    assert (home.store, home.disks, home.mnt, home.state) == (
        "/srv/replica",
        "/a/vms",
        "/a/home/mnt",
        "/a/home/state",
    )


def test_when_copies_may_begin_is_said_for_all_and_for_one_vm() -> None:
    parsed = parse(
        "hvfuse.toml",
        '[replication]\nresync_window = "22:05-03:00"\ndigest = "blake3"\ninitial = "seed"\n'
        '[vm.db]\nresync = "manual"\n[vm.web]\nresync_window = "always"\ninitial = "now"\ndigest = "xxh3"\n',
    )
    night = Window(22 * 60 + 5, 3 * 60)
    assert parsed.default.resync == Resync(automatic=True, window=night)
    assert (parsed.default.digest, parsed.default.initial) == ("blake3", Initial(how="seed"))
    assert parsed.policy("db").resync == Resync(automatic=False, window=night)
    assert parsed.policy("web").resync == Resync(automatic=True, window=ALWAYS)
    assert (parsed.policy("web").digest, parsed.policy("web").initial) == ("xxh3", Initial())
    assert Config().default.resync.window == Window(18 * 60 + 30, 6 * 60)


def from_now(**span: int) -> str:
    return f"{datetime.now() + timedelta(**span):%Y-%m-%d %H:%M}"


@pytest.mark.parametrize("text", [from_now(days=6), "2001-01-01 18:30"])
def test_a_first_copy_can_have_a_time_and_one_that_is_over_is_no_fault(text: str) -> None:
    at = round(datetime.fromisoformat(text).timestamp()) * 10**9
    assert parse("hvfuse.toml", f'[replication]\ninitial = "{text}"\n').default.initial == Initial(at_ns=at)


FAULTS = {
    "unknown key": (
        '[replication]\n\nfreqency = "1s"\n',
        3,
        "[replication] freqency: unknown key; did you mean frequency?",
    ),
    "unknown key, nothing near": (
        "[paths]\nx = 1\n",
        2,
        "[paths] x: unknown key; known here: disks, mnt, store, state",
    ),
    "unknown table": ("# a\n[retentoin]\n", 2, "retentoin: unknown table; did you mean retention?"),
    "unknown top key": ('speed = "fast"\n', 1, "speed: unknown key"),
    "unknown table within": ("[paths.disks2]\n", 1, "[paths] disks2: unknown table; did you mean disks?"),
    "duration without unit": ("[replication]\nfrequency = 30\n", 2, "[replication] frequency: 30 is not a duration"),
    "duration with odd unit": ('[replication]\nfrequency = "30x"\n', 2, '[replication] frequency: "30x" is not'),
    "duration with sign": ('[replication]\nfrequency = "-5s"\n', 2, '"-5s" is not a duration'),
    "too often": ('[replication]\nfrequency = "0s"\n', 2, '"0s" is not a duration from "1s" to "1h"'),
    "too seldom": ('[replication]\nfrequency = "61m"\n', 2, '"61m" is not a duration from "1s" to "1h"'),
    "level too high": ("[replication]\ncompression = 23\n", 2, "compression: 23 is not a whole number from 0 to 22"),
    "level as a boolean": ("[replication]\ncompression = true\n", 2, "compression: true is not a whole number"),
    "level as a fraction": ("[replication]\ncompression = 1.5\n", 2, "compression: 1.5 is not a whole number"),
    "negative hours": ("[retention]\nhourly = -1\n", 2, "[retention] hourly: -1 is not a whole number"),
    "keep for ever": ('[retention]\nkeep_all = "forever"\n', 2, '[retention] keep_all: "forever" is not a duration'),
    "path as a number": ("[paths]\nstore = 1\n", 2, "[paths] store: 1 is not the path of a directory"),
    "empty path": ('[paths]\nmnt = ""\n', 2, '[paths] mnt: "" is not the path of a directory'),
    "table as a value": ("replication = 5\n", 1, "replication: this is a table"),
    "vm as a value": ("vm = 5\n", 1, "vm: this is a table"),
    "one vm as a value": ("[vm]\nweb = 1\n", 2, "[vm] web: this is a table"),
    "bad vm name": ('[vm."../x"]\n', 1, "../x: this cannot be a VM's name: it begins with a dot"),
    "key of a vm": ('[vm.a]\nfrequency = "1s"\n[vm.b]\nfrequencies = 1\n', 4, "[vm.b] frequencies: unknown key"),
    "excluded as text": ('[vm.a]\nexclude = "x.vhd"\n', 2, "[vm.a] exclude: "),
    "excluded path": ('[vm.a]\nexclude = [\n  "ok.vhd",\n  "a/b.vhd",\n]\n', 5, "[vm.a] exclude: "),
    "initial too far ahead": (
        f'[replication]\ninitial = "{from_now(days=8)}"\n',
        2,
        " is not a time at most 7 days ahead",
    ),
    "initial at a time of no day": (
        '[vm.a]\ninitial = "18:30"\n',
        2,
        '[vm.a] initial: "18:30" is not "now", "seed", or',
    ),
    "initial on a day of no month": ('[vm.a]\n\ninitial = "2026-02-30 18:30"\n', 3, "is not"),
    "initial as a date without quotes": ("[vm.a]\ninitial = 2026-11-22 18:30:00\n", 2, "[vm.a] initial: "),
    "resync neither": (
        '[replication]\nresync = "never"\n',
        2,
        '[replication] resync: "never" is not "auto" or "manual"',
    ),
    "resync as a boolean": ("[replication]\nresync = true\n", 2, 'resync: true is not "auto" or "manual"'),
    "resync as a list": ('[replication]\nresync = ["auto"]\n', 2, 'is not "auto" or "manual"'),
    "window without end": (
        '[replication]\nresync_window = "18:30"\n',
        2,
        'resync_window: "18:30" is not "always" or two',
    ),
    "window of nothing": ('[replication]\nresync_window = "18:30-18:30"\n', 2, "two different times of the day"),
    "window at 24": ('[vm.a]\nresync_window = "18:30-24:00"\n', 2, "[vm.a] resync_window: "),
    "window with seconds": ('[vm.a]\nresync_window = "18:30:00-06:00:00"\n', 2, "[vm.a] resync_window: "),
    "window as a number": ("[vm.a]\nresync_window = 18\n", 2, "18 is not"),
    "digest unknown": ('[replication]\ndigest = "md5"\n', 2, 'digest: "md5" is not "xxh3" or "blake3"'),
    "key twice": ("[retention]\nhourly = 1\nhourly = 2\n", 3, "Cannot overwrite a value"),
    "no value": ("[retention]\nhourly =\n", 2, "Invalid value"),
    "open string": ('[paths]\nstore = "abc\n', 2, "Illegal character"),
    "cut off": ("[retention]\nhourly", 2, "Expected"),
    "dotted key": ('replication.frequency = "1x"\n', 1, '[replication] frequency: "1x"'),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_refused_by_file_line_and_name(case: str) -> None:
    text, line, message = FAULTS[case]
    with pytest.raises(UsageError) as caught:
        parse("hvfuse.toml", text)
    assert str(caught.value).startswith(f"hvfuse.toml:{line}: "), caught.value
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_bytes_that_are_not_utf8_are_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "hvfuse.toml").write_bytes(b"# fine\n# \xff\n")
    with pytest.raises(UsageError, match=r"hvfuse\.toml:2: this is not UTF-8"):
        load(str(tmp_path))


def test_a_home_without_a_file_has_the_defaults_and_gets_the_template_once(tmp_path: Path) -> None:
    assert load(str(tmp_path)) == Config()
    write_template(str(tmp_path))
    path = tmp_path / "hvfuse.toml"
    assert path.read_text() == TEMPLATE
    path.write_text("# mine\n")
    write_template(str(tmp_path))
    assert path.read_text() == "# mine\n"
