"""Logging of libraries, and durations for people."""

import logging as python_logging
import pathlib

from absl import logging


def quiet_libraries() -> None:
    """Logs this package's lines from INFO on, other libraries' from WARNING on (TFDS: ERROR)."""

    def keep(record) -> bool:
        if str(pathlib.Path(__file__).parent) in record.pathname:
            return True
        return record.levelno >= (
            python_logging.ERROR
            if 'tensorflow_datasets' in record.pathname
            else python_logging.WARNING
        )

    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(keep)


def format_eta(seconds: float) -> str:
    """Formats a duration in seconds as 1h02m, 3m29s or 12s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours}h{minutes:02d}m'
    return f'{minutes}m{seconds:02d}s' if minutes else f'{seconds}s'
