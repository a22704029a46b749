"""A VM's definition: the same settings make the same document, and mean the same where it is adopted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvfuse.control import definition
from hvfuse.control.config import VmPolicy
from hvfuse.control.config_file import ConfigFile, load
from hvfuse.control.config_layers import with_definitions
from hvfuse.control.config_text import parse
from hvfuse.control.definition import Definition
from hvfuse.control.home import Home
from hvfuse.errors import CorruptError, NotFoundError, UnsupportedError, UsageError
from tests.dying import done_until

GOLD = """\
[replication]
protect = "manual"
compression = 3
initial = "seed"
[policy.gold]
frequency = "5s"
app_consistent = "1h"
keep_all = "6h"
[vm.web]
policy = "gold"
hourly = 48
exclude = ["b.raw", "a.raw"]
[vm.web.guest]
freeze = ["/bin/freeze", "web ☃"]
thaw = ["/bin/thaw"]
"""
SAME = """\
[vm.web.guest] # said in another order, and elsewhere
thaw = ["/bin/thaw"]
freeze = ["/bin/freeze", "web ☃"]
[vm.other]
frequency = "9s"
[vm.web]
exclude = ["a.raw", "b.raw", "a.raw"]
app_consistent = "1h"
compression = 3
hourly = 48
frequency = "5s"
[retention]
keep_all = "6h"
"""


def home_at(root: Path) -> Home:
    return load(str(root)).home(str(root))


def travelling(policy: VmPolicy) -> VmPolicy:
    """What of a policy travels; the rest as by default."""
    return dataclasses.replace(policy, protect=VmPolicy().protect, initial=VmPolicy().initial)


def adopted_policy(found: Definition, text: str = "", vm: str = "web") -> VmPolicy:
    layers = with_definitions(parse("t.toml", text), text, {vm: ("DEFINITION", found)})
    assert layers.faults == {}
    return layers.config.policy(vm)


def test_the_same_settings_make_the_same_bytes_however_they_are_said() -> None:
    first, second = (definition.of(text, "/nowhere", "web").encode() for text in (GOLD, SAME))
    assert first == second
    assert definition.of(SAME, "/nowhere", "other").encode() != first
    assert Definition.decode(first).digest() == definition.of(GOLD, "/nowhere", "web").digest()


def test_what_is_of_no_use_elsewhere_stays_at_home() -> None:
    document = json.loads(definition.of(GOLD + '[paths]\nstore = "/secret"\n', "/nowhere", "web").encode())
    assert not {"protect", "initial", "policy", "target"} & document["settings"].keys()
    assert "/secret" not in str(document)
    assert document["settings"]["resync_window"] == "18:30-06:00"  # a default here need not be one there


def toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_DURATIONS = st.sampled_from(["1s", "30s", "2m", "1h"])
_KEYS = {
    "frequency": _DURATIONS,
    "compression": st.integers(0, 22),
    "throttle": st.sampled_from(["none", "10MB/s", ["mon-fri 08:00-18:00 10MB/s", "50MB/s"]]),
    "soft_limit": st.integers(1, 40),
    "hard_limit": st.integers(50, 900),
    "resync": st.sampled_from(["auto", "manual"]),
    "resync_window": st.sampled_from(["always", "22:00-05:00"]),
    "digest": st.sampled_from(["xxh3", "blake3"]),
    "protect": st.sampled_from(["auto", "manual"]),
}
_KEPT = {"keep_all": _DURATIONS, "hourly": st.integers(0, 100), "daily": st.integers(0, 100)}
_OWN = {
    "app_consistent": st.sampled_from(["1h", "off"]),
    "exclude": st.lists(st.sampled_from(["a.raw", "ä.vhd", 'q".raw']), max_size=3),
}
_GUESTS = st.sampled_from(
    [{"agent": "/run/☃.sock"}, {"freeze": ["/f"], "thaw": ["/t", "\x7f"], "freeze_timeout": "5s"}]
)


def some(keys: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


@st.composite
def configurations(draw: st.DrawFn) -> str:
    tables = {
        "replication": draw(some(_KEYS)),
        "retention": draw(some(_KEPT)),
        "policy.gold": draw(some({**_KEYS, **_KEPT})),
        "vm.web": draw(some({**_KEYS, **_KEPT, **_OWN})) | draw(st.sampled_from([{}, {"policy": "gold"}])),
        "vm.web.guest": draw(_GUESTS),
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {toml(value)}" for key, value in table.items())]
    return "\n".join(lines).replace("\x7f", "\\u007f")


@given(text=configurations(), there=configurations())
@settings(max_examples=60, deadline=None)
def test_a_definition_means_the_same_elsewhere_and_bytes_come_back_as_they_were(text: str, there: str) -> None:
    found = definition.of(text, "/nowhere", "web")
    data = found.encode()
    again = Definition.decode(data)
    assert (again, again.encode()) == (found, data)
    general = there[: there.index("[vm.web]")]  # what the other home says in general counts less
    assert travelling(adopted_policy(again, general)) == travelling(parse("s.toml", text).policy("web"))
    # A chain of homes: what travels on from there is what came.
    assert definition.of(general, "/nowhere", "web", adopted=again).encode() == data


def test_what_the_home_says_of_the_vm_wins_key_by_key() -> None:
    found = definition.of(GOLD, "/nowhere", "web")
    text = (
        '[replication]\nfrequency = "7m"\ncompression = 9\n[policy.local]\nhourly = 1\ndaily = 2\n'
        '[vm.web]\npolicy = "local"\ndaily = 3\n[vm.web.guest]\nagent = "/run/a.sock"\n'
    )
    policy = adopted_policy(found, text)
    assert (policy.frequency, policy.compression) == (5.0, 3)
    assert (policy.retention.keep_all_seconds, policy.retention.hourly, policy.retention.daily) == (21600, 1, 3)
    assert policy.guest is not None and (policy.guest.agent, policy.guest.freeze) == ("/run/a.sock", ())
    assert adopted_policy(found, text, vm="web2").retention.hourly == 48


def test_a_newer_source_is_understood_as_far_as_that_goes_and_a_newer_version_refused() -> None:
    document = json.loads(definition.of(GOLD, "/nowhere", "web").encode())
    document["weather"] = {"rain": 1}
    document["settings"]["colour"] = "red"
    document["tables"]["guest"]["smell"] = 3
    document["tables"]["moods"] = {"x": 1}
    document["networks"]["lan"] = {"place": "br0"}
    found = Definition.decode(json.dumps(document).encode())
    layers = with_definitions(parse("t", ""), "", {"web": ("P", found)})
    assert layers.config.policy("web").frequency == 5.0
    assert {"vm.web.colour", "vm.web.moods", "vm.web.guest.smell"} <= set(layers.unknown["web"])
    on = definition.of("", "/nowhere", "web", adopted=found)  # and it travels on
    assert (on.settings["colour"], on.tables["moods"], on.networks["lan"]) == ("red", {"x": 1}, {"place": "br0"})
    document["version"] = 2
    with pytest.raises(UnsupportedError, match="version 2"):
        Definition.decode(json.dumps(document).encode())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("version"), lambda d: d.update(version=True), lambda d: d.update(version="1"),
        lambda d: d.pop("settings"), lambda d: d.update(settings=[]), lambda d: d.update(tables={"guest": 3}),
        lambda d: d.update(files={"guest.libvirt": {"name": "../x", "data": ""}}),
        lambda d: d.update(files={"guest.libvirt": {"name": "x", "data": "!"}}),
        lambda d: d.update(files={"guest.libvirt": {"name": "x"}}), lambda d: d.update(point=3),
    ],
)  # fmt: skip
def test_what_is_no_definition_is_refused(change: Any) -> None:
    document = json.loads(definition.of(GOLD, "/nowhere", "web").encode())
    change(document)
    with pytest.raises(CorruptError):
        Definition.decode(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b"[" * 100_000, b'{"version":1'])
def test_so_is_other_text(data: bytes) -> None:
    with pytest.raises(CorruptError):
        Definition.decode(data)


def with_file(data: bytes, path: str = "sub/web.xml", **more: str) -> Definition:
    """As `of` makes one of a home that names such a file."""
    base = definition.of(GOLD, "/nowhere", "web")
    file = definition.DefinitionFile(os.path.basename(path), data)
    return dataclasses.replace(
        base, tables={**base.tables, "guest": {**base.tables["guest"], "libvirt": path}},
        files={"guest.libvirt": file}, **more,
    )  # fmt: skip


def test_a_file_is_taken_along_if_it_can_be_read_and_is_not_too_long(tmp_path: Path) -> None:
    text = '[vm.web.guest]\nlibvirt = "xml/web.xml"\n'
    assert definition.of(text, str(tmp_path), "web").files["guest.libvirt"].fault == "No such file or directory"
    (tmp_path / "xml").mkdir()
    path = tmp_path / "xml" / "web.xml"
    for data in (b"", b"<domain/>\xff\x00", bytes(definition.MAX_FILE_BYTES)):
        path.write_bytes(data)
        found = Definition.decode(definition.of(text, str(tmp_path), "web").encode())
        (file,) = found.files.values()
        assert (file.name, file.data, file.fault) == ("web.xml", data, None)
    path.write_bytes(bytes(definition.MAX_FILE_BYTES + 1))
    (file,) = Definition.decode(definition.of(text, str(tmp_path), "web").encode()).files.values()
    assert file.data is None and "more than 1048576" in (file.fault or "")
    path.unlink()
    os.mkfifo(path)  # nobody is waited for
    (file,) = definition.of(text, str(tmp_path), "web").files.values()
    assert file.data == b""


def test_an_adopted_definition_applies_at_once_and_no_longer_once_it_is_forgotten(tmp_path: Path) -> None:
    file, home = ConfigFile(str(tmp_path)), home_at(tmp_path)
    assert file.current().policy("web").frequency == 30
    for frequency in ("5s", "6s", "7s", "8s"):  # faster than the times of files can tell
        data = definition.of(f'[vm.web]\nfrequency = "{frequency}"\n', "/nowhere", "web").encode()
        definition.adopt(home, "web", data, point="p1")
        assert file.current().policy("web").frequency == float(frequency[0])
        assert load(str(tmp_path)).policy("web") == file.current().policy("web")
    assert file.current() is file.current()
    assert file.applied().definitions["web"].point == "p1"
    (tmp_path / "hvfuse.toml").write_text('[vm.web]\nfrequency = "9s"\n[vm.x]\nfrequency = "2s"\n')
    fresh = ConfigFile(str(tmp_path))
    assert (fresh.current().policy("web").frequency, fresh.current().policy("x").frequency) == (9.0, 2.0)
    (tmp_path / "hvfuse.toml").unlink()
    definition.forget(home, "web")
    assert file.current().policy("web").frequency == 30 and load(str(tmp_path)).adopted == {}
    assert os.listdir(home.state_dir("web")) == []
    definition.forget(home, "web")


def test_a_faulty_or_newer_one_is_told_and_defaults_apply(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, home = ConfigFile(str(tmp_path)), home_at(tmp_path)
    good = definition.of('[vm.web]\nfrequency = "5s"\n', "/nowhere", "web").encode()
    definition.adopt(home, "web", good)
    path = Path(definition.path_of(home, "web"))
    for bad, why in (
        (good.replace(b'"version":1', b'"version":2'), "version 2"),
        (good.replace(b'"5s"', b'"5 parsecs"'), "frequency"),
        (good[:-9], "no definition of a VM"),
    ):
        beside = path.parents[1] / ".beside"
        beside.write_bytes(bad)
        os.replace(beside, path)
        assert file.current().policy("web").frequency == 30
        assert file.fault is not None and file.fault.startswith(str(path)) and why in file.fault
        assert load(str(tmp_path)).policy("web").frequency == 30
        assert ConfigFile(str(tmp_path)).current().policy("other") == VmPolicy()
    definition.adopt(home, "web", good)
    assert file.current().policy("web").frequency == 5 and file.fault is None
    assert (
        len({record.getMessage() for record in caplog.records}) == 3 and len(caplog.records) == 6
    )  # by both, once each


def test_a_damaged_or_newer_document_is_not_adopted(tmp_path: Path) -> None:
    with pytest.raises(CorruptError):
        definition.adopt(home_at(tmp_path), "web", b"{}")
    with pytest.raises(UsageError):
        definition.adopt(home_at(tmp_path), "../web", definition.of("", "/", "web").encode())
    assert list(tmp_path.iterdir()) == []


def test_killed_at_every_step_the_old_one_applies_or_the_new_one_each_with_its_own_file(tmp_path: Path) -> None:
    old, new = with_file(b"old", point="p1"), with_file(b"new")
    seen = set()
    for step in itertools.count(1):
        root = tmp_path / str(step)
        root.mkdir()
        home = home_at(root)
        definition.adopt(home, "web", old.encode(), point="p1")
        ended = done_until(step, lambda home=home: definition.adopt(home, "web", new.encode(), point="p2"))
        found = definition.load(home, "web")
        path = found.tables["guest"]["libvirt"]
        assert path.startswith(os.path.join(home.state_dir("web"), "definition.d/")) and path.endswith("/web.xml")
        assert (found.point, Path(path).read_bytes()) in (("p1", b"old"), ("p2", b"new"))
        seen.add(found.point)
        definition.adopt(home, "web", new.encode(), point="p2")
        assert len(os.listdir(os.path.join(home.state_dir("web"), "definition.d"))) == 1
        shutil.rmtree(root)
        if ended:
            break
    assert seen == {"p1", "p2"} and step > 8
    with pytest.raises(NotFoundError):
        definition.load(home_at(tmp_path), "web")
