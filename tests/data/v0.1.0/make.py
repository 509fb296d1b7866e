"""Write the outputs of version 0.1.0 that tests/project/test_stored_outputs.py reads.

Run it with a checkout of version 0.1.0 and its tests on the path (README.md). It works in ``ROOT``,
because outputs name their sources by absolute paths, and the test replaces this one by its own.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from realign_fast.estimator import StreamingCovariance
from revision_parts import tiny_llama, word_tokenizer, write_corpus

from realign_fast import Corpus, Moments, ReAlign
from realign_fast.cli import main
from realign_fast.frame import FixedFrame
from realign_fast.revision.model import IMAGE_TOKEN, ReVisionModel

ROOT = Path("/tmp/realign_fast-0.1.0")
FILES = Path(__file__).parent
D = 8


def write_rows(random):
    """Two sides of small shards, float16, one shard of a single row."""
    for side, sizes, shift in (("text", (20, 1, 9), 0.5), ("image", (25, 6), -0.5)):
        (ROOT / side).mkdir()
        for index, size in enumerate(sizes):
            rows = random.standard_normal((size, D)) * np.arange(1, D + 1) + shift
            np.save(ROOT / side / f"emb_{index}.npy", rows.astype(np.float16))


def write_statistics(random):
    """A moments file, a saved aligner, pickles, and the results that they gave."""
    rows = torch.from_numpy(random.standard_normal((5, D)))
    text = Moments(covariance=True).update(Corpus(ROOT / "text").take(range(30)))
    image = Moments(covariance=True).update(Corpus(ROOT / "image").take(range(31)))
    aligner = ReAlign.from_moments(text, image, method="coral", shrinkage=0.1)
    frame = FixedFrame.fit(text, image, energy=0.8)
    objects = {"realign": aligner, "moments": text, "frame": frame, "scatter": text.scatter}
    objects["estimator"] = StreamingCovariance().fit(rows.numpy())
    text.save(ROOT / "moments.safetensors")
    aligner.save_pretrained(ROOT / "aligner")
    (ROOT / "pickles").mkdir()
    for name, value in objects.items():
        (ROOT / "pickles" / f"{name}.pkl").write_bytes(pickle.dumps(value))
    np.savez_compressed(
        ROOT / "results.npz",
        rows=rows.numpy(),
        aligned=aligner(rows).numpy(),
        mean=text.mean.numpy(),
        covariance=text.covariance.numpy(),
        principal=frame.principal.numpy(),
        precision=objects["estimator"].precision_,
    )


def write_training():
    """Write model and data, and what a training of four steps left, its checkpoint of two too."""
    captions = ["a red dog sits", "the blue cat runs", "one small tree", "two mats under it"]
    ids = [f"x{number}" for number in range(16)]
    which = np.arange(len(ids)) % len(captions)
    write_corpus(ROOT / "corpus", ids, rows=np.eye(D, dtype=np.float32)[which] + 0.05)
    entries = [{"id": i, "caption": captions[n]} for i, n in zip(ids, which, strict=True)]
    (ROOT / "list.json").write_text(json.dumps(entries))
    tiny_llama(vocabulary=400, hidden=8, layers=1).save_pretrained(ROOT / "llama")
    word_tokenizer().save_pretrained(ROOT / "llama")
    command = [
        "pretrain",
        "--language-model",
        str(ROOT / "llama"),
        "--data",
        str(ROOT / "list.json"),
    ]
    command += ["--rows", str(ROOT / "corpus"), "--out", str(ROOT / "training"), "--batch", "4"]
    command += ["--micro-batch", "4", "--visual-tokens", "2", "--held-out", "0"]
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 0.02}
    settings |= {"bf16": "false", "use_cpu": "true", "dataloader_num_workers": 0}
    for name, value in (settings | {"disable_tqdm": "true"}).items():
        command += ["--set", f"{name}={value}"]
    assert main(command) == 0
    model, rows = ReVisionModel.from_pretrained(ROOT / "training"), torch.eye(D)[:3]
    input_ids = torch.tensor([[1, *[IMAGE_TOKEN] * 2, 7, 8, 9]] * 3)
    np.savez_compressed(
        ROOT / "revision.npz",
        input_ids=input_ids.numpy(),
        image_rows=rows.numpy(),
        logits=model(input_ids=input_ids, image_rows=rows).logits[:, -1].numpy(),
        answers=model.generate(input_ids, image_rows=rows, max_new_tokens=4).numpy(),
    )
    # Leave what a training holds that was stopped after two steps, and what it came to.
    for name in ("training/checkpoint-4", "training/data"):
        shutil.rmtree(ROOT / name)
    for name in ("trainer_state.json", "projector.safetensors", "revision.json"):
        (ROOT / "model").mkdir(exist_ok=True)
        (ROOT / "training" / name).rename(ROOT / "model" / name)
    kept = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    kept |= {"projector.safetensors", "revision.json"}
    for path in (ROOT / "training").rglob("*"):
        if path.is_file() and path.name not in kept:  # copies of the tokenizer
            path.unlink()


def main_program():
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    random = np.random.default_rng(20)
    write_rows(random)
    write_statistics(random)
    sides = ["--text", str(ROOT / "text"), "--image", str(ROOT / "image"), "--quiet"]
    assert main(["align", *sides, "--out", str(ROOT / "out")]) == 0
    assert main(["fit", *sides, "--out", str(ROOT / "fit"), "--method", "coral"]) == 0
    write_training()
    shutil.copytree(ROOT, FILES, dirs_exist_ok=True, ignore=shutil.ignore_patterns("lock"))


if __name__ == "__main__":
    main_program()
