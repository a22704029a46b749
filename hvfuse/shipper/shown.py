"""The records of a VM, with their last values at hand for the control socket to show."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from hvfuse.errors import HvfuseError
from hvfuse.shipper.copy import CopyReport
from hvfuse.shipper.cycle import CycleReport
from hvfuse.shipper.orders import Orders
from hvfuse.shipper.policy import Records
from hvfuse.states import Event, ReplicationState


class ShownRecords:
    """Records that also remember their last values, for the control socket to show."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._changing = threading.Lock()  # of `fields`, which is replaced as a whole: any thread may read it
        self.fields: Mapping[str, object] = {}

    def apply(self, *events: Event, **fields: object) -> ReplicationState:
        state = self._records.apply(*events, **fields)
        self._show({**fields, "state": state})
        return state

    def update(self, **fields: object) -> None:
        self._show(fields)
        self._records.update(**fields)

    def _show(self, fields: Mapping[str, object]) -> None:
        told = {name: value.as_json() if isinstance(value, Orders) else value for name, value in fields.items()}
        with self._changing:
            self.fields = {**self.fields, **told}

    def orders(self) -> Orders:
        return self._records.orders()

    def change_orders(self, change: Callable[[Orders], Orders]) -> Orders:
        orders = self._records.change_orders(change)
        with self._changing:
            self.fields = {**self.fields, "orders": orders.as_json()}
        return orders

    def copy_progress(self) -> Mapping[str, object] | None:
        return self._records.copy_progress()

    def last_app_consistent_ns(self) -> int | None:
        return self._records.last_app_consistent_ns()

    def cycle(self, report: CycleReport, *events: Event, **fields: object) -> ReplicationState:
        state = self._records.cycle(report, *events, **fields)
        self._show({**fields, "state": state})
        return state

    def copied(self, report: CopyReport) -> None:
        with self._changing:
            self.fields = {**self.fields, "last_copy": report.as_json()}
        self._records.copied(report)

    def resume(self) -> None:
        self._records.resume()

    def missed(self, count: int) -> None:
        self._records.missed(count)

    def failed(self, error: HvfuseError) -> None:
        self._records.failed(error)
