"""A training step of ReVision against a straightforward way to load and project.

The straightforward way (what a script after LLaVA's does): the whole list and every row in Python
dicts, one sample built at a time, K copies of each row stacked and each of them projected. Ours:
`revision.training_data`, `ReVisionModel`. All train the same projector before the
same frozen small language model (random Llama), from the same start, on the same batches; the error
is that of the first loss, against the same model in float64. The ceiling is our step on batches
that lie ready.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import table, timing
from torch import nn

pytest.importorskip("transformers", reason="training_step is missing: pip install '.[train]'")

import transformers

from realign_fast.corpus import Corpus
from realign_fast.revision.model import IMAGE_TOKEN, ReVisionConfig, ReVisionModel
from realign_fast.revision.templates import Plain
from realign_fast.revision.training_data import Collator, prepare

D, HIDDEN, LAYERS, WORDS, CAPTION = 768, 512, 4, 2000, 12
SAMPLES = 4000
Batches = Iterator[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("training"), SAMPLES)


@table.of("training_step")
def bench_training_step(line, world, measure):
    k, batch = int(line.kind.removeprefix("K=")), line.rows
    started = model(k)
    weights = sum(one.numel() for one in started.language_model.model.layers.parameters())
    truth = exact_loss(started, next(our_batches(world, k, batch)))
    case = timing.Case(
        **line.facts(),
        bytes=2 * 4 * weights,  # the weights, forward and backward
        flops=4 * weights * batch * (k + CAPTION + 2),  # they are frozen: no products for them
        limit="flops",
        error_of=lambda loss: abs(loss - truth) / truth,
        tolerance=1e-5,
    )
    ready = list(islice(our_batches(world, k, batch), 8))
    case.add("training_step", Trained(started, our_batches(world, k, batch)).step, "ours")
    case.add("on ready batches", Trained(started, cycle(ready)).step, "ceiling")
    theirs = Trained(Straightforward(started), straightforward_batches(world, k, batch))
    name = f"straightforward (transformers {transformers.__version__})"
    case.add(name, theirs.step)
    measure(case)


def exact_loss(started: ReVisionModel, batch: dict[str, torch.Tensor]) -> float:
    """Return the loss of the first batch in float64 (transformers computes it in float32)."""
    with torch.no_grad():
        logits = copy.deepcopy(started).double()(**batch).logits.double()
    labels = batch["labels"][:, 1:].flatten()
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels))


def tokenizer():
    """Return a tokenizer with numbers as words, so that a text has one token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{n}": n + 3 for n in range(WORDS)}
    made = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_world(root: Path, count: int) -> Path:
    """Write `count` rows of float16 in four shards with ids, and a list of captions."""
    random = np.random.default_rng(0)
    for folder in ("text_emb", "metadata"):
        (root / folder).mkdir(parents=True)
    with open(root / "list.jsonl", "w") as lines:
        for number, places in enumerate(np.array_split(np.arange(count), 4)):
            rows = random.standard_normal((len(places), D), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            np.save(root / "text_emb" / f"text_emb_{number}.npy", rows.astype(np.float16))
            with open(root / "metadata" / f"metadata_{number}.jsonl", "w") as ids:
                for place in places:
                    ids.write(json.dumps({"id": f"i{place}"}) + "\n")
                    text = " ".join(f"w{one}" for one in random.integers(0, WORDS, CAPTION))
                    lines.write(json.dumps({"id": f"i{place}", "caption": text}) + "\n")
    return root


def model(k: int) -> ReVisionModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    made = ReVisionModel(
        ReVisionConfig("random", D, HIDDEN, visual_tokens=k), LlamaForCausalLM(config)
    )
    made.train_only(["projector"])
    return made.train()


class Straightforward(nn.Module):
    """The same model in a straightforward form: every copy of a row is projected."""

    def __init__(self, made: ReVisionModel) -> None:
        super().__init__()
        self.language_model, self.projector = made.language_model, made.projector.layers

    def forward(self, input_ids, attention_mask, labels, image_rows):
        copies = torch.nn.functional.normalize(image_rows, dim=-1)  # [B, K, D]
        visual = self.projector(copies)
        before = self.language_model.get_input_embeddings()(input_ids[:, :1])
        after = self.language_model.get_input_embeddings()(input_ids[:, 1 + copies.shape[1] :])
        return self.language_model(
            inputs_embeds=torch.cat([before, visual, after], 1),
            attention_mask=attention_mask,
            labels=labels,
        )


def all_in_memory(root: Path) -> tuple[list[dict], dict[str, list[float]]]:
    """Load the samples with `json.load` and a dict of all embeddings."""
    entries = [json.loads(line) for line in open(root / "list.jsonl")]
    rows = {}
    for number in range(4):
        shard = np.load(root / "text_emb" / f"text_emb_{number}.npy")
        names = open(root / "metadata" / f"metadata_{number}.jsonl")
        for line, row in zip(names, shard, strict=True):
            rows[json.loads(line)["id"]] = row.astype(np.float32)
    return entries, rows


def shuffled(count: int) -> list[int]:
    """Return the numbers below `count` in the order of every reader that is compared."""
    return np.random.default_rng(0).permutation(count).tolist()


def straightforward_batches(root: Path, k: int, batch: int) -> Batches:
    entries, rows = all_in_memory(root)
    words = tokenizer()
    order = shuffled(len(entries))
    for begin in range(0, len(order) - batch, batch):
        ids, labels, images = [], [], []
        for place in order[begin : begin + batch]:
            caption = words(entries[place]["caption"], add_special_tokens=False)["input_ids"]
            ids.append([0, *[IMAGE_TOKEN] * k, *caption, 1])
            labels.append([-100] * (1 + k) + [*caption, 1])
            images.append(np.stack([rows[entries[place]["id"]]] * k))
        tokens = torch.tensor(ids)  # captions here are of one length
        yield {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.tensor(labels),
            "image_rows": torch.from_numpy(np.stack(images)),
        }


def our_batches(root: Path, k: int, batch: int) -> Batches:
    data = prepare(
        root / "list.jsonl", Corpus(root, "text"), Plain(tokenizer(), k), root / f"cache-{k}"
    )
    options = {"sampler": shuffled(len(data)), "collate_fn": Collator(0)}
    yield from torch.utils.data.DataLoader(data, batch, **options)


class Trained:
    """Copy of a model with its optimizer and its batches."""

    def __init__(self, made: nn.Module, batches: Batches) -> None:
        self.model, self.batches, self.losses = copy.deepcopy(made), batches, []
        parameters = [one for one in self.model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, 5e-4, weight_decay=0)

    def step(self, _: object = None) -> float:
        """Make one training step and keep the loss of the first."""
        loss = self.model(**next(self.batches)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))
        return self.losses[0]
