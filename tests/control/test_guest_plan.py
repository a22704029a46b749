"""What is started for a guest on disks that were failed over; and never one on test on the network of the real one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest

from hvfuse.control.guest_plan import BootPlan, Kind, plan_boot
from hvfuse.control.guest_settings import Addresses, BootSettings, Mode, Network, Site, networks_at
from hvfuse.errors import UsageError

DISKS = {"root.raw": "/v/root.raw", "a,b.raw": '/v/a,b "x".raw'}
NETWORKS = {"lan": "br1", "back,up": "br,2"}
MONITOR = ("-qmp", "unix:qmp.sock,server=on,wait=off", "-display", "none")


def planned(*words: str, mode: Mode = Mode.PLANNED, **changes: Any) -> BootPlan:
    settings = changes.pop("settings", BootSettings(qemu=("q", *words)))
    fields: dict[str, Any] = {
        "vm": "web,01",
        "mode": mode,
        "point": "1-7",
        "directory": "/v",
        "disks": DISKS,
        "state_dir": "/s/boot",
        "networks": NETWORKS,
        "addresses": None,
    }
    return plan_boot(settings, **{**fields, **changes})


def test_placeholders_become_what_they_stand_for() -> None:
    plan = planned(
        "-drive", "file={disk:root.raw},if=virtio", "-netdev", "bridge,id=n,br={network:lan}", "{{{name}}}", "x{name}"
    )
    assert plan.kind is Kind.QEMU
    assert plan.command == (
        *("q", "-drive", "file=/v/root.raw,if=virtio", "-netdev", "bridge,id=n,br=br1", "{web,01}", "xweb,01"),
        *("-name", "web,,01", *MONITOR),
    )
    assert plan.name == "web,01"


def test_a_comma_in_a_value_ends_no_option() -> None:
    plan = planned(
        *("-drive", "file={disk:a,b.raw},format=raw", "-hda", "{disk:a,b.raw}", "-nic", "bridge,br={network:back,up}"),
        *("-blockdev", '{{"driver":"file","filename":"{disk:a,b.raw}"}}', "-name", "{name}"),
    )
    assert plan.command[1:] == (
        *("-drive", 'file=/v/a,,b "x".raw,format=raw', "-hda", '/v/a,b "x".raw', "-nic", "bridge,br=br,,2"),
        *("-blockdev", '{"driver":"file","filename":"/v/a,b \\"x\\".raw"}', "-name", "web,,01", *MONITOR),
    )


@pytest.mark.parametrize(
    ("words", "added"),
    [
        ((), ("-name", "web,,01", *MONITOR)),
        (("-nographic", "-name", "x"), MONITOR[:2]),
        (("--vnc", ":1", "--name", "x"), MONITOR[:2]),
        (("-name", "x", "-qmp", "unix:{state}/qmp.sock,server=on,wait=off"), MONITOR[2:]),
        (("-name", "x", "-qmp", "tcp:localhost:4444,server=on"), MONITOR),
    ],
)
def test_what_a_command_line_lacks_is_added(words: tuple[str, ...], added: tuple[str, ...]) -> None:
    assert planned(*words).command[1 + len(words) :] == added


def test_a_disk_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"\[vm\.web,01\.guest\]: \{disk:os\.raw\}: .* no disk os\.raw here; it has: a,b"
    ):
        planned("{disk:os.raw}")


def test_a_network_that_is_not_mapped_is_refused_with_the_lines_to_add() -> None:
    for mode, key in ((Mode.TEST, "test"), (Mode.UNPLANNED, "target")):
        with pytest.raises(UsageError, match=r"\{network:lan\}: nothing says what the network lan is") as caught:
            planned("-nic", "bridge,br={network:lan}", mode=mode, networks={})
        assert caught.value.hint is not None
        assert f'[network.lan] {key} = "' in caught.value.hint


def test_networks_are_those_of_the_site() -> None:
    networks = {"lan": Network(source="br0", target="br1", test="br9"), "dmz": Network(target="br2")}
    assert networks_at(Site.SOURCE, networks) == {"lan": "br0"}
    assert networks_at(Site.TARGET, networks) == {"lan": "br1", "dmz": "br2"}
    assert networks_at(Site.TEST, networks) == {"lan": "br9"}


ISOLATED = (
    *("bridge,br={network:lan}", "tap,id=n,ifname={network:lan},script=no", "user,id=n,restrict=on", "none"),
    *('{{"type":"bridge","id":"n","br":"{network:lan}"}}', "bridge,id=n,br={network:back,up}"),
)
WAYS_OUT = (
    *("user", "user,id=n", "user,restrict=off", "bridge,id=n", "bridge,br=br0", "tap,ifname=tap0", "tap"),
    *("bridge,br=br0,id={network:lan}", "vde", "bridge,br=br0{network:lan}", '{{"type":"user","id":"n"}}'),
)


@pytest.mark.parametrize("value", ISOLATED)
@pytest.mark.parametrize("option", ["-netdev", "-nic", "--net"])
def test_a_guest_on_test_is_given_networks_of_tests(option: str, value: str) -> None:
    plan = planned(option, value, mode=Mode.TEST)
    assert (plan.name, plan.command[3:5]) == ("web,01 - Test", ("-name", "web,,01 - Test"))
    assert "none" not in plan.command[3 : plan.command.index("-display")]


@pytest.mark.parametrize("value", WAYS_OUT)
@pytest.mark.parametrize("option", ["-netdev", "-nic", "--net"])
def test_a_guest_on_test_is_given_no_other(option: str, value: str) -> None:
    with pytest.raises(UsageError, match="a guest on test must not be on the network of the real one"):
        planned(option, value, mode=Mode.TEST)
    assert planned(option, value).command[1] == option, "but the real one may be on any"


def test_a_guest_on_test_of_which_no_network_is_said_gets_none() -> None:
    assert planned("-m", "1", mode=Mode.TEST).command[-2:] == ("-nic", "none")
    assert "-nic" not in planned("-nodefaults", mode=Mode.TEST).command
    assert "-nic" not in planned("-m", "1").command


def test_hooks_are_told_everything_and_what_is_not_said_is_empty() -> None:
    plan = planned(mode=Mode.TEST, addresses=Addresses(ipv6="2001:db8::1", ipv6_prefix=64, dns=("192.0.2.1",)))
    assert plan.environment == {
        "HVFUSE_VM": "web,01",
        "HVFUSE_GUEST_NAME": "web,01 - Test",
        "HVFUSE_MODE": "test",
        "HVFUSE_POINT": "1-7",
        "HVFUSE_DISKS": "/v",
        "HVFUSE_STATE": "/s/boot",
        "HVFUSE_IPV4": "",
        "HVFUSE_IPV4_MASK": "",
        "HVFUSE_IPV4_GATEWAY": "",
        "HVFUSE_IPV6": "2001:db8::1",
        "HVFUSE_IPV6_PREFIX": "64",
        "HVFUSE_IPV6_GATEWAY": "",
        "HVFUSE_DNS1": "192.0.2.1",
        "HVFUSE_DNS2": "",
        "HVFUSE_NETWORKS": json.dumps({"back,up": "br,2", "lan": "br1"}),
    }


def test_disks_can_be_validated_without_a_guest() -> None:
    plan = planned(settings=BootSettings(validate=("fsck",), validate_timeout=7))
    assert (plan.kind, plan.command, plan.domain) == (Kind.NOTHING, (), "")
    assert (plan.validate, plan.validate_timeout) == (("fsck",), 7)


XML = """
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web01</name><uuid>8E8A5B2C-0000-4000-8000-000000000001</uuid>
  <title>{name} {{}}</title>
  <devices>
    <disk type='file'><source file='{disk:a,b.raw}'/><target dev='vda'/></disk>
    <interface type='bridge'><source bridge='{network:lan}'/></interface>
  </devices>
</domain>"""
LIBVIRT = BootSettings(libvirt="web01.xml")


def domain_of(plan: BootPlan) -> ElementTree.Element:
    assert plan.kind is Kind.LIBVIRT
    return ElementTree.fromstring(plan.domain)


def test_a_domain_is_filled_in_and_keeps_its_identity() -> None:
    plan = planned(settings=LIBVIRT, definition=XML)
    found = domain_of(plan)
    assert found.findtext("title") == "web,01 {}"
    assert found.find("devices/disk/source").attrib == {"file": DISKS["a,b.raw"]}  # type: ignore[union-attr]
    assert found.find("devices/interface/source").attrib == {"bridge": "br1"}  # type: ignore[union-attr]
    assert (found.findtext("name"), found.findtext("uuid")) == ("web,01", plan.uuid)
    assert plan.uuid == "8e8a5b2c-0000-4000-8000-000000000001"


def test_a_domain_on_test_has_a_name_and_an_identity_of_its_own() -> None:
    test = planned(settings=LIBVIRT, definition=XML, mode=Mode.TEST)
    found = domain_of(test)
    assert (found.findtext("name"), found.findtext("uuid")) == ("web,01 - Test", test.uuid)
    assert test.uuid != planned(settings=LIBVIRT, definition=XML).uuid
    assert test == planned(settings=LIBVIRT, definition=XML, mode=Mode.TEST), "and the same one each time"
    other = planned(settings=LIBVIRT, definition=XML, mode=Mode.TEST, state_dir="/s/other")
    assert other.uuid != test.uuid, "several points can be on test at once"
    bare = planned(settings=LIBVIRT, definition="<domain><devices/></domain>")
    assert (domain_of(bare).findtext("name"), domain_of(bare).findtext("uuid")) == ("web,01", bare.uuid)


INTERFACES = (
    "<interface type='network'><source network='default'/></interface>",
    "<interface type='network'><source network='default' portgroup='{network:lan}'/></interface>",
    "<interface type='bridge'><source bridge='br0-{network:lan}'/></interface>",
    "<interface type='direct'><source dev='eth0' mode='bridge'/></interface>",
    "<interface type='user'/>",
    "<interface type='hostdev'><source><address type='pci'/></source></interface>",
)


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_domain_on_test_is_given_no_network_of_the_real_one(interface: str) -> None:
    text = f"<domain><devices>{interface}</devices></domain>"
    with pytest.raises(UsageError, match=r"web01\.xml: <interface type=.*a guest on test must not be") as caught:
        planned(settings=LIBVIRT, definition=text, mode=Mode.TEST)
    assert "[network.NAME] test" in str(caught.value.hint)
    planned(settings=LIBVIRT, definition=text)


def test_a_domain_on_test_cannot_be_given_words_for_qemu() -> None:
    text = XML.replace("<title>", "<qemu:commandline><qemu:arg value='-nic'/></qemu:commandline><title>")
    with pytest.raises(UsageError, match="qemu:arg"):
        planned(settings=LIBVIRT, definition=text, mode=Mode.TEST)
    assert "<qemu:arg" in planned(settings=LIBVIRT, definition=text).domain


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "web01.xml: this is not XML"),
        ("<domain>", "web01.xml: this is not XML"),
        ("<network/>", "web01.xml: this is <network>, not the <domain> of a guest"),
        ("<domain><uuid>x</uuid></domain>", "web01.xml: <uuid>: 'x' is none"),
        ("<domain><name>{nme}</name></domain>", "web01.xml: unknown placeholder {nme}"),
        ("<domain a='{disk:x}'/>", "web01.xml: [vm.web,01.guest]: {disk:x}: web,01 has no disk x"),
    ],
)
def test_a_definition_that_is_none_is_named(text: str, fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(settings=LIBVIRT, definition=text)
    assert str(caught.value).startswith(fault)


def test_an_unmapped_network_of_a_domain_tells_the_lines_to_add() -> None:
    with pytest.raises(UsageError, match=r"web01\.xml: .*\{network:lan\}") as caught:
        planned(settings=replace(LIBVIRT), definition=XML, mode=Mode.TEST, networks={})
    assert "[network.lan] test = " in str(caught.value.hint)
