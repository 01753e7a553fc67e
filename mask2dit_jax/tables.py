"""Markdown tables."""

import numbers
from collections.abc import Mapping, Sequence


def _format_cell(value) -> str:
    """A value as text: floats with 4 significant digits, '|' escaped, since it ends a cell."""
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return f'{value:.4g}'
    return str(value).replace('|', r'\|')


def _format_column(rows: Sequence[Mapping], column: str) -> list[str]:
    """Header, rule and cells of one column, all of one width."""
    header = column
    cells = [_format_cell(row.get(column, '')) for row in rows]
    width = max(3, *map(len, [header, *cells]))  # markdown's rule has at least three characters

    if all(isinstance(row.get(column, 0), numbers.Real) for row in rows):
        rule = '-' * (width - 1) + ':'  # aligned to the right
        return [header.rjust(width), rule, *(cell.rjust(width) for cell in cells)]

    rule = '-' * width
    return [header.ljust(width), rule, *(cell.ljust(width) for cell in cells)]


def format_table(rows: Sequence[Mapping], columns: Sequence[str]) -> str:
    """Formats rows as a markdown table that is also aligned as plain text.

    Args:
      rows: one mapping per row; floats are shown with 4 significant digits, a missing column is
        left empty.
      columns: keys to show, in order; a column of numbers is aligned to the right.

    Returns:
      The lines of the table, without a final newline.
    """
    formatted_columns = [_format_column(rows, column) for column in columns]
    lines = [f'| {" | ".join(cells)} |' for cells in zip(*formatted_columns)]
    return '\n'.join(lines)
