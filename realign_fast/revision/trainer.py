"""Trainer of transformers for ReVision: its model files, its order of samples, its answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer

from .generation import respond
from .templates import Template
from .training_data import spread

_BLOCK = 4096  # indices that are permuted at a time
_ROUNDS = 4


class ReVisionTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that saves and loads a `ReVisionModel`, and shuffles without a list of indices."""

    def __init__(self, *inputs: Any, template: Template, generations: int, **options: Any) -> None:
        """Take the arguments of Trainer.

        At each evaluation, `generations` of the held-out samples are answered, into
        `samples.jsonl` and the log; not under FSDP and DeepSpeed, which may have spread the
        parameters over devices.
        """
        self.template, self.generations = template, generations
        self._batch_ends: list[float] = []  # of the first two, in seconds
        super().__init__(*inputs, processing_class=template.tokenizer, **options)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        """Train on one batch of this device; print the expected time after the second."""
        loss: Tensor = super().training_step(*arguments, **options)
        if len(ends := self._batch_ends) < 2:
            loss.item()  # waits for the device
            ends.append(time.monotonic())
            if len(ends) == 2 and self.is_world_process_zero():
                steps = self.state.max_steps - self.state.global_step
                seconds = steps * self.args.gradient_accumulation_steps * (ends[1] - ends[0])
                print(f"{steps:,} steps will take about {timedelta(seconds=round(seconds))}")
        return loss

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Return the metrics of Trainer; answer samples in one process alone."""
        metrics: dict[str, float] = super().evaluate(*arguments, **options)
        if self.generations <= 0 or self._is_sharded or not self.is_world_process_zero():
            return metrics
        indices = spread(self.generations, len(self.eval_dataset))
        samples = [self.eval_dataset.sample(index) for index in indices]
        rows = self.eval_dataset.image_rows(indices)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        answers = respond(model, self.template, samples, rows, max_new_tokens=48)
        model.train(was_training)
        step = self.state.global_step
        with open(Path(self.args.output_dir) / "samples.jsonl", "a") as file:
            for sample, answer in zip(samples, answers, strict=True):
                entry = {"step": step, "id": sample.id, "answer": answer}
                entry |= {"expected": self.template.reference(sample)}
                file.write(json.dumps(entry) + "\n")
                print(f"step {step}, {sample.id}: {answer!r}")
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            out = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(out, state_dict)
            self.processing_class.save_pretrained(out)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._is_sharded:  # FSDP and DeepSpeed load their own files
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(self.model).load_trained(resume_from_checkpoint)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PermutationSampler(len(train_dataset or self.train_dataset), seed, self)


class PermutationSampler(Sampler[int]):
    """Yields every index of `range(length)` once, in an order chosen by the seed and the epoch.

    RandomSampler of torch makes a Python list of all indices, 40 bytes a sample in every process;
    here each is computed. The epoch is that of `trainer` where one is given, which is right in a
    resumed training too.
    """

    def __init__(self, length: int, seed: int, trainer: Trainer | None = None) -> None:
        self.length, self.seed, self.trainer, self.epoch = length, seed, trainer, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        if self.trainer is not None:
            self.set_epoch(int((self.trainer.state.epoch or 0) + 1e-6))
        key = abs(self.seed) * 1_000_003 + self.epoch
        for start in range(0, self.length, _BLOCK):
            block = np.arange(start, min(start + _BLOCK, self.length))
            yield from permute(block, self.length, key).tolist()


def permute(indices: NDArray[np.integer], length: int, key: int) -> NDArray[np.int64]:
    """Map `indices` `[n]` by the permutation of `range(length)` that `key` chooses.

    An index goes through a Feistel network: four rounds on numbers of `2 h` bits, a bijection
    whatever the round function is (Luby and Rackoff, 1988). Results beyond the length go through
    again until they fall inside it ("cycle walking"), which keeps it a bijection.
    """
    half_bits = np.uint64(max(1, -(-(length - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = np.random.default_rng(key).integers(0, 1 << 63, _ROUNDS, dtype=np.uint64)
    permuted = np.asarray(indices, np.uint64).copy()
    outside = np.arange(len(permuted))
    while len(outside):
        high, low = permuted[outside] >> half_bits, permuted[outside] & mask
        for round_key in round_keys:
            high, low = low, high ^ (_mix(low + round_key) & mask)
        permuted[outside] = (high << half_bits) | low
        outside = outside[permuted[outside] >= length]
    return permuted.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
