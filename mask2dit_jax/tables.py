"""Markdown tables."""

import numbers
from collections.abc import Mapping, Sequence


def _cell(value) -> str:
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f'{value:.4g}'
    return str(value).replace('|', r'\|')


def format_table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Formats rows as a markdown table, aligned also as plain text.

    Args:
      rows: one mapping per row; floats are shown with 4 significant digits, a missing column is
        left empty.
      columns: keys to show, in order; a column of numbers is aligned to the right.

    Returns:
      The lines of the table, without a final newline.
    """
    formatted = []
    for column in columns:
        cells = [column, *(_cell(row.get(column, '')) for row in rows)]
        width = max(3, *map(len, cells))
        right = all(isinstance(row.get(column, 0), numbers.Real) for row in rows)
        rule = '-' * (width - 1) + ':' if right else '-' * width
        cells = [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
        formatted.append([cells[0], rule, *cells[1:]])
    return '\n'.join(f'| {" | ".join(line)} |' for line in zip(*formatted))
