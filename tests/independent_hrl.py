"""A second reader of [MS-HRL] logs, written from the format's description alone.

It shares no code with hvfuse and imports nothing of it, so that a mistake in hvfuse's own reader and
writer cannot hide in both. It is slow and plain on purpose. AssertionError says what is wrong.
"""

import os
import struct

HEADER = struct.Struct("<8s I I 4s I Q Q I Q i I 16s 16s I Q I 2s 16s 3970x")
BLOCK = struct.Struct("<Q I I 16x")
ENTRY = struct.Struct("<QIIIBIB6x")


def complement_sum(data):
    """One's complement of the sum of all bytes, modulo 2**32."""
    return 0xFFFFFFFF - sum(data) % (1 << 32)


def read_at(log, offset, length):
    """Exactly `length` bytes at `offset`."""
    data = os.pread(log, length, offset)
    assert len(data) == length, f"the file ends within the {length} bytes at {offset}"
    return data


def header_of(log):
    """The header's fields that a reader needs: (end of log, metadata size, number of entries, unique
    id, previous unique id)."""
    raw = read_at(log, 0, 4096)
    fields = HEADER.unpack(raw)
    assert fields[0] == b"msctlog ", "wrong cookie"
    assert fields[1] == 0x00020000, "not version 2"
    if fields[3] == b"hvfs":
        assert fields[7] == complement_sum(raw[:40] + bytes(4) + raw[44:]), "header checksum"
    assert fields[15] == 0, "file type"
    assert fields[16] == bytes(2), "flags"
    assert not any(raw[126:]), "the header's tail is not zero"
    assert fields[8] != 0, "not closed properly"
    assert fields[10] % 512 == 0, "metadata size"
    return fields[8], fields[10], fields[14], fields[11], fields[12]


def block_offsets(log, end, size):
    """Offsets of the metadata blocks, in the order of the file."""
    offsets = []
    at = end - size
    while True:
        assert at >= 4096, "the chain leads into the header"
        offsets.append(at)
        distance = BLOCK.unpack(read_at(log, at, 32))[0]
        if distance == 0:
            return offsets[::-1]
        assert distance >= size, "blocks overlap"
        at -= distance


def block_entries(log, at, size):
    """The entries of the block at `at`: (byte offset, data length, data checksum)."""
    raw = read_at(log, at, size)
    _, count, check = BLOCK.unpack(raw[:32])
    assert check == complement_sum(raw[:12] + bytes(4) + raw[16:32]), f"checksum of the block at {at}"
    entries = []
    for number in range(count):
        piece = raw[32 + 32 * number : 64 + 32 * number]
        byte_offset, check, length, _, operation, data_check, location = ENTRY.unpack(piece)
        assert check == complement_sum(piece[:8] + bytes(4) + piece[12:]), f"entry {number} of the block at {at}"
        assert operation == 1, "not a write"
        assert location == 0, "location"
        entries.append((byte_offset, length, data_check))
    return entries


def payload_matches(log, at, length, data_check):
    """Whether the payload has the checksum given; 0 stands for none."""
    total = sum(
        sum(read_at(log, start, min(1 << 20, at + length - start))) for start in range(at, at + length, 1 << 20)
    )
    return data_check in {0, 0xFFFFFFFF - total % (1 << 32)}


def read(log_path):
    """Verify everything; returns [(offset on the disk, length, location in the log)] in write order."""
    log = os.open(log_path, os.O_RDONLY)
    try:
        end, size, promised, _, _ = header_of(log)
        found = []
        at = 4096
        for block in block_offsets(log, end, size):
            for byte_offset, length, data_check in block_entries(log, block, size):
                assert payload_matches(log, at, length, data_check), f"payload at {at}"
                found.append((byte_offset, length, at))
                at += length
            assert at == block, f"the payloads end at {at}, their block begins at {block}"
            at += size
        assert at == end, "the last block does not end the log"
        assert len(found) == promised, "total_metadata_entries"
        return found
    finally:
        os.close(log)


def ids(log_path):
    """(unique id, previous unique id) of a log: what chains one to the next."""
    log = os.open(log_path, os.O_RDONLY)
    try:
        return header_of(log)[3:]
    finally:
        os.close(log)


def replay(log_path, image_path):
    """Verify the log, then write all its entries in order into an existing raw image."""
    entries = read(log_path)
    log = os.open(log_path, os.O_RDONLY)
    image = os.open(image_path, os.O_WRONLY)
    try:
        for offset, length, location in entries:
            for done in range(0, length, 1 << 20):
                piece = read_at(log, location + done, min(1 << 20, length - done))
                assert os.pwrite(image, piece, offset + done) == len(piece)
    finally:
        os.close(image)
        os.close(log)
