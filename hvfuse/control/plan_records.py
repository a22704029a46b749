"""The runs of recovery plans that are kept.

    "next/plan"        {"number": the last id given out}
    "plan/" + u64 BE   the fields of `PlanRun` but its id

The oldest beyond RUNS_KEPT go, unless there is something to go on with.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from hvfuse import system
from hvfuse.control.database import Database, Transaction, numbered
from hvfuse.control.plan import Mode
from hvfuse.control.plan_record import OPEN, PlanRun, RunState
from hvfuse.errors import NotFoundError
from hvfuse.system import Clock

RUNS_KEPT = 500
_PREFIX = b"plan/"
_NEXT = b"next/plan"


class PlanRuns:
    """The runs of a home. `clock`: for their times."""

    def __init__(self, database: Database, *, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def all(self, plan: str | None = None) -> list[PlanRun]:
        """The runs of a plan, or of all, oldest first, as their processes left them (`bury` first). Raises
        CorruptError."""
        with self._database.read() as txn:
            found = [PlanRun.from_json(number, values) for number, values in txn.under(_PREFIX)]
        return [run for run in found if plan is None or run.plan == plan]

    def get(self, run_id: int) -> PlanRun:
        """One run. Raises NotFoundError, CorruptError."""
        with self._database.read() as txn:
            return _found(txn, run_id)

    def open(self, plan: str) -> PlanRun | None:
        """The run of a plan that there is something to go on with; there is never more than one."""
        return next((run for run in reversed(self.all(plan)) if run.state in OPEN), None)

    def begin(self, plan: str, mode: Mode, *, point: str | None) -> PlanRun:
        """A new run, of this process. Durable."""
        now_ns = self._clock.now_ns()

        def act(txn: Transaction) -> PlanRun:
            number = int((txn.get(_NEXT) or {"number": 0})["number"]) + 1
            owner = system.process_identity(os.getpid())
            run = PlanRun(id=number, plan=plan, mode=mode, point=point, started_ns=now_ns, owner=owner)
            txn.put(_NEXT, {"number": number})
            txn.put(numbered(_PREFIX, number), run.as_json())
            _prune(txn)
            return run

        return self._database.write(act)

    def change(self, run_id: int, change: Callable[[PlanRun, int], PlanRun]) -> PlanRun:
        """Replace a run by what `change` makes of it and the time, in one step; durable. Returns the new one. Raises
        NotFoundError."""
        now_ns = self._clock.now_ns()

        def act(txn: Transaction) -> PlanRun:
            changed = change(_found(txn, run_id), now_ns)
            txn.put(numbered(_PREFIX, run_id), changed.as_json())
            return changed

        return self._database.write(act)

    def bury(self) -> None:
        """Tell the runs whose process is gone from those that are worked at."""
        for run in self.all():
            if _is_abandoned(run):
                self.change(run.id, lambda now, now_ns: now.buried(now_ns) if _is_abandoned(now) else now)


def _found(txn: Transaction, run_id: int) -> PlanRun:
    values = txn.get(numbered(_PREFIX, run_id))
    if values is None:
        raise NotFoundError(f"there is no run {run_id} of a recovery plan", hint="hvfuse plan list")
    return PlanRun.from_json(run_id, values)


def _is_abandoned(run: PlanRun) -> bool:
    return run.state is RunState.IN_PROGRESS and (run.owner is None or not system.is_running(run.owner))


def _prune(txn: Transaction) -> None:
    for number in txn.numbers(_PREFIX)[:-RUNS_KEPT]:
        if _found(txn, number).state not in OPEN:
            txn.delete(numbered(_PREFIX, number))
