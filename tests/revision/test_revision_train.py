"""Training: it learns, goes on where it stopped bit for bit, and does not depend on workers."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from safetensors.torch import load_file
from support.revision_parts import (
    CAPTIONS,
    IDS,
    list_entry,
    word_tokenizer,
    write_corpus,
    write_lines,
)

from realign_fast.align import ReAlign
from realign_fast.corpus import Corpus
from realign_fast.revision import stages
from realign_fast.revision.evaluation import evaluate
from realign_fast.revision.generation import caption_rows, open_model
from realign_fast.revision.model import ReVisionConfig, ReVisionModel, position_limit
from realign_fast.revision.stages import (
    PRESETS,
    TrainingConfig,
    finetune,
    last_checkpoint,
    pretrain,
)
from realign_fast.revision.templates import Plain
from realign_fast.revision.training_data import prepare

FAST = {"bf16": False, "use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = {"max_steps": 3, "save_strategy": "no"}


def run_of(world, out, start="llama", **options):
    trainer = FAST | {"logging_steps": 1} | options.pop("trainer", {})
    start = start if isinstance(start, Path) else world / start
    options = {"batch": 8, "micro_batch": 4, "visual_tokens": 2, "held_out": 0} | options
    rows = options.pop("rows", Corpus(world / "corpus", "text"))
    where = {"conversations": str(world / "list.jsonl"), "out": str(out), "start": str(start)}
    return TrainingConfig(rows=rows, trainer=trainer, **where, **options)


def losses(out):
    history = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [(one["step"], one["loss"]) for one in history if "loss" in one]


def weights(out):
    return load_file(Path(out) / "projector.safetensors")


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def test_stage_1_then_stage_2_learn_to_say_what_the_row_says(world, trained):
    one, two = trained.parent / "one", trained
    first, *_, last = json.loads((one / "training.json").read_text())["held_out_losses"]
    assert last < first - 0.05  # all that a frozen random language model allows
    start = load_file(world / "llama" / "model.safetensors")
    base = ReVisionModel.from_pretrained(one).language_model.state_dict()
    assert all(torch.equal(base[name], start[name]) for name in start)
    assert not (one / "language_model").exists()
    assert json.loads((two / "training.json").read_text())["held_out_losses"][-1] < 0.5
    model, template = open_model(two, device="cpu")
    rows = Corpus(world / "corpus", "image").take(range(4))
    assert list(caption_rows(model, template, [rows], "what is this ?")) == CAPTIONS
    config = json.loads((two / "revision.json").read_text())
    assert (config["template"], config["visual_tokens"]) == ("chat", 2)


@pytest.mark.parametrize("parts", [("projector", "language_model"), ("lora",)])
def test_resumed_training_has_the_losses_of_uninterrupted_bit_for_bit(parts, world, tmp_path):
    """GPT-2 has dropout, evaluations lie between, two epochs are shuffled: random states matter."""
    options = {"start": "gpt2", "train": parts, "template": "chat", "held_out": 8}
    steps = {"save_steps": 3, "num_train_epochs": 2.0, "eval_steps": 4, "save_total_limit": 9}
    through = run_of(world, tmp_path / "a", trainer=steps, **options)
    finetune(through)
    want = losses(tmp_path / "a")
    assert len(want) == 10 and len({loss for _, loss in want}) == 10
    stop = 3 if "lora" in parts else 6  # in the first epoch, and in the second
    out = tmp_path / "b"
    out.mkdir()
    os.rename(tmp_path / "a" / f"checkpoint-{stop}", out / f"checkpoint-{stop}")
    finetune(run_of(world, out, trainer=steps, resume=True, **options))
    assert losses(out) == want
    assert same(weights(out), weights(tmp_path / "a"))


def test_one_and_two_data_workers_train_the_same(world, tmp_path):
    for workers in (1, 2):
        pretrain(
            run_of(
                world, tmp_path / str(workers), trainer=SHORT | {"dataloader_num_workers": workers}
            )
        )
    assert losses(tmp_path / "1") == losses(tmp_path / "2")
    assert same(weights(tmp_path / "1"), weights(tmp_path / "2"))


def test_raw_rows_aligned_on_the_way_train_as_aligned_ones(world, tmp_path):
    raw = Corpus(world / "corpus", "text")
    aligner = ReAlign.fit(raw, torch.randn(100, 16) + 1)
    write_corpus(tmp_path / "aligned", IDS, rows=aligner(raw.take(range(48))).numpy())
    pretrain(run_of(world, tmp_path / "a", aligner=aligner, trainer=SHORT))
    pretrain(
        run_of(world, tmp_path / "b", rows=Corpus(tmp_path / "aligned", "text"), trainer=SHORT)
    )
    pairs = zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True)
    assert all(abs(one[1] - two[1]) < 1e-4 for one, two in pairs)


def test_a_test_list_is_measured_on_its_own_rows_which_nothing_moves(world, tmp_path):
    """Stage 1 takes text rows through an aligner; what is watched is the loss on images as is."""
    raw = Corpus(world / "corpus", "text")
    aligner = ReAlign.fit(raw, torch.randn(100, 16) + 1)
    rows = write_corpus(tmp_path / "pictures", IDS[:12], modality="image", seed=3)
    pictures = Corpus(tmp_path / "pictures", "image")
    lines = (world / "list.jsonl").read_text().splitlines()
    (tmp_path / "test.jsonl").write_text("\n".join(lines[:12]))
    test = {"test": str(tmp_path / "test.jsonl"), "test_rows": pictures}
    out = tmp_path / "out"
    trainer = SHORT | {"eval_steps": 1, "per_device_eval_batch_size": 12}
    found = pretrain(run_of(world, out, aligner=aligner, trainer=trainer, **test))
    assert found["data"]["used"] == len(IDS) and len(found["held_out_losses"]) == 3
    template = Plain(word_tokenizer(), 2)
    data = prepare(tmp_path / "test.jsonl", pictures, template, tmp_path / "cache")
    assert torch.equal(data[3]["image_rows"][0], torch.from_numpy(rows[3]))
    model = ReVisionModel.from_pretrained(out, world / "llama")
    measured = evaluate(model, data, choices=0)
    assert found["held_out_losses"][-1] == pytest.approx(measured["loss"]["value"], rel=1e-4)
    moved = evaluate(model, data, choices=0, aligner=aligner)
    assert abs(moved["loss"]["value"] - measured["loss"]["value"]) > 1e-3
    with pytest.raises(ValueError, match="got one of them"):
        pretrain(run_of(world, tmp_path / "x", test=test["test"]))


def test_row_numbers_serve_test_rows_too(world, tmp_path):
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(48, 16)).astype("f4"))
    np.save(tmp_path / "image.npy", np.random.default_rng(1).normal(size=(12, 16)).astype("f4"))
    texts = write_lines(tmp_path / "list.jsonl", [list_entry(str(n), "cat") for n in range(48)])
    entries = [list_entry(str(n), "dog") for n in range(11, -1, -1)]
    path, images = write_lines(tmp_path / "test.jsonl", entries), Corpus(tmp_path / "image.npy")
    test = {"ids": "row", "test": str(path), "test_rows": images}
    config = run_of(world, tmp_path, rows=Corpus(tmp_path / "text.npy"), trainer=SHORT, **test)
    found = pretrain(dataclasses.replace(config, conversations=str(texts)))
    model, template = open_model(tmp_path, device="cpu")
    data = prepare(path, images, template, tmp_path / "cache", ids="row")
    assert torch.equal(data[0]["image_rows"], images.take([11]).float())
    expected = evaluate(model, data, choices=0)["loss"]["value"]
    assert found["held_out_losses"][-1] == pytest.approx(expected, rel=1e-4)


def test_learned_positions_limit_samples_and_answers(world, tmp_path):
    """GPT-2 has 128 positions here: 100 visual tokens, captions of 15 words, and one of 60."""
    captions = [" ".join(["cat"] * (60 if number == 20 else 15)) for number in range(48)]
    path = write_lines(tmp_path / "list.jsonl", map(list_entry, IDS, captions))
    options = {"start": "gpt2", "visual_tokens": 100, "held_out": 8}
    config = run_of(world, tmp_path / "a", trainer=SHORT | {"eval_steps": 1}, **options)
    config = dataclasses.replace(config, conversations=str(path))
    with pytest.raises(ValueError, match=r"1 longer than max_length \(--max-length\) or"):
        pretrain(config)
    summary = pretrain(dataclasses.replace(config, max_skipped=0.1))
    assert summary["data"]["over_long"] == 1 and summary["steps"] == 3
    model, template = open_model(tmp_path / "a", device="cpu")
    (caption,) = caption_rows(model, template, [config.rows.take([0])])
    caption = caption.replace("\ufffd", "a")  # a token of one byte that is no UTF-8: three bytes
    assert len(template.tokenizer(caption)["input_ids"]) <= 27
    with pytest.raises(ValueError, match="48 of 48 samples cannot be used"):
        pretrain(dataclasses.replace(config, visual_tokens=200, out=str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("kind", "options", "limit"),
    [
        ("GPT2Config", {"n_positions": 128}, 128),
        ("OPTConfig", {"max_position_embeddings": 64}, 64),
        ("MptConfig", {"max_seq_len": 96}, 96),
        ("BloomConfig", {}, None),
        ("MambaConfig", {}, None),
        ("Gemma3Config", {"text_config": {"max_position_embeddings": 256}}, 256),
        ("LlamaConfig", {"max_position_embeddings": 64}, 64),
        ("LlamaConfig", {"max_position_embeddings": 64, "rope_scaling": LINEAR}, 256),
        ("Qwen2Config", {"max_position_embeddings": 64, "rope_scaling": YARN}, 128),
        ("LlamaConfig", {"max_position_embeddings": 512, "rope_scaling": LLAMA3}, 512),
    ],
)
def test_the_longest_input_is_what_the_configuration_says(kind, options, limit):
    import transformers

    assert position_limit(getattr(transformers, kind)(**options)) == limit


def test_gradient_checkpointing_trains_the_same(world, tmp_path):
    for name in ("off", "on"):
        how = SHORT | {"gradient_checkpointing": name == "on"}
        pretrain(run_of(world, tmp_path / name, trainer=how))
    assert same(weights(tmp_path / "on"), weights(tmp_path / "off"))


def test_warm_up_and_clipping_are_those_of_llava(world, tmp_path):
    run = run_of(world, tmp_path, batch=None, trainer={})
    run = stages._with_preset("pretrain", run)
    arguments = stages._training_arguments(run)
    assert (arguments.get_warmup_steps(400), arguments.max_grad_norm) == (12, 1.0)
    assert arguments.learning_rate == stages.RATES["pretrain"]


def test_bf16_is_the_default_where_the_processor_computes_in_it(world, tmp_path):
    flags = set(Path("/proc/cpuinfo").read_text().split())
    run = stages._with_preset("pretrain", run_of(world, tmp_path))
    del run.trainer["bf16"]  # of FAST
    assert stages._training_arguments(run).bf16 is bool(flags & {"avx512_bf16", "amx_tile"})
    run.trainer["bf16"] = True
    assert stages._training_arguments(run).bf16


def test_the_presets_are_the_papers():
    for stage, rate, parts in (
        ("pretrain", 5e-4, ("projector",)),
        ("finetune", 1e-5, ("projector", "language_model")),
    ):
        assert (stages.RATES[stage], PRESETS[stage]["train"]) == (rate, parts)
    trainer = stages.TRAINER_SETTINGS
    assert trainer["warmup_steps"] == 0.03 and trainer["lr_scheduler_type"] == "cosine"
    assert trainer["weight_decay"] == 0 and trainer["num_train_epochs"] == 1
    assert PRESETS["pretrain"]["batch"] == 256
    assert TrainingConfig.max_length == 2048
    model = ReVisionConfig("model", row_dimension=512, hidden_size=576)
    assert (model.projector, model.visual_tokens, model.normalize) == ("mlp", 576, True)


def test_mistakes_are_named(world, tmp_path):
    with pytest.raises(ValueError, match=r"learning_rat: no setting.*learning_rate"):
        pretrain(run_of(world, tmp_path, trainer={"learning_rat": 1}))
    with pytest.raises(
        ValueError, match=r"multiple of 4, micro batch 4 x 1 .* --batch-size or --micro-batch"
    ):
        pretrain(run_of(world, tmp_path, batch=6))
    small = {"trainer": {"save_steps": 2, "max_steps": 2}, "batch": 2}  # the micro batch follows
    pretrain(run_of(world, tmp_path / "done", **small))
    with pytest.raises(ValueError, match="holds checkpoints of an earlier training"):
        pretrain(run_of(world, tmp_path / "done"))
    write_corpus(tmp_path / "wide", IDS, dimension=8)
    wide = Corpus(tmp_path / "wide", "text")
    with pytest.raises(ValueError, match="rows have 8 columns, the model was trained on 16"):
        finetune(run_of(world, tmp_path / "x", start=tmp_path / "done", rows=wide))
    with pytest.raises(ValueError, match="expected some of projector"):
        pretrain(run_of(world, tmp_path / "y", train=("vision",)))
    with pytest.raises(ValueError, match="got r for an adapter that is not trained"):
        pretrain(run_of(world, tmp_path / "y", lora={"r": 8}))
    adapted = {"train": ("projector", "lora")}
    with pytest.raises(ValueError, match="rr: no field of LoraConfig; nearest:"):
        pretrain(run_of(world, tmp_path / "y", lora={"rr": 8}, **adapted))
    with pytest.raises(ValueError, match="r: got 'abc', expected a number"):
        pretrain(run_of(world, tmp_path / "y", lora={"r": "abc"}, **adapted))
    with pytest.raises(ValueError, match="learning_rate: got 'abc', expected a number"):
        pretrain(run_of(world, tmp_path / "y", trainer={"learning_rate": "abc"}))
    with pytest.raises(ValueError, match="bf16: got 'no', expected true or false"):
        pretrain(run_of(world, tmp_path / "y", trainer={"bf16": "no"}))
    with pytest.raises(ValueError, match="setting of Trainer: "):
        pretrain(run_of(world, tmp_path / "y", trainer={"lr_scheduler_type": "none such"}))
    with pytest.raises(ValueError, match="got visual_tokens 3, and the model was made with 2"):
        finetune(run_of(world, tmp_path / "y", start=tmp_path / "done", visual_tokens=3))
    with pytest.raises(FileNotFoundError, match="/nowhere: no such directory; give a language"):
        finetune(run_of(world, tmp_path / "y", start=Path("/nowhere")))
    assert not (tmp_path / "y" / "training.json").exists()


def test_a_fresh_adapter_begins_from_the_seed(world, tmp_path):
    options = {"start": "gpt2", "train": ("lora",), "template": "chat"}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name))  # whatever ran before
        finetune(
            run_of(
                world, tmp_path / name, trainer=SHORT | {"max_steps": 1, "seed": seed}, **options
            )
        )
    adapters = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc"
    ]
    assert same(*adapters[:2]) and not same(adapters[0], adapters[2])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_resumed_training_sums_up_all_of_it(world, tmp_path, capsys):
    steps = {"max_steps": 6, "save_steps": 3, "save_total_limit": 9}
    whole = pretrain(run_of(world, tmp_path, trainer=steps, resume=True))
    printed = capsys.readouterr().out
    assert "holds no checkpoint to resume from" in printed
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = pretrain(run_of(world, tmp_path, trainer=steps, resume=True))
    assert again["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)


def test_a_training_that_took_its_steps_takes_none_when_resumed(world, tmp_path, capsys, caplog):
    def _run(steps, **options):
        trainer = {"max_steps": steps, "logging_steps": 0.5, "save_steps": 0.2}  # 6 steps a pass
        return pretrain(run_of(world, tmp_path, trainer=trainer, **options))

    whole, before = _run(4), weights(tmp_path)
    assert _run(4, resume=True) == whole and same(weights(tmp_path), before)
    assert "has taken its 4 steps, so nothing is trained" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoint-4")
    logger = logging.getLogger("transformers")  # which does not propagate
    logger.addHandler(caplog.handler)
    assert _run(4, resume=True)["steps"] == 4
    logger.removeHandler(caplog.handler)
    assert "do not match" not in caplog.text
    assert _run(5, resume=True)["steps"] == 5
    assert _run(3, resume=True)["steps"] == 5


def test_a_training_is_not_resumed_with_other_inputs(world, tmp_path):
    out, trainer = tmp_path / "out", {"max_steps": 2, "save_steps": 1}
    write_corpus(tmp_path / "rows", IDS, seed=5)
    write_corpus(tmp_path / "pictures", IDS[:12], modality="image", seed=3)
    rows, pictures = Corpus(tmp_path / "rows", "text"), Corpus(tmp_path / "pictures", "image")
    lines = (world / "list.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("a", lines[:12]), ("b", lines[1:12]), ("c", lines[:-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    aligner = ReAlign.fit(rows, torch.randn(100, 16) + 1)
    options = {"test": str(tmp_path / "a.jsonl"), "test_rows": pictures, "trainer": trainer}
    config = run_of(world, out, **options)
    pretrain(config)
    for changes, said in (
        ({"conversations": str(tmp_path / "c.jsonl")}, "list, number of samples"),
        ({"rows": rows}, "rows"),
        ({"aligner": aligner}, "aligner"),
        ({"test": str(tmp_path / "b.jsonl")}, "test list, test number of samples"),
    ):
        with pytest.raises(ValueError, match=f"out: its training began with another {said}; --res"):
            pretrain(dataclasses.replace(config, resume=True, **changes))
    shutil.copytree(world / "corpus", tmp_path / "moved")  # where the files lie does not matter
    more = {"rows": Corpus(tmp_path / "moved", "text")}
    more["trainer"] = config.trainer | {"max_steps": 3, "learning_rate": 1e-3}
    assert pretrain(dataclasses.replace(config, resume=True, **more))["steps"] == 3


def test_a_checkpoint_that_a_kill_left_incomplete_is_passed_over(world, tmp_path):
    steps = {"max_steps": 3, "save_steps": 1}
    pretrain(run_of(world, tmp_path, trainer=steps))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    pretrain(run_of(world, tmp_path, trainer=steps, resume=True))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert json.loads(state.read_bytes())["global_step"] == 3
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    assert last_checkpoint(tmp_path) is None
