"""What readers keep in memory: decoded frames, and anything else of bounded size, those used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from hvfuse.errors import CorruptError, HvfuseError
from hvfuse.frames import Frame, decode
from hvfuse.target import schema
from hvfuse.target.store import Store

FRAME_CACHE = 64 << 20
"""Bytes that decoded frames of one reader may take, mostly."""

_Key = TypeVar("_Key", bound=Hashable)
_Value = TypeVar("_Value")


class ByteLru(Generic[_Key, _Value]):
    """Keeps what was used last, within `limit` bytes; `cost` tells the bytes of a value."""

    def __init__(self, limit: int, cost: Callable[[_Value], int]) -> None:
        self._limit = limit
        self._cost = cost
        self._held = 0
        self._values: OrderedDict[_Key, _Value] = OrderedDict()

    def get(self, key: _Key) -> _Value | None:
        """The value, now the one used last; None if it is not kept."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: _Key, value: _Value) -> None:
        """Keep a value; what was not used for longest goes. The newest stays even if it is too large."""
        self._values[key] = value
        self._held += self._cost(value)
        while self._held > self._limit and len(self._values) > 1:
            self._held -= self._cost(self._values.popitem(last=False)[1])

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()
        self._held = 0


class FrameGoneError(Exception):
    """The frame was merged into an image meanwhile."""


class FrameReader:
    """Decoded frames of one VM, those used last kept, in `limit` bytes. Errors name `what`, such as the point."""

    def __init__(self, store: Store, vm_id: int, what: str, *, limit: int = FRAME_CACHE) -> None:
        self._store = store
        self._vm_id = vm_id
        self._what = what
        self._kept: ByteLru[tuple[int, int], Frame] = ByteLru(limit, lambda frame: frame.header.plain_length)

    def data(self, seq: int, number: int, position: int, length: int) -> memoryview:
        """`length` bytes at `position` in a frame's data. Raises FrameGoneError, CorruptError."""
        frame = self._kept.get((seq, number))
        if frame is None:
            frame = self._load(seq, number)
            self._kept.put((seq, number), frame)
        piece = frame.data[position : position + length]
        if len(piece) != length:
            raise CorruptError(f"{self._what}: frame {number} is shorter than its index entries say")
        return piece

    def _load(self, seq: int, number: int) -> Frame:
        key = schema.frame_key(self._vm_id, seq, number)
        raw = self._store.env.peek(schema.FRAMES, key)
        if raw is None:
            raise FrameGoneError
        try:
            frame = decode(raw)
        except HvfuseError as error:
            raise CorruptError(
                f"{self._what}: frame {number} of stored cycle {seq} is damaged: {error}",
                hint="hvfuse store check",
            ) from None
        if frame.header.number != number:
            raise CorruptError(f"{self._what}: frame {number} of stored cycle {seq} is another frame")
        return frame
