"""``realign-fast demo``: the whole pipeline on the built-in embeddings, judged and drawn.

The data (README.md beside this file) hold image rows, text rows, and held-out pairs that neither
the encoder nor the map ever saw.
"""

from __future__ import annotations

from pathlib import Path

from .. import metrics
from ..align import ReAlign
from ..corpus.corpus import Corpus
from ..moments import Moments
from ..pipeline.align_run import AlignRun, align
from ..pipeline.settings import Settings
from ..report.pictures import draw_alignment
from ..storage.paths import write_json

DATA = Path(__file__).resolve().parent / "data"
_EXPLANATION = """\
{n_y:,} texts moved towards {n_x:,} images; {pairs} pairs held out. New rows of the same kind as the
fitted ones would keep a gap of {floor:.4f} (statistical floor). The held-out pairs keep more: the
encoder was trained on the fitted pictures, and places pictures it never saw a little elsewhere."""


def run(out: Path, progress: bool = True) -> dict:
    """Align the built-in corpus into ``out``; print a table, write ``demo.json``, ``demo.png``."""
    settings = Settings(progress=progress, mode="overwrite")  # it shows how long each pass takes
    report = align(DATA, DATA, out, settings)
    aligner = ReAlign.load(out / "aligner.safetensors")
    AlignRun(settings).apply(aligner, Corpus(DATA / "heldout", "text"), out / "heldout")

    image, text = _rows(DATA, "image"), (_rows(DATA, "text"), _rows(out, "text"))
    held = DATA / "heldout"
    held_image = _rows(held, "image")
    held_text = _rows(held, "text"), _rows(out / "heldout", "text")
    n_x, n_y = int(aligner.target_count), int(aligner.source_count)
    trace = float(aligner.target_trace)
    columns = {
        "fitted before": _figures(text[0], image),
        "fitted after": _figures(text[1], image),
        "held-out before": _figures(held_text[0], held_image, paired=True),
        "held-out after": _figures(held_text[1], held_image, paired=True),
    }
    pairs = len(held_image)
    columns["held-out after"]["gap from sampling alone"] = metrics.sampling_gap(
        trace, n_x, n_y, pairs, pairs
    )
    summary = {"texts": n_y, "images": n_x, "held_out_pairs": pairs, "figures": columns}
    write_json(out / "demo.json", summary)
    print(_table(columns))
    print(_EXPLANATION.format(n_y=n_y, n_x=n_x, pairs=pairs, floor=aligner.statistical_floor))
    for one in report["passes"]:
        rate = one["rows_per_second"] / 1e6
        print(f"  {one['name']:16} {rate:7.2f} M rows/s  {one['gb_per_second']:6.2f} GB/s")
    title = f"ReAlign on {n_y:,} texts and {n_x:,} images; {pairs} pairs held out"
    draw_alignment(out / "demo.png", image, text, held_image, held_text, title)
    print(f"wrote {out}: aligned rows, aligner.safetensors, report.json, demo.json, demo.png")
    return summary


def _rows(path: Path, modality: str):
    corpus = Corpus(path, modality)
    return corpus.take(range(corpus.num_rows))


def _figures(text, image, paired: bool = False) -> dict[str, float]:
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
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines = [" " * 28 + "".join(f"{head:>17}" for head in columns)]
    for name in names:
        cells = (
            f"{column[name]:17.4f}" if name in column else " " * 17 for column in columns.values()
        )
        lines.append(f"{name:28}" + "".join(cells))
    return "\n".join(lines)
