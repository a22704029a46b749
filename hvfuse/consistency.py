"""What a recovery point promises to the guest: a word that tracker, shipper and store share."""

from __future__ import annotations

from enum import StrEnum


class Consistency(StrEnum):
    """What a recovery point promises to the guest."""

    CRASH = "crash-consistent"
    """The disks as after a power cut: whatever was flushed is there, file systems replay their journals."""
    APPLICATION = "app-consistent"
    """The guest stood still at the barrier: its file systems are clean, its programs had been asked to finish."""
