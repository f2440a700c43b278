"""Parquet files are data: a column whose values Python code would make is not read."""

import pyarrow as pa


def is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type are nothing but data, all the way down.

    Ray Data registers types of its own with Arrow, and one of them unpickles what a file holds: a stranger's code
    would run as soon as a value is looked at.
    """
    if isinstance(kind, pa.ExtensionType):  # those that are defined in Python; Arrow's own are data
        return False
    if isinstance(kind, pa.BaseExtensionType):
        return is_plain(kind.storage_type)
    if isinstance(kind, pa.DictionaryType | pa.RunEndEncodedType):
        return is_plain(kind.value_type)
    return all(is_plain(kind.field(number).type) for number in range(kind.num_fields))


def check_plain(schema: pa.Schema, url: str) -> None:
    """ValueError where a schema has columns that are not."""
    if strange := [field.name for field in schema if not is_plain(field.type)]:
        raise ValueError(f"{url} has columns that cannot be read without running code: {', '.join(strange)}.")
