"""What the two sides of `tools/resync` say to each other through a pipe. Pure: it packs, unpacks and checks.

Each side first sends a greeting of 16 bytes, "hvfuse resync N\\n", N being the protocol's version in decimal. Then
messages, little-endian, packed:

    offset size field
         0    4 length of the payload, bytes; at most `MAX_PAYLOAD`
         4    2 kind
         6    2 zero
         8    8 number of the request; a reply has its request's; 0 for what needs no reply
        16    8 xxh3-64 of bytes 0 to 15 and of the payload
        24      payload

The driving side asks, the served side replies, in any order: several requests may be under way. Replies are
REPLY, or FAILED with {"type", "message", "hint"}, type being a class of `hvfuse.errors`.

    kind            payload                                              reply
     1 OPEN         {"path", "role": "source" | "replica", "write"}      {"identity", "created", "state", "unaltered"}
     2 BEGIN        {"end", "algorithm", "seed", "level"}                nothing
     3 OCCUPIED     one extent                                           extents
     4 SUMMARIES    extents, each within a span                          digests, one for each extent
     5 DIGESTS      extents, each within a span                          digests, one for each block
     6 FETCH        extents, all on one span                             frame (`hvfuse.frames`)
     7 APPLY        frame, all of it on one span                         nothing
     8 RESIZE       {"size"}                                             identity
     9 IDENTIFY     nothing                                              identity
    10 SYNC         the state to be kept, or nothing                     {"kept"}
    11 FINISH       nothing                                              nothing
    12 ALIVE        nothing                                              none: sent when there is nothing else to say
    16 REPLY        as above
    17 FAILED       as above; with the number 0 it is the sender that gives up

Extents are pairs of 64-bit numbers, offset and length, whole blocks of 64 KiB, ascending and apart. Digests are 16
bytes each (`hvfuse.formats.digests`). "path" is a string in which a byte that is not UTF-8 is a lone surrogate;
"state" is a string, or null. JSON is in ASCII and at most `MAX_JSON` bytes.

Neither side believes the other: every length, offset and count is checked against what was agreed before it is used,
so that a wrong message costs at most `MAX_PAYLOAD` bytes of memory and the connection.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from hvfuse import errors, frames
from hvfuse.errors import CorruptError, HvfuseError, UnsupportedError
from hvfuse.extent import Extent, round_up
from hvfuse.formats.digests import BLOCK, DIGEST_SIZE, Digests
from hvfuse.frames import EXTENT_DTYPE, Fill, FrameWriter
from hvfuse.reconcile import plan
from hvfuse.reconcile.changes import Change

VERSION = 1
GREETING_SIZE = 16
MAX_PAYLOAD = frames.MAX_PLAIN + frames.HEADER_SIZE
"""Bytes. A frame is the largest thing that is sent."""
MAX_JSON = 64 << 10
NOBODY = bytes(16)
"""Disk id and generation of the frames: there is but one disk."""

_HEADER = struct.Struct("<IHHQ")
HEADER_SIZE = _HEADER.size + 8


class Kind(IntEnum):
    """What a message is."""

    OPEN = 1
    BEGIN = 2
    OCCUPIED = 3
    SUMMARIES = 4
    DIGESTS = 5
    FETCH = 6
    APPLY = 7
    RESIZE = 8
    IDENTIFY = 9
    SYNC = 10
    FINISH = 11
    ALIVE = 12
    REPLY = 16
    FAILED = 17


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Message:
    """A message whose checksum is right; nothing else is known of its payload."""

    kind: Kind
    number: int
    payload: bytes


def greeting(version: int = VERSION) -> bytes:
    """The first bytes of either side."""
    return b"hvfuse resync %d\n" % version


def pack(kind: Kind, number: int, payload: bytes = b"") -> list[bytes]:
    """A message, in pieces to be sent one after the other."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a message of {len(payload)} bytes")
    head = _HEADER.pack(len(payload), kind, 0, number)
    return [head + _checksum(head, payload), payload]


def _checksum(head: bytes, payload: bytes) -> bytes:
    state = xxhash.xxh3_64(head)
    state.update(payload)
    return state.intdigest().to_bytes(8, "little")


class Receiver:
    """Turns the other side's bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._greeted = False

    @property
    def idle(self) -> bool:
        """Whether the bytes so far end where a message does."""
        return self._greeted and not self._buffer

    @property
    def greeted(self) -> bool:
        """Whether the other side is known to be what it should be."""
        return self._greeted

    def receive(self, data: bytes) -> Iterator[Message]:
        """The messages that `data` completes. Raises CorruptError, UnsupportedError."""
        self._buffer += data
        if not self._greeted and not self._take_greeting():
            return
        while (message := self._take()) is not None:
            yield message

    def _take_greeting(self) -> bool:
        start = bytes(self._buffer[:GREETING_SIZE])
        expected = greeting()
        if start == expected:
            del self._buffer[:GREETING_SIZE]
            self._greeted = True
            return True
        words = b"hvfuse resync "
        if start[: len(words)] != words[: len(start)]:
            said = bytes(self._buffer[:200]).decode(errors="replace").strip()
            raise CorruptError(
                f"the other side is no tools/resync: it says {said!r}",
                hint="its command must run tools/resync --serve, and print nothing itself",
            )
        if len(start) < GREETING_SIZE and not start.endswith(b"\n"):
            return False
        version = start[len(words) :].split(b"\n")[0].decode(errors="replace")
        raise UnsupportedError(
            f"the other side speaks version {version!r} of the protocol, this one {VERSION}",
            hint="use the same version of hvfuse on both sides",
        )

    def _take(self) -> Message | None:
        if len(self._buffer) < HEADER_SIZE:
            return None
        head = bytes(self._buffer[: _HEADER.size])
        length, kind, zero, number = _HEADER.unpack(head)
        if length > MAX_PAYLOAD or zero or kind not in _KINDS:
            raise CorruptError(f"the other side sent a message of kind {kind} with {length} bytes")
        if len(self._buffer) < HEADER_SIZE + length:
            return None
        payload = bytes(memoryview(self._buffer)[HEADER_SIZE : HEADER_SIZE + length])
        if self._buffer[_HEADER.size : HEADER_SIZE] != _checksum(head, payload):
            raise CorruptError("a message of the other side does not match its checksum")
        del self._buffer[: HEADER_SIZE + length]
        return Message(Kind(kind), number, payload)


def pack_json(fields: Mapping[str, object]) -> bytes:
    """A JSON payload."""
    return json.dumps(fields).encode()


def unpack_json(payload: bytes) -> dict[str, object]:
    """The object in a JSON payload. Raises CorruptError."""
    try:
        found = json.loads(payload) if len(payload) <= MAX_JSON else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CorruptError("a message of the other side is no JSON object")
    return found


def pack_extents(extents: Iterable[Extent]) -> bytes:
    """Extents."""
    return np.array([(extent.offset, extent.length) for extent in extents], "<u8").tobytes()


def unpack_extents(payload: bytes, *, end: int) -> list[Extent]:
    """Extents on a disk of `end` bytes. Raises CorruptError."""
    if len(payload) % 16:
        raise CorruptError("the other side sent extents that are cut off")
    pairs = np.frombuffer(payload, "<u8").reshape(-1, 2)
    limit = round_up(end, BLOCK)
    if (pairs > limit).any() or (pairs % BLOCK).any() or (pairs[:, 1] == 0).any():
        raise CorruptError("the other side sent an extent out of bounds")
    ends = pairs.sum(axis=1)
    if (ends > limit).any() or (pairs[1:, 0] < ends[:-1]).any():
        raise CorruptError("the other side sent extents out of order or bounds")
    return [Extent(offset, length) for offset, length in pairs.tolist()]


def pack_digests(digests: Digests) -> bytes:
    """Digests."""
    return digests.astype("<u8").tobytes()


def unpack_digests(payload: bytes, *, count: int) -> Digests:
    """So many digests. Raises CorruptError."""
    if len(payload) != count * DIGEST_SIZE:
        raise CorruptError(f"the other side sent {len(payload)} bytes of digests, not {count} digests")
    return np.frombuffer(payload, "<u8").astype(np.uint64).reshape(-1, 2)


def pack_changes(found: Sequence[Change], *, level: int) -> bytes:
    """Changes of one span as a frame. `level`: as in `FrameWriter`."""
    table = np.zeros(len(found), EXTENT_DTYPE)
    table["offset"] = [change.offset for change in found]
    table["length"] = [change.length for change in found]
    table["kind"] = [Fill.ZERO if change.data is None else Fill.DATA for change in found]
    data = [change.data for change in found if change.data is not None]
    writer = FrameWriter(generation=NOBODY, cycle=0, level=level)
    return writer.encode(disk_id=NOBODY, number=0, table=table, data=data)


def unpack_changes(payload: bytes, *, end: int) -> list[Change]:
    """Changes of one span of a disk of `end` bytes. Raises CorruptError, UnsupportedError."""
    frame = frames.decode(payload)
    found: list[Change] = []
    for row, at in zip(frame.table.tolist(), frame.positions().tolist(), strict=True):
        offset, length, kind = row
        found.append(Change(offset, length, frame.data[at : at + length] if kind == Fill.DATA else None))
    if found and (found[-1].end > end or found[-1].end > found[0].offset - found[0].offset % plan.SPAN + plan.SPAN):
        raise CorruptError("the other side sent changes out of bounds")
    return found


def pack_error(error: HvfuseError) -> bytes:
    """An error."""
    hint = error.hint[:1000] if error.hint else None
    return pack_json({"type": type(error).__name__, "message": str(error)[:2000], "hint": hint})


def unpack_error(payload: bytes) -> HvfuseError:
    """The other side's error, as one of ours."""
    fields = unpack_json(payload)
    kind = getattr(errors, str(fields.get("type")), None)
    if not isinstance(kind, type) or not issubclass(kind, HvfuseError):
        kind = HvfuseError
    hint = fields.get("hint")
    return kind(f"on the other side: {fields.get('message')}", hint=hint if isinstance(hint, str) else None)
