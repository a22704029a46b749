"""A VM of the home, as orders about it need it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hvfuse.cli.main import Session
from hvfuse.control.home import check_vm_name
from hvfuse.control.records import Records
from hvfuse.system import SystemClock

if TYPE_CHECKING:
    from hvfuse.control.site import Site


@contextmanager
def open_site(session: Session, vm: str) -> Iterator[Site]:
    """The VM in its installation. Raises NotFoundError when there is no such home, UsageError for a name that cannot
    be."""
    from hvfuse.control.site import Site

    check_vm_name(vm)
    if not os.path.isdir(session.root):
        session.home  # noqa: B018  raises NotFoundError
    home = session.prepare()
    if os.path.isdir(home.folder(vm)):
        home.make_vm(vm)
    with Records(home.records) as records:
        yield Site(home=home, policy=session.config.policy(vm), vm=vm, records=records, clock=SystemClock())
