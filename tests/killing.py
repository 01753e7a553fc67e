"""Marked points for the processes that tests kill: what a process does to files, told by Python.

A test's child imports this; its files and signals come in the same order however busy the machine
is, which watching it from outside does not give.
"""

import os
import signal
import sys

# Python's audit events of what changes files, besides 'open'.
_CHANGES = ('os.rename', 'os.mkdir', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink')


def kill():
    """Ends this process as a reset of the machine does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(event: str, part: str, action=kill) -> None:
    """Calls `action` before the first event that names a path which contains `part`.

    Args:
      event: one of Python's audit events, e.g. 'os.rename'.
      part: of the path.
      action: what is done.
    """
    done = []

    def hook(name, args):
        if name == event and not done and any(part in str(arg) for arg in args):
            done.append(True)
            action()

    sys.addaudithook(hook)


def _changed_path(event, args):
    """The path that an event is about to change, or None."""
    if event == 'open':
        path, _, flags = args
        return path if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) else None
    return args[0] if event in _CHANGES else None


def before_change(folder: str, number: int | None) -> list[str]:
    """Kills this process before a change of what is below a folder.

    Args:
      folder: its path, as the process uses it.
      number: of the change, counted from 0; None kills nothing.

    Returns:
      A list that gets the changes, in words. Changes are files opened for writing, and renamed,
      made or removed files and folders.
    """
    changes = []

    def hook(event, args):
        path = _changed_path(event, args)
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(folder):
            if len(changes) == number:
                kill()
            changes.append(f'{event} {path}')

    sys.addaudithook(hook)
    return changes


def die_of_files_above(num_bytes: int) -> None:
    """From now on the kernel ends this process where it writes a file beyond so many bytes."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, -1))
