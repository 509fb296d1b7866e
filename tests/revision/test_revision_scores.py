"""Scores against values worked out by hand, and the likelihoods behind the evaluation."""

import json

import numpy as np
import pytest
import torch
from support.revision_parts import (
    WORDS,
    list_entry,
    tiny_llama,
    word_tokenizer,
    write_corpus,
    write_lines,
)

pytest.importorskip("transformers")
from realign_fast.corpus import Corpus
from realign_fast.revision.evaluation import evaluate, interval
from realign_fast.revision.generation import respond
from realign_fast.revision.model import IMAGE_TOKEN, ReVisionConfig, ReVisionModel
from realign_fast.revision.templates import Chat, Plain
from realign_fast.revision.training_data import prepare


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = interval(values)
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    weighted = interval(np.array([1.0, 3.0]), np.array([3.0, 1.0]))
    assert weighted["value"] == 1.5
    with pytest.raises(ValueError, match="no values"):
        interval(np.array([]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    ids = [f"x{n}" for n in range(12)]
    texts = ["a red dog", "the cat sits on the mat", "one", "two small trees"] * 3
    write_corpus(root / "corpus", ids)
    write_lines(root / "list.jsonl", map(list_entry, ids, texts))
    torch.manual_seed(1)
    config = ReVisionConfig("nowhere", 16, 64, visual_tokens=2)
    return root, texts, ReVisionModel(config, tiny_llama(vocabulary=400)).eval()


@pytest.mark.parametrize("kind", [Plain, Chat])
def test_the_loss_is_that_of_each_sample_alone(kind, world):
    root, _, model = world
    corpus, template = Corpus(root / "corpus", "text"), kind(word_tokenizer(), 2)
    data = prepare(root / "list.jsonl", corpus, template, root / "cache", side="image")
    found = evaluate(model, data, choices=0, batch=5)
    total = count = 0
    for number in range(len(data)):
        one = data[number]
        inputs = {name: torch.tensor([one[name]]) for name in ("input_ids", "labels")}
        loss = model(**inputs, image_rows=one["image_rows"]).loss.detach()
        tokens = sum(label != -100 for label in one["labels"])
        total, count = total + float(loss) * tokens, count + tokens
    assert found["tokens"] == count
    assert found["loss"]["value"] == pytest.approx(total / count, rel=1e-5)
    assert found["loss"]["low"] < found["loss"]["value"] < found["loss"]["high"]


class Knowing(torch.nn.Module):
    """Not a model: likelihoods that are right where `knows`, to check what is made of them."""

    def __init__(self, knows, data):
        super().__init__()
        self.device, self.knows = torch.device("cpu"), knows
        self.projector = torch.nn.Identity()
        self.projector.space = None
        self.right = {}
        for number in range(len(data)):
            one = data[number]
            self.right[tuple(one["image_rows"][0].tolist())] = one["input_ids"]

    def forward(self, input_ids, attention_mask, image_rows):
        logits = torch.zeros(*input_ids.shape, 400)
        for place, (ids, row) in enumerate(zip(input_ids, image_rows, strict=True)):
            right = self.right.get(tuple(row.tolist()), [])  # it knows nothing of the mean row
            for at, token in enumerate(right[1 : len(ids)]):
                if token != IMAGE_TOKEN and self.knows:
                    logits[place, at, token] = 9.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize(("knows", "low", "high"), [(True, 1.0, 1.0), (False, 0.25, 0.25)])
def test_the_choice_is_right_where_the_likelihoods_are_and_chance_where_all_are_equal(
    knows, low, high, world
):
    root, _, _ = world
    template = Plain(word_tokenizer(), 2)
    data = prepare(
        root / "list.jsonl", Corpus(root / "corpus", "text"), template, root / "cache", side="image"
    )
    every = evaluate(Knowing(knows, data), data, choices=4)
    for found in (every["choice"], every["choice_by_gain"]):
        assert low - 1e-6 <= found["value"] <= high + 1e-6
        assert (found["of"], found["chance"]) == (4, 0.25)
    assert (every["gain"]["value"] > 1) == knows and every["gain"]["value"] >= 0
    with pytest.raises(ValueError, match="4 different texts for a choice of 5"):
        evaluate(Knowing(knows, data), data, choices=5)


def test_choices_that_stop_early_and_gains_are_those_of_all_likelihoods(tmp_path):
    """Against every likelihood, one text at a time."""
    count, choices = 14, 10
    ids, words = [f"x{n}" for n in range(count)], WORDS[:count]
    write_corpus(tmp_path / "corpus", ids, seed=4)
    lines = [{"id": one, "caption": f"a {word}"} for one, word in zip(ids, words, strict=True)]
    write_lines(tmp_path / "list.jsonl", lines)
    template = Plain(word_tokenizer(), 2)
    corpus = Corpus(tmp_path / "corpus", "text")
    data = prepare(tmp_path / "list.jsonl", corpus, template, tmp_path / "cache", side="image")
    torch.manual_seed(2)
    config = ReVisionConfig("nowhere", 16, 64, visual_tokens=2)
    model = ReVisionModel(config, tiny_llama(vocabulary=600)).eval()
    for layer in (0, 2):
        model.projector.layers[layer].weight.data *= 40  # or every image would say the same
    captions = [f"a {word}" for word in words]
    images = [data[image]["image_rows"].float() for image in range(count)]
    images.append(torch.cat(images).mean(0, keepdim=True))
    table = np.zeros((count + 1, count))  # [image, text], the mean row last
    for image, rows in enumerate(images):
        sample = data.sample(min(image, count - 1))
        for text, caption in enumerate(captions):
            ids_, labels = template.encode(template.with_answer(sample, caption))
            inputs = {"input_ids": torch.tensor([ids_]), "labels": torch.tensor([labels])}
            table[image, text] = -float(model(**inputs, image_rows=rows).loss.detach())
    found = evaluate(model, data, choices=choices, batch=7, seed=7)
    for name, scores in (
        ("choice", table[:count]),
        ("choice_by_gain", table[:count] - table[count]),
    ):
        random, names, right = np.random.default_rng(7), sorted(captions), []
        for image in range(count):
            drawn = [names[one] for one in random.permutation(count)[:choices]]
            wrong = [one for one in drawn if one != captions[image]][: choices - 1]
            best = max(scores[image, captions.index(one)] for one in wrong)
            right.append(best < scores[image, image])
        assert 0 < np.mean(right) < 1
        assert found[name]["value"] == pytest.approx(np.mean(right))
    order = np.random.default_rng(7).permutation(count)
    apart = table[order, order] - table[np.roll(order, 1), order]
    tokens = np.array([sum(label != -100 for label in data[at]["labels"]) for at in order])
    assert found["gain"]["value"] == pytest.approx((apart * tokens).sum() / tokens.sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("ids", "texts", "choices", "said"),
    [
        (["x1"], ["a dog"], 4, "1 different texts for a choice of 4, expected 2 up"),
        (["x1", "x2"], ["a dog"] * 2, 2, "1 different texts for a choice of 2, expected 2 up"),
        (["x1", "x2"], ["a dog", "a cat"], 4, "2 different texts for a choice of 4, expected 2 up"),
        (["x1", "x2"], ["a dog", "a cat"], 1, "2 different texts for a choice of 1, expected 2 up"),
    ],
)
def test_a_choice_needs_different_texts(ids, texts, choices, said, world, tmp_path):
    data, model = few(world, tmp_path, ids, texts)
    with pytest.raises(ValueError, match=said):
        evaluate(model, data, choices=choices)


def few(world, tmp_path, ids, texts):
    """A prepared list of these ids and texts, and the model."""
    root, _, model = world
    path = write_lines(tmp_path / "list.jsonl", map(list_entry, ids, texts))
    corpus, template = Corpus(root / "corpus", "text"), Plain(word_tokenizer(), 2)
    return prepare(path, corpus, template, tmp_path / "cache", side="image", max_skipped=0.9), model


def test_few_samples_are_measured_without_what_they_cannot_tell(world, tmp_path):
    """One sample; the same image three times; an id that no row has and an entry without one."""
    for name, ids in (("one", ["x1"]), ("same", ["x1"] * 3), ("lost", ["x1", "nobody", None])):
        (tmp_path / name).mkdir()
        data, model = few(world, tmp_path / name, ids, ["a dog", "a cat", "one"])
        found = evaluate(model, data, choices=0)
        assert found["samples"] == len(data) == (3 if name == "same" else 1)
        evaluate(model, data, choices=0, losses=tmp_path / "losses.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").open()]
        assert [line["other_loss"] for line in lines] == [None] * len(data)
        assert "gain" not in found and found["loss"]["low"] <= found["loss"]["value"]
    assert (data.report["missing_ids"], data.report["without_ids"]) == (1, 1)
    with pytest.raises(ValueError, match="got limit 0, expected a number of samples from 1"):
        evaluate(model, data, choices=0, limit=0)


def test_images_are_exchanged_with_different_ones_alone(world, tmp_path):
    """Two samples of x1 and one of x2: an exchange within x1 would count as no gain."""
    data, model = few(world, tmp_path, ["x1", "x1", "x2"], ["a dog", "a cat", "one"])
    losses = []
    for image in (0, 1, 2):
        for text in (0, 1, 2):
            item = data[text]
            inputs = {name: torch.tensor([item[name]]) for name in ("input_ids", "labels")}
            rows = data[image]["image_rows"]
            losses.append(float(model(**inputs, image_rows=rows).loss.detach()))
    table = np.array(losses).reshape(3, 3)
    order = np.random.default_rng(0).permutation(3)
    pairs = [(int(a), int(b)) for a, b in zip(order, np.roll(order, 1), strict=True)]
    pairs = [pair for pair in pairs if pair not in ((0, 1), (1, 0))]
    tokens = np.array([sum(label != -100 for label in data[a]["labels"]) for a, _ in pairs])
    gains = np.array([table[b, a] - table[a, a] for a, b in pairs])
    found = evaluate(model, data, choices=0, losses=tmp_path / "new" / "losses.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "losses.jsonl").open()]
    assert [line["id"] for line in lines] == ["x1", "x1", "x2"]
    assert [line["loss"] for line in lines] == pytest.approx(np.diag(table).tolist(), abs=1e-5)
    others = {a: table[b, a] for a, b in pairs}
    for text, line in enumerate(lines):
        assert line["other_loss"] == (
            pytest.approx(others[text], abs=1e-5) if text in others else None
        )
    means = np.average([line["loss"] for line in lines], weights=[line["tokens"] for line in lines])
    assert found["loss"]["value"] == pytest.approx(means) and len(pairs) == 2
    assert found["gain"]["value"] == pytest.approx((gains * tokens).sum() / tokens.sum(), abs=1e-5)


def test_texts_and_answers_stay_within_the_positions_of_the_language_model(world, tmp_path):
    data, model = few(world, tmp_path, ["x1", "x2"], ["a dog", "the cat sits on the mat"])
    data.template.positions = 10
    found = evaluate(model, data, choices=2)
    assert found["choice"]["of"] == 2
    template = data.template
    data.template.positions = 3 + 2
    texts = respond(model, template, [data.sample(0)], data.image_rows([0]), max_new_tokens=50)
    assert len(template.tokenizer(texts[0])["input_ids"]) <= 2
    with pytest.raises(ValueError, match=r"as the answer of sample 'x.' makes . tokens, expected"):
        evaluate(model, data, choices=2)
    data.template.positions = 3
    with pytest.raises(ValueError, match="takes 3 tokens, and the language model takes 3 with"):
        respond(model, template, [data.sample(0)], data.image_rows([0]))


def test_without_images_there_is_no_gain_to_tell(world, tmp_path):
    root, _, model = world
    turns = [[("human", "what ?"), ("gpt", word)] for word in WORDS[:4]]
    lines = [
        {"id": n, "conversations": [{"from": who, "value": said} for who, said in one]}
        for n, one in enumerate(turns)
    ]
    (tmp_path / "list.json").write_text(json.dumps(lines))
    template, corpus = Chat(word_tokenizer(), 2), Corpus(root / "corpus", "text")
    data = prepare(tmp_path / "list.json", corpus, template, tmp_path / "cache", side="image")
    found = evaluate(model, data, choices=3)
    assert "gain" not in found and "choice_by_gain" not in found and "choice" in found
