"""Trainer of transformers with the files of a `ReVisionModel`."""

from __future__ import annotations

from typing import Any

from transformers import Trainer


class ReVisionTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that saves and loads a `ReVisionModel`."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            out = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(out, state_dict)
            self.processing_class.save_pretrained(out)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # which load their own files
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(self.model).load_trained(resume_from_checkpoint)
