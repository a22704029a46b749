"""`hvfuse replication reverse`, on either side."""

from __future__ import annotations

import os

import click

from hvfuse.cli import wiring
from hvfuse.cli.failing_over import consent, show_plan, wait_hydrated
from hvfuse.cli.main import Session
from hvfuse.cli.output import emit_json
from hvfuse.cli.progress import showing
from hvfuse.control import flows, reversing
from hvfuse.control.job import JobKind
from hvfuse.control.site import Site
from hvfuse.control.supervisor import is_supervised
from hvfuse.words import bytes_text


def give_way(session: Session, site: Site, *, into: str | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    """On the old source: its disks become the replica."""
    vm = site.vm
    if dry_run:
        return show_plan(JobKind.REVERSE, vm, flows.GIVE_WAY, as_json=as_json)
    if site.records.read(vm).giving_way is None:
        reversing.demand_taken_over(site, wiring.party(site.home))
    logged = reversing.unsent_bytes(site)
    what = f"this makes the disks of {vm} here the replica of what it has become on the other side" + (
        "; what was written here and never arrived there is dropped, and nobody can tell how much that is"
        if logged is None
        else f"; {bytes_text(logged)} that were written here and never arrived there are dropped"
        if logged
        else ""
    )
    consent(what, "Give way?", yes=yes, command=f"hvfuse replication reverse {vm}")
    fence = wiring.fence_of(site.home, session.config_file, vm, site.records)
    store = os.path.abspath(into or site.home.store)
    with showing(f"{vm}: moving its disks", quiet=as_json) as progress:
        reversing.give_way(site, wiring.party(site.home), fence, into=store, progress=progress)
    following = f"hvfuse replication reverse {vm}"
    if as_json:
        emit_json({"vm": vm, "side": "replica", "store": store, "dropped_bytes": logged, "next_command": following})
        return None
    click.echo(f"{vm}: its disks are the replica now, in {store}")
    click.echo(f"next, where the VM is: {following}")
    return None


def turn_round(session: Session, site: Site, *, to: str | None, dry_run: bool, as_json: bool) -> None:
    """Where the VM is now: it is replicated to the other side."""
    vm, record = site.vm, site.records.read(site.vm)
    if dry_run:
        return show_plan(JobKind.REVERSE, vm, flows.REVERSE, as_json=as_json)
    store = reversing.reverse(
        site,
        wiring.party(site.home),
        own=record.store or site.home.store,
        to=None if to is None else os.path.abspath(to),
        wait=lambda: wait_hydrated(site, quiet=as_json),
    )
    following = None if is_supervised(site.home) else f"hvfuse run, or: hvfuse replicate {vm}"
    if as_json:
        emit_json({"vm": vm, "side": "source", "store": store, "next_command": following})
        return None
    click.echo(f"{vm} is replicated to {store}: both sides are compared, and what differs is sent")
    if following is not None:
        click.echo(f"to begin: {following}")
    return None
