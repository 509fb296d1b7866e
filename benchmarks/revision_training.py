"""Training steps of ReVision beside the straightforward way, in one interleaved run.

    python benchmarks/revision_training.py --out benchmarks/results/revision_DATE.json

The straightforward way: the whole list and every row in Python dicts, one sample built at a time,
K copies of each row stacked and each of them projected. Ours: `revision.join`, `revision.data` and
`ReVisionModel`. Both train the same projector before the same frozen small language model, from the
same start, on the same batches; their losses are held against each other before any speed is said.

Told are: samples a second of either and their ratio (median over rounds, each round runs both);
the share of a step that the model waits for the loader (ours, two workers); the anonymous memory
that either's data take in a process of its own, for a corpus and one four times as large.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from realign_fast.corpus import Corpus
from realign_fast.revision.data import Collator
from realign_fast.revision.join import prepare
from realign_fast.revision.model import ReVisionModel
from realign_fast.revision.projector import IMAGE_TOKEN, ReVisionConfig
from realign_fast.revision.shuffle import Shuffled
from realign_fast.revision.templates import Plain

D, HIDDEN, LAYERS, WORDS = 768, 512, 4, 2000
ROUNDS = 5
BATCHES, STEPS = {576: 4, 16: 32}, {576: 1, 16: 2}  # of a round, by K
Batches = Iterator[dict[str, torch.Tensor]]


def tokenizer():
    """Numbers as words: a text is as many tokens as it has words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{n}": n + 3 for n in range(WORDS)}
    made = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_world(root: Path, count: int) -> Path:
    """`count` rows of float16 in four shards with ids, and a list of captions of 12 words."""
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
                    text = " ".join(f"w{one}" for one in random.integers(0, WORDS, 12))
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
    """The same model, written as one would first write it: every copy is projected."""

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
    """What `json.load` and a dict of embeddings come to."""
    entries = [json.loads(line) for line in open(root / "list.jsonl")]
    rows = {}
    for number in range(4):
        shard = np.load(root / "text_emb" / f"text_emb_{number}.npy")
        names = open(root / "metadata" / f"metadata_{number}.jsonl")
        for line, row in zip(names, shard, strict=True):
            rows[json.loads(line)["id"]] = row.astype(np.float32)
    return entries, rows


def straightforward_batches(root: Path, k: int) -> Batches:
    entries, rows = all_in_memory(root)
    words = tokenizer()
    order = list(Shuffled(len(entries), 0))
    for begin in range(0, len(order) - BATCHES[k], BATCHES[k]):
        ids, labels, images = [], [], []
        for place in order[begin : begin + BATCHES[k]]:
            caption = words(entries[place]["caption"], add_special_tokens=False)["input_ids"]
            ids.append([0, *[IMAGE_TOKEN] * k, *caption, 1])
            labels.append([-100] * (1 + k) + [*caption, 1])
            images.append(np.stack([rows[entries[place]["id"]]] * k))
        batch = torch.tensor(ids)  # captions here are of one length
        yield {
            "input_ids": batch,
            "attention_mask": torch.ones_like(batch),
            "labels": torch.tensor(labels),
            "image_rows": torch.from_numpy(np.stack(images)),
        }


def our_batches(root: Path, k: int, workers: int = 0) -> Batches:
    data = prepare(
        root / "list.jsonl", Corpus(root, "text"), Plain(tokenizer(), k), root / f"cache-{k}"
    )
    options = {"sampler": Shuffled(len(data), 0), "collate_fn": Collator(0)}
    yield from torch.utils.data.DataLoader(data, BATCHES[k], num_workers=workers, **options)


class Trained:
    """A model, its optimizer and its batches; counts what it waits for them."""

    def __init__(self, made: nn.Module, batches: Batches) -> None:
        self.model, self.batches = made, batches
        parameters = [one for one in made.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, 5e-4, weight_decay=0)
        self.waited, self.losses = 0.0, []

    def steps(self, count: int) -> float:
        """Seconds that `count` steps take."""
        begin = time.perf_counter()
        for _ in range(count):
            asked = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - asked
            loss = self.model(**batch).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(float(loss.detach()))
        return time.perf_counter() - begin


def speed(root: Path, k: int) -> dict:
    ours = Trained(model(k), our_batches(root, k))
    other = Trained(Straightforward(model(k)), straightforward_batches(root, k))
    for one in (ours, other):
        one.steps(1)
    ratios, rates, steps = [], [], STEPS[k]
    for _ in range(ROUNDS):
        seconds = [one.steps(steps) for one in (ours, other)]
        ratios.append(seconds[1] / seconds[0])
        rates.append([BATCHES[k] * steps / one for one in seconds])
    apart = max(abs(a - b) for a, b in zip(ours.losses, other.losses, strict=True))
    if apart > 1e-3:
        raise SystemExit(f"K = {k}: the losses differ by {apart:.1e}, so no speed is told")
    fed = Trained(model(k), our_batches(root, k, workers=2))
    fed.steps(1)
    fed.waited = 0.0
    seconds = fed.steps(steps * ROUNDS)
    return {
        "k": k,
        "batch": BATCHES[k],
        "largest_difference_of_losses": apart,
        "samples_per_second": statistics.median(one[0] for one in rates),
        "straightforward_samples_per_second": statistics.median(one[1] for one in rates),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "projector_alone_ratio": projector_alone(k),
        "share_of_step_waiting_for_loader": fed.waited / seconds,
    }


def projector_alone(k: int) -> float:
    """How much faster projecting once is than projecting copies, forward and backward."""
    made, ratios = model(k).projector, []
    rows, target = torch.randn(BATCHES[k], D), torch.randn(BATCHES[k], k, HIDDEN)
    copies = rows[:, None].expand(-1, k, -1).contiguous()
    for _ in range(ROUNDS):
        times = []
        for call in (lambda: made(rows), lambda: made.layers(copies)):
            begin = time.perf_counter()
            (call() * target).sum().backward()
            times.append(time.perf_counter() - begin)
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def anonymous_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +([0-9]+)", text)[1])


def memory(root: str, way: str) -> None:
    """In a process of its own: what the data of one way take, after 30 batches; printed in KiB."""
    tokenizer()  # what both load
    if way == "straightforward":
        from transformers import PreTrainedTokenizerFast  # noqa: F401
    before = anonymous_kib()
    batches = (our_batches if way == "ours" else straightforward_batches)(Path(root), 16)
    for _ in range(30):
        next(batches)
    print(anonymous_kib() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="json (default: printed)")
    parser.add_argument("--rows", type=int, default=20_000, help="%(default)s, and four times it")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        memory(*options.memory)
        return
    with tempfile.TemporaryDirectory() as folder:
        worlds = {
            count: make_world(Path(folder) / str(count), count)
            for count in (options.rows, 4 * options.rows)
        }
        found = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        found["language_model"] = f"random Llama, hidden {HIDDEN}, {LAYERS} layers, frozen"
        found["columns"] = D
        found["speed"] = [speed(worlds[options.rows], k) for k in (576, 16)]
        found["memory_mib"] = {
            way: {str(count): _measured(root, way) / 1024 for count, root in worlds.items()}
            for way in ("ours", "straightforward")
        }
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


def _measured(root: Path, way: str) -> int:
    command = [sys.executable, __file__, "--memory", str(root), way]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1])


if __name__ == "__main__":
    main()
