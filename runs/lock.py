"""One process trains a run: training.lock in its folder names that process and its host."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

from runs.files import cure_of
from runs.folder import LOCK, Run


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Hold the lock of a run; that of a process of this host that is dead is taken over.

    Raises ValueError if another process holds it, OSError if the folder cannot be written.
    """
    path = run.folder / LOCK
    lock = SoftFileLock(path, timeout=0.5, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        if lock.is_lock_held_by_us:
            cure = "go on with its records, or close them first: records.close()"
            raise ValueError(f"this process is training the run {run.name!r} already: {cure}") from error
        raise ValueError(
            f"the run {run.name!r} is being trained by {owner(path)}: wait, or stop it. If it no longer runs, delete {path}"
        ) from error
    except OSError as error:
        cure = cure_of(error, run.folder, "BASEGPT_RUNS")
        raise OSError(f"could not write {LOCK} of the run {run.name!r} ({error.strerror}): {cure}") from error
    try:
        yield
    finally:
        lock.release()


def owner(path: Path) -> str:
    """The process that holds a lock; filelock writes its number and its host in a line each."""
    with suppress(OSError):  # it has just been released
        process, host, *_ = [*path.read_text(encoding="utf-8", errors="replace").splitlines(), "?", "?"]
        return f"process {process} on the host {host.partition('?')[0] or '?'}"
    return "another process"
