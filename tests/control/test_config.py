"""hvfuse.toml: what it means, and each fault by its line."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from hvfuse.control.config import TEMPLATE, Config, Monitoring, VmPolicy
from hvfuse.control.config_file import load, write_template
from hvfuse.control.config_guest import ADDRESSES, BOOT, NETWORK
from hvfuse.control.config_text import Origins, parse, shown
from hvfuse.control.config_values import GUEST, MONITORING, PATHS, VM
from hvfuse.control.guest_settings import Addresses, BootSettings, GuestSettings, Network
from hvfuse.errors import UsageError
from hvfuse.shipper.throttle import Limit, Throttle
from hvfuse.shipper.window import ALWAYS, Initial, Resync, Window
from hvfuse.target.retention import RetentionPolicy


def test_the_template_means_all_defaults() -> None:
    assert parse("hvfuse.toml", TEMPLATE) == Config()


def test_the_template_with_every_comment_taken_off_is_valid_and_means_the_defaults() -> None:
    lines = [
        line.removeprefix("# ")
        if " = " in line or line.startswith(("# [vm.", "# [policy.", "# [net", "# [plan.", "# [[plan."))
        else line
        for line in TEMPLATE.splitlines()
    ]
    parsed = parse("hvfuse.toml", "\n".join(lines))
    assert parsed.default == Config().default
    assert (parsed.policies["gold"].frequency, parsed.policies["gold"].retention.keep_all_seconds) == (5.0, 86400)
    web = parsed.policy("web01")
    assert (web.frequency, web.retention.keep_all_seconds, web.app_consistent) == (10.0, 86400, 3600.0)
    assert web.guest == GuestSettings(agent="/run/qemu/web01.agent", freeze=(), thaw=(), freeze_timeout=10.0)
    assert web.boot is not None
    assert (web.boot.qemu[0], web.boot.libvirt, web.boot.validate_timeout) == ("qemu-system-x86_64", None, 300.0)
    assert web.boot.before_boot == web.boot.after_boot == web.boot.validate == ("/path/to/command",)
    assert web.network == Addresses(
        ipv4="192.0.2.10",
        ipv4_mask="255.255.255.0",
        ipv4_gateway="192.0.2.1",
        ipv6="2001:db8::10",
        ipv6_prefix=64,
        ipv6_gateway="2001:db8::1",
        dns=("192.0.2.53", "2001:db8::53"),
    )
    assert web.network_test is None
    assert parsed.networks == {"lan": Network(source="br0", target="br1", test="br-isolated")}
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


ASKED = '[vm.a.guest]\nagent = "/q"\n'
MINUTES = 60
VALUES: dict[str, tuple[str, object]] = {
    'protect = "manual"': ("protect", "manual"),
    'frequency = "1s"': ("frequency", 1.0),
    'frequency = "1h"': ("frequency", 3600.0),
    "compression = 0": ("compression", 0),
    "compression = 22": ("compression", 22),
    "soft_limit = 50": ("soft_limit", 50),
    "hard_limit = 25": ("hard_limit", 25),
    "hard_limit = 100000": ("hard_limit", 100_000),
    'initial = "seed"': ("initial", Initial(how="seed")),
    'resync = "manual"': ("resync", Resync(automatic=False)),
    'resync_window = "always"': ("resync", Resync(window=ALWAYS)),
    'digest = "blake3"': ("digest", "blake3"),
    'app_consistent = "off"': ("app_consistent", 0.0),
    'app_consistent = "1h"': ("app_consistent", 3600.0),
    'app_consistent = "12h"': ("app_consistent", 43200.0),
    'keep_all = "0s"': ("retention", RetentionPolicy(keep_all_seconds=0)),
    "hourly = 0": ("retention", RetentionPolicy(hourly=0)),
    "daily = 3660": ("retention", RetentionPolicy(daily=3660)),
    "exclude = []": ("exclude", frozenset()),
    'exclude = ["b.raw", "a.vhd"]': ("exclude", frozenset({"a.vhd", "b.raw"})),
    'throttle = "none"': ("throttle", Throttle()),
    "throttle = []": ("throttle", Throttle()),
    'throttle = "10MB/s"': ("throttle", Throttle((Limit(10e6),))),
    'throttle = "1.5 MiB/s"': ("throttle", None),
    'throttle = "1.5MiB/s"': ("throttle", Throttle((Limit(1.5 * 2**20),))),
    'throttle = "100KB/s"': ("throttle", Throttle((Limit(1e5),))),
    'throttle = "100GB/s"': ("throttle", Throttle((Limit(1e11),))),
    'throttle = "99KB/s"': ("throttle", None),
    'throttle = "101GB/s"': ("throttle", None),
    'throttle = "0B/s"': ("throttle", None),
    'throttle = "10MB"': ("throttle", None),
    'throttle = "fast"': ("throttle", None),
    "throttle = 10": ("throttle", None),
    'throttle = ["mon-fri 08:00-18:00 10MB/s", "sat,sun none", "50MB/s"]': (
        "throttle",
        Throttle(
            (
                Limit(10e6, frozenset(range(5)), Window(8 * MINUTES, 18 * MINUTES)),
                Limit(None, frozenset({5, 6})),
                Limit(50e6),
            )
        ),
    ),
    'throttle = ["22:00-06:00 1GB/s", "Fri-Mon 1MB/s"]': (
        "throttle",
        Throttle((Limit(1e9, window=Window(22 * MINUTES, 6 * MINUTES)), Limit(1e6, frozenset({4, 5, 6, 0})))),
    ),
    'throttle = ["monday 1MB/s"]': ("throttle", None),
    'throttle = ["08:00-18:00 mon 1MB/s"]': ("throttle", None),
    'throttle = ["mon 08:00-08:00 1MB/s"]': ("throttle", None),
    'throttle = ["mon 08:00-25:00 1MB/s"]': ("throttle", None),
    'throttle = ["mon tue 1MB/s"]': ("throttle", None),
    'throttle = ["mon-fri 08:00-18:00"]': ("throttle", None),
    'throttle = ["mon-fri-sun 1MB/s"]': ("throttle", None),
    'throttle = ["mon, tue 1MB/s"]': ("throttle", None),
    'throttle = [""]': ("throttle", None),
    "throttle = [5]": ("throttle", None),
    'throttle = ["1MB/s", ["2MB/s"]]': ("throttle", None),
    'protect = "yes"': ("protect", None),
    "protect = true": ("protect", None),
    'app_consistent = "0s"': ("app_consistent", None),
    'app_consistent = "59m"': ("app_consistent", None),
    'app_consistent = "13h"': ("app_consistent", None),
    "app_consistent = 0": ("app_consistent", None),
    "app_consistent = false": ("app_consistent", None),
    'frequency = "\u0663s"': ("frequency", None),
    'frequency = "1000000000s"': ("frequency", None),
}
"""What a line means in [vm.a], which has a guest; None: it is refused."""


@pytest.mark.parametrize("line", VALUES)
def test_each_key_takes_what_fits_and_refuses_what_does_not(line: str) -> None:
    key, value = VALUES[line]
    text = f"[vm.a]\n{line}\n{ASKED}"
    if value is None:
        with pytest.raises(UsageError, match=rf"^hvfuse\.toml:2: \[vm\.a\] {key}: .* is not "):
            parse("hvfuse.toml", text)
        return
    assert getattr(parse("hvfuse.toml", text).policy("a"), key) == value


@pytest.mark.parametrize("line", VALUES)
def test_a_policy_takes_what_a_vm_does_except_what_is_of_one_vm_alone(line: str) -> None:
    key, value = VALUES[line]
    text = f'[policy.p]\n{line}\n[vm.a]\npolicy = "p"\n{ASKED}'
    if value is None or key == "exclude":
        with pytest.raises(UsageError, match=rf"^hvfuse\.toml:2: \[policy\.p\] {key}: "):
            parse("hvfuse.toml", text)
        return
    parsed = parse("hvfuse.toml", text)
    assert getattr(parsed.policy("a"), key) == getattr(parsed.policies["p"], key) == value
    assert parsed.policy("b") == parsed.default == Config().default


def test_a_vm_says_more_than_its_policy_and_that_more_than_the_general_tables() -> None:
    parsed = parse(
        "hvfuse.toml",
        '[vm.web]\npolicy = "gold"\nfrequency = "7s"\nresync = "auto"\n'
        '[policy.gold]\nfrequency = "5s"\ncompression = 9\nresync = "manual"\ndaily = 7\n[policy.tin]\n'
        '[replication]\nfrequency = "2m"\ncompression = 3\nhard_limit = 90\nresync_window = "always"\n'
        "[retention]\nhourly = 5\n[vm.plain]\n",
    )
    web, gold = parsed.policy("web"), parsed.policies["gold"]
    assert (web.frequency, web.compression, web.hard_limit, web.resync) == (7.0, 9, 90, Resync(window=ALWAYS))
    assert web.retention == RetentionPolicy(hourly=5, daily=7)
    assert (gold.frequency, gold.resync) == (5.0, Resync(automatic=False, window=ALWAYS))
    assert parsed.policies["tin"] == parsed.policy("plain") == parsed.policy("other") == parsed.default


def test_the_defaults_that_are_shown_are_those_that_apply() -> None:
    said = {key: known.default for key, known in VM.items()}
    text = "".join(f"{key} = {shown(value)}\n" for key, value in said.items())
    assert parse("hvfuse.toml", "[vm.a]\n" + text).policy("a") == VmPolicy()
    said = {key: known.default for key, known in MONITORING.items()}
    text = "".join(f"{key} = {shown(value)}\n" for key, value in said.items())
    assert parse("hvfuse.toml", "[monitoring]\n" + text).monitoring == Monitoring()


def test_a_guest_is_asked_by_its_agent_or_by_commands() -> None:
    parsed = parse(
        "hvfuse.toml",
        '[vm.a.guest]\nagent = "/run/a.sock"\nfreeze_timeout = "1m"\n'
        '[vm.b.guest]\nfreeze = ["ssh", "b", "fsfreeze"]\nthaw = ["/bin/thaw"]\n[vm.c]\n',
    )
    assert parsed.policy("a").guest == GuestSettings("/run/a.sock", (), (), 60.0)
    assert parsed.policy("b").guest == GuestSettings(None, ("ssh", "b", "fsfreeze"), ("/bin/thaw",))
    assert parsed.policy("c").guest is None


def test_a_guest_that_is_booted_says_how_and_where() -> None:
    parsed = parse(
        "hvfuse.toml",
        '[vm.a.guest]\nqemu = ["/usr/bin/qemu", "file={disk:a,b.raw}", "{{\\"x\\"}}", "br={network:my lan}"]\n'
        'validate = ["v", "{name}"]\nvalidate_timeout = "24h"\n'
        '[vm.b.guest]\nlibvirt = "guests/../b.xml"\nbefore_boot = ["x"]\nagent = "/q"\n'
        '[vm.c.guest]\nvalidate = ["fsck"]\n[vm.c.network]\ndns = []\n'
        '[vm.c.network_test]\nipv6 = "2001:DB8:0::1"\nipv6_prefix = 128\nipv4 = "10.0.0.1"\n'
        'ipv4_mask = "255.255.255.254"\nipv4_gateway = "192.0.2.1"\n'
        '[network."my lan"]\ntest = "isolated"\n',
    )
    a, b, c = (parsed.policy(vm) for vm in "abc")
    words = ("/usr/bin/qemu", "file={disk:a,b.raw}", '{{"x"}}', "br={network:my lan}")
    assert a.guest is None
    assert a.boot == BootSettings(qemu=words, validate=("v", "{name}"), validate_timeout=86400.0)
    assert b.guest == GuestSettings(agent="/q")
    assert b.boot == BootSettings(libvirt="b.xml", before_boot=("x",))
    assert (c.guest, c.boot, c.network) == (None, BootSettings(validate=("fsck",)), Addresses())
    assert c.network_test == Addresses(
        ipv6="2001:db8::1", ipv6_prefix=128, ipv4="10.0.0.1", ipv4_mask="255.255.255.254", ipv4_gateway="192.0.2.1"
    )
    assert parsed.networks == {"my lan": Network(test="isolated")}
    assert parsed.default.boot is None


def test_what_is_watched_and_who_is_told() -> None:
    text = '[monitoring]\ninterval = "7d"\nnotify = ["/bin/tell", ""]\nkeep_events = "366d"\n'
    assert parse("hvfuse.toml", text).monitoring == Monitoring(
        interval=7 * 86400.0, notify=("/bin/tell", ""), keep_events=366 * 86400.0
    )


FAULTS = {
    "policy that is not there": (
        '[policy.gold]\n[vm.a]\n\npolicy = "golf"\n',
        4,
        "[vm.a] policy: there is no table [policy.golf]; did you mean gold?",
    ),
    "policy where there is none": ('[vm.a]\npolicy = "x"\n', 2, "there is no table [policy.x]; known here: none"),
    "policy without a name": ('[vm.a]\npolicy = ""\n', 2, '[vm.a] policy: "" is not the name of a policy'),
    "policy as a list": ('[vm.a]\npolicy = ["x"]\n', 2, '[vm.a] policy: ["x"] is not the name of a policy'),
    "policy of a policy": ('[policy.a]\npolicy = "b"\n', 2, "[policy.a] policy: unknown key"),
    "bad name of a policy": ('[policy."a/b"]\n', 1, "a/b: this cannot be a policy's name: it holds a slash"),
    "policies as a value": ("policy = 1\n", 1, "policy: this is a table: write [policy] on a line"),
    "one policy as a value": ("[policy]\ngold = 1\n", 2, "[policy] gold: this is a table: write [policy.gold]"),
    "exclude in a policy": ('[policy.a]\nexclude = ["x.vhd"]\n', 2, "[policy.a] exclude: unknown key"),
    "exclude of all": ('[replication]\nexclude = ["x.vhd"]\n', 2, "[replication] exclude: unknown key"),
    "retention among replication": ("[replication]\nhourly = 1\n", 2, "[replication] hourly: unknown key"),
    "soft over hard": (
        "[replication]\nhard_limit = 20\n\nsoft_limit = 30\n",
        4,
        "[replication] soft_limit: 30 is more than hard_limit, which is 20",
    ),
    "soft over the default hard": ("[replication]\nsoft_limit = 51\n", 2, "51 is more than hard_limit, which is 50"),
    "hard of a policy under the default soft": (
        "[policy.p]\nhard_limit = 24\n",
        2,
        "[policy.p] hard_limit: 24 is less than soft_limit, which is 25",
    ),
    "soft of a vm over its policy's hard": (
        '[vm.a]\npolicy = "p"\nsoft_limit = 41\n[policy.p]\nhard_limit = 40\n',
        3,
        "[vm.a] soft_limit: 41 is more than hard_limit, which is 40",
    ),
    "applications at rest, of all": (
        '[replication]\napp_consistent = "1h"\n',
        2,
        "[replication] app_consistent: this cannot be said of every VM: say it in a [policy.NAME] or [vm.NAME]",
    ),
    "applications at rest without a guest": (
        '[vm.a]\nfrequency = "1s"\napp_consistent = "1h"\n',
        3,
        "[vm.a] app_consistent: this needs a table [vm.a.guest] that says how the guest is asked to hold still: "
        "agent, or freeze and thaw",
    ),
    "applications at rest by the policy, without a guest": (
        '[policy.p]\napp_consistent = "1h"\n[vm.a]\nfrequency = "1s"\npolicy = "p"\n',
        5,
        "[vm.a] policy: its app_consistent needs a table [vm.a.guest]",
    ),
    "a name with a dot": (
        '[vm."web.example"]\n\napp_consistent = "1h"\n',
        3,
        '[vm."web.example"] app_consistent: this needs a table [vm."web.example".guest] that says',
    ),
    "guest as a value": ("[vm.a]\nguest = 1\n", 2, "[vm.a] guest: this is a table: write [vm.a.guest]"),
    "guest in a policy": ('[policy.p.guest]\nagent = "/q"\n', 1, "[policy.p] guest: unknown table"),
    "guest that says nothing": ("[vm.a.guest]\n", 1, "[vm.a] guest: this says nothing: say agent, or freeze and thaw"),
    "guest with a time alone": (
        '[vm.a.guest]\nfreeze_timeout = "5s"\n',
        2,
        "[vm.a.guest] freeze_timeout: this says nothing: say agent, or freeze and thaw",
    ),
    "a time to freeze beside qemu": (
        '[vm.a.guest]\nqemu = ["q"]\nfreeze_timeout = "5s"\n',
        3,
        "[vm.a.guest] freeze_timeout: this says nothing: say agent, or freeze and thaw",
    ),
    "applications at rest of a guest that is only booted": (
        '[vm.a]\napp_consistent = "1h"\n[vm.a.guest]\nqemu = ["q"]\n',
        2,
        "[vm.a] app_consistent: this needs a table [vm.a.guest] that says how the guest is asked to hold still",
    ),
    "qemu and libvirt": (
        '[vm.a.guest]\nlibvirt = "a.xml"\nqemu = ["q"]\n',
        2,
        "[vm.a.guest] libvirt: not together with qemu: say one of them",
    ),
    "qemu as a text": ('[vm.a.guest]\nqemu = "q -m 1"\n', 2, '[vm.a.guest] qemu: "q -m 1" is not a command'),
    "qemu by a relative path": ('[vm.a.guest]\nqemu = ["./q"]\n', 2, 'qemu: ["./q"] is not a command'),
    "qemu with an unknown placeholder": (
        '[vm.a.guest]\nqemu = [\n  "q",\n  "file={dsk:a.raw}",\n]\n',
        5,
        '[vm.a.guest] qemu: ["q", "file={dsk:a.raw}"] is not a command line for hvfuse: '
        "unknown placeholder {dsk:a.raw}; known are {disk:NAME}, ",
    ),
    "qemu with a placeholder of no disk": ('[vm.a.guest]\nqemu = ["q", "{disk:}"]\n', 2, "placeholder {disk:}; known"),
    "qemu with a name of a name": ('[vm.a.guest]\nqemu = ["q", "{name:x}"]\n', 2, "placeholder {name:x}; known"),
    "qemu with half a brace": ('[vm.a.guest]\nqemu = ["q", "a{b"]\n', 2, "a brace { without its other half in 'a{b'"),
    "qemu with the other half": ('[vm.a.guest]\nqemu = ["q", "}"]\n', 2, "a brace } without its other half in '}'"),
    "qemu that leaves": (
        '[vm.a.guest]\nqemu = ["q", "-daemonize"]\n',
        2,
        "for hvfuse: -daemonize cannot be in it, as hvfuse starts it in the background itself",
    ),
    "qemu that stands still": ('[vm.a.guest]\nqemu = ["q", "-S"]\n', 2, "-S cannot be in it"),
    "libvirt as a list": ('[vm.a.guest]\nlibvirt = ["a"]\n', 2, 'libvirt: ["a"] is not the path of a domain\'s XML'),
    "a hook without a guest": (
        '[vm.a.guest]\nvalidate = ["x"]\nafter_boot = ["x"]\n',
        3,
        "[vm.a.guest] after_boot: qemu or libvirt is missing: there is nothing to boot",
    ),
    "a time to validate alone": (
        '[vm.a.guest]\nqemu = ["q"]\nvalidate_timeout = "1m"\n',
        3,
        "[vm.a.guest] validate_timeout: validate is missing",
    ),
    "too long to validate": (
        '[vm.a.guest]\nvalidate_timeout = "25h"\n',
        2,
        '"25h" is not a duration from "1s" to "24h"',
    ),
    "no command to validate": ("[vm.a.guest]\nvalidate = []\n", 2, "validate: [] is not a command"),
    "addresses as a value": ("[vm.a]\nnetwork = 1\n", 2, "[vm.a] network: this is a table: write [vm.a.network]"),
    "addresses that say nothing": ("[vm.a.network]\n", 1, "[vm.a] network: this says nothing: say ipv4 and ipv4_mask"),
    "addresses in a policy": ('[policy.p.network]\nipv4 = "x"\n', 1, "[policy.p] network: unknown table"),
    "unknown key of addresses": (
        '[vm.a.network_test]\nipv5 = "x"\n',
        2,
        "[vm.a.network_test] ipv5: unknown key; did you mean ipv",
    ),
    "an address without a mask": (
        '[vm.a.network]\nipv4 = "10.0.0.2"\n',
        2,
        "[vm.a.network] ipv4: ipv4_mask is missing: one is of no use without the other",
    ),
    "a mask without an address": ('[vm.a.network]\nipv4_mask = "255.0.0.0"\n', 2, "ipv4_mask: ipv4 is missing"),
    "a gateway without an address": ('[vm.a.network]\nipv6_gateway = "fe80::1"\n', 2, "ipv6_gateway: ipv6 is missing"),
    "an address without a prefix": ('[vm.a.network]\nipv6 = "2001:db8::1"\n', 2, "ipv6: ipv6_prefix is missing"),
    "an address that is none": ('[vm.a.network]\nipv4 = "10.0.0.256"\n', 2, '"10.0.0.256" is not an address of a host'),
    "an address with leading zeroes": ('[vm.a.network]\nipv4 = "10.0.0.01"\n', 2, "is not an address of a host"),
    "an address with a prefix": ('[vm.a.network]\nipv4 = "10.0.0.1/24"\n', 2, "is not an address of a host"),
    "an address of the other kind": (
        '[vm.a.network]\nipv6 = "10.0.0.1"\n',
        2,
        '"10.0.0.1" is not an address of a host',
    ),
    "an address of everybody": ('[vm.a.network]\nipv4 = "224.0.0.1"\n', 2, "is not an address of a host"),
    "an address of nobody": ('[vm.a.network]\nipv6 = "::"\n', 2, "is not an address of a host"),
    "an address of this host": ('[vm.a.network]\nipv4 = "127.0.0.1"\n', 2, "is not an address of a host"),
    "an address with a scope": ('[vm.a.network]\nipv6 = "fe80::1%eth0"\n', 2, "is not an address of a host"),
    "an address as a number": ("[vm.a.network]\nipv4 = 167772161\n", 2, "167772161 is not an address of a host"),
    "a mask with a hole": ('[vm.a.network]\nipv4_mask = "255.0.255.0"\n', 2, '"255.0.255.0" is not a mask'),
    "a mask the wrong way round": ('[vm.a.network]\nipv4_mask = "0.0.0.255"\n', 2, '"0.0.0.255" is not a mask'),
    "a mask of everything": ('[vm.a.network]\nipv4_mask = "0.0.0.0"\n', 2, '"0.0.0.0" is not a mask'),
    "a mask in bits": ('[vm.a.network]\nipv4_mask = "24"\n', 2, '"24" is not a mask'),
    "a prefix too long": ("[vm.a.network]\nipv6_prefix = 129\n", 2, "129 is not a whole number from 1 to 128"),
    "the network as its host": (
        '[vm.a.network]\nipv4 = "10.0.0.255"\nipv4_mask = "255.255.255.0"\n',
        2,
        "ipv4: 10.0.0.255 is the network 10.0.0.0/24 itself or its broadcast address, not a host",
    ),
    "the guest as its own gateway": (
        '[vm.a.network]\nipv4 = "10.0.0.2"\nipv4_mask = "255.255.255.0"\nipv4_gateway = "10.0.0.2"\n',
        4,
        "ipv4_gateway: this is the guest's own address",
    ),
    "three name servers": (
        '[vm.a.network]\ndns = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]\n',
        2,
        "is not a list of at most two addresses",
    ),
    "a name server by name": ('[vm.a.network]\ndns = ["ns1"]\n', 2, "is not an address of a host"),
    "a name server as a text": ('[vm.a.network]\ndns = "10.0.0.1"\n', 2, "is not a list of at most two addresses"),
    "networks as a value": ("network = 1\n", 1, "network: this is a table: write [network]"),
    "one network as a value": ('[network]\nlan = "br0"\n', 2, "[network] lan: this is a table: write [network.lan]"),
    "network that says nothing": (
        "[network.lan]\n",
        1,
        "[network] lan: this says nothing: say source, target and test",
    ),
    "network with a brace": ('[network."a}"]\n', 1, "a}: this cannot be a network's name: it holds a brace"),
    "unknown key of a network": (
        '[network.lan]\ntests = "b"\n',
        2,
        "[network.lan] tests: unknown key; did you mean test?",
    ),
    "network without a name": (
        '[network.lan]\ntarget = ""\n',
        2,
        '[network.lan] target: "" is not the name of a bridge',
    ),
    "network like an option": ('[network.lan]\ntest = "-x"\n', 2, '"-x" is not the name of a bridge'),
    "tests on the network of the real one": (
        '[network.lan]\nsource = "br1"\ntarget = "br0"\ntest = "br0"\n',
        4,
        "[network.lan] test: this is the target too: a guest on test would be on the network of the real one",
    ),
    "tests on the network that it comes from": (
        '[network.lan]\ntest = "br0"\nsource = "br0"\n',
        2,
        "[network.lan] test: this is the source too",
    ),
    "agent and a command": (
        '[vm.a.guest]\nagent = "/q"\nthaw = ["x"]\n',
        3,
        "[vm.a.guest] thaw: not together with agent: say agent, or freeze and thaw",
    ),
    "freeze alone": ('[vm.a.guest]\nfreeze = ["x"]\n', 2, "[vm.a.guest] freeze: thaw is missing"),
    "thaw alone": ('[vm.a.guest]\n\nthaw = ["x"]\n', 3, "[vm.a.guest] thaw: freeze is missing"),
    "agent by a relative path": ('[vm.a.guest]\nagent = "q"\n', 2, '[vm.a.guest] agent: "q" is not the absolute path'),
    "command as a text": (
        '[vm.a.guest]\nfreeze = "x y"\n',
        2,
        '[vm.a.guest] freeze: "x y" is not a command and its arguments, such as [',
    ),
    "command of nothing": ("[vm.a.guest]\nfreeze = []\n", 2, "[vm.a.guest] freeze: [] is not a command"),
    "command of no name": ('[vm.a.guest]\nthaw = ["", "x"]\n', 2, '[vm.a.guest] thaw: ["", "x"] is not a command'),
    "command by a relative path": ('[vm.a.guest]\nfreeze = ["bin/x"]\n', 2, "is not a command"),
    "command with a number": ('[vm.a.guest]\nfreeze = ["x", 1]\n', 2, '["x", 1] is not a command'),
    "freezes too long": ('[vm.a.guest]\nfreeze_timeout = "61s"\n', 2, '"61s" is not a duration from "1s" to "60s"'),
    "unknown key of a guest": (
        '[vm.a.guest]\nagnet = "/q"\n',
        2,
        "[vm.a.guest] agnet: unknown key; did you mean agent?",
    ),
    "interval too short": ('[monitoring]\ninterval = "59m"\n', 2, '[monitoring] interval: "59m" is not a duration'),
    "interval too long": ('[monitoring]\ninterval = "8d"\n', 2, 'from "1h" to "7d"'),
    "events kept too short": ('[monitoring]\nkeep_events = "23h"\n', 2, 'keep_events: "23h" is not'),
    "events kept too long": ('[monitoring]\nkeep_events = "367d"\n', 2, 'from "1d" to "366d"'),
    "nobody to tell by a text": ('[monitoring]\nnotify = "mail"\n', 2, '[monitoring] notify: "mail" is not a command'),
    "key of monitoring": (
        "[monitoring]\nnotified = []\n",
        2,
        "[monitoring] notified: unknown key; did you mean notify?",
    ),
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
    "table twice": ("[vm.a]\n[retention]\n[vm.a]\n", 3, "[vm.a] stands here for the second time"),
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


def test_each_setting_says_where_it_comes_from() -> None:
    text = (
        '[replication]\nfrequency = "1m"\ncompression = 2\n\n[policy.gold]\ncompression = 9\ndaily = 7\n'
        '[vm.web]\npolicy = "gold"\ndaily = 3\nthrottle = [\n  "1MB/s",\n]\n[vm.web.guest]\nagent = "/q"\n'
    )
    parse("hvfuse.toml", text)
    origins = Origins(text)
    found = {each.key: (each.value, each.source) for each in origins.of("web")}
    assert found == {
        **{key: (known.default, "default") for key, known in VM.items()},
        "frequency": ("1m", "[replication], line 2"),
        "compression": (9, "[policy.gold], line 6"),
        "daily": (3, "[vm.web], line 10"),
        "throttle": (["1MB/s"], "[vm.web], line 13"),
        "guest.agent": ("/q", "[vm.web.guest], line 15"),
        "guest.freeze_timeout": ("10s", "default"),
    }
    booted = Origins('[vm.a.guest]\nvalidate = ["v"]\n[vm.a.network]\ndns = ["192.0.2.1"]\n').of("a")
    assert {each.key: (each.value, each.source) for each in booted if "." in each.key} == {
        "guest.validate": (["v"], "[vm.a.guest], line 2"),
        "guest.validate_timeout": ("5m", "default"),
        "network.dns": (["192.0.2.1"], "[vm.a.network], line 4"),
    }
    general = {each.key: (each.value, each.source) for each in origins.of(None)}
    assert "exclude" not in general
    assert general["compression"] == (2, "[replication], line 3")
    assert origins.of("other")[0].source == "default"


PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()


def test_the_page_for_users_tells_of_each_key() -> None:
    for key in (*PATHS, *VM, "policy", *GUEST, *BOOT, *ADDRESSES, *NETWORK, *MONITORING):
        assert f"`{key}`" in PAGE, key


def test_the_example_of_the_page_for_users_is_sound() -> None:
    example = PAGE.split("## An example")[1].split("\n`db01`")[0]
    text = "\n".join(line.removeprefix("    ") for line in example.splitlines()[1:])
    parsed = parse("docs/policy.md", text)
    assert set(parsed.policies) == {"gold", "bulk"}
    assert parsed.policy("db01").frequency == 5.0
    assert parsed.policy("files").exclude == {"swap.vhd"}
