"""A domain of libvirt's, from its XML with placeholders. Pure.

Placeholders stand in texts and attributes. The domain's name becomes the guest's; a guest on test gets an identity of
its own too, as libvirt runs one domain of a UUID, and the real one may be known to it.
"""

from __future__ import annotations

import re
import uuid
from typing import Protocol
from xml.etree import ElementTree

from hvfuse.control.guest_settings import Mode
from hvfuse.control.guest_template import Placeholder, fill, is_network
from hvfuse.errors import UsageError

_NAMESPACES = {"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"}
_SEED = uuid.UUID("6a2f3f43-5d4e-4b8e-9d0b-4f1a6a0d9c11")
_FOLDED = re.compile(r"[0-9a-f]{32}")


class Values(Protocol):
    """What placeholders stand for."""

    def __call__(self, placeholder: Placeholder) -> str:
        """Raises UsageError where that is nothing."""


def domain(definition: str, *, path: str, name: str, value: Values, mode: Mode, seed: str) -> tuple[str, str]:
    """The XML and its UUID. `path` is what errors name. `seed`: what tells this guest from every other one; where
    the XML has no UUID to keep, it comes from that. Raises UsageError."""
    try:
        root = ElementTree.fromstring(definition)
    except ElementTree.ParseError as error:
        raise UsageError(f"{path}: this is not XML: {error}") from None
    if root.tag != "domain":
        raise UsageError(f"{path}: this is <{root.tag}>, not the <domain> of a guest")
    try:
        if mode is Mode.TEST:
            _refuse_ways_out(root)
        for element in root.iter():
            element.text = fill(element.text, value) if element.text else element.text
            for key, text in element.attrib.items():
                element.set(key, fill(text, value))
    except UsageError as error:
        raise UsageError(f"{path}: {error}", hint=error.hint) from None
    identity = str(uuid.uuid5(_SEED, seed))
    if mode is not Mode.TEST:
        identity = _own_uuid(root, path) or identity
    _set(root, "uuid", identity)
    _set(root, "name", name)
    for prefix, uri in _NAMESPACES.items():
        ElementTree.register_namespace(prefix, uri)
    return ElementTree.tostring(root, encoding="unicode"), identity


def _own_uuid(root: ElementTree.Element, path: str) -> str | None:
    text = (root.findtext("uuid") or "").strip()
    if not text:
        return None
    if not _FOLDED.fullmatch(text.replace("-", "").lower()):
        raise UsageError(f"{path}: <uuid>: {text!r} is none")
    return str(uuid.UUID(text))


def _set(root: ElementTree.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ElementTree.Element(tag)
        root.insert(0, element)
    element.text = text


def _refuse_ways_out(root: ElementTree.Element) -> None:
    """See `guest_plan`; of a domain whose placeholders still stand there."""
    for interface in root.iterfind("devices/interface"):
        source = interface.find("source")
        named = [
            source.attrib[key] for key in ("network", "bridge", "dev") if source is not None and key in source.attrib
        ]
        if not named or not all(map(is_network, named)):
            kind = interface.get("type", "")
            raise UsageError(
                f"<interface type={kind!r}>: a guest on test must not be on the network of the real one",
                hint="name its source by {network:NAME}, and say in hvfuse.toml what it is in tests: "
                '[network.NAME] test = "NAME OF AN ISOLATED NETWORK"',
            )
    for element in root.iter():
        if element.tag.startswith(f"{{{_NAMESPACES['qemu']}}}arg"):
            raise UsageError("<qemu:arg>: a guest on test cannot be given these: nothing says where they lead")
