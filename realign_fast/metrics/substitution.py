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
from itertools import compress
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional

from .._argument_checks import expect_counts, expect_tensor
from .._one_thread import one_thread
from .cosines import check_rows
from .estimate import Estimate

TargetMap = Callable[[Tensor], Tensor]
# Fits on source and target rows and returns the map of either; None leaves target rows as given.
Fit = Callable[[Tensor, Tensor], tuple[TargetMap, TargetMap | None]]
Check = Callable[[torch.nn.Module], tuple[float, float]]  # loss and accuracy of a reader
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
    accuracy: dict[str, Estimate]
    share_closed: dict[str, Estimate]  # (l_source - l) / (l_source - l_target) of mean losses; NaN
    # where target rows are no better than source rows
    interval: dict[str, tuple[float, float]]  # 95%, of share_closed (delta method, Student)
    runs: dict[str, Tensor]  # [2, runs] float64 losses and accuracies, to compare maps run by run


@one_thread
def substitution(
    source_rows: Tensor,
    target_rows: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    *,
    aligned: Tensor | Fit | Mapping[str, Tensor | Fit] | None = None,
    target_map: TargetMap | Mapping[str, TargetMap] | None = None,
    partners: Tensor | None = None,
    test: float | Tensor = 0.2,
    seeds: Sequence[int] = range(5),
    reader: Reader | None = None,
    on_reader: Callable[[], object] | None = None,
) -> Substitution:
    """Train readers on source, aligned and target rows and test each on other target rows.

    Labels are int64 [N] classes (cross entropy; accuracy is the share of right classes), bool
    [N, C] such as :func:`hashed_ngrams` of captions (binary cross entropy; the share of rows whose
    likeliest label is theirs), or float [N, C] such as rows of another encoder (mean squared error;
    R^2). On a CPU the bytes do not depend on the number of threads, since it trains on one; another
    CPU or torch, or CUDA, may round differently. Memory beside the rows (which a fit copies): 4,096
    of them with their labels.

    Args:
        source_rows, target_rows: [N, D] and [M, D], as readers see them; not normalised here.
        source_labels, target_labels: labels of both, of one kind.
        aligned: source rows mapped, [N, D'], or a function that fits a map in each run, on the rows
            that the other readers are trained on, and returns the maps of source and of target rows
            (None where these stay); named "aligned", or several by name.
        target_map: map of target rows [n, D] to [n, D'] where the target side moves too, of every
            mapped aligned or by name. Readers of source and target rows see target rows as given.
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
    named = dict(aligned) if isinstance(aligned, Mapping) else {"aligned": aligned}
    named = {name: rows for name, rows in named.items() if rows is not None}
    maps = target_map if isinstance(target_map, Mapping) else dict.fromkeys(named, target_map)
    if not len(seeds) or not set(maps) <= set(named) or {"source", "target"} & set(named):
        raise ValueError(
            f"substitution: got {len(seeds)} seeds, aligned rows {list(named)} and maps "
            f"{list(maps)}; expected seeds, names other than source and target, maps of these names"
        )
    for name, rows, labels in (
        ("source", source_rows, source_labels),
        ("target", target_rows, target_labels),
        *((name, rows, source_labels) for name, rows in named.items() if isinstance(rows, Tensor)),
    ):
        _check(name, rows, labels, target_rows, target_labels)
    partners = torch.full((len(source_rows),), -1) if partners is None else partners.cpu()
    is_known = partners.dtype == torch.int64 and partners.shape == source_rows.shape[:1]
    if not is_known or int(partners.max()) >= len(target_rows):
        raise ValueError(
            "substitution: expected partners as an int64 number for each source row, of a target "
            "row or -1"
        )
    reader = reader or Reader()
    expect_counts("substitution", steps=reader.steps, batch=reader.batch)
    outputs = source_labels.shape[-1]
    if source_labels.dim() == 1:
        outputs = 1 + max(int(side.max()) for side in (source_labels, target_labels))
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in ("source", *named, "target")}
    for seed in seeds:
        is_tested = _draw_test(test, len(target_rows), seed)
        tested, trained = (mask.nonzero()[:, 0] for mask in (is_tested, ~is_tested))
        held_out = trained[:0]
        if reader.held_out:
            is_held_out = _draw_test(reader.held_out, len(trained), seed, "held_out")
            held_out, trained = trained[is_held_out], trained[~is_held_out]
            is_tested[held_out] = True
        free = (~is_tested[partners] | (partners < 0)).nonzero()[:, 0]
        for name, figures in runs.items():
            rows, moves = (target_rows if name == "target" else source_rows), maps.get(name)
            if isinstance(fit := named.get(name), Tensor):
                rows = fit
            elif fit is not None:
                source_map, moves = fit(source_rows[free], target_rows[trained])
                rows = source_map(source_rows)
            if not moves and rows.shape[1] != target_rows.shape[1]:
                raise ValueError(f"substitution: {name} rows have other columns than target rows")
            side = (target_labels, trained) if name == "target" else (source_labels, free)
            score = partial(_test, rows=target_rows, labels=target_labels, target_map=moves)
            check = partial(score, tested=held_out) if len(held_out) else None
            network = _train(rows, *side, outputs, seed, reader, check)
            figures.append(score(network, tested=tested))
            if not figures[-1][0] < math.inf:
                raise ValueError(
                    f"substitution: the reader of {name} rows has a loss that is not finite; give "
                    "unit rows, or a Reader of a smaller rate"
                )
            if on_reader:
                on_reader()
    overlap = 0.0 if isinstance(test, Tensor) else len(tested) / len(trained)
    tables = {name: torch.tensor(run, dtype=torch.float64).T for name, run in runs.items()}
    return _summary(tables, overlap)


def hashed_ngrams(
    captions: Sequence[str], buckets: int = 512, *, longest: int = 1, letters: int = 3
) -> Tensor:
    """Return labels bool [N, buckets]: the buckets that the words of each caption fall into.

    Words have ``letters`` or more letters and digits and are lower-cased; n-grams are 1 to
    ``longest`` words in a row. The bucket is CRC-32 of the UTF-8 modulo ``buckets`` (feature
    hashing, Weinberger et al., arXiv 0902.2206), on every machine alike.
    """
    labels = torch.zeros(len(captions), buckets, dtype=torch.bool)
    for row, caption in enumerate(captions):
        tokens = [word for word in re.findall(r"\w+", caption.lower()) if len(word) >= letters]
        for length in range(1, longest + 1):
            for first in range(len(tokens) - length + 1):
                ngram = " ".join(tokens[first : first + length])
                labels[row, crc32(ngram.encode("utf-8", "surrogatepass")) % buckets] = True
    return labels


class Captioned(NamedTuple):
    """Arguments of :func:`substitution` for rows that captions describe, without wordless rows."""

    rows: list[Tensor]  # [n, D] float32 of the source and of the target
    labels: list[Tensor]  # [n, buckets] bool
    partners: Tensor  # [n of the source] int64: the target row of the same caption, or -1
    wordless: list[int]  # rows of each side that were left out


def label_by_captions(
    rows: Sequence[Tensor], captions: Sequence[Sequence[str]], buckets: int = 512
) -> Captioned:
    """Label the rows of a source and a target by the words of their captions.

    Rows without a word of 3 letters have no label (:func:`hashed_ngrams`) and are left out.
    """
    labels = [hashed_ngrams(side, buckets) for side in captions]
    masks = [side.any(dim=1) for side in labels]
    captioned = [[*compress(*side)] for side in zip(captions, masks, strict=True)]
    place = {caption: number for number, caption in enumerate(captioned[1])}
    return Captioned(
        [side[mask].float() for side, mask in zip(rows, masks, strict=True)],
        [side[mask] for side, mask in zip(labels, masks, strict=True)],
        torch.tensor([place.get(caption, -1) for caption in captioned[0]]),
        [int((~mask).sum()) for mask in masks],
    )


def _summary(figures: dict[str, Tensor], overlap: float) -> Substitution:
    """Return means of losses and accuracies [2, runs] by name, of splits with this overlap."""

    def _mean(values: Tensor) -> Estimate:
        of_runs = Estimate.of_mean(values)
        return Estimate(of_runs, of_runs.standard_error * (1 + len(values) * overlap) ** 0.5)

    losses = {name: values[0] for name, values in figures.items()}
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
    means = [{name: _mean(values[i]) for name, values in figures.items()} for i in (0, 1)]
    return Substitution(means[0], means[1], shares, intervals, figures)


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
    rows: Tensor,
    labels: Tensor,
    trained: Tensor,
    outputs: int,
    seed: int,
    reader: Reader,
    check: Check | None,
) -> torch.nn.Module:
    """Return a reader that was trained on the rows whose numbers are ``trained``.

    With a ``check``, it has the weights for which that returned the least loss.
    """
    if not len(trained):
        raise ValueError("substitution: no source row is left to train on; test fewer target rows")
    columns = rows.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[torch.nn.Module] = []
        if reader.hidden:
            layers = [torch.nn.Linear(columns, reader.hidden), torch.nn.GELU()]
        layers.append(torch.nn.Linear(reader.hidden or columns, outputs))
        network = torch.nn.Sequential(*layers).to(rows.device)
        weights = network.parameters()
        optimizer = torch.optim.AdamW(weights, reader.rate, weight_decay=reader.weight_decay)
        stale, best = 0, (math.inf, network.state_dict())
        for step in range(1, reader.steps + 1):
            batch = trained[torch.randint(len(trained), (reader.batch,))]
            loss = _loss(network(rows[batch].float()), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if check and step % _CHECK_STEPS == 0:
                held_out_loss, stale = check(network)[0], stale + 1
                if held_out_loss < best[0]:
                    stale, best = 0, (held_out_loss, copy.deepcopy(network.state_dict()))
                elif stale == _PATIENCE:
                    break
        if best[0] < math.inf:
            network.load_state_dict(best[1])
    return network


@torch.no_grad()
def _test(
    network: torch.nn.Module,
    rows: Tensor,
    labels: Tensor,
    tested: Tensor,
    target_map: TargetMap | None,
) -> tuple[float, float]:
    """Return the mean loss and the accuracy of a reader on the tested target rows."""
    loss = right = 0.0
    for numbers in torch.split(tested, _BLOCK):
        outputs = network((target_map(rows[numbers]) if target_map else rows[numbers]).float())
        expected = labels[numbers].to(outputs.device)
        loss += float(_loss(outputs, expected)) * len(numbers) / len(tested)
        best = outputs.argmax(dim=1, keepdim=True)
        is_right = expected[:, None] == best if labels.dim() == 1 else expected.gather(1, best)
        right += float(is_right.sum()) / len(tested)
    if labels.is_floating_point():
        right = 1 - loss / float(labels[tested].double().var(dim=0, correction=0).mean())
    return loss, right


def _loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of outputs [n, C] for labels of their kind."""
    labels = labels.to(outputs.device)
    if labels.dim() == 1:
        return functional.cross_entropy(outputs, labels)
    if labels.dtype == torch.bool:
        return functional.binary_cross_entropy_with_logits(outputs, labels.float())
    return functional.mse_loss(outputs, labels.float())


def _check(
    name: str, rows: Tensor, labels: Tensor, target_rows: Tensor, target_labels: Tensor
) -> None:
    for side, side_rows in ((name, rows), ("target", target_rows)):
        check_rows(f"substitution, {side} rows", side_rows)
    for side_labels in (labels, target_labels):
        expect_tensor("substitution", side_labels, "labels", floating=False)
    known = {(torch.int64, 1), (torch.bool, 2), (torch.float32, 2), (torch.float64, 2)}
    is_known = (labels.dtype, labels.dim()) in known and len(labels) == len(rows)
    is_known &= bool(torch.isfinite(labels).all()) and (labels.dim() > 1 or int(labels.min()) >= 0)
    is_alike = (labels.dtype, labels.shape[1:]) == (target_labels.dtype, target_labels.shape[1:])
    if not is_known or not is_alike:
        raise ValueError(
            f"substitution: got {labels.dtype} {list(labels.shape)} as labels of {len(rows)} "
            f"{name} rows, expected int64 [N] from 0, bool or finite float [N, C] like those of "
            f"target rows, {target_labels.dtype} {list(target_labels.shape)}"
        )
