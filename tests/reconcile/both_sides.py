"""Two files and every way to make them equal: here, pushed and pulled through real pipes to a real server, which
runs in a thread of this process."""

import contextlib
import os
import threading

from hvfuse.errors import HvfuseError
from hvfuse.reconcile.ends import open_replica, open_source
from hvfuse.reconcile.line import Line
from hvfuse.reconcile.remote import Peer, RemoteEnd
from hvfuse.reconcile.run import Options, Report, Resync
from hvfuse.reconcile.served import Permission, Server

WAYS = ("local", "push", "pull")
ANYTHING = Permission()


class ServedHere:
    """As a process that serves (`subprocess.Popen`), without the process."""

    def __init__(self, permission=ANYTHING, silence=60.0):
        there, back = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(there[1], "wb", 0), os.fdopen(back[0], "rb", 0)
        self._fds = there[0], back[1]
        self.error = None
        self._server = Server(Line(*self._fds, silence=silence, drained=True), permission)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self._server.run()
        except HvfuseError as error:
            self.error = error
        finally:
            for fd in self._fds:
                os.close(fd)

    def wait(self, timeout=None):
        self._thread.join(20)
        assert not self._thread.is_alive()
        return 0


def resync(source, replica, way="local", *, permission=ANYTHING, level=1, progress=None, **options) -> Report:
    """Make them equal in one of the WAYS."""
    options.setdefault("at_once", 2)
    chosen = Options(**options)
    write = not chosen.dry_run
    tell = progress or (lambda report, passed: None)
    source, replica = str(source), str(replica)
    with contextlib.ExitStack() as stack:
        if way == "local":
            near = stack.enter_context(contextlib.closing(open_source(source)))
            far = stack.enter_context(contextlib.closing(open_replica(replica, write=write)))
            run = Resync(near, far, replica=far, options=chosen, progress=tell)
            return run.run(replica_path=replica, created=far.created)
        peer = stack.enter_context(Peer(ServedHere(permission)))
        if way == "pull":
            far = RemoteEnd(peer, source, role="source", write=False, level=level)
            near = stack.enter_context(contextlib.closing(open_replica(replica, write=write)))
            run = Resync(near, far, source=far, replica=near, options=chosen, progress=tell)
            return run.run(replica_path=replica, created=near.created)
        near = stack.enter_context(contextlib.closing(open_source(source)))
        far = RemoteEnd(peer, replica, role="replica", write=write, level=level)
        run = Resync(near, far, replica=far, options=chosen, progress=tell)
        return run.run(replica_path=replica, created=far.created and write)


def settle(path, seconds=60):
    """Make a file's mtime old, as that of a file to which nobody writes."""
    found = os.stat(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - seconds * 10**9))
