"""What is left below a folder after a power cut, read without the code that recovers it."""

from __future__ import annotations

import os

import numpy as np
import xxhash

from hvfuse import spool
from hvfuse.formats.companion import ENTRY_DTYPE, Entries, Kind, entry_seed
from hvfuse.formats.tracking import HEAD_SIZE, IndexHead, unpack_head

_UNIQUE_ID = slice(60, 76)
"""Where a log's header says which log it is (`hvfuse.formats.hrl`)."""


def lost_seal(folder: str, cycles: set[tuple[bytes, int]], disks: list[str]) -> str | None:
    """What is missing of the sealed logs of these cycles, (generation, cycle), in words; None if nothing is.

    Raises CorruptError for a companion that is there and cannot be read.
    """
    logs = {(log.header.generation, log.header.cycle, log.disk): log for log in _sealed_logs(folder)}
    for generation, cycle in cycles:
        for disk in disks:
            log = logs.get((generation, cycle, disk))
            if log is None:
                return f"the log of {disk} of cycle {cycle} is missing"
            good = intact(log.entries(), _read(log.log_path))
            if good < log.header.entry_count:
                return f"entry {good} is not in {log.log_path}"
    return None


def _sealed_logs(folder: str) -> list[spool.SealedLog]:
    """By `spool`, but each companion is read whole."""
    for name in sorted(os.listdir(folder)):
        if name.endswith(".hrc"):
            spool.read_companion(os.path.join(folder, name))
    return spool.list_logs(folder)


def intact(entries: Entries, log: bytes) -> int:
    """How many entries, from the first on, have their payload in `log`."""
    for number, entry in enumerate(entries):
        start, length = int(entry["location"]), int(entry["length"])
        if entry["kind"] == Kind.WRITE and xxhash.xxh3_64_intdigest(log[start : start + length]) != entry["xxh3"]:
            return number
    return len(entries)


def durable_entries(folder: str, disk: str, unique_id: bytes) -> int | None:
    """How many entries of the active log `unique_id` are there with their payloads.

    None where the log's name does not lead to it: a sync of a file does not make its name durable.
    """
    for slot in range(2):
        path = os.path.join(folder, spool.index_name(disk, slot))
        if not os.path.exists(path):
            continue
        with open(path, "rb") as file:
            data = file.read()
        head = unpack_head(data)
        log_path = os.path.join(folder, spool.log_name(disk, head.serial)) if head is not None else ""
        if head is None or head.unique_id != unique_id or not os.path.exists(log_path):
            continue
        log = _read(log_path)
        if log[_UNIQUE_ID] == unique_id:
            entries = np.frombuffer(data[HEAD_SIZE:], ENTRY_DTYPE)
            return intact(entries[: _valid(entries, head)], log)
    return None


def _valid(entries: Entries, head: IndexHead) -> int:
    seed = entry_seed(head.unique_id)
    for number, entry in enumerate(entries):
        raw = entry.tobytes()
        if entry["seq"] != head.first_seq + number or entry["check"] != xxhash.xxh3_64_intdigest(raw[:56], seed):
            return number
    return len(entries)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
