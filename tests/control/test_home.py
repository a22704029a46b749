"""Where an installation's files lie, and which names a VM may have."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hvfuse.control.config import Config
from hvfuse.control.home import check_vm_name, home_root
from hvfuse.errors import NotFoundError, UsageError


def test_the_option_goes_before_the_variable_and_that_before_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HVFUSE_HOME", raising=False)
    assert home_root(None) == str(tmp_path / "hvfuse-home")
    monkeypatch.setenv("HVFUSE_HOME", "elsewhere")
    assert home_root(None) == str(tmp_path / "elsewhere")
    assert home_root("here") == str(tmp_path / "here")


@pytest.mark.parametrize("name", ["web01", "Datenbank Süd", "a.b", "x" * 200, "-", "records", "run.lock"])
def test_ordinary_names_are_accepted(name: str) -> None:
    assert check_vm_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/", "a\0b", "a\nb", "x" * 201, "ü" * 101, "\udc80"])
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a VM's name"):
        check_vm_name(name)
    home = Config().home("/h")
    for path in (home.folder, home.mountpoint, home.state_dir, home.tracker_socket):
        with pytest.raises(UsageError):
            path(name)


def test_no_vm_can_take_the_place_of_the_control_planes_own_files() -> None:
    home = Config().home("/h")
    own = {home.records, home.run_lock}
    assert not own & {home.state_dir("records"), home.state_dir("run.lock"), home.tracker_socket("records")}


def test_the_state_is_private_and_the_store_is_not_made_empty(tmp_path: Path) -> None:
    home = Config().home(str(tmp_path / "home"))
    home.make()
    (Path(home.disks) / "vm").mkdir()
    home.make_vm("vm")
    home.make()
    for path in (home.state, home.state_dir("vm")):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert not os.path.exists(home.store), "nobody could tell it from the mount point of a disk that is missing"
    with pytest.raises(NotFoundError, match="there is no VM other"):
        home.make_vm("other")
