"""`hvfuse store` and `hvfuse point`, as a user types them."""

from __future__ import annotations

import json
import os

import pytest

from hvfuse.cli.main import main
from hvfuse.target import schema
from hvfuse.target.local import LocalReplica
from hvfuse.target.store import Store
from tests.target.model import Source


@pytest.fixture
def home(tmp_path):
    """A home whose store holds two points of web01."""
    source = Source("web01", {"os.raw": 50_000})
    source.write("os.raw", 0, source.random.randbytes(50_000))
    with Store(str(tmp_path / "store")) as store:
        replica = LocalReplica(store, "web01")
        source.copy_to(replica)
        for number in range(2):
            source.write("os.raw", number, source.random.randbytes(1000))
            source.ship_to(replica)
    return tmp_path


@pytest.fixture
def hvfuse(home, capsys):
    """Run a command line; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["--home", str(home), *arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def test_point_list_shows_the_newest_last(hvfuse, home):
    code, out, _ = hvfuse("point", "list", "web01", "--json")
    answer = json.loads(out)
    assert (code, answer["output_version"], answer["vm"]) == (0, 1, "web01")
    first, second = answer["points"]
    assert first | {"id": "", "stored_bytes": 0} == {
        "id": "", "time": "2023-11-14T22:13:51.000Z", "kind": "crash-consistent", "cycle": 1,
        "stored_bytes": 0, "pinned": False, "definition": None,
    }  # fmt: skip
    assert second["cycle"] == 2
    _, out, _ = hvfuse("point", "list", "web01")
    assert [line.split()[0] for line in out.splitlines()] == ["POINT", first["id"], second["id"]]


def test_a_vm_that_the_store_does_not_have_ends_with_5(hvfuse):
    code, out, err = hvfuse("point", "list", "nope", "--json")
    assert code == 5
    assert json.loads(out)["error"]["type"] == "NotFoundError"
    assert err.startswith("hvfuse: the store has no VM 'nope'")


def test_a_home_without_a_store_ends_with_5_and_gets_none(hvfuse, home):
    os.rename(home / "store", home / "elsewhere")
    for command in (["store", "info"], ["store", "check"], ["point", "list", "web01"]):
        code, _, err = hvfuse(*command)
        assert (code, "there is no store" in err) == (5, True)
    assert not os.path.exists(home / "store")


def test_store_info_tells_what_is_there(hvfuse, home):
    code, out, _ = hvfuse("store", "info", "--json")
    answer = json.loads(out)
    (vm,) = answer["vms"]
    assert (code, answer["format"], answer["epoch"]) == (0, schema.FORMAT, 0)
    assert answer["free_bytes"] > 0
    assert (vm["name"], vm["points"], vm["cycles_in_journal"]) == ("web01", 2, 2)
    assert vm["journal_bytes"] > 2000
    assert vm["base_bytes"] >= 50_000
    code, out, _ = hvfuse("store", "info")
    assert code == 0
    assert "web01" in out


def test_store_check_ends_with_7_and_names_what_is_damaged(hvfuse, home):
    code, out, _ = hvfuse("store", "check")
    assert (code, "nothing wrong" in out) == (0, True)
    with Store(str(home / "store")) as store:

        def act(txn):
            with txn.cursor(db=store.env.db(schema.FRAMES)) as cursor:
                assert cursor.last()
                key, value = cursor.item()
            txn.put(key, value[:-1] + bytes([value[-1] ^ 1]), db=store.env.db(schema.FRAMES))

        store.write("test", act)
        newest = store.point("web01").id
    code, out, err = hvfuse("store", "check", "--json")
    answer = json.loads(out)
    assert (code, answer["ok"], len(answer["findings"])) == (7, False, 1)
    assert f"frame 0 of point {newest} is damaged" in answer["findings"][0]["what"]
    assert f"hvfuse: web01: frame 0 of point {newest} is damaged" in err
