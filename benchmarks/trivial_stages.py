"""Stages that do next to nothing, so that what is measured is all around them."""

import pyarrow as pa


def first_columns(table: pa.Table) -> pa.Table:
    """Keep the first two columns."""
    return table.select([0, 1])


def same(lines: list[bytes]) -> list[bytes]:
    """Answer each record with itself."""
    return lines
