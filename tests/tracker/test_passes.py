"""Logs lost while a copy is under way: the copy stays valid, and a pass compares what was written since."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import pytest

from hvfuse import system
from hvfuse.errors import ResyncRequiredError
from hvfuse.formats.tracking import COMPARING, DIRTY, Scope
from hvfuse.tracker.disk import TrackedDisk
from hvfuse.tracker.regions import RegionMap
from hvfuse.tracker.vm import TrackedVm
from tests.crash.host import FAST_FOLDER, Death
from tests.tracker.replica_model import BLOCK, Site, Violation

STEPS = 60
WORLDS = 12


@pytest.fixture
def root() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="hvfuse-passes-", dir=FAST_FOLDER)
    yield path
    shutil.rmtree(path)


ACTIONS: list[tuple[float, str, Callable[[Site], None]]] = [
    (30, "scribble", Site.scribble),
    (45, "ship", Site.ship),
    (5, "lose logs", Site.lose_logs),
    (2, "fill up", Site.fill_up),
    (2, "log fails", lambda site: site.fail("log:append", site.scribble)),
    (0.5, "map fails", lambda site: site.fail("regions:sync", site.scribble)),
    (0.5, "sync fails", Site.fail_sync),
    (2, "rotate", Site.rotate),
    (1, "come", Site.come),
    (1, "bring", Site.bring),
    (1, "exclude", Site.exclude_one),
    (1.5, "include", Site.include_all),
    (1, "write untracked", Site.write_untracked),
    (1.5, "change the set offline", Site.change_set_offline),
    (3, "damage", Site.damage),
    (0.5, "change offline", Site.change_offline),
    (1, "roll back", Site.roll_back),
    (3, "restart", Site.restart),
    (3, "cut power", Site.reboot),
    (3, "kill", Site.die),
]


def live(site: Site, steps: int = STEPS) -> None:
    """Random actions, now and then a death at a labelled call; the promise holds after each."""
    weights = [weight for weight, _, _ in ACTIONS]
    with site:
        for _ in range(steps):
            (_, name, action), *_ = site.dice.choices(ACTIONS, weights)
            site.happened.append(name)
            try:
                if site.dice.randrange(4) == 0:
                    site.dying(lambda action=action: action(site))
                else:
                    action(site)
                site.check()
            except Violation as violation:
                raise Violation(f"{violation}; {site.happened[-12:]}") from None


@pytest.mark.parametrize("seed", range(WORLDS))
def test_whatever_happens_every_difference_is_in_a_log_or_will_be_looked_at(root: str, seed: int) -> None:
    live(Site(root, seed=seed))


def forget_what_was_comparing(self: RegionMap) -> None:
    self.clear(COMPARING)
    START_COMPARING(self)


def forget_what_got_dirty(self: RegionMap, mark: int) -> None:
    CLEAR(self, mark | DIRTY)


START_COMPARING, CLEAR = RegionMap.start_comparing, RegionMap.clear
PLANTED: dict[str, tuple[object, str, object]] = {
    "an abandoned copy's regions are forgotten": (RegionMap, "start_comparing", forget_what_was_comparing),
    "what got dirty meanwhile is taken as compared": (RegionMap, "clear", forget_what_got_dirty),
    "a lost log's end is forgotten": (TrackedDisk, "unsealed", lambda self: []),
    "what was not synced when the host died is forgotten": (RegionMap, "mark_hot_dirty", lambda self: None),
    "what the copy read was not synced": (TrackedVm, "_sync_images", lambda self: None),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_bugs_that_are_planted_break_the_promise(root: str, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    monkeypatch.setattr(*PLANTED[planted])
    with pytest.raises(Violation):
        for seed in range(30):
            folder = os.path.join(root, str(seed))
            os.mkdir(folder)
            live(Site(folder, seed=seed))


# Deaths at every call of the steps that change sides --------------------------------------------------------


def joined(site: Site) -> None:
    """A replica that the logs continue, and something in them."""
    site.converge()
    site.scribble()


def lost(site: Site) -> None:
    """Regions are marked, and a copy of them is required."""
    joined(site)
    site.lose_logs()
    site.scribble()


def copying(site: Site) -> None:
    """A copy of regions is under way, some of it read, and there are logs."""
    lost(site)
    begin(site, Scope.REGIONS)
    site.ship()
    site.scribble()


def copying_lost(site: Site) -> None:
    """The same, but the logs were lost meanwhile."""
    copying(site)
    site.lose_logs()
    site.scribble()


def copying_all(site: Site) -> None:
    """A copy of everything is under way, and its logs were lost."""
    joined(site)
    begin(site, Scope.FULL)
    site.ship()
    site.scribble()
    site.lose_logs()
    site.scribble()


def copied(site: Site) -> None:
    """The replica has the copy, and the tracker has not heard of it; its logs were lost meanwhile."""
    copying_lost(site)
    finish_copy(site)


def copied_whole(site: Site) -> None:
    """The replica has the copy; its logs are there."""
    copying(site)
    finish_copy(site)


def begin(site: Site, scope: Scope) -> None:
    site.tracker.begin(site.dice.randbytes(16), scope)


def finish_copy(site: Site) -> None:
    status = site.tracker.status()
    generation = bytes.fromhex(status["generation"])
    while site.replica.position != (generation, 0):
        site._copy_on(generation, status)


def acknowledge(site: Site) -> None:
    site.tracker.resynced(bytes.fromhex(site.tracker.status()["generation"]))


def doubt(site: Site) -> None:
    site.damage()


STEPS_THAT_CHANGE_SIDES: dict[str, tuple[Callable[[Site], None], Callable[[Site], None]]] = {
    "begin regions": (lost, lambda site: begin(site, Scope.REGIONS)),
    "begin regions without a loss": (joined, lambda site: begin(site, Scope.REGIONS)),
    "begin all": (lost, lambda site: begin(site, Scope.FULL)),
    "begin regions over an abandoned copy": (copying, lambda site: begin(site, Scope.REGIONS)),
    "begin regions over one without logs": (copying_lost, lambda site: begin(site, Scope.REGIONS)),
    "begin all over an abandoned copy": (copying_all, lambda site: begin(site, Scope.FULL)),
    "lose logs": (joined, Site.lose_logs),
    "lose logs during a copy": (copying, Site.lose_logs),
    "lose logs after a copy": (copied_whole, Site.lose_logs),
    "acknowledge": (copied_whole, acknowledge),
    "acknowledge after a loss": (copied, acknowledge),
    "doubt": (joined, doubt),
    "doubt during a copy": (copying, doubt),
    "widen": (copying_lost, lambda site: site.tracker.degrade("for the test", full=True)),
    "restart": (copying_lost, Site.restart),
}


@pytest.mark.parametrize("step", STEPS_THAT_CHANGE_SIDES)
def test_death_at_any_call_leaves_marks_too_many_never_too_few(root: str, step: str) -> None:
    """Of the process and of the host in turn."""
    prepare, action = STEPS_THAT_CHANGE_SIDES[step]
    nth, died = 0, True
    while died:
        nth += 1
        folder = os.path.join(root, str(nth))
        os.mkdir(folder)
        with Site(folder, seed=1) as site:
            prepare(site)
            site.check()
            site.reaper.die_at(frozenset({"tracker"}), None, nth=nth)  # type: ignore[arg-type]
            died = site._dies_in(lambda action=action, site=site: action(site))
            if died:
                site.cut_power() if nth % 2 else site.kill()
                site.attach()
            try:
                site.check()
                for _ in range(3):
                    site.scribble()
                    site.check()
                site.converge()
            except Violation as violation:
                raise Violation(f"{violation}; {site.happened}") from None
        shutil.rmtree(folder)
    assert nth > 3


class Meddler:
    """Instead of the injector: at the nth call at which the guest could write, it does; some calls later, death."""

    def __init__(self, site: Site, meddle: Callable[[], None], *, nth: int, dies_after: int | None) -> None:
        self.done = False
        self._site, self._meddle = site, meddle
        self._left, self._dies_after = nth, dies_after

    def __call__(self, label: str, call: str, size: int) -> None:
        site = self._site
        if self.done:
            if self._dies_after is not None:
                self._dies_after -= 1
                if self._dies_after < 0:
                    raise Death(label)
        elif not site.tracker.gate.locked():
            self._left -= 1
            if self._left == 0:
                system.install(site.reaper)
                self._meddle()
                system.install(self)
                self.done = True


MEDDLING: dict[str, Callable[[Site], None]] = {
    "write": lambda site: site.tracker.disks["a.raw"].write(b"meddling" * 64, 3 * BLOCK) and None,
    "lose": Site.lose_logs,
}


@pytest.mark.parametrize(
    ("meddling", "scope"), [("write", Scope.REGIONS), ("write", Scope.FULL), ("lose", Scope.REGIONS)]
)
def test_what_guests_do_while_a_generation_begins_is_in_its_copy_or_in_its_logs(
    root: str, meddling: str, scope: Scope
) -> None:
    nth, done = 0, True
    while done:
        nth += 1
        for dies_after in (None, (0, 1, 3, 6)[nth % 4]):
            folder = os.path.join(root, f"{nth}.{dies_after}")
            os.mkdir(folder)
            with Site(folder, seed=2) as site:
                lost(site)
                meddler = Meddler(site, lambda site=site: MEDDLING[meddling](site), nth=nth, dies_after=dies_after)
                system.install(meddler)
                try:
                    begin(site, scope)
                except ResyncRequiredError:
                    assert meddling == "lose"
                except Death:
                    site.cut_power() if nth % 3 else site.kill()
                system.install(site.reaper)
                done = meddler.done
                if site.vm is None:
                    site.attach()
                site.check()
                assert site.tracker.is_logging or site.tracker.resync_reason is not None
                site.converge()
            shutil.rmtree(folder)
    assert nth > 3
