"""The definitions of VMs in the store: what a source says of a VM, for whoever fails it over. Bytes, here.

A definition is stored once, whatever number of recovery points were made under it: the VM's record names the one given
last, and each point the one that was in force when it was committed. One that neither names any more goes in the
transaction in which the last point that names it goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hvfuse.errors import UsageError
from hvfuse.target import failing_over, relation, schema
from hvfuse.target.environment import Txn
from hvfuse.target.failing_over import Claim
from hvfuse.target.index import scan
from hvfuse.target.schema import VmRecord
from hvfuse.target.store import Store

MAX_BYTES = 8 << 20
"""Of one definition."""


def define(store: Store, vm_name: str, definition: bytes, claim: Claim | None = None) -> None:
    """Have the VM's next points made under a definition. Durable when it returns; one read if nothing changes.

    `claim`: of who ships. Raises NotFoundError (the store has no such VM), SuspendedError, FencedError, UsageError (too
    long).
    """
    if len(definition) > MAX_BYTES:
        raise UsageError(f"{vm_name}: its definition has {len(definition)} bytes, more than {MAX_BYTES}")
    name = schema.definition_name(definition)
    with store.env.read() as txn:
        if store.load_vm(txn, vm_name).definition == name:
            return
    store.env.ensure(schema.DEFINITIONS)

    def act(txn: Txn) -> None:
        vm = store.load_vm(txn, vm_name)
        relation.demand_open(vm)
        failing_over.demand_claim(vm, claim)
        key = schema.definition_key(vm.id, name)
        txn.put(key, schema.pack_definition(definition), db=store.env.db(schema.DEFINITIONS))
        store.save_vm(txn, replace(vm, definition=name))

    store.write("store:define", act)


def stored(txn: Txn, store: Store, vm: VmRecord) -> Iterator[tuple[str, bytes]]:
    """The VM's definitions by name, as they lie there. None in a store of before that is open for reading."""
    if store.env.has(schema.DEFINITIONS):
        for key, raw in scan(txn, store.env, schema.DEFINITIONS, schema.u32(vm.id), schema.u32(vm.id + 1)):
            yield key[4:].hex(), raw


def drop_unnamed(txn: Txn, store: Store, vm: VmRecord) -> None:
    """Delete the definitions that neither the VM nor any of its points names."""
    unnamed = {name.encode() for name, _ in stored(txn, store, vm)} - {vm.definition.encode()}
    if not unnamed:
        return
    # In the records as they lie there, oldest first: one that is still named mostly is by an old point, so that this
    # ends early. To parse them all, after each cycle, would take longer than the cycle.
    for _, raw in scan(txn, store.env, schema.POINTS, schema.point_key(vm.id, 0), schema.point_key(vm.id + 1, 0)):
        unnamed -= {name for name in unnamed if name in raw}
        if not unnamed:
            return
    for name in unnamed:
        txn.delete(schema.definition_key(vm.id, name.decode()), db=store.env.db(schema.DEFINITIONS))
