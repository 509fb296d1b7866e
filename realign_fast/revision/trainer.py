"""Trainer of transformers for ReVision: its model files, its order of samples, its callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from ..align import ReAlign
from .dataset import Collator
from .generation import respond
from .permutation_sampler import PermutationSampler
from .templates import Template


class ReVisionTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that saves and loads a `ReVisionModel`, and shuffles without a list of indices."""

    data_collator: Any

    def __init__(self, *arguments: Any, test_collator: Collator, **options: Any) -> None:
        """Take the arguments of Trainer.

        `test_collator` makes the batches of evaluations, whose rows may need another aligner than
        those of training.
        """
        self.test_collator = test_collator
        self.sampler: PermutationSampler | None = None
        super().__init__(*arguments, **options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return Trainer's loader of evaluations, with `test_collator`."""
        training_collator = self.data_collator
        self.data_collator = self.test_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

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
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = PermutationSampler(len(train_dataset or self.train_dataset), seed)
        return self.sampler


class EpochCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler the epoch, which a resumed data loader does not do."""

    def __init__(self, trainer: ReVisionTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch of the sampler."""
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int((state.epoch or 0) + 1e-6))


class GenerationCallback(TrainerCallback):  # type: ignore[misc]
    """Answers a few held-out samples at each evaluation, into `samples.jsonl` and the log.

    It does nothing under FSDP and DeepSpeed, which may have spread the parameters over devices.
    """

    def __init__(
        self,
        trainer: ReVisionTrainer,
        template: Template,
        count: int,
        aligner: ReAlign | None = None,
    ) -> None:
        """Answer `count` samples; `aligner` maps their rows first."""
        self.trainer, self.template, self.count, self.aligner = trainer, template, count, aligner

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Generate the answers, in one process alone."""
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            return
        if not state.is_world_process_zero:
            return
        held_out = self.trainer.eval_dataset
        count = min(self.count, len(held_out))
        indices = [number * len(held_out) // count for number in range(count)]
        samples, items = [held_out.sample(i) for i in indices], held_out.__getitems__(indices)
        rows = [item["image_rows"].float() for item in items]
        if self.aligner is not None:
            rows = [self.aligner(images) if len(images) else images for images in rows]
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        was_training = model.training
        model.eval()
        answers = respond(model, self.template, samples, rows, max_new_tokens=48)
        model.train(was_training)
        with open(Path(args.output_dir) / "samples.jsonl", "a") as file:
            for sample, answer in zip(samples, answers, strict=True):
                entry = {
                    "step": state.global_step,
                    "id": sample.id,
                    "answer": answer,
                    "expected": self.template.reference(sample),
                }
                file.write(json.dumps(entry) + "\n")
                print(f"step {state.global_step}, {sample.id}: {answer!r}")
