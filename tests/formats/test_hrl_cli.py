"""`hvfuse log` as a user runs it: output, exit codes, and that a refusal writes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvfuse.cli.main import main
from hvfuse.formats import companion
from hvfuse.formats.companion import AddressSpace
from hvfuse.formats.image import ImageFormat, create_image, open_image
from tests import independent_hrl
from tests.log_samples import FLUSH, Sample, foreign, sealed, trim, write, zero

Run = Callable[..., tuple[int, str, str]]
SIZE = 1 << 16
SAMPLE = sealed([write(512, b"a" * 700), zero(0, 512), FLUSH, trim(4096, 300), write(0, b"end")], first_seq=40)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["log", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def saved(folder: Path, sample: Sample, name: str = "os.raw.0000000017") -> Path:
    (folder / f"{name}.hrc").write_bytes(sample.companion)
    path = folder / f"{name}.hrl"
    path.write_bytes(sample.log)
    return path


def foreign_log(folder: Path, data: bytes = b"x" * 512) -> Path:
    path = folder / "foreign.hrl"
    path.write_bytes(foreign([[(1024, data)]]))
    return path


def disk(folder: Path, kind: ImageFormat = ImageFormat.RAW, *, size: int = SIZE) -> Path:
    path = folder / ("disk.raw" if kind is ImageFormat.RAW else "disk.vhd")
    create_image(str(path), size, kind)
    return path


def contents(path: Path) -> bytes:
    image = open_image(str(path))
    try:
        return image.pread(0, image.size)
    finally:
        image.close()


def one_object(out: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(out)
    assert parsed["output_version"] == 1
    return parsed


def test_dump_shows_kinds_and_flushes_with_a_companion(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("dump", "--json", saved(tmp_path, SAMPLE))
    shown = one_object(out)
    assert code == 0
    assert [(e["seq"], e["kind"], e["offset"], e["length"]) for e in shown["entries"]] == [
        (40, "write", 512, 700), (41, "zero", 0, 512), (42, "flush", 0, 0), (43, "trim", 4096, 300),
        (44, "write", 0, 3),
    ]  # fmt: skip
    assert shown["header"]["creator"] == "hvfs"
    assert shown["header"]["end_of_log"] == len(SAMPLE.log)
    assert (shown["companion"]["cycle"], shown["companion"]["serial"]) == (3, 17)


def test_dump_shows_a_foreign_log_without_companion(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("dump", "--json", foreign_log(tmp_path))
    shown = one_object(out)
    assert code == 0
    assert shown["companion"] is None
    assert [(e["seq"], e["kind"], e["offset"]) for e in shown["entries"]] == [(None, "write", 1024)]


def test_dump_stops_at_its_limit(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, SAMPLE)
    assert len(one_object(run("dump", "--json", "--limit", "2", path)[1])["entries"]) == 2
    text = run("dump", path)[1]
    assert len(text.splitlines()) - len(run("dump", "--limit", "2", path)[1].splitlines()) == 3
    assert "trim" in text


def test_verify_says_that_a_whole_log_is_fine(run: Run, tmp_path: Path) -> None:
    code, out, err = run("verify", saved(tmp_path, SAMPLE), foreign_log(tmp_path))
    assert (code, err) == (0, "")
    assert "companion agrees" in out
    assert "1 without a checksum" in out


def test_verify_names_what_is_damaged_and_where_and_looks_at_all_files(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, SAMPLE)
    raw = bytearray(SAMPLE.log)
    raw[8192 + 100] ^= 4
    path.write_bytes(raw)
    code, out, err = run("verify", path, foreign_log(tmp_path))
    assert code == 7
    assert err.startswith(f"hvfuse: {path}: at 8192: the payload")
    assert "foreign.hrl: ok" in out
    shown = one_object(run("verify", "--json", path, foreign_log(tmp_path))[1])
    assert [log["ok"] for log in shown["logs"]] == [False, True]


def test_verify_notices_what_only_the_companion_knows(run: Run, tmp_path: Path) -> None:
    path = saved(tmp_path, sealed([write(0, b"abcd" * 10)]))
    path.write_bytes(path.read_bytes().replace(b"abcd", b"badc", 1))
    code, _, err = run("verify", path)
    assert code == 7
    assert "companion's checksum" in err
    path.with_suffix(".hrc").write_bytes(b"torn")
    code, _, err = run("verify", path)
    assert code == 7
    assert ".hrc: companion is truncated" in err


@pytest.mark.parametrize(
    ("content", "expected"), [(b"", 7), (b"\0" * 9000, 7), (SAMPLE.log[:-1], 7), (SAMPLE.log[:5000], 7)]
)
def test_verify_of_rubbish_ends_with_7(run: Run, tmp_path: Path, content: bytes, expected: int) -> None:
    path = tmp_path / "x.hrl"
    path.write_bytes(content)
    code, out, err = run("verify", path)
    assert (code, out) == (expected, "")
    assert err.startswith(f"hvfuse: {path}: ")


def test_verify_of_nothing_ends_with_5(run: Run, tmp_path: Path) -> None:
    assert run("verify", tmp_path / "none.hrl")[0] == 5


@pytest.mark.parametrize("kind", [ImageFormat.RAW, ImageFormat.VHD_FIXED])
def test_apply_does_what_the_independent_reader_does(run: Run, tmp_path: Path, kind: ImageFormat) -> None:
    log, image = saved(tmp_path, SAMPLE), disk(tmp_path, kind)
    copy = tmp_path / "copy.raw"
    copy.write_bytes(contents(image))
    code, out, _ = run("apply", "--yes", "--json", log, image)
    assert code == 0
    assert one_object(out)["entries"] == 4
    independent_hrl.replay(log, copy)
    assert contents(image) == copy.read_bytes() == SAMPLE.applied(bytes(SIZE))


def test_apply_asks_and_takes_no_answer_for_a_no(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, image = foreign_log(tmp_path), disk(tmp_path)
    for answer, code in (("n\n", 130), ("", 130), ("y\n", 0)):
        answers = tmp_path / "answers"
        answers.write_text(answer)
        with open(answers, encoding="ascii") as stdin:
            monkeypatch.setattr("sys.stdin", stdin)
            assert run("apply", log, image)[0] == code
        assert (contents(image) != bytes(SIZE)) == (code == 0)
    assert run("apply", "--json", log, image)[0] == 2


def test_apply_writes_nothing_of_a_damaged_log(run: Run, tmp_path: Path) -> None:
    image = disk(tmp_path)
    path = saved(tmp_path, SAMPLE)
    for at in (8192 + 699, 13800, len(SAMPLE.log) - 4001, len(SAMPLE.log) - 4096, 50):
        raw = bytearray(SAMPLE.log)
        raw[at] ^= 1
        path.write_bytes(raw)
        assert run("apply", "--yes", path, image)[0] == 7
        assert contents(image) == bytes(SIZE)


def test_apply_refuses_a_log_that_reaches_beyond_the_disk(run: Run, tmp_path: Path) -> None:
    log, image = foreign_log(tmp_path), disk(tmp_path, size=1024 + 511)
    code, _, err = run("apply", "--yes", log, image)
    assert code == 7
    assert "bytes 1024 to 1536, but the disk ends at 1535" in err
    assert contents(image) == bytes(1535)


def test_apply_refuses_a_dynamic_vhd_and_says_why(run: Run, tmp_path: Path) -> None:
    image = disk(tmp_path, ImageFormat.VHD_DYNAMIC, size=1 << 20)
    before = image.read_bytes()
    code, _, err = run("apply", "--yes", foreign_log(tmp_path), image)
    assert code == 8
    assert "vhd-dynamic" in err
    assert "hint: " in err
    assert image.read_bytes() == before


def test_apply_refuses_a_log_that_counts_in_an_image_file(run: Run, tmp_path: Path) -> None:
    log = saved(tmp_path, sealed([write(0, b"x")], space=AddressSpace.IMAGE_FILE))
    assert run("apply", "--yes", log, disk(tmp_path))[0] == 8


def test_apply_refuses_a_disk_that_is_replicated(run: Run, tmp_path: Path) -> None:
    image = disk(tmp_path)
    Path(f"{image}.hvt").write_bytes(b"")
    os.symlink(image, tmp_path / "link.raw")
    for path in (image, tmp_path / "link.raw"):
        code, _, err = run("apply", "--yes", foreign_log(tmp_path), path)
        assert code == 2
        assert "replicated" in err
    assert contents(image) == bytes(SIZE)


def test_apply_twice_changes_nothing_more(run: Run, tmp_path: Path) -> None:
    log, image = saved(tmp_path, SAMPLE), disk(tmp_path)
    for _ in range(2):
        assert run("apply", "--yes", log, image)[0] == 0
    assert contents(image) == SAMPLE.applied(bytes(SIZE))


def test_a_companion_is_compared_with_the_log_that_it_describes_and_with_no_other(run: Run, tmp_path: Path) -> None:
    header, entries = companion.unpack(SAMPLE.companion)
    for flags, described in ((0, "x.raw.0000000017.hrl"), (companion.COMPACTED, "x.raw.0000000017.c.hrl")):
        for name in ("x.raw.0000000017.hrl", "x.raw.0000000017.c.hrl"):
            (tmp_path / name).write_bytes(SAMPLE.log)
            (tmp_path / "x.raw.0000000017.hrc").write_bytes(replace(header, flags=flags).pack() + entries.tobytes())
            code, out, _ = run("verify", "--json", tmp_path / name)
            assert code == 0
            assert one_object(out)["logs"][0]["companion"] == (name == described)
