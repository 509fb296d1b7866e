"""Trainer of transformers for ReVision: its model files, its order of samples, its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from .dataset import spread
from .generation import respond
from .permutation_sampler import PermutationSampler
from .templates import Template


class ReVisionTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that saves and loads a `ReVisionModel`, and shuffles without a list of indices."""

    def __init__(
        self, *arguments: Any, template: Template, generations: int, **options: Any
    ) -> None:
        """Take the arguments of Trainer.

        At each evaluation, `generations` of the held-out samples are answered, into
        `samples.jsonl` and the log; not under FSDP and DeepSpeed, which may have spread the
        parameters over devices.
        """
        self.template, self.generations = template, generations
        super().__init__(*arguments, processing_class=template.tokenizer, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Return the metrics of Trainer; answer samples in one process alone."""
        metrics: dict[str, float] = super().evaluate(*arguments, **options)
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if self.generations > 0 and whole and self.is_world_process_zero():
            self._answer_samples()
        return metrics

    def _answer_samples(self) -> None:
        indices = spread(self.generations, len(self.eval_dataset))
        samples = [self.eval_dataset.sample(index) for index in indices]
        rows = [item["image_rows"] for item in self.eval_dataset.__getitems__(indices)]
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        answers = respond(model, self.template, samples, rows, max_new_tokens=48)
        model.train(was_training)
        step = self.state.global_step
        with open(Path(self.args.output_dir) / "samples.jsonl", "a") as file:
            for sample, answer in zip(samples, answers, strict=True):
                entry = {"step": step, "id": sample.id, "answer": answer}
                entry["expected"] = self.template.reference(sample)
                file.write(json.dumps(entry) + "\n")
                print(f"step {step}, {sample.id}: {answer!r}")

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self.args.should_save:
            out = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(out, state_dict)
            self.processing_class.save_pretrained(out)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they load their own files
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(self.model).load_trained(resume_from_checkpoint)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        return _EpochSampler(self, len(train_dataset or self.train_dataset))


class _EpochSampler(PermutationSampler):
    """Takes the epoch from the state of the trainer, which is right in a resumed training too."""

    def __init__(self, trainer: ReVisionTrainer, length: int) -> None:
        seed = trainer.args.data_seed
        super().__init__(length, trainer.args.seed if seed is None else seed)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        self.set_epoch(int((self.trainer.state.epoch or 0) + 1e-6))
        return super().__iter__()
