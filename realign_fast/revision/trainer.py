"""What Trainer must be told: our files, an order without a list, sample generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..align import ReAlign
from .generation import respond
from .model import transformers
from .permutation_sampler import Shuffled
from .templates import Chat, Plain


class ReVisionTrainer(transformers().Trainer):
    """Trainer that saves and loads a `ReVisionModel`, and shuffles without a list of indices.

    `test_collator` makes the batches of evaluations, whose rows need not be moved as those of
    training.
    """

    def __init__(self, *arguments: Any, test_collator: Any = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.test_collator = test_collator or self.data_collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        training = self.data_collator
        self.data_collator = self.test_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            out = output_dir or self.args.output_dir
            self.accelerator.unwrap_model(self.model).save_pretrained(out, state_dict)
            self.processing_class.save_pretrained(out)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they load their own files
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.accelerator.unwrap_model(self.model).load_trained(resume_from_checkpoint)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.shuffled = Shuffled(len(train_dataset or self.train_dataset), seed)
        return self.shuffled


class Epochs(transformers().TrainerCallback):
    """Tells the order of samples which epoch it is, also where a resumed loader hides it."""

    def __init__(self, trainer: ReVisionTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if hasattr(self.trainer, "shuffled"):
            self.trainer.shuffled.set_epoch(int((state.epoch or 0) + 1e-6))


class Generations(transformers().TrainerCallback):
    """Answers a few held-out samples at each evaluation, into `samples.jsonl` and the log.

    Left out under FSDP and DeepSpeed, which may have spread the parameters over devices.
    """

    def __init__(
        self,
        trainer: ReVisionTrainer,
        template: Plain | Chat,
        count: int,
        aligner: ReAlign | None = None,
    ) -> None:
        self.trainer, self.template, self.count, self.aligner = trainer, template, count, aligner

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            return
        if not state.is_world_process_zero:
            return
        held = self.trainer.eval_dataset
        count = min(self.count, len(held))
        places = [number * len(held) // count for number in range(count)]
        samples, items = [held.sample(one) for one in places], held.__getitems__(places)
        rows = [item["image_rows"].float() for item in items]
        if self.aligner is not None:
            rows = [self.aligner(one) if len(one) else one for one in rows]
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = model.training
        model.eval()
        answers = respond(model, self.template, samples, rows, max_new_tokens=48)
        model.train(training)
        with open(Path(args.output_dir) / "samples.jsonl", "a") as file:
            for sample, answer in zip(samples, answers, strict=True):
                one = {"step": state.global_step, "id": sample.name, "answer": answer}
                file.write(json.dumps(one | {"expected": self.template.expected(sample)}) + "\n")
                print(f"step {state.global_step}, {sample.name}: {answer!r}")
