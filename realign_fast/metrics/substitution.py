"""Substitution: what rows of one modality are worth to a small reader in place of another's.

A reader, a network that predicts the labels of a row, is trained on source rows, on aligned source
rows and on target rows, and tested on target rows that no reader was trained on. Between the losses
of the first and of the last lies the cost of the modality gap; a map closes a share of it.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from .._argument_checks import expect_counts, expect_matrix, expect_tensor
from .._one_thread import one_thread
from .estimate import Estimate

RowMap = Callable[[Tensor], Tensor]
# Fits on source and target rows and returns the map of either; None leaves target rows as given.
Fit = Callable[[Tensor, Tensor], tuple[RowMap, RowMap | None]]
Check = Callable[[nn.Module], float]  # the loss of a reader
_BLOCK = 4096  # tested rows at a time
_CHECK_STEPS, _PATIENCE = 50, 10  # steps between losses of held-out rows, and their number
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # 97.5%, from 1 degree


@dataclass(frozen=True)
class Reader:
    """Settings of a reader: one hidden layer (GELU) or none, trained by AdamW."""

    hidden: int = 256  # units of the hidden layer; 0 makes it linear (logistic)
    steps: int = 400
    batch: int = 256
    rate: float = 1e-3
    weight_decay: float = 1e-2
    # Share of the target rows that are not tested, on which every reader is checked each 50 steps,
    # and none trains: its weights of least loss are kept, and 500 steps without a lower one end it.
    held_out: float = 0.0


class Substitution(NamedTuple):
    """Figures by the rows that the readers were trained on: source, target and each aligned.

    Standard errors are over runs, each with a seed and, where a share is tested, a split of its
    own. Splits overlap: the variance of the mean of J runs is ``1/J + n_test / n_train`` times that
    of a run (Nadeau and Bengio, 2003). Test rows that were given count as fixed.
    """

    loss: dict[str, Estimate]
    share_closed: dict[str, Estimate]  # (l_source - l) / (l_source - l_target) of mean losses; NaN
    # where target rows are no better than source rows
    interval: dict[str, tuple[float, float]]  # 95%, of share_closed (delta method, Student)
    runs: dict[str, Tensor]  # [runs] float64 losses, to compare maps run by run


@one_thread
def substitution(
    source_rows: Tensor,
    target_rows: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    *,
    aligned: Mapping[str, Fit] | None = None,
    partners: Tensor | None = None,
    test: float | Tensor = 0.2,
    seeds: Sequence[int] = range(5),
    reader: Reader | None = None,
    on_reader: Callable[[], object] | None = None,
) -> Substitution:
    """Train readers on source, aligned and target rows and test each on other target rows.

    Labels are bool [N, C] such as :func:`hashed_words` of captions (the loss is binary cross
    entropy) or float [N, C] such as rows of another encoder (mean squared error). On a CPU the
    bytes do not depend on the number of threads, since it trains on one; another CPU or torch, or
    CUDA, may round differently. Memory beside the rows (which a fit copies): 4,096 of them with
    their labels.

    Args:
        source_rows, target_rows: [N, D] and [M, D], as readers see them; not normalised here.
        source_labels, target_labels: labels of both, of one kind.
        aligned: by a name, a function that fits a map in each run, on the rows that the other
            readers are trained on, and returns the maps of source and of target rows, [n, D] to
            [n, D'] (None where the latter stay, with D' = D). A map that is known is ``lambda *_:
            (source_map, target_map)``. Readers of source and target rows see rows as given.
        partners: [N] int64, the target row that each source row describes, -1 for none; source rows
            of tested target rows are left out. Needed where both sides show the same things.
        test: share of the target rows that each run draws for its test, or int64 numbers of the
            rows that all runs test.
        seeds: a run for each: of the weights, the batches (alike in all readers), and the split.
        on_reader: called after each of ``len(seeds) * (2 + number of aligned)`` readers.

    Raises:
        ValueError, TypeError: rows or labels that do not fit or are not finite, nothing to train on
            or to test on, or a reader whose loss is not finite.
    """
    fits: dict[str, Fit | None] = {"source": None, **(aligned or {}), "target": None}
    if not len(seeds) or len(fits) != 2 + len(aligned or {}):
        raise ValueError(
            f"substitution: got {len(seeds)} seeds and aligned rows {[*(aligned or {})]}; expected "
            "seeds, and names other than source and target"
        )
    _check("source", source_rows, source_labels, target_labels)
    _check("target", target_rows, target_labels, target_labels)
    partners = torch.full((len(source_rows),), -1) if partners is None else partners.cpu()
    is_known = partners.dtype == torch.int64 and partners.shape == source_rows.shape[:1]
    if not is_known or int(partners.max()) >= len(target_rows):
        raise ValueError(
            "substitution: expected partners as an int64 number for each source row, of a target "
            "row or -1"
        )
    reader = reader or Reader()
    expect_counts("substitution", steps=reader.steps, batch=reader.batch)
    runs: dict[str, list[float]] = {name: [] for name in fits}
    for seed in seeds:
        is_tested = _draw_test(test, len(target_rows), seed)
        tested, trained = (mask.nonzero()[:, 0] for mask in (is_tested, ~is_tested))
        held_out = trained[:0]
        if reader.held_out:
            is_held_out = _draw_test(reader.held_out, len(trained), seed, "held_out")
            held_out, trained = trained[is_held_out], trained[~is_held_out]
            is_tested[held_out] = True
        free = (~is_tested[partners] | (partners < 0)).nonzero()[:, 0]
        for name, fit in fits.items():
            rows = target_rows if name == "target" else source_rows
            target_map: RowMap | None = None
            if fit is not None:
                source_map, target_map = fit(source_rows[free], target_rows[trained])
                rows = source_map(source_rows)
            if not target_map and rows.shape[1] != target_rows.shape[1]:
                raise ValueError(f"substitution: {name} rows have other columns than target rows")
            side = (target_labels, trained) if name == "target" else (source_labels, free)
            score = partial(_test, rows=target_rows, labels=target_labels, target_map=target_map)
            check = partial(score, tested=held_out) if len(held_out) else None
            network = _train(rows, *side, seed, reader, check)
            runs[name].append(score(network, tested=tested))
            if not runs[name][-1] < math.inf:
                raise ValueError(
                    f"substitution: the reader of {name} rows has a loss that is not finite; give "
                    "unit rows, or a Reader of a smaller rate"
                )
            if on_reader:
                on_reader()
    overlap = 0.0 if isinstance(test, Tensor) else len(tested) / len(trained)
    return _summary({name: torch.tensor(run).double() for name, run in runs.items()}, overlap)


def hashed_words(captions: Sequence[str], buckets: int = 512) -> Tensor:
    """Return labels bool [N, buckets]: the buckets that the words of each caption fall into.

    Words have 3 or more letters and digits and are lower-cased. The bucket is CRC-32 of the UTF-8
    modulo ``buckets`` (feature hashing, Weinberger et al., arXiv 0902.2206), on all machines alike.
    """
    labels = torch.zeros(len(captions), buckets, dtype=torch.bool)
    for row, caption in enumerate(captions):
        for word in re.findall(r"\w{3,}", caption.lower()):
            labels[row, crc32(word.encode("utf-8", "surrogatepass")) % buckets] = True
    return labels


def _summary(losses: dict[str, Tensor], overlap: float) -> Substitution:
    """Return the figures of losses [runs] by name, of splits with this overlap."""

    def _mean(values: Tensor) -> Estimate:
        of_runs = Estimate.of_mean(values)
        return Estimate(of_runs, of_runs.standard_error * (1 + len(values) * overlap) ** 0.5)

    distances = losses["source"] - losses["target"]
    distance = float(distances.mean()) if distances.mean() > 0 else math.nan
    width = _STUDENT[min(len(distances), 11) - 2] if len(distances) > 1 else math.nan
    shares, intervals = {}, {}
    for name, values in losses.items():
        closed = losses["source"] - values
        share = float(closed.mean()) / distance
        error = _mean((closed - share * distances) / distance).standard_error
        shares[name] = Estimate(share, error)
        intervals[name] = (share - width * error, share + width * error)
    means = {name: _mean(values) for name, values in losses.items()}
    return Substitution(means, shares, intervals, losses)


def _draw_test(test: float | Tensor, count: int, seed: int, name: str = "`test`") -> Tensor:
    """Return which target rows [M] are tested; a ValueError unless some are and some are not."""
    is_tested = torch.zeros(count, dtype=torch.bool)
    if isinstance(test, Tensor):
        is_tested[test.cpu()] = True
    else:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        is_tested[order[: max(round(test * count), 0)]] = True
    if not 0 < int(is_tested.sum()) < count:
        raise ValueError(
            f"substitution: {name} takes {int(is_tested.sum())} of {count} target rows, expected "
            "some, and others to train on"
        )
    return is_tested


def _train(
    rows: Tensor, labels: Tensor, trained: Tensor, seed: int, reader: Reader, check: Check | None
) -> nn.Module:
    """Return a reader that was trained on the rows whose numbers are ``trained``.

    With a ``check``, it has the weights for which that returned the least loss.
    """
    if not len(trained):
        raise ValueError("substitution: no source row is left to train on; test fewer target rows")
    columns = rows.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        if reader.hidden:
            layers = [nn.Linear(columns, reader.hidden), nn.GELU()]
        layers.append(nn.Linear(reader.hidden or columns, labels.shape[1]))
        network = nn.Sequential(*layers).to(rows.device)
        optimizer = torch.optim.AdamW(
            network.parameters(), reader.rate, weight_decay=reader.weight_decay, fused=True
        )
        stale, best = 0, (math.inf, network.state_dict())
        for step in range(1, reader.steps + 1):
            batch = trained[torch.randint(len(trained), (reader.batch,))]
            loss = _loss(network(rows[batch].float()), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if check and step % _CHECK_STEPS == 0:
                held_out_loss, stale = check(network), stale + 1
                if held_out_loss < best[0]:
                    stale, best = 0, (held_out_loss, copy.deepcopy(network.state_dict()))
                elif stale == _PATIENCE:
                    break
        if best[0] < math.inf:
            network.load_state_dict(best[1])
    return network


@torch.no_grad()
def _test(
    network: nn.Module, rows: Tensor, labels: Tensor, tested: Tensor, target_map: RowMap | None
) -> float:
    loss = 0.0
    for numbers in torch.split(tested, _BLOCK):
        outputs = network((target_map(rows[numbers]) if target_map else rows[numbers]).float())
        loss += float(_loss(outputs, labels[numbers])) * len(numbers) / len(tested)
    return loss


def _loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of outputs [n, C] for labels of their kind."""
    labels = labels.to(outputs.device)
    if labels.dtype == torch.bool:
        return nn.functional.binary_cross_entropy_with_logits(outputs, labels.float())
    return nn.functional.mse_loss(outputs, labels.float())


def _check(name: str, rows: Tensor, labels: Tensor, target_labels: Tensor) -> None:
    expect_matrix(f"substitution, {name} rows", rows)
    for side_labels in (labels, target_labels):
        expect_tensor("substitution", side_labels, "labels", floating=False)
    is_known = labels.dtype == torch.bool or labels.is_floating_point()
    is_known &= labels.dim() == 2 and len(labels) == len(rows) and bool(labels.isfinite().all())
    is_alike = (labels.dtype, labels.shape[1:]) == (target_labels.dtype, target_labels.shape[1:])
    if not is_known or not is_alike:
        raise ValueError(
            f"substitution: got {labels.dtype} {list(labels.shape)} as labels of {len(rows)} "
            f"{name} rows, expected bool or finite float [N, C] like those of target rows, "
            f"{target_labels.dtype} {list(target_labels.shape)}"
        )
