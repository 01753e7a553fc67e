"""Paths are folders and files of this machine: buckets and other remote places are refused.

pathlib takes gs://bucket/run for the local folder ./gs:/bucket/run, and everything written there
would be lost with the machine.
"""

import os
import re

from absl import flags

# What pathlib makes of gs://bucket counts, too: gs:/bucket.
_REMOTE = re.compile(r'[A-Za-z][\w+.-]+:/|.*://')


def is_remote(path) -> bool:
    """Whether a path names something that is not a folder or file of this machine."""
    return isinstance(path, (str, os.PathLike)) and bool(_REMOTE.match(os.fspath(path)))


def check_local(**named) -> None:
    """Refuses remote paths.

    Args:
      **named: paths by the names that the message gives them; what is no path, as None, passes.

    Raises:
      ValueError: naming the first that is remote, and the fix.
    """
    for name, path in named.items():
        if is_remote(path):
            raise ValueError(
                f'{name} is {os.fspath(path)}, which is not on this machine: buckets and URLs do '
                'not work yet; mount it (gcsfuse, NFS) or copy it, and give the local path.'
            )


def check_flags_local(*names: str) -> None:
    """Makes absl refuse remote paths in these flags, which may be lists, when it parses them."""

    def check(name: str):
        def validate(value) -> bool:
            for path in value if isinstance(value, list) else [value]:
                try:
                    check_local(**{f'--{name}': path})
                except ValueError as error:
                    raise flags.ValidationError(str(error)) from error
            return True

        return validate

    for name in names:
        flags.register_validator(name, check(name))
