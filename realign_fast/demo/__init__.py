"""The demo (``realign-fast demo``): three questions about the modality gap, on built-in embeddings.

The data (README.md in this folder) consist of image rows, text rows, and held-out pairs that
neither the encoder nor the map has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..corpus.row_values import column_values
from ..interface.option_values import Modality
from ..interface.progress import Progress
from ..metrics.estimate import plain
from ..moments import Moments
from ..ops.reference import unit
from ..pipeline.align_run import align
from ..pipeline.settings import Settings
from ..shared_space import SharedSpace
from ..storage.paths import write_json

__all__ = ["DATA", "run"]
DATA = Path(__file__).resolve().parent / "data"
HELD_OUT = DATA / "heldout"
_SPLITS, _SEEDS, _WORD_LABELS = 10, 3, 256
_READER = metrics.Reader(steps=400, batch=64)
_NORMAL, _STUDENT = 1.96, 2.26  # 97.5% quantiles, the latter of 9 degrees of freedom
_TABLE = """\
1. Is the gap closed?                         before      after
   distance of the centroids, fitted rows    {fitted[before]:7.4f}    {fitted[after]:7.4f}
   the same, {held_out_pairs} new pictures{held_out[before]:23.4f}{held_out[after]:11.4f}\
   {closed}
   Sampling alone would leave {statistical_floor:.4f} between the fitted clouds. New \
pictures keep more,
   because this small encoder places pictures that it never saw a bit elsewhere.

2. Does one index of texts and images work?   before      after
   text finds its image among the first 10    {search[before]:6.1%}     {search[after]:6.1%}   \
± {search_error:.1%}
   The index holds {search[gallery]} images and as many texts. Among the images alone it is \
{search[images_alone]:.1%}.

3. Can texts stand for images?                before      after
   share of the distance to real images           0%        {reader}
   Small readers learn to name words from texts, and are tested on new images. Their loss is
   {loss[source]:.4f} with texts as they are, {loss[centred]:.4f} with both sides centred, and \
{loss[target]:.4f} if they learn
   from real images. Readers that are trained for longer close less of it."""
_NEXT = """\
Next, with your own rows:
  realign-fast align --text TEXT --image IMAGE --out OUT     move the texts onto the images
  realign-fast unify --text TEXT --image IMAGE --out INDEX   write rows for one search index
  realign-fast report OUT                                    see what changed, on one page"""


def run(out: Path, progress: bool = True) -> dict[str, Any]:
    """Align the built-in corpus into ``out`` and answer three questions about it.

    Returns:
        The contents of ``demo.json``: the numbers of texts, images and held-out pairs, and the
        figures of ``gap``, ``search`` and ``substitution``. A standard error is at ``NAME_error``,
        a 95% interval at ``interval``.
    """
    align(DATA, DATA, out, Settings(progress=progress))
    aligner = ReAlign.from_pretrained(out)
    fitted, held_out = _both(DATA), _both(HELD_OUT)
    steps = _SPLITS + len(_WAYS_TO_READ) * _SEEDS
    with Progress(steps, "measure", unit="step", shown=progress) as bar:
        gap = {
            "fitted": _measure_gap(fitted, _rows(out, "text")),
            "held_out": _measure_gap(held_out, unit(aligner(held_out["text"]))),
        }
        search = _measure_search(held_out, bar.update)
        substitution = _measure_substitution(fitted, held_out, bar.update)
    summary: dict[str, Any] = {
        "texts": int(aligner.source_count),
        "images": int(aligner.target_count),
        "held_out_pairs": len(held_out["image"]),
        "gap": {**gap, "statistical_floor": aligner.statistical_floor},
        "search": search,
        "substitution": substitution,
    }
    write_json(out / "demo.json", summary)
    print(_table(summary))
    print(f"\nWrote {out}: the aligned rows and demo.json.\n")
    print(_NEXT)
    return summary


_WAYS_TO_READ = ("source", "centred", "target")
Rows = dict[str, Tensor]  # by modality, [N, D] float64 of unit length


def _rows(path: Path, modality: Modality) -> Tensor:
    corpus = Corpus(path, modality)
    return unit(corpus.take(range(corpus.num_rows)).double())


def _both(path: Path) -> Rows:
    return {"text": _rows(path, "text"), "image": _rows(path, "image")}


def _measure_gap(before: Rows, aligned_text: Tensor) -> dict[str, Any]:
    """Return the distances of the centroids before and after, and the closed share with its 95%."""
    image = Moments(covariance=True).update(before["image"])
    before_gap, after_gap = (
        metrics.centroid_gap(Moments(covariance=True).update(text), image)
        for text in (before["text"], aligned_text)
    )
    error = _NORMAL * after_gap.standard_error
    shares = [1 - (after_gap + side * error) / before_gap for side in (0, 1, -1)]
    figures: dict[str, Any] = plain({"before": before_gap, "after": after_gap})
    return figures | {"share_closed": shares[0], "interval": shares[1:]}


def _measure_search(pairs: Rows, on_split: Callable[[], object]) -> dict[str, Any]:
    """Return R@10 of the image of a text in half of the pairs; the space is fitted on the other."""
    search = metrics.search_pairs(
        pairs,
        lambda rows, _: SharedSpace.fit(text=rows["text"], image=rows["image"]),
        roles=["text"],
        splits=_SPLITS,
        on_search=on_split,
    )
    encoder, space = search["text"].values()
    alone = encoder.pure_recall[10]
    figures = plain(
        {"before": encoder.recall[10], "after": space.recall[10], "images_alone": alone}
    )
    return {**figures, "gallery": -(-len(pairs["text"]) // 2), "splits": _SPLITS}


def _measure_substitution(
    fitted: Rows, held_out: Rows, on_reader: Callable[[], object]
) -> dict[str, Any]:
    """Return the losses of readers on held-out images, and the share of the distance closed."""
    space = SharedSpace.fit(text=fitted["text"], image=fitted["image"], method="center")
    images = torch.cat([fitted["image"], held_out["image"]])
    captions = [*_captions(DATA, "image"), *_captions(HELD_OUT, "image")]
    result = metrics.substitution(
        fitted["text"].float(),
        images.float(),
        metrics.hashed_words([*_captions(DATA, "text")], _WORD_LABELS),
        metrics.hashed_words(captions, _WORD_LABELS),
        aligned={"centred": lambda *_: (space.text, space.image)},
        test=torch.arange(len(fitted["image"]), len(images)),
        seeds=range(_SEEDS),
        reader=_READER,
        on_reader=on_reader,
    )
    figures: dict[str, Any] = {"loss": plain(result.loss), "seeds": _SEEDS}
    figures |= plain({"share_closed": result.share_closed["centred"]})
    return figures | {"interval": [*result.interval["centred"]]}


def _captions(path: Path, modality: Modality) -> Iterator[str]:
    return column_values(Corpus(path, modality), columns=("caption",))


def _table(summary: dict[str, Any]) -> str:
    return _TABLE.format(
        **summary,
        **summary["gap"],
        loss=summary["substitution"]["loss"],
        closed=_share(summary["gap"]["held_out"], " closed"),
        search_error=_STUDENT * summary["search"]["after_error"],
        reader=_share(summary["substitution"], "   "),
    )


def _share(figures: dict[str, Any], word: str) -> str:
    low, high = figures["interval"]
    return f"{figures['share_closed']:.0%}{word} [{low:.0%}, {high:.0%}]"
