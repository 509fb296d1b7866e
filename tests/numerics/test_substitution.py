"""Substitution: a planted effect of known size, the demo corpus's figures, bytes and refusals."""

import json
from collections import Counter

import pytest
import torch
from support.op_checks import random_rows

from realign_fast import Corpus, ReAlign, metrics
from realign_fast.demo import DATA

LINEAR = metrics.Reader(hidden=0, steps=150, batch=64, rate=0.1, weight_decay=0)


def planted(count=300, columns=6):
    """Rows of one distribution, the source's moved by a gap, and labels linear in what they show.

    A reader of source rows is wrong on target rows by ``gap @ weights``; with a share of the gap
    removed, by the rest of it, so that ``1 - (1 - share)^2`` of the squared error is closed.
    """
    weights = random_rows(columns, 3, seed=1).float()
    source, target = (random_rows(count, columns, seed=seed).float() for seed in (2, 3))
    gap = torch.linspace(0.5, 2, columns)
    return source + gap, target, source @ weights, target @ weights, gap, weights


def known(source_map, target_map=None):
    """The fit of maps that are known."""
    return lambda *_: (source_map, target_map)


def test_a_planted_effect_has_its_size():
    source, target, source_labels, target_labels, gap, weights = planted()
    found = metrics.substitution(
        source,
        target,
        source_labels,
        target_labels,
        aligned={
            "half": known(lambda rows: rows - gap / 2),
            "whole": known(lambda rows: rows - gap),
            "target moves": known(lambda rows: rows, lambda rows: rows + gap),
        },
        seeds=range(3),
        reader=LINEAR,
    )
    assert found.loss["source"] == pytest.approx(float((gap @ weights).square().mean()), rel=0.03)
    for name, share in (("source", 0), ("half", 0.75), ("whole", 1), ("target moves", 1)):
        assert found.share_closed[name] == pytest.approx(share, abs=0.02)
    low, high = found.interval["half"]
    assert low < found.share_closed["half"] < high < low + 0.05
    assert found.runs["half"].shape == (3,)
    mean = metrics.Estimate.of_mean(found.runs["source"])  # splits of 60 and 240 rows overlap
    expected = mean.standard_error * (1 + 3 * 60 / 240) ** 0.5
    assert found.loss["source"].standard_error == pytest.approx(expected)


def test_maps_are_fitted_on_rows_that_are_not_tested():
    source, target, source_labels, target_labels, *_ = planted(40)
    partners = torch.arange(40).flip(0)
    seen = []

    def fit(source_rows, target_rows):
        seen.append((source_rows, target_rows))
        return lambda rows: rows * 2, lambda rows: rows * 2

    found = metrics.substitution(
        source,
        target,
        source_labels,
        target_labels,
        aligned={"aligned": fit},
        partners=partners,
        seeds=[3, 4],
        test=0.25,
        reader=metrics.Reader(steps=1),
    )
    for (source_rows, target_rows), seed in zip(seen, (3, 4), strict=True):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        is_tested = torch.zeros(40, dtype=torch.bool)
        is_tested[order[:10]] = True
        assert torch.equal(target_rows, target[~is_tested])
        assert torch.equal(source_rows, source[~is_tested[partners]])
    assert [*found.loss] == ["source", "aligned", "target"]


def test_a_reader_stops_where_held_out_target_rows_say():
    """Labels are noise: readers that train on get worse, those that are checked keep their best."""
    source, target = (random_rows(80, 20, seed=seed).float() for seed in (2, 3))
    labels = [random_rows(80, 4, seed=seed) > 0 for seed in (4, 5)]
    seen, losses = [], []

    def fit(source_rows, target_rows):
        seen.append((len(source_rows), len(target_rows)))
        return lambda rows: rows, None

    for held_out in (0, 0.25):
        reader = metrics.Reader(steps=600, batch=16, held_out=held_out)
        options = dict(aligned={"same": fit}, partners=torch.arange(80), seeds=[0], test=0.25)
        options["reader"] = reader
        losses.append(metrics.substitution(source, target, *labels, **options).loss)
    assert seen == [(60, 60), (45, 45)]
    for name in losses[0]:
        assert losses[1][name] < 0.8 < losses[0][name]
    with pytest.raises(ValueError, match="held_out takes 60 of 60 target rows"):
        options["reader"] = metrics.Reader(held_out=1)
        metrics.substitution(source, target, *labels, **options)


@pytest.mark.parametrize("kind", ["numbers", "labels"])
def test_bytes_depend_on_seeds_alone(kind):
    source, target, *numbers = planted(80)[:4]
    labels = [n if kind == "numbers" else n > 0 for n in numbers]
    found, state, counted = [], torch.get_rng_state(), []
    options = dict(seeds=(0, 5), test=torch.arange(20), reader=metrics.Reader(steps=50))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(
            metrics.substitution(
                source, target, *labels, on_reader=lambda: counted.append(1), **options
            )
        )
    assert torch.equal(torch.get_rng_state(), state) and len(counted) == 8
    for name, runs in found[0].runs.items():
        assert torch.equal(runs, found[1].runs[name])
    assert found[0].runs["source"][0] != found[0].runs["source"][1]
    assert found[0].loss["target"] < found[0].loss["source"]
    assert found[0].share_closed["target"] == 1


def test_partners_of_tested_rows_are_not_trained_on():
    """Source rows and their labels are noise but for one, which would tell the tested row's."""
    rows, labels = random_rows(30, 4).float(), torch.zeros(30, 2, dtype=torch.bool)
    labels[0] = True
    options = dict(test=torch.tensor([0]), seeds=[0], reader=metrics.Reader(steps=50, rate=0.05))
    seen, unseen = (
        metrics.substitution(rows, rows, labels, labels, partners=partners, **options)
        for partners in (None, torch.arange(30))
    )
    assert unseen.loss["source"] > 3 * seen.loss["source"]
    with pytest.raises(ValueError, match="no source row is left to train on"):
        partners = torch.zeros(30, dtype=torch.int64)
        metrics.substitution(rows, rows, labels, labels, partners=partners, **options)


def test_words_are_hashed_alike_everywhere():
    labels = metrics.hashed_words(["A red, RED house!", "", "an ox"], 64)
    assert labels.sum(dim=1).tolist() == [2, 0, 0] and labels.dtype == torch.bool
    assert labels[0].nonzero()[:, 0].tolist() == [15, 29]


def test_the_demo_corpus_has_the_figures_of_the_prototype():
    """Losses of docs/text_instead_of_pairs.md, within the errors of a single seed."""
    rows = {}
    for name, folder, side in (
        ("text", DATA, "text"), ("image", DATA, "image"), ("held", DATA / "heldout", "image")
    ):  # fmt: skip
        corpus = Corpus(folder, side)
        rows[name] = torch.nn.functional.normalize(corpus.take(range(corpus.num_rows)).float())
    words = [
        {word for word in caption.lower().replace(",", " ").replace(":", " ").split() if word[2:]}
        for folder in (DATA, DATA / "heldout")
        for file in sorted((folder / "metadata").glob("*.jsonl"))
        for caption in (json.loads(line)["caption"] for line in file.open())
    ]
    texts, images = len(rows["text"]), len(rows["image"])
    counts = [Counter(w for own in side for w in own) for side in (words[:texts], words[-400:])]
    vocabulary = [word for word, _ in counts[0].most_common(600) if counts[1][word] >= 3]
    labels = torch.tensor([[word in own for word in vocabulary] for own in words])
    told = labels[:texts].any(dim=1)
    text, image = rows["text"], rows["image"]
    centres = text.mean(dim=0), image.mean(dim=0)
    transport = ReAlign.fit(text, image, method="optimal-transport", shrinkage="oas")
    normalize = torch.nn.functional.normalize
    aligned = {
        "ReAlign": known(ReAlign.fit(text, image)),
        "transport": known(transport),
        "centred": known(*(lambda rows, c=centre: normalize(rows - c) for centre in centres)),
    }
    found = metrics.substitution(
        text[told],
        torch.cat([image, rows["held"]]),
        labels[:texts][told],
        labels[texts:],
        aligned=aligned,
        test=torch.arange(images, images + 400),
        seeds=[0],
    )
    for name, loss, error in (
        ("source", 0.1028, 0.0012), ("ReAlign", 0.0951, 0.0006), ("transport", 0.0911, 0.001),
        ("centred", 0.0891, 0.0006), ("target", 0.0875, 0.0009),
    ):  # fmt: skip
        assert found.loss[name] == pytest.approx(loss, abs=error), name


ROWS = random_rows(20, 4).float()
LABELS = ROWS > 0
NUMBERS = torch.arange(20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(source_rows=ROWS[:, :3]), "source rows have other columns than target rows"),
        (dict(source_rows=ROWS[:19]), r"bool \[20, 4\] as labels of 19 source rows, expected bool"),
        (dict(source_labels=LABELS[:, :1]), "expected bool .* those of target rows"),
        (dict(target_labels=None), "expected labels as a tensor, got NoneType"),
        (dict(aligned={"a": known(lambda rows: rows * torch.nan)}), "reader of a rows has a loss"),
        (dict(aligned={"a": known(lambda rows: rows[:, :3])}), "a rows have other columns"),
        (dict(aligned={"target": known(torch.sin)}), r"rows \['target'\]; .* names other than"),
        (dict(seeds=[]), "got 0 seeds"),
        (dict(test=0.0), "`test` takes 0 of 20 target rows"),
        (dict(test=1.0), "`test` takes 20 of 20 target rows"),
        (dict(partners=torch.zeros(3)), "partners as an int64 number for each source row"),
        (dict(partners=NUMBERS + 18), "of a target row or -1"),
        (dict(source_labels=NUMBERS), "expected bool or finite float .N, C."),
        (dict(source_labels=ROWS / 0, target_labels=ROWS), "or finite float"),
        (dict(reader=metrics.Reader(steps=0)), "steps is 0, expected a whole number from 1"),
        (
            dict(source_rows=ROWS.double() * 1e300),
            "reader of source rows has a loss that is not finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = dict(source_rows=ROWS, target_rows=ROWS, source_labels=LABELS)
    arguments |= dict(target_labels=LABELS, reader=metrics.Reader(steps=1), seeds=[0]) | change
    with pytest.raises((ValueError, TypeError), match=message):
        metrics.substitution(**arguments)
