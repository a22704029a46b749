"""`hvfuse policy`: which settings apply to a VM and where they come from, and whether a configuration is sound."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import click

from hvfuse.cli.main import Session
from hvfuse.cli.output import counted, emit_json, json_option, note, one_line, print_table
from hvfuse.control.config import Config
from hvfuse.control.config_file import adopted, decoded
from hvfuse.control.config_layers import origins as layered_origins
from hvfuse.control.config_layers import with_definitions
from hvfuse.control.config_text import Effective, Origins, parse, shown
from hvfuse.control.home import CONFIG_NAME
from hvfuse.control.supervisor import find_vms
from hvfuse.errors import NotFoundError


@click.group()
def policy() -> None:
    """Show which settings apply to a VM, and prove the configuration.

    They stand in hvfuse.toml, in the home. `hvfuse run` takes a change over within seconds.
    """


@policy.command("show")
@click.argument("vm", required=False)
@json_option
@click.pass_obj
def show(session: Session, vm: str | None, as_json: bool) -> None:
    """Show each setting of VM, and where it comes from.

    Without VM: the settings of a VM of which hvfuse.toml says nothing, then what the others have of their own.
    """
    path = os.path.join(session.root, CONFIG_NAME)
    text = _text(path) if os.path.exists(path) else ""
    config = parse(path, text)
    definitions, faults = adopted(config.home(session.root))
    layers = with_definitions(config, text, definitions)
    for fault in (*faults.values(), *layers.faults.values()):
        note(fault)
    origins = Origins(text)
    names = {*find_vms(config.home(session.root)), *config.vms, *layers.config.adopted}

    def of(name: str) -> list[Effective]:
        if name in layers.config.adopted:
            return layered_origins(text, name, definitions[name][1])
        return origins.of(name)

    if vm is not None:
        if vm not in names:
            raise NotFoundError(f"there is no VM {vm}, and nothing of it in {path}", hint="hvfuse policy show")
        _show_one(vm, of(vm), as_json=as_json)
        return
    general = origins.of(None)
    settings = {name: of(name) for name in sorted(names)}
    if as_json:
        vms = [{"name": name, "settings": _fields(found)} for name, found in settings.items()]
        emit_json({"file": path, "default": _fields(general), "vms": vms})
    else:
        _print_all(general, settings)


@policy.command("check")
@click.argument("file", required=False, type=click.Path())
@json_option
@click.pass_obj
def check(session: Session, file: str | None, as_json: bool) -> None:
    """Prove that FILE, or the home's hvfuse.toml, is sound.

    Ends with 2 and names file, line and key if it is not. Nothing is changed: use it before a file is put in place.
    """
    path = file if file is not None else os.path.join(session.root, CONFIG_NAME)
    config = parse(path, _text(path))
    strangers = _strangers(session.root, config)
    if as_json:
        names = {"policies": sorted(config.policies), "vms": sorted(config.vms)}
        emit_json({"file": path, "valid": True, **names, "unknown_vms": strangers})
        return
    policies = f"{len(config.policies)} {'policy' if len(config.policies) == 1 else 'policies'}"
    click.echo(f"{path} is sound: {policies}, {counted(len(config.vms), 'VM')} with settings of their own")
    for name in strangers:
        note(f"there is no VM {name} yet, of which it speaks")


def _strangers(root: str, config: Config) -> list[str]:
    """The VMs of which a configuration speaks that are not there: names misspelt, maybe."""
    return sorted(set(config.vms) - set(find_vms(config.home(root))))


def _text(path: str) -> str:
    with open(path, "rb") as file:
        return decoded(path, file.read())


def _fields(found: Sequence[Effective]) -> list[dict[str, Any]]:
    return [
        {
            "key": each.key,
            "value": each.value,
            "source": {"table": each.table, "line": each.line}
            | ({} if each.definition is None else {"definition": each.definition}),
        }
        for each in found
    ]


def _show_one(vm: str, found: Sequence[Effective], *, as_json: bool) -> None:
    if as_json:
        emit_json({"vm": vm, "settings": _fields(found)})
    else:
        print_table(("SETTING", "VALUE", "FROM"), [_row(each) for each in found])


def _print_all(general: Sequence[Effective], settings: Mapping[str, Sequence[Effective]]) -> None:
    """First what applies where nothing else is said; of each VM, only what differs in value or in source."""
    rows = [("(any VM)", *_row(each)) for each in general]
    usual = {each.key: each for each in general}
    for name, found in settings.items():
        own = [each for each in found if each != usual.get(each.key, Effective(key=each.key, value=[]))]
        rows += [(name, *_row(each)) for each in own] or [(name, "as any VM", "", "")]
    print_table(("VM", "SETTING", "VALUE", "FROM"), rows)


def _row(each: Effective) -> tuple[str, str, str]:
    return each.key, one_line(shown(each.value)), one_line(each.source)
