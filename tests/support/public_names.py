"""A program that uses every public name; ``test_types.py`` checks its types and never runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import realign_fast
from realign_fast import (
    Corpus,
    Moments,
    ReAlign,
    SharedSpace,
    corpus,
    embed,
    metrics,
    ops,
    report,
    revision,
    whiten,
)
from realign_fast.frame import Decomposition, FixedFrame
from realign_fast.pipeline import AlignRun, Settings, SpaceSides, align, unify


def use_the_core(text: Tensor, image: Tensor) -> Tensor:
    aligner: ReAlign = ReAlign.fit(text, image, method="coral", shrinkage="oas", bad_rows="skip")
    source = Moments(covariance=True).update(text, bad_rows="keep")
    target = Moments(covariance=True).update(image)
    half = ReAlign.from_moments(source, target, noise=None)
    half.record_drift(Moments().update(text, through=half.row_map))
    aligner.save_pretrained(Path("aligner"))
    loaded: ReAlign = ReAlign.from_pretrained("aligner")
    frame = FixedFrame.fit(source, target, energy=0.9)
    split: Decomposition = frame.decompose((text, image))
    return loaded(aligner(text)) + split.gamma


def use_the_shared_space(text: Tensor, image: Tensor) -> Tensor:
    space: SharedSpace = SharedSpace.fit(text=text, image=image, layout="blocks", method="auto")
    gallery = {"text": space.text(text), "image": space.image(image)}
    relevant = {"image": torch.arange(len(text))}
    found: metrics.MixedGallery = metrics.mixed_gallery(space.query(text), gallery, relevant)
    found = metrics.over_splits([found, found])

    def fit(rows: dict[str, Tensor], role: str) -> SharedSpace:
        return SharedSpace.fit(text=rows["text"], image=rows["image"], query_role=role)

    pairs = metrics.search_pairs({"text": text, "image": image}, fit, roles=["text"], splits=2)
    found = pairs["text"]["space"]
    return space.score(text, image, "image") * found.recall[10]


def errors_that_the_types_reveal(text: Tensor, image: Tensor) -> None:
    ReAlign.fit(text, image, method="pca")  # type: ignore[arg-type]
    Moments().update(text, bad_rows="drop")  # type: ignore[arg-type]
    whiten.coral("source", "target")  # type: ignore[arg-type]
    whiten.inverse_root(text, floor="0.1")  # type: ignore[arg-type]
    FixedFrame.load("frame").decompose(text, image)  # type: ignore[arg-type, call-arg]


def use_a_report(out: Path) -> str:
    path, facts = report.write_report(out, sample=100)
    return f"{path}{report.render(report.facts_of(out))}{facts['sentence']}"


def use_the_ops(rows: Tensor) -> str:
    scale, shift, recentre = 1.0, torch.zeros(4), torch.zeros(4)
    mapped: Tensor = realign_fast.align_rows(rows, scale, shift, recentre, out_dtype=ops.DTYPES[0])
    sums: ops.RowSums = realign_fast.sum_rows(mapped)
    scatter = torch.zeros(4, 4, dtype=ops.working_dtype(rows))
    counts: Tensor = realign_fast.add_scatter_(scatter, sums.total, rows, shift)
    sums = ops.sum_mapped_rows(rows, lambda block: ops.align_rows(block, scale, shift))
    backend: ops.Backend = realign_fast.backend_of(ops.OPS[0], "cpu")
    same = ops.backend_of(ops.OPS[0], rows.device), ops.sum_rows(rows), ops.add_scatter_
    chosen: dict[str, str] = ops.chosen_backends(rows.device)
    answer: str = ops.INSTRUCTION_SETS[0] + ops.cpu_instruction_set("sum_rows") + ops.why_no_cuda()
    return f"{answer} {backend} {same} {counts} {sums} {chosen}"


def use_whiten(source: Tensor, target: Tensor, rows: Tensor) -> list[Tensor]:
    shrinkage: whiten.Shrinkage = "ledoit-wolf"
    share: float = whiten.shrinkage(source, shrinkage, count=100, mean=rows.mean(dim=0))
    distance: float = whiten.bures_distance(source, target)
    default: float = whiten.default_floor(source)
    return [
        distance * whiten.symmetric_root(source) @ whiten.inverse_root(source, floor=default),
        whiten.coral(whiten.shrink(source, share), target),
        whiten.optimal_transport(source, target),
        whiten.blockwise(source, target, rows.T),
    ]


def use_metrics(text: Tensor, image: Tensor, y: Moments, x: Moments) -> dict[str, float | None]:
    settings = metrics.GapSettings(mixing_k=5)
    nearest: metrics.Neighbours = metrics.nearest_rows(text, image, 5)
    spectrum: metrics.Spectrum = metrics.spectrum_of(y)
    values = spectrum.values
    figures: list[metrics.Estimate] = [
        metrics.centroid_gap(y, x),
        metrics.mean_cosine(text, image),
        metrics.knn_mixing(text, image),
        metrics.knn_overlap(text, image),
    ]
    numbers: list[float] = [
        figures[0].standard_error,
        metrics.sampling_gap(y.trace, y.count, x.count),
        metrics.trace_ratio(y, x),
        metrics.covariance_distance(y, x),
        metrics.frechet_distance(y, x),
        metrics.effective_rank(values),
        metrics.participation_ratio(values),
        metrics.anisotropy(values),
        metrics.power_law_exponent(values),
        metrics.log_spectrum_correlation(values, values),
        metrics.subspace_overlap(spectrum.vectors, spectrum.vectors, 2),
        metrics.cosine_divergence(text, image),
        metrics.cosine_correlation(text, image),
    ]
    rows: list[Tensor] = [metrics.pairwise_cosines(text), nearest.indices]
    gap = metrics.gap_report(text, image, settings=settings, paired=True)
    captions = ["a caption"] * len(text)
    labels: Tensor = metrics.hashed_words(captions)
    read: metrics.Substitution = metrics.substitution(
        *(text, image, labels, labels),
        aligned={"moved": lambda source, target: (ReAlign.fit(source, target), None)},
        reader=metrics.Reader(hidden=0),
    )
    numbers += [read.share_closed["moved"], read.loss["source"].standard_error]
    return gap | {"sum": sum(numbers) + float(rows[0].sum())}


def use_corpora_and_runs() -> dict[str, Any]:
    text = Corpus("text", allow_pickle=True)
    rows: Tensor = text.take(corpus.sample_ids(len(text), 100, 0))
    batches: list[corpus.Batch] = list(text.batches(batch_rows=4096))
    shard: corpus.Shard = corpus.read_header("text/text_emb_0.npy")
    writer_type: type[corpus.ShardWriter] = corpus.ShardWriter
    with shard.writer("out/text_emb_0.npy") as writer:
        writer.write(batches[0].rows)
    print(
        corpus.as_numpy(rows).shape,
        writer_type.__name__,
        corpus.sample_ids(10, 5, seed=0),
        corpus.format_of("text_emb_0.npy"),
    )
    settings = Settings(workers=2, method="realign", bad_rows="skip")
    run = AlignRun(settings)
    aligner: ReAlign = run.fit(text, Corpus("image"))
    print(aligner.record)
    sides = SpaceSides({"text": Corpus("text"), "image": Corpus("image")}, layout="blocks")
    return align("text", "image", "out", settings) | unify(sides, "index", settings)


def use_embed() -> dict[str, Any]:
    encoder: embed.Encoder = embed.load_encoder("ViT-B-32", "laion2b_s34b_b79k")
    encoders: list[type[embed.Encoder]] = [
        embed.OpenClipEncoder,
        embed.HuggingFaceEncoder,
    ]
    assert isinstance(encoder, tuple(encoders))
    source = embed.open_source("pairs.parquet", "pairs", embed.Columns(caption="text"))
    return embed.embed(encoder, "out", pairs=source, settings=embed.EmbedSettings(workers=0))


def use_revision(language_model: PreTrainedModel, tokenizer: Any, rows: Corpus) -> dict[str, Any]:
    config = revision.ReVisionConfig("model", row_dimension=512, hidden_size=576)
    projector: revision.Projector = revision.Projector(config)
    print(revision.ReVisionModel(config, language_model), projector)
    training = revision.TrainingConfig("list.jsonl", rows, "out", "model")
    print(revision.pretrain(training), revision.finetune(training))
    model: revision.ReVisionModel = revision.ReVisionModel.from_pretrained("out")
    template = revision.Plain(tokenizer, config.visual_tokens)
    chat = revision.Chat(tokenizer, config.visual_tokens)
    data = revision.prepare("list.jsonl", rows, chat, "cache")
    batch: dict[str, Tensor] = revision.Collator(pad=0)([data[0], data[1]])
    captions: list[str] = list(revision.caption_rows(model, template, [batch["image_rows"]]))
    return revision.evaluate(model, data) | {"captions": captions}
