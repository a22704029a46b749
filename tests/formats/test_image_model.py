"""Every format against a bytearray, with qemu writing in between and judging at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hvfuse.extent import is_zero
from hvfuse.formats.image import ImageFormat, open_image
from tests.formats.disk_samples import BLOCK, make, qemu_content, qemu_io

SIZE = 10 * BLOCK + 1024
"""Bytes; the last block of a dynamic disk is cut short by the disk's end."""

RANGES = st.tuples(st.integers(0, SIZE), st.integers(0, 2 * BLOCK)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))


class DiskMachine(RuleBasedStateMachine):
    """Random work on one disk; `model` is what it has to hold."""

    image_format: ImageFormat

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hvfuse-model-"))
        self.path = self.folder / "disk.bin"
        make(self.path, SIZE, self.image_format)
        self.model = bytearray(SIZE)
        self.hidden: set[int] = set()
        self.disk = open_image(str(self.path), writable=True)

    @rule(place=RANGES, seed=st.integers(0, 255))
    def write(self, place: tuple[int, int], seed: int) -> None:
        offset, length = place
        data = bytes((seed * n) & 0xFF for n in range(length))
        self.disk.pwrite(offset, memoryview(data) if seed % 2 else data)
        self.model[offset : offset + length] = data

    @rule(place=RANGES)
    def trim(self, place: tuple[int, int]) -> None:
        self.disk.trim(*place)
        self.model[place[0] : sum(place)] = bytes(place[1])

    @rule(place=RANGES)
    def zero(self, place: tuple[int, int]) -> None:
        self.disk.zero(*place)
        self.model[place[0] : sum(place)] = bytes(place[1])

    @rule(place=RANGES)
    def read(self, place: tuple[int, int]) -> None:
        assert self.disk.pread(*place) == self.model[place[0] : sum(place)]

    @rule(place=RANGES)
    def what_no_extent_covers_is_zero(self, place: tuple[int, int]) -> None:
        at = place[0]
        for offset, length in self.disk.extents(place[0], sum(place)):
            assert at <= offset < offset + length <= sum(place)
            assert is_zero(self.model[at:offset])
            at = offset + length
        assert is_zero(self.model[at : sum(place)])

    @rule()
    def reopen(self) -> None:
        self.disk.flush()
        self.disk.close()
        self.disk = open_image(str(self.path), writable=True)

    @rule(sector=st.integers(0, SIZE // 512 - 1), count=st.integers(1, 12), value=st.integers(1, 255))
    def qemu_writes(self, sector: int, count: int, value: int) -> None:
        count = min(count, SIZE // 512 - sector)
        self._show_hidden_sectors()
        self.disk.close()
        qemu_io(self.path, self.image_format, f"write -P {value} {sector * 512} {count * 512}")
        self.model[sector * 512 : (sector + count) * 512] = bytes([value]) * (count * 512)
        self.disk = open_image(str(self.path), writable=True)

    @rule(sector=st.integers(0, SIZE // 512 - 1))
    def hyper_v_leaves_a_sector_out(self, sector: int) -> None:
        """Clear a sector's bit, as it is in a block of which only a part was ever written."""
        if self.image_format is not ImageFormat.VHD_DYNAMIC:
            return
        self.disk.close()
        with self.path.open("r+b") as file:
            file.seek(1536 + sector * 512 // BLOCK * 4)
            block = int.from_bytes(file.read(4), "big")
            if block != 0xFFFFFFFF:
                byte, bit = divmod(sector % (BLOCK // 512), 8)
                file.seek(block * 512 + byte)
                bits = file.read(1)[0] & ~(0x80 >> bit)
                file.seek(block * 512 + byte)
                file.write(bytes([bits]))
                self.model[sector * 512 : sector * 512 + 512] = bytes(512)
                self.hidden.add(sector)
        self.disk = open_image(str(self.path), writable=True)

    def _show_hidden_sectors(self) -> None:
        """qemu does not look at bitmaps; a byte written by hvfuse makes them whole."""
        for sector in self.hidden:
            self.disk.pwrite(sector * 512, self.model[sector * 512 : sector * 512 + 1])
        self.hidden.clear()

    @invariant()
    def the_size_stays(self) -> None:
        if hasattr(self, "disk"):
            assert self.disk.size == SIZE

    def teardown(self) -> None:
        if not hasattr(self, "disk"):
            return
        try:
            assert self.disk.pread(0, SIZE) == self.model
            self._show_hidden_sectors()
            self.disk.flush()
            self.disk.close()
            assert qemu_content(self.path, self.image_format) == self.model
        finally:
            shutil.rmtree(self.folder)


@pytest.mark.qemu
@pytest.mark.parametrize("image_format", [ImageFormat.RAW, ImageFormat.VHD_FIXED, ImageFormat.VHD_DYNAMIC])
def test_a_disk_holds_what_was_written_whatever_is_done_to_it(image_format: ImageFormat) -> None:
    machine = type("Machine", (DiskMachine,), {"image_format": image_format})
    steps = int(os.environ.get("HVFUSE_MODEL_EXAMPLES", "25"))
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=steps, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
