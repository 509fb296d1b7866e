"""Rows that a run read, before and after its map, with what the run recorded of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor

from ..align import ReAlign
from ..corpus.corpus import Corpus, sample_ids
from ..corpus.layout import SUBFOLDERS
from ..corpus.row_values import ID_COLUMNS, column_values
from ..interface.option_values import OptionError, UnfinishedShards
from ..moments import good_rows
from ..ops.reference import unit
from ..pipeline.checkpoints import STATS, identity
from ..pipeline.manifest import fault_of, read_manifest
from ..pipeline.output import ALIGNER, REPORT, SPACE
from ..shared_space import SharedSpace
from ..storage.paths import AnyPath, StoragePath, output_of, records_of, storage_path

_NAMED_ROWS = 1_000_000  # of a corpus whose ids and captions are read
_NUMBER, _SHAPE = float | int | None, {"path": str, "rows": int}
_PASS = dict.fromkeys(("seconds", "rows_per_second", "gb_per_second"), _NUMBER)
_REPORT: dict[str, Any] = {  # types of the values of a report.json that are used
    "passes": [_PASS | {"name": str, "rows": int}],
    "result": {"centroid_gap": _NUMBER},
    **dict.fromkeys(("source", "target", "text", "image"), _SHAPE),
    **dict.fromkeys(("versions", "kernels"), dict),
}
_LONGEST = 300  # characters of an id or a caption that are kept
_VALUES = ID_COLUMNS, ("caption", "text", "txt")


@dataclass
class Side:
    """A sample of the rows of one modality before and after the map."""

    name: str
    rows: int  # of the corpus
    corpus: Corpus | None = None
    before: Tensor | None = None  # [n, D] float64, unit rows of the encoder
    after: Tensor | None = None  # [n, D] float64, their directions after the map
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # of these rows
    missing: str = ""  # why there are none
    changed: str = ""  # a shard of another size, time or version than the run read

    def labels(self, places: Sequence[int]) -> list[list[str]]:
        """Return file and row, id and caption of some of the rows; empty where there is none."""
        corpus = self.corpus
        assert corpus is not None
        rows = self.numbers[places]
        labels = []
        for row, shard in zip(rows, np.searchsorted(corpus.starts, rows, "right") - 1, strict=True):
            place = f"{corpus.shards[shard].path.name}, row {row - corpus.starts[shard]}"
            labels.append([place, "", ""])
        for column, names in enumerate(_VALUES, 1):
            if corpus.num_rows > _NAMED_ROWS:
                break
            with suppress(ValueError, OSError):  # files without such a column
                texts = [*column_values(corpus, None, names)]
                for label, row in zip(labels, rows, strict=True):
                    is_long = len(text := texts[row]) > _LONGEST
                    label[column] = text[: _LONGEST - 1] + "…" if is_long else text
        return labels


@dataclass
class Output:
    """The records of ``align``, ``fit``, ``apply`` or ``unify``, and samples of its rows."""

    path: StoragePath
    manifest: dict[str, Any]
    report: dict[str, Any]  # empty if the run did not end
    fitted: ReAlign | SharedSpace
    sides: list[Side]  # that of the source or of the queries first

    @classmethod
    def read(cls, out: AnyPath, sample: int, seed: int) -> Output:
        """Read the records of an output and ``sample`` rows of each side, spread evenly."""
        path = storage_path(out)
        folder = path.parent if path.name.endswith(".safetensors") else path
        if path != (output := output_of(folder)):
            raise OptionError(f"{path}: is not the whole output of a run; give {output}")
        records, report = records_of(path), {}
        has_map, is_space = ((records / name).exists() for name in (ALIGNER, SPACE))
        if not has_map and not is_space and (records / STATS).is_dir():
            raise UnfinishedShards(
                f"{path}: has statistics and no map: its run or job array has not ended; run the "
                "same command again (it resumes), or the missing jobs and the step after them"
            )
        is_space = is_space and not has_map
        fitted = (SharedSpace if is_space else ReAlign).from_pretrained(path)
        if (records / REPORT).exists():  # else the run did not end
            report = _read_report(records / REPORT)
        self = cls(path, read_manifest(records), report, fitted, [])
        passes, first = self.manifest["passes"], "text"
        names = {"text": "apply" if "apply" in passes else "source moments"}
        names["image"], shapes = "target moments", {"text": "source", "image": "target"}
        if isinstance(fitted, SharedSpace):
            roles = [name.removeprefix("apply ") for name in passes if name.startswith("apply ")]
            roles = [role for role in roles if not role.endswith("queries")]
            names = {role: f"apply {role}" for role in roles or fitted.sides}
            first, shapes = fitted.query_role, {}
        elif report and "target" not in report:  # rows that a given map was applied to
            del names["image"]
        for role, name in names.items():
            shape = report.get(shapes.get(role, role))
            self.sides.append(self._read_side(role, passes.get(name), shape, sample, seed))
        self.sides.sort(key=lambda side: side.name != first)
        return self

    def _read_side(
        self, role: str, record: Any, shape: dict[str, Any] | None, sample: int, seed: int
    ) -> Side:
        """Read a sample of the rows that a pass read, without those that are zero or not finite.

        ``record`` is the pass in the manifest, ``shape`` the corpus in the report.
        """
        record, shape = record or {"facts": {}, "shards": []}, shape or {"path": "", "rows": 0}
        entries, facts = record["shards"], record["facts"]
        side = Side(role, sum(entry["rows"] for entry in entries) or shape["rows"])
        options = {name: facts.get(name) for name in ("column", "allow_pickle")}
        try:
            paths = [entry["path"] for entry in entries] or [shape["path"]]
            corpus = _opened(paths, role, options)
            if corpus.num_rows != side.rows:
                counts = f"has {corpus.num_rows} rows, the run read {side.rows}"
                raise ValueError(f"{corpus.path}: {counts}")
            pairs = zip(corpus.shards, entries, strict=bool(entries))
            new = (str(x.path) for x, entry in pairs if not entry.items() >= identity(x).items())
            side.changed = next(new, "")
            numbers = sample_ids(side.rows, sample, seed)
            rows = corpus.take(numbers).double()
        except (OSError, ValueError, TypeError) as error:
            side.missing = f"{role} rows: {getattr(error, 'strerror', None) or error}"
            return side
        is_good = good_rows(rows)
        side.corpus, side.numbers = corpus, numbers[is_good.numpy()]
        side.before = unit(rows[is_good])
        side.after = self.moved(role, side.before)
        return side

    def documents(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a modality after the map."""
        if isinstance(self.fitted, SharedSpace):
            return self.fitted.documents(name, rows)
        return self.fitted(rows) if name == "text" else rows

    def query(self, rows: Tensor, role: str) -> Tensor:
        """Return rows as they search the output."""
        if isinstance(self.fitted, SharedSpace):
            return self.fitted.query(rows, role)
        return self.documents(role, rows)

    def refitted(self, rows: dict[str, Any]) -> Output:
        """Return the output with a map that is fitted on other rows; those of the source first."""
        if isinstance(self.fitted, SharedSpace):
            role, method = next(iter(rows)), self.fitted.method
            return replace(self, fitted=SharedSpace.fit(**rows, method=method, query_role=role))
        shrinkage = self.manifest.get("settings", {}).get("shrinkage")
        options: Any = {"method": self.fitted.method, "shrinkage": shrinkage}
        return replace(self, fitted=ReAlign.fit(*rows.values(), **options))

    def moved(self, name: str, rows: Tensor) -> Tensor:
        """Return directions after the map, in a space in the columns that belong to their side."""
        rows = self.documents(name, rows)
        if isinstance(self.fitted, SharedSpace):
            (first,) = self.fitted.document_map(name).scales
            rows = rows[:, first : first + self.fitted.dimension]
        return unit(rows)


def _read_report(path: StoragePath) -> dict[str, Any]:
    """Return the report of a run; a ValueError for a file that no run wrote."""
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
        present = {"passes"} | {name for name in report if report[name] is not None}
        expected = {name: kind for name, kind in _REPORT.items() if name in present}
        fault = fault_of(report, expected, "the report")
    except (ValueError, TypeError, RecursionError):
        fault = "something that is no JSON of one"
    if fault:
        raise ValueError(
            f"{path}: expected the report of a run, got {fault}; run the same command again"
        )
    return report


def _opened(paths: Sequence[AnyPath], role: str, options: dict[str, Any]) -> Corpus:
    """Open shards in their order: as a root or a folder, with its metadata, or one by one."""
    if not str(paths[0]):
        raise ValueError("the run did not record where they are")
    side: Any = role if role in SUBFOLDERS else None
    folder = storage_path(paths[0]).parent
    root = folder.parent if folder.name in SUBFOLDERS.values() else folder
    names = [PurePosixPath(str(path)).name for path in paths]
    with suppress(OSError, ValueError, TypeError):  # other files may lie beside the shards
        corpus = Corpus(root, side, **options)
        if [shard.path.name for shard in corpus.shards] == names:
            return corpus
    return Corpus(paths if len(paths) > 1 else paths[0], side, **options)
