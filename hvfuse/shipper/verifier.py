"""What a shipper offers of verification: runs that a command asks for, idle-time verification, repair.

A command drives its run itself: "begin", then "step" until the report says that it is done, or "end" before that. So
a command that dies leaves nothing running. Requests ("op" is "verify"; "do" says what) and their answers:

    begin    share (0 to 1), seed (or null),     -> "run", "report"
             only_mismatches (default false),
             token (text; what "end" is to name)
    step     run                                 -> "run", "report", "verified"
    end      token                               -> {}; also where that run is not under way
    budget   budget (bytes a second, 0: none)    -> "verified"
    repair                                       -> "mismatches": those whose blocks were copied anew

All of it happens in the shipper's thread.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hvfuse.errors import BusyError, CorruptError, HvfuseError, NotFoundError, UnsupportedError, UsageError
from hvfuse.extent import Extent
from hvfuse.reconcile import plan
from hvfuse.shipper import proofs as proofs_file
from hvfuse.shipper.policy import CurrentPolicy
from hvfuse.shipper.proofs import Mismatch, Proofs
from hvfuse.shipper.replica import Replica
from hvfuse.shipper.retry import refusal
from hvfuse.shipper.sides import Sides, open_sides
from hvfuse.shipper.source import Source
from hvfuse.shipper.verify import WORKERS, Region, Run, choose
from hvfuse.system import Clock
from hvfuse.wire import Message

SLICE = 1.0
IDLE_SLICE = 0.25
"""Seconds that one turn of a run takes, of a command's and of idle time's."""
ABANDONED = 30.0
"""Seconds after its last step at which a command's run does not keep others out any more."""
IDLE_RUN = 1 << 30
"""Bytes that are chosen at once for idle time."""
RESTED = 3600
"""Seconds; what was proved so lately is not verified in idle time."""
PAUSE = 60.0
"""Seconds after which idle time is used again when there was nothing to verify, or it could not be."""
SAVED_EVERY = 10.0
"""Seconds between durable proofs of idle time, at least."""

_log = logging.getLogger(__name__)


class Verifier:
    """Verifies one VM. For the shipper's thread.

    `path`: of the file of proofs. `ship` ships a cycle now, after a copy if one is needed; `allow_copy` gives a copy
    leave to start at once, or raises HvfuseError.
    """

    def __init__(
        self,
        *,
        vm: str,
        folder: str,
        path: str,
        source: Source,
        replica: Replica,
        clock: Clock,
        ship: Callable[[], object],
        allow_copy: Callable[[], object],
        policy: CurrentPolicy,
    ) -> None:
        self._vm = vm
        self._folder = folder
        self._path = path
        self._source = source
        self._replica = replica
        self._clock = clock
        self._ship = ship
        self._allow_copy = allow_copy
        self._policy = policy
        self._workers = ThreadPoolExecutor(WORKERS, "hvfuse-verify")
        self._kept: Proofs | None = None
        self._run: Run | None = None
        self._number = 0
        self._token: object = None  # of the run's command, which may not have learnt the number
        self._stepped_at = 0.0
        self._idle_run: Run | None = None
        self._idle_at = clock.monotonic()
        self._idle_after = self._idle_at
        self._saved_at = self._idle_at
        self._allowance = 0.0
        self._complaint = ""

    def close(self) -> None:
        """End the threads."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def handle(self, message: Message) -> Mapping[str, object]:
        """One request. Raises HvfuseError."""
        match message.get("do"):
            case "begin":
                return self._begin(message)
            case "step":
                return self._step(message)
            case "end":
                return self._end(message)
            case "budget":
                return self._set_budget(message)
            case "repair":
                return {"mismatches": [mismatch.as_json() for mismatch in self.repair()]}
            case other:
                raise UsageError(f"verification knows no request {other!r}")

    def prove(self, progress: Callable[[int, int], None]) -> Mapping[str, Any]:
        """See `Shipper.prove`."""
        answer = self._begin({"share": 1.0})
        while True:
            report = answer["report"]
            assert isinstance(report, dict)
            progress(report["bytes_compared"], report["bytes_total"])
            if report["done"]:
                break
            answer = self._step({"run": answer["run"]})
        if report["mismatch_bytes"] or report["bytes_unproved"] or report["resized"]:
            first = next(iter(report["mismatches"]), None)
            at = f", first at byte {first['offset']} of {first['disk']}" if first is not None else ""
            raise CorruptError(
                f"{self._vm}: source and replica are not equal: {report['mismatch_bytes']} bytes differ{at}",
                hint=f"hvfuse failover cancel {self._vm}; then hvfuse verify {self._vm} --repair",
            )
        compared, disks = report["bytes_compared"], len(self.proofs.disks)
        return {"bytes": compared, "disks": disks, "algorithm": self._policy.now.algorithm.value}

    def _begin(self, message: Message) -> Mapping[str, object]:
        share, seed = message.get("share", 1.0), message.get("seed")
        if not isinstance(share, float | int) or not 0 < share <= 1:
            raise UsageError("the share to verify is more than 0 and at most 1")
        if self._run is not None and self._clock.monotonic() - self._stepped_at < ABANDONED:
            raise BusyError(
                f"{self._vm} is being verified already",
                hint=f"wait for the other command to end; if it was killed, try again in {ABANDONED:.0f} s",
            )
        self._run = None
        if not isinstance(seed, int):
            seed = random.SystemRandom().getrandbits(32)
        with self._sides(from_medium=False) as sides:
            regions = self._choose(sides, share=share, seed=seed, only=bool(message.get("only_mismatches")))
        self._run = self._new_run(regions, seed)
        self._number += 1
        self._token = message.get("token")
        self._stepped_at = self._clock.monotonic()
        return {"run": self._number, "report": self._run.report().as_json()}

    def _choose(self, sides: Sides, *, share: float, seed: int, only: bool) -> list[Region]:
        proofs = self.proofs
        proofs.follow((disk.disk_id, disk.name, disk.size) for disk in sides.disks.values())
        if only and not proofs.mismatches:
            return []
        return choose(proofs, share=share, dice=random.Random(seed), most=0 if only else None)

    def _new_run(self, regions: list[Region], seed: int) -> Run:
        return Run(
            regions,
            proofs=self.proofs,
            seed=seed,
            clock=self._clock,
            workers=self._workers,
            algorithm=self._policy.now.algorithm,
        )

    def _step(self, message: Message) -> Mapping[str, object]:
        run = self._run
        if run is None or message.get("run") != self._number:
            raise NotFoundError(f"{self._vm}: that verification is not under way any more", hint="begin it again")
        try:
            if run.wants_cycle:
                self._ship()
            with self._sides(from_medium=run.is_fresh) as sides:
                run.advance(sides, seconds=SLICE)
        except BaseException:
            self._run = None
            raise
        finally:
            self._save()
        self._stepped_at = self._clock.monotonic()
        report = run.report().as_json()
        if run.is_done:
            self._run = None
            self.proofs.last_run = {"finished_ns": self._clock.now_ns(), **report}
            self._save()
        return {"run": self._number, "report": report, "verified": self._verified()}

    def _end(self, message: Message) -> Mapping[str, object]:
        """Nobody is to step the run any more. What it proved is kept with each step."""
        if message.get("token") is not None and message.get("token") == self._token:
            self._run = None
        return {}

    def _set_budget(self, message: Message) -> Mapping[str, object]:
        budget = message.get("budget")
        if not isinstance(budget, int) or budget < 0:
            raise UsageError("the budget is a number of bytes a second, or 0")
        self.proofs.budget = budget
        self._save()
        self._idle_run, self._allowance, self._idle_after = None, 0.0, self._clock.monotonic()
        return {"verified": self._verified()}

    def repair(self) -> list[Mismatch]:
        """Copy the blocks anew that are on the list of mismatches. They stay on it until they are found equal.

        Returns what was on it. Raises HvfuseError.
        """
        found = list(self.proofs.mismatches)
        if not found:
            return []
        self._ship()  # the logs are lost: what they hold becomes points before
        self._allow_copy()  # which may be refused: then nothing is in doubt that was not
        self.doubt()
        self._ship()
        return found

    def doubt(self) -> bool:
        """Have the source require a resynchronisation of what is on the list of mismatches and was not copied anew
        since. Returns whether there is anything. Raises HvfuseError, UnreachableError if the VM is not mounted."""
        if not self.proofs.mismatches:
            return False
        status = self._source.status()
        assert status.generation is not None
        mismatched = self.proofs.mismatched(status.generation.hex())
        if not mismatched:
            return False
        regions = {
            disk.disk_id: [
                Extent(extent.offset, min(extent.end, disk.size) - extent.offset)
                for extent in mismatched[disk.disk_id]
                if extent.offset < disk.size
            ]
            for disk in status.disks
            if disk.disk_id in mismatched
        }
        self._source.doubt(status.generation, "verification found that the replica differs", regions)
        self.doubted(status.generation)
        return True

    def doubted(self, generation: bytes) -> None:
        """The generation ends with a copy of what is on the list; or of everything. Raises HvfuseError."""
        if self.proofs.mismatches:
            self.proofs.doubt(generation.hex())
            self._save()

    def idle(self) -> None:
        """Verify a little, within the budget. To be called often when there is nothing else to do.

        What goes wrong is logged, once. Nothing depends on it.
        """
        budget, now = self.proofs.budget, self._clock.monotonic()
        elapsed, self._idle_at = now - self._idle_at, now
        is_driven = self._run is not None and now - self._stepped_at < ABANDONED
        if not budget or is_driven or now < self._idle_after:
            return
        self._allowance = min(self._allowance + elapsed * budget, float(max(budget, 2 * plan.SPAN)))
        if self._allowance < plan.SPAN:
            return
        try:
            self._advance_idle()
            self._complaint = ""
        except (HvfuseError, OSError) as error:
            self._idle_run, self._idle_after = None, now + PAUSE
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.info("%s: not verified in idle time: %s", self._vm, error)

    def _advance_idle(self) -> None:
        run = self._idle_run
        if run is not None and run.wants_cycle and run.position == self._replica.position():
            return
        with self._sides(from_medium=run is None or run.is_fresh) as sides:
            if run is None:
                run = self._begin_idle(sides)
            if run is None:
                self._idle_after = self._clock.monotonic() + PAUSE
                return
            mismatches = len(self.proofs.mismatches)
            self._allowance -= run.advance(sides, seconds=IDLE_SLICE, most=int(self._allowance))
        self._idle_run = None if run.is_done else run
        if run.is_done:
            report = run.report()
            self.proofs.last_run = {"finished_ns": self._clock.now_ns(), **report.as_json()}
            if report.bytes_total < IDLE_RUN:  # that was all there is to do
                self._idle_after = self._clock.monotonic() + PAUSE
        is_due = self._clock.monotonic() - self._saved_at >= SAVED_EVERY
        if run.is_done or is_due or len(self.proofs.mismatches) != mismatches:
            self._save()

    def _begin_idle(self, sides: Sides) -> Run | None:
        self.proofs.follow((disk.disk_id, disk.name, disk.size) for disk in sides.disks.values())
        before = max(1, self._clock.now_ns() // 10**9 - RESTED)
        seed = random.SystemRandom().getrandbits(32)
        regions = choose(self.proofs, share=1.0, dice=random.Random(seed), most=IDLE_RUN, before=before)
        return self._new_run(regions, seed) if regions else None

    @property
    def proofs(self) -> Proofs:
        """What is proved, as far as it is known."""
        if self._kept is None:
            try:
                self._kept = proofs_file.load(self._path)
            except (CorruptError, UnsupportedError) as error:
                _log.warning("%s; every block counts as not proved yet", error)
                self._kept = Proofs()
            except OSError as error:
                raise refusal(error, self._path) from error
        return self._kept

    def _verified(self) -> Mapping[str, object] | None:
        verified = self.proofs.verified(self._clock.now_ns())
        return None if verified is None else verified.as_json()

    def _save(self) -> None:
        self._saved_at = self._clock.monotonic()
        try:
            self.proofs.save(self._path)
        except OSError as error:
            raise refusal(error, self._path) from error

    def _sides(self, *, from_medium: bool) -> contextlib.AbstractContextManager[Sides]:
        return open_sides(self._vm, self._folder, self._source, self._replica, from_medium=from_medium)
