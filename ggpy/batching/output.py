"""Where a batch's results go: a file that is only ever added to, so that a run can be ended at any moment."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import Error
from ..file import folder_of, writing_aside
from .rows import is_parquet, parquet, parquet_columns

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Known = Callable[[Mapping[str, Any]], tuple[object, object]]
_ROWS = 4096  # of a Parquet file that are written at once
# An id may be torn.
_ID = re.compile(rb'\{"id": (?:"(?:[^"\\]|\\.)*(?:"|\\?\Z)|-?\d*)')
_SECOND = (b', "key": "', b', "custom_id": ')  # what follows the id in results


class Output:
    """Results by id, in JSON lines or, once all are there, in Parquet.

    What a killed process wrote counts up to its last whole line. A Parquet file can't be added to: its results are lines
    in a file of that name and ".partial", until `finish`.

    Parameters
    ----------
    path : Path
    known : callable
        Gives the id and key of a result.

    Attributes
    ----------
    done : dict
        The key of each result that is there, by id as text, in the file's order.

    Raises
    ------
    Error
        Another process writes to the file; it has something else in it.
    """

    def __init__(self, path: Path, known: Known):
        self.path, self._known = path, known
        folder_of(path)
        self.done: dict[str, str] = {}
        self._size, self._is_whole = 0, False
        self._is_parquet = is_parquet(path)
        self._lines = path.with_name(path.name + ".partial") if self._is_parquet else path
        if self._is_parquet:
            parquet()
            if path.exists():
                self._know(path, parquet_columns(path, ("id", "key")))
        self._file = self._opened()
        try:
            self._know(self._lines, self._whole_lines(), again=self._is_parquet)
        except BaseException:
            self._file.close()
            raise

    def _opened(self) -> BinaryIO:
        if self._lines.exists() and not self._lines.is_file():
            raise Error(f"{self._lines}: not a regular file, won't be added to")
        file = open(self._lines, "r+b" if self._lines.exists() else "w+b", buffering=0)  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise Error(f"{self._lines}: another process writes to it") from None
            except OSError:  # a file system without locks
                pass
        return file  # type: ignore[return-value]

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        """The results in the file; a last line that isn't whole is cut off."""
        with open(self._lines, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    found = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    found = None
                if not isinstance(found, dict):
                    if lines.read(1):
                        raise Error(f"{self._lines}: line {number} is no result; name another output")
                    if not _may_be_result(line):
                        raise Error(f"{self._lines}: has something else in it; name another output")
                    break
                self._size += len(line)
                yield found
        self._file.truncate(self._size)
        self._file.seek(self._size)

    def _know(self, path: Path, results: Iterable[Mapping[str, Any]], again: bool = False) -> None:
        """Notes the results of a file. Lines may be there `again` if a run was ended before it could remove them."""
        for result in results:
            id, key = self._known(result)
            if not isinstance(id, (int, str)) or not isinstance(key, str):
                raise Error(f"{path}: has something else in it; name another output")
            if str(id) in self.done and not again:
                raise Error(f"{path}: two results of id {json.dumps(id)}")
            self.done[str(id)] = key

    def add(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Writes results.

        Raises
        ------
        Error
            The disk is full: what was whole before stays.
        """
        data = memoryview(
            b"".join(json.dumps(r, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for r in results)
        )
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._file.truncate(self._size)
            why = error.strerror or error
            raise Error(f"{self._lines}: {why}; the results before are whole, and the same command goes on") from None
        self._size += len(data)

    def finish(self) -> None:
        """Makes the file last and, where it is to be Parquet, makes it.

        Raises
        ------
        Error
            The disk is full: the lines stay.
        """
        os.fsync(self._file.fileno())
        if self._is_parquet and (self._size or not self.path.exists()):
            try:
                _write_parquet(self.path, self._lines)
            except OSError as error:
                raise Error(f"{self.path}: {error.strerror or error}; its rows are in {self._lines}") from None
        if self._is_parquet:
            self._size = 0
        self._is_whole = not self._is_parquet

    def close(self) -> None:
        """Lets go of the file; one without results goes, unless it is whole."""
        self._file.close()
        if not self._size and not self._is_whole:
            self._lines.unlink()


def _may_be_result(line: bytes) -> bool:
    """Whether a line that isn't whole is the beginning of a result, or was never written to the disk."""
    line = line.rstrip(b"\0")
    found = _ID.match(line)
    if found is None:
        return b'{"id": '.startswith(line)
    rest = line[found.end() :]
    return any(name.startswith(rest[: len(name)]) for name in _SECOND)


def _write_parquet(path: Path, lines: Path) -> None:
    """Parquet of what is there already and of the lines, with the columns that occur."""
    writer = parquet()
    import pyarrow as pa

    token = {"token": pa.int64(), "text": pa.string(), "logprob": pa.float64()}
    types = {
        "key": pa.string(),
        **dict.fromkeys(("text", "thinking", "tool_calls", "finish_reason", "label", "error"), pa.string()),
        **dict.fromkeys(("prompt_tokens", "completion_tokens"), pa.int64()),
        "logprobs": pa.list_(pa.struct({**token, "top": pa.list_(pa.struct(token))})),
        "scores": pa.list_(pa.struct({"label": pa.string(), "logprob": pa.float64()})),
        "embedding": pa.list_(pa.float32()),
    }

    def results() -> Iterator[dict[str, Any]]:
        seen = set()
        if path.exists():
            for result in parquet_columns(path):
                seen.add(result["id"])
                yield result
        with lines.open("rb") as file:
            for line in file:
                result = json.loads(line)
                if "tool_calls" in result:
                    result["tool_calls"] = json.dumps(result["tool_calls"])
                if result["id"] not in seen:
                    yield result

    names: dict[str, None] = {}
    are_numbers = True
    for result in results():
        names.update(dict.fromkeys(result))
        are_numbers = are_numbers and isinstance(result["id"], int) and abs(result["id"]) < 1 << 63
    id_type = pa.int64() if are_numbers else pa.string()
    schema = pa.schema([("id", id_type), *((name, types[name]) for name in types if name in names)])
    with writing_aside(path) as aside, writer.ParquetWriter(aside, schema) as file:
        rows: list[dict[str, Any]] = []

        def write() -> None:
            if rows:
                file.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        for result in results():
            rows.append({**result, "id": result["id"] if are_numbers else str(result["id"])})
            if len(rows) == _ROWS:
                write()
        write()
