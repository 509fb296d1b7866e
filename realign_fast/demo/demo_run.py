"""The demo: align the built-in embeddings, measure the result and draw it.

The data (README.md in this folder) consist of image rows, text rows, and held-out pairs that
neither the encoder nor the map has seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .. import metrics
from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..interface.option_values import Modality
from ..moments import Moments
from ..pipeline.align_run import AlignRun, align
from ..pipeline.settings import Settings
from ..report.pictures import draw_alignment
from ..storage.paths import write_json

DATA = Path(__file__).resolve().parent / "data"
HELD_OUT = DATA / "heldout"
_EXPLANATION = """\
{texts:,} texts were aligned to {images:,} images; {pairs} pairs are held out. New rows drawn like
the fitted ones would keep a gap of {floor:.4f} (statistical floor). The held-out pairs keep more:
the encoder was trained on the fitted pictures and places pictures it never saw a bit elsewhere."""


def run(out: Path, progress: bool = True) -> dict[str, Any]:
    """Align the built-in corpus into ``out``, print a table of figures and draw the clouds.

    Returns:
        The contents of ``demo.json``: the numbers of texts, images and held-out pairs, and the
        figures of rows before and after, by column and name.
    """
    settings = Settings(progress=progress, mode="overwrite")  # the rates need every pass to run
    report = align(DATA, DATA, out, settings)
    aligner = ReAlign.load(out / "aligner.safetensors")
    AlignRun(settings).apply(aligner, Corpus(HELD_OUT, "text"), out / "heldout")

    image, text = _rows(DATA, "image"), (_rows(DATA, "text"), _rows(out, "text"))
    held_out_image = _rows(HELD_OUT, "image")
    held_out_text = _rows(HELD_OUT, "text"), _rows(out / "heldout", "text")
    counts = {
        "texts": int(aligner.source_count),
        "images": int(aligner.target_count),
        "held_out_pairs": len(held_out_image),
    }
    figures = {
        "fitted before": _figures(text[0], image),
        "fitted after": _figures(text[1], image),
        "held-out before": _figures(held_out_text[0], held_out_image, paired=True),
        "held-out after": _figures(held_out_text[1], held_out_image, paired=True),
    }
    texts, images, pairs = counts.values()
    trace = float(aligner.target_trace)
    sampling_gap = metrics.sampling_gap(trace, images, texts, pairs, pairs)
    figures["held-out after"]["gap from sampling alone"] = sampling_gap
    summary = {**counts, "figures": figures}
    write_json(out / "demo.json", summary)
    print(_table(figures))
    floor = aligner.statistical_floor
    print(_EXPLANATION.format(texts=texts, images=images, pairs=pairs, floor=floor))
    for done in report["passes"]:
        rate, gigabytes = done["rows_per_second"] / 1e6, done["gb_per_second"]
        print(f"  {done['name']:16} {rate:7.2f} M rows/s  {gigabytes:6.2f} GB/s")
    title = f"ReAlign on {texts:,} texts and {images:,} images; {pairs} pairs held out"
    draw_alignment(out / "demo.png", image, text, held_out_image, held_out_text, title)
    print(f"wrote {out}: aligned rows, aligner.safetensors, report.json, demo.json, demo.png")
    return summary


def _rows(path: Path, modality: Modality) -> Tensor:
    corpus = Corpus(path, modality)
    return corpus.take(range(corpus.num_rows))


def _figures(text: Tensor, image: Tensor, paired: bool = False) -> dict[str, float]:
    text_moments, image_moments = Moments().update(text), Moments().update(image)
    figures = {
        "centroid gap": metrics.centroid_gap(text_moments, image_moments),
        "trace text / image": text_moments.trace / image_moments.trace,
    }
    if paired:
        figures["cosine of matched pairs"] = float(metrics.matched_cosine(text, image).mean())
        for k in (1, 10):
            name = f"text-to-image R@{k} of {len(text)}"
            figures[name] = metrics.recall_at_k(text, image, k)
    return figures


def _table(columns: dict[str, dict[str, float]]) -> str:
    lines = {"": "".join(f"{head:>17}" for head in columns)}
    for name in dict.fromkeys(name for figures in columns.values() for name in figures):
        cells = (figures.get(name) for figures in columns.values())
        lines[name] = "".join(" " * 17 if cell is None else f"{cell:17.4f}" for cell in cells)
    return "\n".join(f"{name:28}{line}" for name, line in lines.items())
