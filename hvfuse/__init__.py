"""hvfuse: replication, recovery points and failover for virtual disks, under a FUSE filesystem."""

import os

__version__ = "0.1.0"

# numpy's linear algebra is not used; its threads would take a third of the time in which most commands are done.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
