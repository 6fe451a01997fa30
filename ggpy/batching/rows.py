"""Where a batch's rows come from: JSON lines, a Parquet file, or a list."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import Error, UnsupportedError

_ROWS = 1024  # of a Parquet file that are read at once
_MOST_BYTES = 16 << 20  # of a line


class Row(NamedTuple):
    """A row as it came.

    Attributes
    ----------
    place : int
        Its line, or its number, from 1.
    columns : mapping
        Empty if it can't be read.
    error : str
        Why it can't be; "" if it can.
    """

    place: int
    columns: Mapping[str, Any]
    error: str = ""


class Source:
    """Rows that can be gone through more than once.

    Parameters
    ----------
    given : str, Path or sequence of mappings
        A file, as Parquet if its name ends in .parquet, else a JSON object in each line; or the rows themselves.

    Attributes
    ----------
    name : str
        For messages.

    Raises
    ------
    Error
        There is no such file.
    """

    def __init__(self, given: str | Path | Sequence[Mapping[str, Any]]):
        self._rows: Sequence[Mapping[str, Any]] = ()
        self.path: Path | None = None
        if not isinstance(given, (str, Path)):
            self._rows, self.name = list(given), "the rows"
            return
        self.path, self.name = Path(given), str(given)
        if not self.path.is_file():
            raise Error(f"{given}: no such file" if not self.path.exists() else f"{given}: not a regular file")

    def __iter__(self) -> Iterator[Row]:
        if self.path is None:
            return (_checked(place, row) for place, row in enumerate(self._rows, 1))
        return _parquet_rows(self.path) if is_parquet(self.path) else _json_rows(self.path)


def is_parquet(path: Path) -> bool:
    """Whether a file of this name is Parquet."""
    return path.suffix == ".parquet"


def _checked(place: int, found: object) -> Row:
    if not isinstance(found, Mapping):
        return Row(place, {}, f"a row is an object with columns, not {type(found).__name__}")
    return Row(place, found)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for place, line in enumerate(iter(lambda: file.readline(_MOST_BYTES), b""), 1):
            if len(line) == _MOST_BYTES and not line.endswith(b"\n"):
                while len(rest := file.readline(_MOST_BYTES)) == _MOST_BYTES and not rest.endswith(b"\n"):
                    pass
                yield Row(place, {}, f"a line of more than {_MOST_BYTES:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig" if place == 1 else "utf-8")
                yield _checked(place, json.loads(text, object_pairs_hook=_each_once))
            except (ValueError, RecursionError) as error:
                yield Row(place, {}, f"no JSON: {error}")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{json.dumps(next(name for name in found if names.count(name) > 1))} stands there twice")
    return found


def parquet() -> Any:
    """pyarrow.parquet.

    Raises
    ------
    UnsupportedError
        It isn't installed.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise UnsupportedError("Parquet files need pyarrow: pip install 'ggpy[parquet]'") from None
    return parquet


def _parquet_rows(path: Path) -> Iterator[Row]:
    return (Row(place, columns) for place, columns in enumerate(parquet_columns(path), 1))


def parquet_columns(path: Path, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, without columns and fields that are null.

    Raises
    ------
    Error
        It is damaged.
    """
    reader = parquet()
    from pyarrow import ArrowException

    try:
        with reader.ParquetFile(path) as file:
            if twice := [n for n, count in Counter(file.schema_arrow.names).items() if count > 1]:
                raise Error(f"{path}: two columns {twice[0]!r}")
            columns = None if names is None else [n for n in names if n in file.schema_arrow.names]
            for batch in file.iter_batches(_ROWS, columns=columns):
                yield from map(_without_nulls, batch.to_pylist())
    except (ArrowException, OSError, ValueError) as error:
        raise Error(f"{path}: {str(error) or type(error).__name__}") from None


def _without_nulls(value: Any) -> Any:
    """A message that lacks a field that others have isn't one whose field is null."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
