"""hvfuse: replication, recovery points and failover for virtual disks, under a FUSE filesystem."""

__version__ = "0.1.0"
