"""Files that appear whole, and folders that one process at a time writes to.

Whoever opens a file of ours must never take half of it for the whole: `whole_file` writes under
another name and renames. Two processes that write to one folder would delete each other's work:
`claim` lets one in. A claim is a small file in the folder:

    FOLDER/owner.json      {"host": "a", "pid": 123, "started": "...", "token": "..."}

It is made exclusively, and its time of change is moved on every BEAT_SECONDS as long as the owner
lives. A process that was killed leaves it behind; the next one takes the folder over when it sees
that the owner is dead: on the same machine because no such process runs, on another because
nothing moved on for SILENCE_SECONDS. No clock is compared with another machine's.
"""

import contextlib
import errno
import json
import os
import pathlib
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator

from absl import logging

from mask2dit_jax import paths

OWNER_FILE = 'owner.json'
BEAT_SECONDS = 10
SILENCE_SECONDS = 60  # so many beats may be late, on a file system that is slow
_POLL_SECONDS = 0.5


class ClaimedError(RuntimeError):
    """The folder belongs to another process."""


class OutputError(RuntimeError):
    """A file or folder cannot be written."""


@contextlib.contextmanager
def writing(folder, flag: str = '--out') -> Iterator[None]:
    """Tells in one sentence what keeps files from being written, such as a full disk.

    Args:
      folder: where the files go.
      flag: what the user chose the folder with.

    Raises:
      OutputError: in place of an OSError of the operating system.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        reason = os.strerror(error.errno)
        if error.errno == errno.EEXIST:
            reason = 'it is a file'
        raise OutputError(
            f'{folder} cannot be written ({reason}): make room or give rights there, or choose '
            f'another folder by {flag}.'
        ) from error


def try_output(folder, flag: str = '--out') -> None:
    """Makes a folder and tries to write in it, before any work is done for it.

    Args:
      folder: the folder of results.
      flag: what the user chose the folder with.

    Raises:
      OutputError: if nothing can be written there.
      ValueError: if it is a bucket.
    """
    paths.check_local(**{flag: folder})
    with writing(folder, flag):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # an empty file would fit on a full disk


@contextlib.contextmanager
def whole_file(path) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`, which becomes `path` when the block ends.

    The temporary file is removed if the block raises. A kill leaves it behind, under a name that no
    pattern like *.mp4 finds and that the next writer of the same file replaces.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f'{path.name}.unfinished')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """Writes a text file in UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


class Claim:
    """This process's hold of a folder; see `claim`."""

    def __init__(self, path: pathlib.Path, token: str):
        self._path = path
        self._token = token
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, name=f'claim {path}', daemon=True)
        self._beat.start()

    def check(self) -> None:
        """To be called before anything in the folder is replaced.

        Raises:
          ClaimedError: if another process has taken the folder over, as may happen when this one
            stood still for longer than SILENCE_SECONDS.
        """
        owner = _read_owner(self._path)
        if owner.get('token') != self._token:
            raise ClaimedError(
                f'{self._path.parent} was taken over by {_name(owner)} while this process stood '
                'still: nothing more is written here; let the other one go on.'
            )

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # `check` tells of a file that is gone
                os.utime(self._path)

    def release(self) -> None:
        """Gives the folder back, unless another process has taken it over."""
        self._released.set()
        self._beat.join()
        if _read_owner(self._path).get('token') == self._token:
            self._path.unlink()


@contextlib.contextmanager
def claim(folder, waits: bool = False) -> Iterator[Claim]:
    """Makes this process the only one that writes to a folder, until the block ends.

    A folder whose owner is dead is taken over. Finding that out takes SILENCE_SECONDS if the owner
    ran on another machine.

    Args:
      folder: made if it is not there.
      waits: whether to wait until a living owner is done, rather than to refuse.

    Yields:
      A Claim, whose `check` says whether the folder is still this process's.

    Raises:
      ClaimedError: if the folder has a living owner.
    """
    path = pathlib.Path(folder) / OWNER_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex

    told = False
    attempts = 0
    while not _create(path, token):
        owner = _read_owner(path)
        if _is_dead(path, owner):
            if _take_over(path, owner, token):
                break
            # Somebody else is at it, or was killed at it.
            attempts += 1
            if attempts > SILENCE_SECONDS / _POLL_SECONDS:
                raise ClaimedError(
                    f'{path.parent} was left half taken over: if no process writes to it, delete '
                    f'{path}* there.'
                )
            time.sleep(_POLL_SECONDS)
            continue
        if not path.exists():
            continue
        if not waits:
            raise ClaimedError(
                f'{path.parent} is being written by {_name(owner)}: wait for it or stop it, or '
                f'choose another folder; if it is certainly gone, delete {path}.'
            )
        if not told:
            logging.info('Waiting for %s, which writes to %s.', _name(owner), path.parent)
            told = True
        time.sleep(_POLL_SECONDS)

    held = Claim(path, token)
    try:
        yield held
    finally:
        held.release()


def _description(token: str) -> str:
    """What the owner file of this process says."""
    pid = os.getpid()
    owner = {
        'host': socket.gethostname(),
        'pid': pid,
        'started': _started(pid),
        'token': token,
    }
    return json.dumps(owner) + '\n'


def _create(path: pathlib.Path, token: str) -> bool:
    """Makes the owner file; false if there is one."""
    try:
        with path.open('x', encoding='utf-8') as file:
            file.write(_description(token))
    except FileExistsError:
        return False
    return True


def _read_owner(path: pathlib.Path) -> dict:
    """What the owner file says; empty if it is gone or not yet written."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _name(owner: dict) -> str:
    if not owner:
        return 'another process'
    return f'process {owner["pid"]} of host {owner["host"]}'


def _started(pid: int) -> str | None:
    """When a process of this machine started: the boot, and the clock ticks since; None if no such
    process runs. Numbers of processes come again, but not with the same start."""
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_text(encoding='utf-8')
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8')
    except FileNotFoundError:
        if pathlib.Path('/proc/self').exists() or not _runs(pid):
            return None
        return 'unknown'  # macOS has no /proc
    except ProcessLookupError:
        return None
    fields = stat.rpartition(') ')[2].split()  # the name before may hold anything
    if fields[0] == 'Z':
        return None
    return f'{boot.strip()} {fields[19]}'


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_dead(path: pathlib.Path, owner: dict) -> bool:
    """Whether the owner is gone for certain; on another machine only silence can tell."""
    if owner and owner['host'] == socket.gethostname():
        return _started(owner['pid']) != owner['started']

    logging.info(
        '%s was claimed by %s: watching for %d s whether it lives.',
        path.parent,
        _name(owner),
        SILENCE_SECONDS,
    )
    beat = _beat_of(path)
    if beat is None:
        return False
    end = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
        if _beat_of(path) != beat:
            return False
    return True


def _beat_of(path: pathlib.Path):
    """What changes with every beat, and when the file is replaced or gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _take_over(path: pathlib.Path, owner: dict, token: str) -> bool:
    """Makes this process the owner in place of a dead one; false if another process was faster.

    Several processes may find the same owner dead. The right to replace it is a file named by its
    token: who makes that file, and then still finds the dead owner, is the only one.
    """
    right = path.with_name(f'{path.name}.after-{owner.get("token", "")}')
    try:
        right.touch(exist_ok=False)
    except FileExistsError:
        return False

    try:
        if _read_owner(path) != owner:
            return False
        write_text(path, _description(token))
    finally:
        right.unlink()
    logging.warning('%s was left behind by %s; taken over.', path.parent, _name(owner))
    return True
