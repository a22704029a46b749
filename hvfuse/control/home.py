"""Where everything of one installation lies.

    HOME/hvfuse.toml            the configuration
    HOME/disks/VM/              a VM: one folder with its disks (and, beside them, their logs)
    HOME/mnt/VM/                the same folder, mounted: what the guest uses
    HOME/store/                 the target store
    HOME/state/                 mode 0700
        home-id                 which home this is, to others: 32 hexadecimal digits
        run.lock                held by `hvfuse run`; its content is the holder's pid
        records/                LMDB: the control plane's records (`hvfuse.control.records`)
        vms/VM/                 mode 0700
            tracker.sock        requests to the tracker (`hvfuse.wire`), mode 0600
            shipper.sock        requests to the shipper
            shipper.lock        held by whoever runs cycles of this VM
            fence.lock          held by whoever decides whether its disks are held
            guest/              what stands of a freeze of the guest (`hvfuse.control.guest_guard`)
            definition          what the source said of the VM, where it was failed over to here, and
            definition.d/       the files that this names (`hvfuse.control.definition`)
            tracker.log         what the processes said; cut off at a few MiB
            shipper.log

`disks`, `mnt`, `store` and `state` can each be set elsewhere in `[paths]`. All paths are absolute:
a process that mounts has changed its working directory.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from dataclasses import dataclass

from hvfuse.errors import CorruptError, NotFoundError, UsageError

CONFIG_NAME = "hvfuse.toml"
DEFAULT_HOME = "hvfuse-home"
HOME_VARIABLE = "HVFUSE_HOME"
NAME_BYTES = 200
"""The longest name of a VM: room for suffixes within a file name's 255 bytes."""


def home_root(option: str | None) -> str:
    """The absolute path of the home: `--home`, else `$HVFUSE_HOME`, else `./hvfuse-home`."""
    return os.path.abspath(option or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)


def name_fault(name: str) -> str | None:
    """What is wrong with `name` as a VM's name; None if nothing is."""
    if not name:
        return "is empty"
    if name.startswith("."):
        return "begins with a dot"
    if "/" in name or not name.isprintable():
        return "holds a slash or an unprintable character"
    if len(os.fsencode(name)) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes"
    return None


def check_vm_name(name: str) -> str:
    """`name`, if it can be a VM's name. Raises UsageError saying what is wrong with it."""
    fault = name_fault(name)
    if fault is not None:
        raise UsageError(f"{name!r} cannot be a VM's name: it {fault}")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """The absolute paths of an installation; see the module's docstring."""

    root: str
    disks: str
    mnt: str
    store: str
    state: str

    @property
    def config_path(self) -> str:
        """The configuration file."""
        return os.path.join(self.root, CONFIG_NAME)

    @property
    def records(self) -> str:
        """Directory of the control plane's records."""
        return os.path.join(self.state, "records")

    @property
    def run_lock(self) -> str:
        """File that a running `hvfuse run` holds locked."""
        return os.path.join(self.state, "run.lock")

    def folder(self, vm: str) -> str:
        """The VM's folder with its disks."""
        return os.path.join(self.disks, check_vm_name(vm))

    def mountpoint(self, vm: str) -> str:
        """Where the VM's folder is mounted."""
        return os.path.join(self.mnt, check_vm_name(vm))

    def state_dir(self, vm: str) -> str:
        """The VM's own part of the state directory."""
        return os.path.join(self.state, "vms", check_vm_name(vm))

    def tracker_socket(self, vm: str) -> str:
        """Where the VM's tracker answers."""
        return os.path.join(self.state_dir(vm), "tracker.sock")

    def shipper_socket(self, vm: str) -> str:
        """Where the VM's shipper answers."""
        return os.path.join(self.state_dir(vm), "shipper.sock")

    def tracker_lock(self, vm: str) -> str:
        """Lock of whoever serves the VM, or moves its files."""
        return os.path.join(self.state_dir(vm), "tracker.lock")

    def fence_lock(self, vm: str) -> str:
        """Lock of whoever decides whether the VM's disks are held, and tells its tracker."""
        return os.path.join(self.state_dir(vm), "fence.lock")

    def shipper_lock(self, vm: str) -> str:
        """Lock of whoever runs cycles of the VM."""
        return os.path.join(self.state_dir(vm), "shipper.lock")

    def guest(self, vm: str) -> str:
        """Directory of what stands of a freeze of the VM's guest."""
        return os.path.join(self.state_dir(vm), "guest")

    def proofs(self, vm: str) -> str:
        """What verification proved of the VM's replica."""
        return os.path.join(self.state_dir(vm), "proofs")

    def log(self, vm: str, role: str) -> str:
        """What the VM's process `role` ("tracker", "shipper") said."""
        return os.path.join(self.state_dir(vm), f"{role}.log")

    def identity(self) -> str:
        """Which home this is, wherever its directory lies: 32 hexadecimal digits, made durably when first asked for.
        Raises OSError, CorruptError."""
        path = os.path.join(self.state, "home-id")
        with contextlib.suppress(FileNotFoundError):
            return _identity_in(path)
        from hvfuse import system  # brings numpy, which most commands can do without

        _make_private(self.state)
        own = f"{path}.{os.getpid()}"
        system.replace_file("home:identity", own, f"{uuid.uuid4().hex}\n".encode())
        with contextlib.suppress(FileExistsError):  # of two who make one, the first has made it
            os.link(own, path)
        os.unlink(own)
        system.fsync_directory("home:identity", self.state)
        return _identity_in(path)

    def known_identity(self) -> str | None:
        """The same, None if the home has none yet, or none that can be read."""
        with contextlib.suppress(OSError, CorruptError):
            return _identity_in(os.path.join(self.state, "home-id"))
        return None

    def make(self) -> None:
        """Make the directories that are missing. Raises OSError. Not the store's: where an empty one lies, nobody can
        tell it from a mount point whose disk is missing (`hvfuse.control.location`)."""
        for path in (self.root, self.disks, self.mnt):
            os.makedirs(path, exist_ok=True)
        _make_private(self.state)

    def make_vm(self, vm: str) -> None:
        """Make the VM's part of the state directory. Raises OSError, NotFoundError."""
        if not os.path.isdir(self.folder(vm)):
            raise NotFoundError(f"there is no VM {vm}: {self.folder(vm)} is not a directory")
        self.make_state(vm)

    def make_state(self, vm: str) -> None:
        """The same, also of a VM that another home has. Raises OSError."""
        _make_private(os.path.dirname(self.state_dir(vm)))
        _make_private(self.state_dir(vm))


def _identity_in(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        identity = file.read().strip()
    if re.fullmatch(r"[0-9a-f]{32}", identity) is None:
        raise CorruptError(f"{path}: does not hold the id of a home", hint="restore it from a backup of the home")
    return identity


def _make_private(path: str) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
