"""Trainer of transformers for ReVision: its model files, and answers at each evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Trainer

from .generation import respond
from .templates import Template
from .training_data import spread


class ReVisionTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that saves and loads a `ReVisionModel`."""

    def __init__(self, *inputs: Any, template: Template, generations: int, **options: Any) -> None:
        """Take the arguments of Trainer.

        At each evaluation, `generations` of the held-out samples are answered, into
        `samples.jsonl` and the log; not under FSDP and DeepSpeed, which may have spread the
        parameters over devices.
        """
        self.template, self.generations = template, generations
        super().__init__(*inputs, processing_class=template.tokenizer, **options)

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

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
        side = self.eval_dataset.side
        answers = respond(model, self.template, samples, rows, side=side, max_new_tokens=48)
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
