"""What a setting may be, declared where the setting is.

    @dataclasses.dataclass(frozen=True)
    class TrainConfig:
        steps: int = ranges.whole(1000, least=1)
        given: str = ranges.word('leading', GIVEN)

Every function here makes a dataclass field with a default, and keeps the range in its metadata.
`problems` compares values with the ranges; config.describe shows them, and `check_flag` lends one
to a flag of a command.
"""

import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping

from absl import flags

from mask2dit_jax import paths

# Seeds are 32 bits wide: JAX takes 2**32 for 0.
_LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """What a value may be.

    Attributes:
      says: what is allowed, in words that follow 'use'.
      allows: says whether a value of any type is.
    """

    says: str
    allows: Callable[[object], bool]


def of(cls, name: str) -> Range:
    """The range of a field of a dataclass."""
    return cls.__dataclass_fields__[name].metadata['range']


def field(default, says: str, allows: Callable[[object], bool]):
    """A field with a range of its own; see `Range`."""
    return dataclasses.field(default=default, metadata={'range': Range(says, allows)})


def is_whole(value) -> bool:
    """Whether a value is a whole number; True and False are none."""
    # bool is a subclass of int.
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole(default, least: int, most: int | None = None, or_none: bool = False):
    """A whole number from `least` to `most`; with `or_none` also None."""
    says = f'a whole number of at least {least}'
    if most is not None:
        says = f'a whole number from {least} to {most}'
    if or_none:
        says += ', or None'

    def allows(value) -> bool:
        if value is None:
            return or_none
        return is_whole(value) and value >= least and (most is None or value <= most)

    return field(default, says, allows)


def seed(default):
    """A seed of random numbers."""
    return whole(default, 0, _LARGEST_SEED)


def real(
    default,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
):
    """A finite number; `least` and `most` are allowed themselves, `above` and `below` are not."""
    bounds = [
        f'{words} {bound:g}'
        for words, bound in (
            ('at least', least),
            ('above', above),
            ('at most', most),
            ('below', below),
        )
        if math.isfinite(bound)
    ]
    says = ', '.join(['a finite number', *bounds])

    def allows(value) -> bool:
        return (
            isinstance(value, numbers.Real)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and least <= value <= most
            and above < value < below
        )

    return field(default, says, allows)


def word(default: str, known: Iterable[str], or_empty: bool = False):
    """One of a few words; with `or_empty` also ''."""
    known = tuple(known)
    says = f'one of {", ".join(known)}'
    if or_empty:
        says += ', or nothing'
    allowed = (*known, '') if or_empty else known
    return field(default, says, lambda value: isinstance(value, str) and value in allowed)


def switch(default: bool):
    """True or False."""
    return field(default, 'True or False', lambda value: isinstance(value, bool))


def path(default: str):
    """A path of this machine; '' is for none."""
    says = 'a path on this machine (buckets and URLs do not work yet: mount or copy them)'
    return field(default, says, lambda value: isinstance(value, str) and not paths.is_remote(value))


def pattern(default: str):
    """A regular expression."""

    def allows(value) -> bool:
        try:
            return isinstance(value, str) and bool(re.compile(value))
        except re.error:
            return False

    return field(default, 'a regular expression', allows)


def problems(cls, values: dict, where: str) -> list[str]:
    """Says what is out of range.

    Args:
      cls: a dataclass whose fields have ranges.
      values: values of some of its fields, by name.
      where: what stands before the names of the fields, such as 'config.train.'.

    Returns:
      A sentence for each field that is, with its name, its value and what is allowed.
    """
    found = []
    for declared in dataclasses.fields(cls):
        allowed = declared.metadata.get('range')
        if allowed is None or declared.name not in values:
            continue
        value = values[declared.name]
        if not allowed.allows(value):
            found.append(f'{where}{declared.name} is {value!r}: use {allowed.says}.')
    return found


def refuse(found: list[str]) -> None:
    """Raises a ValueError that lists all that was found wrong, if anything was."""
    if len(found) == 1:
        raise ValueError(found[0])
    if found:
        listed = '\n'.join(f'  {problem}' for problem in found)
        raise ValueError(f'{len(found)} settings are wrong:\n{listed}')


def nearest(name: str, known: Iterable[str], shown: Mapping | None = None) -> str:
    """Says which name may be meant.

    Args:
      name: a misspelt name.
      known: the names that there are.
      shown: what is said in the place of each of them, if not the name.

    Returns:
      ' (did you mean KNOWN?)' with the most similar one, or '' if none is similar.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    if not close:
        return ''
    return f' (did you mean {shown[close[0]] if shown else close[0]}?)'


def check_flag(name: str, cls, key: str) -> None:
    """Makes absl check a flag by the range of a field when it parses the flag.

    Args:
      name: the flag; if it is a list, each of its elements is checked as a number.
      cls, key: the dataclass and the name of the field.
    """
    allowed = of(cls, key)

    def validate(value) -> bool:
        for each in value if isinstance(value, list) else [value]:
            if each is not None and not allowed.allows(_number(each)):
                raise flags.ValidationError(f'--{name} has {each}: use {allowed.says}.')
        return True

    flags.register_validator(name, validate)


def _number(value):
    """Elements of list flags are strings."""
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else value
        except ValueError:
            continue
    return value
