"""What the configuration file `hvfuse.toml` says, and the template of it.

Every key has a default; TEMPLATE, which is written on first use, shows them all. How the file is read:
`hvfuse.control.config_text`, and when: `hvfuse.control.config_file`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hvfuse.control.guest_settings import Addresses, BootSettings, GuestSettings, Network
from hvfuse.control.home import Home
from hvfuse.control.plan import Plan
from hvfuse.shipper.throttle import Throttle
from hvfuse.shipper.window import Initial, Resync
from hvfuse.target.retention import RetentionPolicy

TEMPLATE = """\
# Configuration of hvfuse. Every line that is commented out shows the default.
# A change takes effect within seconds, without a restart; but [paths] with the next `hvfuse run`.
# `hvfuse policy check` proves the file, `hvfuse policy show` says what applies to which VM.

[paths]                       # relative to the directory that holds this file
# disks = "disks"             # one folder for each VM, with its disks in it
# mnt = "mnt"                 # where the folders are mounted: let the guest use its disks here
# store = "store"             # the target store: replica images and the journal of recovery points
# state = "state"             # what the processes need to know across a restart

[replication]
# protect = "auto"            # `hvfuse run` protects a new VM by itself; "manual": it mounts it, and protects
                              # it when told to by `hvfuse replication enable VM`
# target = "own"              # where cycles are sent: this home's own store, or the directory of another home's
# fence = "local"             # when the store cannot be asked whether a VM was failed over: "local" serves its disks as
                              # what is known here says; "strict" holds them, read-only, until it could be asked
# frequency = "30s"           # how often a recovery point is made: "1s" to "1h"
# compression = 1             # zstd level, 1 to 22; 0 = off
# throttle = "none"           # how fast data travels: "10MB/s", or a list of which the first that fits applies (local
                              # time): ["mon-fri 08:00-18:00 10MB/s", "sat,sun none", "50MB/s"]
# soft_limit = 25             # percent of the disks' size in unsent logs: then they are compacted
# hard_limit = 50             # then they are given up, and a resynchronisation compares what changed
# initial = "now"             # the first copy of the disks: "now", at a time at most 7 days ahead such as
                              # "2026-11-22 18:30", or "seed": from a medium (`hvfuse seed`), not over the network
# resync = "auto"             # a resynchronisation that is needed begins by itself; "manual": when it is asked
                              # for with `hvfuse resync VM`; until then, no recovery points are made
# resync_window = "18:30-06:00" # when one of everything, or of much, may begin by itself (local time);
                              # "always": at once, as one of a quarter of the disks or 1 GiB always does
# digest = "xxh3"             # how blocks are compared: "xxh3" is fast; "blake3" cannot be fooled by a guest
                              # that chooses what it writes

[retention]                   # which recovery points are kept
# keep_all = "1h"             # every one for so long
# hourly = 24                 # then one an hour, for so many hours
# daily = 0                   # then one a day, for so many days

[monitoring]
# interval = "12h"            # what health and `hvfuse measure` look back on: "1h" to "7d"
# notify = []                 # run when health changes or a job fails: ["/path/to/command", "argument"]
# keep_events = "30d"         # "1d" to "366d"

# [policy.gold]               # anything of [replication] and [retention], for the VMs that say so
# frequency = "5s"
# keep_all = "1d"

# [vm.web01]                  # for one VM only: anything of [replication] and [retention], and:
# policy = "gold"
# frequency = "10s"
# app_consistent = "1h"       # a recovery point with the guest's applications at rest: "1h" to "12h", or "off"
# exclude = ["swap.vhd"]      # disks that are not replicated

# [vm.web01.guest]            # how its guest is asked to hold still, and booted where it is failed over to
# agent = "/run/qemu/web01.agent" # the QEMU guest agent; or commands instead: freeze = ["/path/to/freeze", "web01"]
                              # and thaw = ["/path/to/thaw", "web01"]
# freeze_timeout = "10s"      # "1s" to "60s"
# qemu = ["qemu-system-x86_64", "-drive", "file={disk:root.raw},format=raw", "-nic", "bridge,br={network:lan}"]
                              # or libvirt = "web01.xml", a domain's XML in the home; see docs/guests.md
# before_boot = ["/path/to/command"] # run before it is booted, and then:
# after_boot = ["/path/to/command"]
# validate = ["/path/to/command"] # exit code 0: what was failed over is sound
# validate_timeout = "5m"     # "1s" to "24h"

# [vm.web01.network]          # its TCP/IP settings where it is failed over to, for these commands; for
# ipv4 = "192.0.2.10"         # tests: [vm.web01.network_test]
# ipv4_mask = "255.255.255.0"
# ipv4_gateway = "192.0.2.1"
# ipv6 = "2001:db8::10"
# ipv6_prefix = 64
# ipv6_gateway = "2001:db8::1"
# dns = ["192.0.2.53", "2001:db8::53"] # at most two

# [network.lan]               # what {network:lan} is called
# source = "br0"              # where the VM comes from
# target = "br1"              # where it is failed over to
# test = "br-isolated"        # in tests: never the network of the real one

# [plan.site]                 # a recovery plan: `hvfuse plan run site`, and `--test` to try it out
# point = "latest"            # or "latest-app-consistent", or a time; for single VMs: points = { db01 = "..." }

# [[plan.site.group]]         # groups one after the other; the VMs of a group at once
# name = "databases"
# vms = ["db01", "db02"]
# before = []                 # commands around the failover: ["/path/to/command", "argument"], or a list of such
# after = []
# pause = "check that the databases answer" # wait for an administrator, after the group
# boot = false                # start the guests
# hook_timeout = "10m"        # "1s" to "1d"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmPolicy:
    """How one VM is replicated. `protect`: whether `hvfuse run` protects it by itself. `target`: the store that it is
    sent to, as the file says; None: the home's own. `fence`: see `hvfuse.control.fence`. `frequency`: seconds from
    cycle to cycle. `compression`: zstd level, 0 = off. `throttle`: how fast frames travel. `soft_limit`, `hard_limit`:
    percent of the disks' size that logs may take before they are compacted or given up. `initial`: how the first copy
    begins. `resync`: when resynchronisations do. `digest`: by what blocks are compared. `app_consistent`: seconds from
    one application-consistent point to the next, 0 = none. `exclude`: file names of disks that are not replicated.
    `guest`: how the guest is asked to hold still; a VM's is never None with `app_consistent`. `boot`: how it is booted
    where it is failed over to; `network`, `network_test`: its addresses there, and in tests; None: not said."""

    protect: Literal["auto", "manual"] = "auto"
    target: str | None = None
    fence: Literal["local", "strict"] = "local"
    frequency: float = 30.0
    compression: int = 1
    throttle: Throttle = field(default_factory=Throttle)
    soft_limit: int = 25
    hard_limit: int = 50
    initial: Initial = field(default_factory=Initial)
    resync: Resync = field(default_factory=Resync)
    digest: Literal["xxh3", "blake3"] = "xxh3"
    app_consistent: float = 0.0
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    exclude: frozenset[str] = frozenset()
    guest: GuestSettings | None = None
    boot: BootSettings | None = None
    network: Addresses | None = None
    network_test: Addresses | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Monitoring:
    """`interval`: seconds over which health and measurements look back. `notify`: a command with its arguments, run
    when health changes or a job fails; empty for none. `keep_events`: seconds."""

    interval: float = 43200.0
    notify: tuple[str, ...] = ()
    keep_events: float = 30 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The file's contents. `paths` as written; `default`: the policy of a VM that has no table; `policies`: the
    others by their names, as of a VM that says nothing of its own; `networks`: by their logical names; `adopted`: by
    VM, what applies to one whose definition was adopted here (`hvfuse.control.config_layers`)."""

    paths: Mapping[str, str] = field(default_factory=dict)
    default: VmPolicy = field(default_factory=VmPolicy)
    policies: Mapping[str, VmPolicy] = field(default_factory=dict)
    vms: Mapping[str, VmPolicy] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    monitoring: Monitoring = field(default_factory=Monitoring)
    networks: Mapping[str, Network] = field(default_factory=dict)
    adopted: Mapping[str, Config] = field(default_factory=dict)

    def policy(self, vm: str) -> VmPolicy:
        """How `vm` is replicated."""
        return self.seen_by(vm).vms.get(vm, self.default)

    def seen_by(self, vm: str) -> Config:
        """What applies to `vm`: the file, with the VM's definition beneath it if one was adopted here."""
        return self.adopted.get(vm, self)

    def home(self, root: str) -> Home:
        """The paths of the installation at the absolute path `root`."""

        def path(key: str) -> str:
            return os.path.abspath(os.path.join(root, self.paths.get(key, key)))

        return Home(root=root, disks=path("disks"), mnt=path("mnt"), store=path("store"), state=path("state"))
