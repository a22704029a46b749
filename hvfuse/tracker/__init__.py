"""The tracker: one process per VM that stands between the guest and its disks and logs every write."""
