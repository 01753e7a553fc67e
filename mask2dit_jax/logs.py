"""What every command does first: it chooses the log lines that are shown, and raises the limit of
open files. Also durations as people read them."""

import contextlib
import logging as python_logging
import pathlib
import resource

from absl import logging


def quiet_libraries() -> None:
    """Shows this package's log lines from INFO on, other libraries' from WARNING on, and those of
    TFDS from ERROR on. Also raises the limit of open files."""
    _raise_limit_of_open_files()
    package_folder = str(pathlib.Path(__file__).parent)

    def is_shown(record: python_logging.LogRecord) -> bool:
        if package_folder in record.pathname:
            return True
        if 'tensorflow_datasets' in record.pathname:
            return record.levelno >= python_logging.ERROR
        return record.levelno >= python_logging.WARNING

    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(is_shown)


def _raise_limit_of_open_files() -> None:
    """Lets this process open as many files as its system allows; many start with 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS says infinity and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def format_eta(seconds: float) -> str:
    """Formats a duration in seconds as 1h02m, 3m29s or 12s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)

    if hours:
        return f'{hours}h{minutes:02d}m'
    if minutes:
        return f'{minutes}m{seconds:02d}s'
    return f'{seconds}s'
