"""Moments and maps of a table whose rows are of several modalities (`corpus/split_corpus.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..corpus.split_corpus import SplitCorpus
from ..moments import Moments
from ..shared_space import RoleMap


@dataclass(frozen=True)
class TableMap:
    """The map of the rows of each modality."""

    maps: Mapping[str, RoleMap]  # in the order of `SplitCorpus.modalities`

    @property
    def dimension(self) -> int:
        """The number of columns D of the encoder's rows."""
        return next(iter(self.maps.values())).dimension

    @property
    def columns(self) -> int:
        """The number of columns of the rows in the index."""
        return next(iter(self.maps.values())).columns

    def to(self, device: torch.device | str) -> TableMap:
        """Return the same maps on ``device``."""
        return TableMap({name: row_map.to(device) for name, row_map in self.maps.items()})

    def __call__(self, rows: Tensor, codes: Tensor, out: Tensor) -> None:
        """Write rows [N, D] into ``out`` [N, columns], each by the map of its code [N]."""
        for code, row_map in enumerate(self.maps.values()):
            own = codes == code
            if bool(own.all()):  # a whole batch of one modality is not copied
                row_map(rows, out=out)
            elif bool(own.any()):
                out[own] = row_map(rows[own], out.new_empty(int(own.sum()), self.columns))


IndexMap = RoleMap | TableMap  # to rows of the index of a space
AnyMap = ReAlign | IndexMap


class TableMoments(Moments):
    """The moments of each modality of a table; counts are those of all of them."""

    def __init__(self, covariance: bool = False, normalize: bool = True, accurate: bool = False):
        super().__init__(covariance, normalize, accurate)
        self.sides: dict[str, Moments] = {}
        self.modalities: Sequence[str] = ()  # by code

    def update_sides(
        self, rows: Tensor, codes: Tensor, row_maps: TableMap | None, **options: Any
    ) -> None:
        """Add rows [N, D], sent through maps, each to the moments of its code [N] uint8.

        ``options`` and errors are those of :meth:`Moments.update`.
        """
        for code, name in enumerate(self.modalities):
            own = codes == code
            if bool(own.any()):
                through = row_maps.maps[name].row_map if row_maps else None
                try:
                    self.side(name).update(rows[own], through=through, **options)
                except ValueError:  # whose number is that of a row among those of its modality
                    Moments().update(rows, **options)
                    raise

    def side(self, name: str) -> Moments:
        """Return the moments of a modality, which may be those of no rows."""
        return self.sides.setdefault(name, Moments(**self._flags()))

    def merge(self, other: Moments) -> TableMoments:
        """Add the sums of each modality of ``other``, which is not changed."""
        assert isinstance(other, TableMoments)
        for name, moments in other.sides.items():
            self.side(name).merge(moments)
        return self

    @property
    def _counts(self) -> list[int]:
        counts = [[0] * 3, *(moments._counts for moments in self.sides.values())]
        return [sum(column) for column in zip(*counts, strict=True)]

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": tensor
            for name, moments in self.sides.items()
            for key, tensor in moments._state().items()
        }

    def _restore(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, _, field = key.rpartition("/")
            parts.setdefault(name, {})[field] = tensor
        for name, part in parts.items():
            self.side(name)._restore(part)


def moments_for(corpus: Corpus, covariance: bool = False) -> Moments:
    """Return moments without rows yet, of a corpus or of each modality of a table."""
    if not isinstance(corpus, SplitCorpus):
        return Moments(covariance, accurate=covariance)
    moments = TableMoments(covariance, accurate=covariance)
    moments.modalities = corpus.modalities
    return moments


def zero_results(moments: Moments, row_map: AnyMap | None) -> int:
    """Return how many of the zero rows that were measured stay zero under a map."""
    if isinstance(moments, TableMoments) and isinstance(row_map, TableMap):
        return sum(zero_results(side, row_map.maps[name]) for name, side in moments.sides.items())
    if row_map is None or isinstance(row_map, TableMap) or not moments.zero_rows:
        return 0
    image = row_map(torch.zeros(1, row_map.dimension))
    return moments.zero_rows * (not bool(image.any()))
