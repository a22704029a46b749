"""A VM's definition: what its home's configuration says of it, in one document that travels with its recovery points.

The document is UTF-8 JSON without spaces, its keys in order, so that the same settings make the same bytes:

    "version"   VERSION; a higher one is refused
    "settings"  the VM's effective keys, as a [vm.NAME] would say them, defaults too
    "tables"    tables of the VM's, such as [vm.NAME.guest], as the file has them
    "networks"  [network.NAME] by their names, as the file has them
    "files"     by the path of the key that names it ("guest.libvirt"): "name", and "data" (its bytes in base64) or
                "fault", why it could not be taken along
    "point"     only where it was adopted: the recovery point with which it came

What else a newer hvfuse may have put there is passed over. Left at home are [paths] and [monitoring], whether the VM is
protected by itself, how its first copy begins, and where it is replicated to.

On the home where the VM is failed over, an adopted definition lies beneath what that home's own hvfuse.toml says of the
VM (`hvfuse.control.config_layers`):

    HOME/state/vms/VM/definition                  the document
    HOME/state/vms/VM/definition.d/DIGEST/NAME    its files

It is put in place by one rename out of HOME/state/vms, so that the time of that directory tells of every change. The
files lie there before it.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from hvfuse.control import config_values as keys
from hvfuse.control.config_layers import Table, layered
from hvfuse.control.home import Home, name_fault
from hvfuse.errors import CorruptError, NotFoundError, UnsupportedError, UsageError

VERSION = 1
MAX_FILE_BYTES = 1 << 20
"""Of each file that travels along."""
MAX_BYTES = 4 << 20
"""Of the document."""

LEFT_AT_HOME = frozenset({"protect", "initial", "policy", "target"})
"""Keys that say nothing elsewhere; `policy` has been resolved."""
_FILE_KEYS = (("guest", "libvirt"),)
_UNNAMED = "domain.xml"
_DOCUMENT, _FILES = "definition", "definition.d"


@dataclass(frozen=True, slots=True)
class DefinitionFile:
    """A file that a definition names. `name`: without directories. `data`: None where `fault` says why it is away."""

    name: str
    data: bytes | None
    fault: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """Fields as in the module's docstring. `point`: "" where nobody says; it does not count for the digest."""

    settings: Table = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    networks: Mapping[str, Table] = field(default_factory=dict)
    files: Mapping[str, DefinitionFile] = field(default_factory=dict)
    point: str = ""

    def encode(self) -> bytes:
        """The document. Raises UsageError if it is too long to travel."""
        data = _packed(self._fields())
        if len(data) > MAX_BYTES:
            raise UsageError(f"what is said of the VM takes {len(data)} bytes, more than {MAX_BYTES}")
        return data

    def _fields(self) -> dict[str, Any]:
        files = {key: _file_fields(file) for key, file in self.files.items()}
        parts = {"settings": self.settings, "tables": self.tables, "networks": self.networks, "files": files}
        return {"version": VERSION, **parts}

    def digest(self) -> str:
        """What recovery points name it by: 32 hexadecimal digits."""
        return xxhash.xxh3_128_hexdigest(self.encode())

    def kept(self) -> bytes:
        """The document, and the recovery point with which it came."""
        return _packed({**self._fields(), "point": self.point})

    @classmethod
    def decode(cls, data: bytes) -> Definition:
        """Raises UnsupportedError (a higher version), CorruptError (not such a document)."""
        try:
            document = json.loads(data)
            version = document["version"]
            if not isinstance(version, int) or isinstance(version, bool) or version < 1:
                raise ValueError("no version")
            if version > VERSION:
                raise UnsupportedError(
                    f"a definition of version {version}; this hvfuse knows version {VERSION}",
                    hint="use the hvfuse that wrote it, or a newer one",
                )
            return cls(
                settings=_table(document["settings"]),
                tables=_tables(document["tables"]),
                networks=_tables(document["networks"]),
                files={key: _file(value) for key, value in _tables(document["files"]).items()},
                point=_text(document.get("point", "")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptError(f"this is no definition of a VM: {error}") from None

    def at(self, folder: str) -> Definition:
        """The same with its files in `folder`: what names them says so."""
        tables = {name: dict(table) for name, table in self.tables.items()}
        for table, key in _FILE_KEYS:
            if (file := self.files.get(f"{table}.{key}")) is not None and table in tables:
                tables[table][key] = os.path.join(folder, file.name)
        return replace(self, tables=tables)


def _packed(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _file_fields(file: DefinitionFile) -> dict[str, str]:
    if file.data is None:
        return {"name": file.name, "fault": file.fault or ""}
    return {"name": file.name, "data": base64.b64encode(file.data).decode()}


def _file(value: Table) -> DefinitionFile:
    name = _text(value["name"])
    if name_fault(name) is not None:
        raise ValueError(f"a file's name {name_fault(name)}")
    if "data" not in value:
        return DefinitionFile(name, None, _text(value["fault"]))
    try:
        data = base64.b64decode(_text(value["data"]), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: {error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"{name} has more than {MAX_FILE_BYTES} bytes")
    return DefinitionFile(name, data)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is something else")
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a table is something else")
    return value


def _tables(value: Any) -> dict[str, dict[str, Any]]:
    return {name: _table(table) for name, table in _table(value).items()}


# At the source --------------------------------------------------------------------------------------------------


def of(text: str, root: str, vm: str, *, adopted: Definition | None = None) -> Definition:
    """What the configuration `text`, found without fault, of the home at `root` says of a VM. `adopted`: what lies
    beneath it. A file that cannot be read is told in its place: replication goes on without it."""
    document = layered(tomllib.loads(text), vm, adopted)
    own = document.get("vm", {}).get(vm, {})
    tables = {name: value for name, value in own.items() if isinstance(value, dict)}
    return Definition(
        settings=_settings(document, own),
        tables=tables,
        networks=document.get("network", {}),
        files={
            f"{table}.{key}": _read(root, tables[table][key])
            for table, key in _FILE_KEYS
            if key in tables.get(table, {})
        },
    )


def _settings(document: Table, own: Table) -> dict[str, Any]:
    found = {key: known.default for key, known in keys.VM.items()}
    for table in (document.get("replication", {}), document.get("retention", {}), own):
        found.update((key, value) for key, value in table.items() if not isinstance(value, dict))
    if "exclude" in found:
        found["exclude"] = sorted(set(found["exclude"]))
    return {key: value for key, value in found.items() if key not in LEFT_AT_HOME}


def file_paths(text: str, root: str, vm: str, *, adopted: Definition | None = None) -> list[str]:
    """The files that `of` would take along."""
    own = layered(tomllib.loads(text), vm, adopted).get("vm", {}).get(vm, {})
    return [os.path.join(root, own[table][key]) for table, key in _FILE_KEYS if key in own.get(table, {})]


def _read(root: str, path: str) -> DefinitionFile:
    """A file, as far as it can be had."""
    name = os.path.basename(path)
    if name_fault(name) is not None:
        name = _UNNAMED
    try:
        # Without waiting for a pipe's other end.
        fd = os.open(os.path.join(root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        return DefinitionFile(name, None, getattr(error, "strerror", None) or str(error))
    if len(data) > MAX_FILE_BYTES:
        return DefinitionFile(name, None, f"it has more than {MAX_FILE_BYTES} bytes")
    return DefinitionFile(name, data)


# Where the VM was failed over to --------------------------------------------------------------------------------


def adopt(home: Home, vm: str, data: bytes, *, point: str = "") -> Definition:
    """Have `data`, as `Definition.encode` made it, apply to the VM on this home from now on; `point`: the recovery
    point with which it came. Durable, and killed anywhere, what applied before still does. Idempotent.

    Returns it, with its files where they lie now. Raises as `decode`, and OSError.
    """
    from hvfuse import system  # brings numpy, which most commands can do without

    found = replace(Definition.decode(data), point=point)
    own = home.state_dir(vm)
    os.makedirs(own, mode=0o700, exist_ok=True)
    files, kept = os.path.join(own, _FILES), found.digest()
    folder = os.path.join(files, kept)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    for file in found.files.values():
        if file.data is not None:
            system.replace_file("definition:file", os.path.join(folder, file.name), file.data)
    for path in (folder, files, own):
        system.fsync_directory("definition:folder", path)
    beside = os.path.join(os.path.dirname(own), f".{vm}.definition")
    system.replace_file("definition:write", beside, found.kept())
    system.rename("definition:rename", beside, os.path.join(own, _DOCUMENT))
    system.fsync_directory("definition:directory", own)
    for name in os.listdir(files):
        if name != kept:
            shutil.rmtree(os.path.join(files, name), ignore_errors=True)
    return found.at(folder)


def forget(home: Home, vm: str) -> None:
    """Have no adopted definition apply to the VM any more. Durable. Raises OSError."""
    from hvfuse import system

    own = home.state_dir(vm)
    path, beside = os.path.join(own, _DOCUMENT), os.path.join(os.path.dirname(own), f".{vm}.definition")
    if os.path.exists(path):
        system.rename("definition:forget", path, beside)  # by way of the directory whose time tells of it
        system.fsync_directory("definition:directory", own)
        system.unlink("definition:unlink", beside, missing_ok=True)
    shutil.rmtree(os.path.join(own, _FILES), ignore_errors=True)


def path_of(home: Home, vm: str) -> str:
    """Where an adopted definition of the VM lies, if there is one."""
    return os.path.join(home.state_dir(vm), _DOCUMENT)


def load(home: Home, vm: str) -> Definition:
    """The adopted definition of a VM, with its files where they lie. Raises NotFoundError, OSError, and as `decode`."""
    path = path_of(home, vm)
    try:
        with open(path, "rb") as file:
            found = Definition.decode(file.read(2 * MAX_BYTES))
    except FileNotFoundError:
        raise NotFoundError(f"{vm} has no definition that was adopted") from None
    return found.at(os.path.join(home.state_dir(vm), _FILES, found.digest()))


def vms_with(home: Home) -> Iterator[str]:
    """The VMs that have an adopted definition, by name."""
    try:
        names = sorted(os.listdir(os.path.join(home.state, "vms")))
    except FileNotFoundError:
        return
    for name in names:
        if name_fault(name) is None and os.path.lexists(path_of(home, name)):
            yield name
