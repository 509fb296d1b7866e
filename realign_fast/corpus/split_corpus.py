"""A table whose rows are of several modalities, which a column beside them names."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..storage.paths import StoragePath
from .corpus import Corpus, sample_ids
from .layout import SUBFOLDERS
from .row_values import values_of

_MOST_MODALITIES = 32  # a column with more values names something else


class SplitCorpus(Corpus):
    """A `Corpus` whose rows name their modality in a column of their file.

    Opening it reads this column once, and each pass reads it again: the names of one shard are held
    at a time, as one byte a row.

    Args:
        corpus: the table, in a format with columns.
        split_by: name of the column of modalities.
        modalities: the names that may occur; None takes those of the table, text and image first
            and the others in alphabetical order.
    Raises:
        ValueError: there is no such column, a row has no or an unknown modality, or the column has
            more than 32 values.
    """

    def __init__(
        self, corpus: Corpus, split_by: str, modalities: Sequence[str] | None = None
    ) -> None:
        vars(self).update(vars(corpus))  # opened already: no header is read again
        self.split_by = split_by
        self._counts: dict[StoragePath, Counter[str]] = {}
        expected = f"one of {', '.join(modalities)}" if modalities else "the name of a modality"
        for index, shard in enumerate(self.shards):
            if split_by == shard.column:
                problem = f"column {split_by!r} holds the rows, expected names of modalities"
                raise ValueError(f"{shard.path}: {problem}; split by another column")
            if not shard.has_other_columns and shard.num_rows:
                advice = f"give a table with the column {split_by!r}"
                raise ValueError(f"{shard.path}: has no column beside the rows; {advice}")
            counts = self._counts[shard.path] = Counter[str]()
            for row, name in enumerate(self._names(index)):
                if not name or (modalities and name not in modalities):
                    raise ValueError(
                        f"{shard.path}: row {row} has {split_by} {name or None!r:.40}, expected "
                        f"{expected}; mend the column, or leave such rows out of the table"
                    )
                counts[name] += 1
        present = {name for counts in self._counts.values() for name in counts}
        if modalities is None and len(present) > _MOST_MODALITIES:
            raise ValueError(
                f"{self.path}: column {split_by!r} has {len(present)} values, such as "
                f"{min(present)!r:.40}, expected the names of up to {_MOST_MODALITIES} modalities; "
                "choose another column"
            )
        alike = Counter(name.strip().casefold() for name in present)
        if near := sorted(name for name in present if alike[name.strip().casefold()] > 1):
            warnings.warn(
                f"{self.path}: column {split_by!r} has {', '.join(map(repr, near))}, which differ "
                "by case or surrounding blanks alone and are modalities of their own; mend the "
                "column if they are one",
                stacklevel=2,
            )
        known = [*SUBFOLDERS, *sorted(present - {*SUBFOLDERS})]
        self.modalities = [*(modalities or (name for name in known if name in present))]
        self._codes = -1, torch.empty(0, dtype=torch.uint8)

    def _names(self, index: int) -> Iterator[str]:
        return values_of(self.shards[index], (self.split_by,))

    @property
    def side_rows(self) -> dict[str, int]:
        """The number of rows of each modality."""
        counts = [self._counts[shard.path] for shard in self.shards]
        return {name: sum(shard[name] for shard in counts) for name in self.modalities}

    def codes(self, index: int) -> torch.Tensor:
        """Return the number in `modalities` of each row of shard `index`, [rows] uint8."""
        if self._codes[0] != index:
            code_of = {name: code for code, name in enumerate(self.modalities)}
            try:
                codes = np.fromiter(map(code_of.__getitem__, self._names(index)), np.uint8)
            except KeyError as error:
                raise self.shards[index].changed_error() from error
            self._codes = index, torch.from_numpy(codes)
        return self._codes[1]

    def sample(self, count: int, seed: int) -> tuple[np.ndarray, torch.Tensor]:
        """Draw up to `count` rows of each modality, spread evenly over the rows of each.

        Returns:
            [n] int64 numbers of the rows, ascending, and [n] uint8 codes of their modalities.
        """
        drawn = [sample_ids(rows, count, seed) for rows in self.side_rows.values()]
        ids, codes, before = [], [], [0] * len(drawn)
        for index in range(len(self.shards)):
            shard_codes = self.codes(index).numpy()
            for code, numbers in enumerate(drawn):
                rows = np.flatnonzero(shard_codes == code)
                low, high = np.searchsorted(numbers, [before[code], before[code] + len(rows)])
                ids.append(self.starts[index] + rows[numbers[low:high] - before[code]])
                codes.append(np.full(high - low, code, np.uint8))
                before[code] += len(rows)
        order = np.argsort(all_ids := np.concatenate(ids))
        return all_ids[order], torch.from_numpy(np.concatenate(codes)[order])
