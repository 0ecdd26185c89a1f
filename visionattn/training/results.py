"""The results file of validate.py."""

import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import VisionattnError, user_input
from .checkpoint import without_nan, write_file


class ResultFile:
    """Results of one or many models, on the disk as soon as they are there.

    JSON holds one object, or with `many` a list, of this command alone. CSV has a row for each model, after the rows
    that the file holds already, and leaves out what is nested.

    Args:
        path: File to write; its suffix says which.
        many: Whether there may be several models.
    """

    def __init__(self, path: str | Path, many: bool = False) -> None:
        self.path, self.many = Path(path), many
        self.records: list[dict[str, Any]] = []
        if self.path.suffix not in (".json", ".csv"):
            raise VisionattnError(f"cannot write {path}: expected a name that ends in .json or .csv")
        if not self.path.parent.is_dir():
            raise VisionattnError(f"cannot write {path}: there is no folder {self.path.parent}")
        if self.path.suffix == ".csv":
            self._rows()  # refuses a file of another kind before anything is computed

    def add(self, record: dict[str, Any]) -> None:
        """Write the results of one more model."""
        self.records.append(without_nan(record))
        with _locked(self.path):  # other processes may add their rows
            if self.path.suffix == ".json":
                text = json.dumps(self.records if self.many else self.records[-1], indent=2) + "\n"
            else:
                rows = [*self._rows(), {key: value for key, value in record.items() if not isinstance(value, dict)}]
                table = io.StringIO()
                columns = dict.fromkeys(key for row in rows for key in row)  # another version's may be others
                writer = csv.DictWriter(table, list(columns), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
                text = table.getvalue()
            write_file(self.path, text)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with user_input(f"cannot read {self.path}", OSError, ValueError, csv.Error):
            table = csv.DictReader(io.StringIO(self.path.read_text(), newline=""), strict=True)
            rows = list(table)
        if "model" not in (table.fieldnames or ["model"]) or any(None in row or None in row.values() for row in rows):
            raise VisionattnError(f"cannot add to {self.path}: it is not a table of results")
        return rows


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from a file, by a hidden one beside it that goes with the last of them."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = path.with_name(f".{path.name}.lock")
    with user_input(f"cannot write {path}", OSError):
        while True:
            lock = open(name, "w")  # noqa: SIM115
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), name.stat()):
                    break
            lock.close()  # whoever held it has removed it
    try:
        yield
    finally:
        name.unlink(missing_ok=True)
        lock.close()
