"""The protocol: fed whole, byte by byte, cut, flipped and made up, it gives the message or one of our errors."""

import os
import random
import struct
import threading
import time

import numpy as np
import pytest

from hvfuse.errors import BusyError, CorruptError, HvfuseError, UnreachableError, UnsupportedError
from hvfuse.extent import Extent
from hvfuse.formats.digests import BLOCK, Algorithm, DigestKey
from hvfuse.reconcile import messages, plan
from hvfuse.reconcile.changes import Change
from hvfuse.reconcile.messages import Kind, Message, Receiver, greeting, pack
from hvfuse.reconcile.remote import Peer, RemoteEnd

from .both_sides import ServedHere, resync

KEY = DigestKey(Algorithm.XXH3, 5)
SAID = [Message(Kind.OPEN, 1, b"{}"), Message(Kind.REPLY, 2**63, b""), Message(Kind.APPLY, 7, os.urandom(100_000))]
BYTES = greeting() + b"".join(b"".join(pack(one.kind, one.number, one.payload)) for one in SAID)


@pytest.mark.parametrize("step", [1, 7, 24, 4096, len(BYTES)])
def test_messages_come_out_as_they_went_in_however_they_are_cut(step):
    receiver, found = Receiver(), []
    for at in range(0, len(BYTES), step):
        found += receiver.receive(BYTES[at : at + step])
    assert found == SAID
    assert receiver.idle


def test_a_flipped_bit_is_noticed_wherever_it_is():
    dice = random.Random(1)
    for place in [*range(60), *(dice.randrange(len(BYTES)) for _ in range(200))]:
        damaged = bytearray(BYTES)
        damaged[place] ^= 1 << dice.randrange(8)
        receiver = Receiver()
        try:
            found = list(receiver.receive(bytes(damaged)))
        except HvfuseError:
            continue
        assert found == SAID[: len(found)]
        assert not receiver.idle


def test_another_version_is_named():
    with pytest.raises(UnsupportedError, match="version '2'"):
        list(Receiver().receive(b"hvfuse resync 2\n"))
    with pytest.raises(UnsupportedError, match="version '12'"):
        list(Receiver().receive(b"hvfuse resync 12\n"))


@pytest.mark.parametrize("said", [b"Welcome to host\n", b"bash: tools/resync: not found\n", b"\0" * 30, b"h!"])
def test_what_is_no_greeting_is_quoted(said):
    with pytest.raises(CorruptError, match="is no tools/resync"):
        list(Receiver().receive(said))


def test_a_length_beyond_all_bounds_costs_nothing():
    receiver = Receiver()
    list(receiver.receive(greeting()))
    with pytest.raises(CorruptError, match="4294967295 bytes"):
        list(receiver.receive(struct.pack("<IHHQ8x", 0xFFFFFFFF, Kind.APPLY, 0, 1)))


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 0)], [(1, BLOCK)], [(0, BLOCK - 1)], [(0, 11 * BLOCK)], [(10 * BLOCK, BLOCK)], [(2**64 - BLOCK, BLOCK)],
        [(0, 2**64 - BLOCK)], [(BLOCK, BLOCK), (0, BLOCK)], [(0, 2 * BLOCK), (BLOCK, BLOCK)],
    ],
)  # fmt: skip
def test_extents_out_of_order_or_bounds_are_refused(pairs):
    good = messages.pack_extents([Extent(0, BLOCK), Extent(9 * BLOCK, BLOCK)])
    assert messages.unpack_extents(good, end=10 * BLOCK - 5) == [Extent(0, BLOCK), Extent(9 * BLOCK, BLOCK)]
    with pytest.raises(CorruptError):
        messages.unpack_extents(np.array(pairs, "<u8").tobytes(), end=10 * BLOCK - 5)
    with pytest.raises(CorruptError):
        messages.unpack_extents(good[:-1], end=10 * BLOCK)


def test_changes_out_of_bounds_are_refused():
    data = memoryview(os.urandom(BLOCK))
    good = [Change(BLOCK, 100, None), Change(3 * BLOCK, BLOCK, data)]
    packed = messages.pack_changes(good, level=1)
    assert messages.unpack_changes(packed, end=4 * BLOCK) == good
    with pytest.raises(CorruptError):
        messages.unpack_changes(packed, end=4 * BLOCK - 1)
    wide = messages.pack_changes([Change(0, BLOCK, data), Change(plan.SPAN, BLOCK, data)], level=0)
    with pytest.raises(CorruptError):
        messages.unpack_changes(wide, end=1 << 40)


def test_errors_keep_their_kind_and_become_nothing_else():
    error = messages.unpack_error(messages.pack_error(BusyError("a: busy", hint="wait")))
    assert isinstance(error, BusyError)
    assert (str(error), error.hint) == ("on the other side: a: busy", "wait")
    for name in ("SystemExit", "os", "Exception", 5, None, "annotations"):
        assert type(messages.unpack_error(messages.pack_json({"type": name}))) is HvfuseError
    with pytest.raises(CorruptError):
        messages.unpack_error(b"[" * 60_000)


def conversation(folder) -> bytes:
    """What the driving side of a push says, from beginning to end."""
    said = greeting()
    number = 0

    def say(kind, payload=b""):
        nonlocal said, number
        number += 1
        said += b"".join(pack(kind, number, payload))

    say(Kind.OPEN, messages.pack_json({"path": str(folder / "replica"), "role": "replica", "write": True}))
    say(Kind.IDENTIFY)
    say(Kind.RESIZE, messages.pack_json({"size": 4 * BLOCK}))
    say(Kind.BEGIN, messages.pack_json({"end": 4 * BLOCK, "algorithm": "xxh3", "seed": 5, "level": 1}))
    whole = [Extent(0, 4 * BLOCK)]
    say(Kind.OCCUPIED, messages.pack_extents(whole))
    say(Kind.SUMMARIES, messages.pack_extents(whole))
    say(Kind.DIGESTS, messages.pack_extents(whole))
    say(Kind.FETCH, messages.pack_extents(whole))
    say(Kind.APPLY, messages.pack_changes([Change(BLOCK, BLOCK, memoryview(os.urandom(BLOCK)))], level=1))
    say(Kind.SYNC, b"state")
    say(Kind.FINISH)
    return said


def drain(served: ServedHere) -> bytes:
    served.stdin.close()
    found = bytearray()
    while data := served.stdout.read(1 << 20):
        found += data
    served.stdout.close()
    served.wait()
    return bytes(found)


def replies(said: bytes) -> list[Message]:
    served = ServedHere()
    try:
        served.stdin.write(said)
    except BrokenPipeError:
        pass
    receiver = Receiver()
    return list(receiver.receive(drain(served)))


def test_a_whole_conversation_is_answered(tmp_path):
    found = {message.number: message.kind for message in replies(conversation(tmp_path))}
    assert found == dict.fromkeys(range(1, 12), Kind.REPLY)
    assert (tmp_path / "replica").stat().st_size == 4 * BLOCK


@pytest.mark.parametrize("seed", range(12))
def test_garbage_on_the_wire_ends_the_server_with_an_error_of_ours(tmp_path, seed):
    dice = random.Random(seed)
    said = bytearray(conversation(tmp_path))
    for _ in range(dice.randrange(1, 4)):
        place = dice.randrange(len(said))
        said[place : place + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
    for message in replies(bytes(said)):
        assert message.kind in (Kind.REPLY, Kind.FAILED)
        assert b"internal error" not in message.payload
    assert set(os.listdir(tmp_path)) <= {"replica", "replica.resync-state"}


def test_requests_with_right_checksums_and_wrong_contents_are_refused_one_by_one(tmp_path):
    dice = random.Random(3)
    said = conversation(tmp_path)[: -len(b"".join(pack(Kind.FINISH, 11)))]
    wrong = [b"", b"x", b"{}", b"[]", b"null", dice.randbytes(16), dice.randbytes(1000),
             struct.pack("<QQ", 0, 5 * BLOCK),
             messages.pack_json({"size": -1}), messages.pack_json({"end": 1 << 80, "algorithm": "md5", "seed": 0}),
             messages.pack_json({"path": "/etc/passwd", "role": "source", "write": False})]  # fmt: skip
    number = 100
    for kind in (
        Kind.OPEN,
        Kind.BEGIN,
        Kind.OCCUPIED,
        Kind.SUMMARIES,
        Kind.DIGESTS,
        Kind.FETCH,
        Kind.APPLY,
        Kind.RESIZE,
    ):
        for payload in wrong:
            number += 1
            said += b"".join(pack(kind, number, payload))
    number += 1
    said += b"".join(pack(Kind.REPLY, number))
    found = replies(said + b"".join(pack(Kind.FINISH, 99)))
    refused = [message for message in found if message.number > 100]
    assert len(refused) == number - 100
    for message in refused:
        assert message.kind is Kind.FAILED
        assert b"internal error" not in message.payload
    assert (tmp_path / "replica").stat().st_size == 4 * BLOCK


class Says:
    """A process that says something and ends: as `subprocess.Popen`."""

    def __init__(self, said: bytes) -> None:
        there, back = os.pipe(), os.pipe()
        os.write(back[1], said)
        os.close(back[1])
        self.stdin, self.stdout = os.fdopen(there[1], "wb", 0), os.fdopen(back[0], "rb", 0)
        self._taken = os.fdopen(there[0], "rb", 0)

    def wait(self, timeout=None):
        self._taken.close()
        return 0


OPENED = messages.pack_json(
    {
        "identity": {
            "kind": "file", "size": 8 * BLOCK, "device": 1, "inode": 1, "mtime_ns": 1, "settled": True, "boot": "",
        },
        "created": False, "state": "x" * 100, "unaltered": True,
    }
)  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        b"", greeting()[:5], greeting(), greeting() + b"garbage" * 100, b"hvfuse resync 9\n",
        greeting() + b"".join(pack(Kind.REPLY, 1, b"{}")), greeting() + b"".join(pack(Kind.REPLY, 1, b"\xff")),
        greeting() + b"".join(pack(Kind.REPLY, 5)), greeting() + b"".join(pack(Kind.OPEN, 1)),
        greeting() + b"".join(pack(Kind.FAILED, 1, b"?")), greeting() + b"".join(pack(Kind.FAILED, 0, b"{}")),
        greeting() + b"".join(pack(Kind.REPLY, 1, OPENED.replace(b"524288", b"-1"))),
        greeting() + b"".join(pack(Kind.REPLY, 1, OPENED.replace(b'"file"', b'"fifo"'))),
        greeting() + b"".join(pack(Kind.REPLY, 1, OPENED.replace(b"524288", b'"1"'))),
        greeting() + b"".join(pack(Kind.REPLY, 1, OPENED)),
    ],
)  # fmt: skip
def test_a_server_that_says_anything_else_or_ends_is_an_error_of_ours(said):
    with Peer(Says(said)) as peer, pytest.raises(HvfuseError):
        far = RemoteEnd(peer, "disk", role="replica", write=True, level=1)
        far.identify()


class Answers(Says):
    """A process that answers each request with the next of some payloads, or kinds and payloads."""

    def __init__(self, payloads) -> None:
        there, back = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(there[1], "wb", 0), os.fdopen(back[0], "rb", 0)
        self._taken, self._back = os.fdopen(there[0], "rb", 0), back[1]
        self._payloads = iter(payloads)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        os.write(self._back, greeting())
        receiver = Receiver()
        while data := self._taken.read(1 << 20):
            for message in receiver.receive(data):
                if message.kind is not Kind.FAILED:
                    said = next(self._payloads)
                    kind, payload = said if isinstance(said, tuple) else (Kind.REPLY, said)
                    os.write(self._back, b"".join(pack(kind, message.number, payload)))
        os.close(self._back)

    def wait(self, timeout=None):
        self._thread.join()
        return super().wait()


EXTENT = [Extent(0, BLOCK)]


@pytest.mark.parametrize(
    ("payload", "ask"),
    [
        (bytes(15), lambda far: far.summaries(EXTENT, KEY)),
        (bytes(32), lambda far: far.digests(EXTENT, KEY)),
        (messages.pack_extents([Extent(8 * BLOCK, BLOCK)]), lambda far: far.occupied(0, 8 * BLOCK)),
        (b"x" * 1000, lambda far: far.fetch(EXTENT)),
        (messages.pack_changes([Change(BLOCK, BLOCK, None)], level=1), lambda far: far.fetch(EXTENT)),
        (messages.pack_changes([Change(0, BLOCK - 1, None)], level=1), lambda far: far.fetch(EXTENT)),
        (messages.pack_changes([Change(7 * BLOCK, 2 * BLOCK, None)], level=1), lambda far: far.fetch(EXTENT)),
        (b"[]", lambda far: far.identify()),
        (b"{}", lambda far: far.identify()),
        ((Kind.FAILED, b"?"), lambda far: far.identify()),
        ((Kind.OPEN, b""), lambda far: far.identify()),
    ],
)
def test_answers_that_do_not_fit_the_question_are_refused(payload, ask):
    with Peer(Answers([OPENED, b"", payload])) as peer:
        far = RemoteEnd(peer, "disk", role="source", write=False, level=1)
        far.begin(8 * BLOCK, KEY)
        with pytest.raises(CorruptError):
            ask(far)


def test_a_server_that_falls_silent_is_given_up(tmp_path):
    there, back = os.pipe(), os.pipe()

    class Silent(Says):
        def __init__(self):
            os.write(back[1], greeting())
            self.stdin, self.stdout = os.fdopen(there[1], "wb", 0), os.fdopen(back[0], "rb", 0)
            self._taken = os.fdopen(there[0], "rb", 0)

    try:
        with Peer(Silent(), silence=0.3) as peer, pytest.raises(UnreachableError, match="nothing was heard"):
            peer.ask(Kind.IDENTIFY)
    finally:
        os.close(back[1])


def test_a_driver_that_falls_silent_is_given_up(tmp_path):
    served = ServedHere(silence=0.3)
    served.stdin.write(greeting())
    served.wait()
    assert isinstance(served.error, UnreachableError)
    served.stdin.close()
    served.stdout.close()


def test_two_sides_that_both_live_wait_as_long_as_it_takes(tmp_path):
    (tmp_path / "one").write_bytes(os.urandom(BLOCK))
    with Peer(ServedHere(silence=0.4), silence=0.4) as peer:
        far = RemoteEnd(peer, str(tmp_path / "one"), role="source", write=False, level=1)
        time.sleep(1)  # nothing to be said for longer than the limit
        assert far.identify().size == BLOCK


def test_a_push_through_the_same_pipes_still_works(tmp_path):
    (tmp_path / "one").write_bytes(os.urandom(3 * BLOCK))
    assert resync(tmp_path / "one", tmp_path / "other", "push").changed
