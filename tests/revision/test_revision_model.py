"""The splice: where visual tokens stand, what the projector's copies cost, what is saved."""

import inspect

import pytest
import torch
from support.revision_parts import LANGUAGE_MODELS, tiny_llama

pytest.importorskip("transformers")
from realign_fast.revision.model import (
    IMAGE_TOKEN,
    PROJECTORS,
    Projector,
    ReVisionConfig,
    ReVisionModel,
)

D, K = 16, 3


def model_of(language_model, **options):
    width = language_model.get_input_embeddings().embedding_dim
    options = {"row_dimension": D, "visual_tokens": K, "hidden_size": width} | options
    torch.manual_seed(7)
    return ReVisionModel(ReVisionConfig("nowhere", **options), language_model).eval()


def ids_of(*pieces):
    """Numbers are token ids, "I" an image."""
    return [one for piece in pieces for one in ([IMAGE_TOKEN] * K if piece == "I" else [piece])]


def batch_of(*samples, side="right"):
    """Ids, mask and labels (loss on every text token) of samples as `ids_of` makes them."""
    longest = max(map(len, samples))
    ids, mask, labels = [], [], []
    for one in samples:
        pad = [0] * (longest - len(one))
        target = [-100 if token == IMAGE_TOKEN else token for token in one]
        parts = ((one, pad), ([1] * len(one), [0] * len(pad)), (target, [-100] * len(pad)))
        for out, (what, fill) in zip((ids, mask, labels), parts, strict=True):
            out.append(what + fill if side == "right" else fill + what)
    names = ("input_ids", "attention_mask", "labels")
    return dict(zip(names, map(torch.tensor, (ids, mask, labels)), strict=True))


MIXED = (ids_of(1, "I", 5, 6), ids_of(1, 7, "I", 8, "I", 9), ids_of(1, 4, 5))  # 1, 2 and no image


@pytest.mark.parametrize("kind", PROJECTORS)
def test_visual_tokens_stand_where_the_image_tokens_were(kind):
    model = model_of(tiny_llama(), projector=kind)
    batch, rows = batch_of(*MIXED), torch.randn(3, D)
    out = model.splice(batch["input_ids"], rows)
    tokens = model.projector(rows)
    words = model.language_model.get_input_embeddings()
    assert torch.equal(out[0, 1 : 1 + K], tokens[0])
    assert torch.equal(out[1, 2 : 2 + K], tokens[1])
    assert torch.equal(out[1, 3 + K : 3 + 2 * K], tokens[2])
    assert torch.equal(out[1, 2 + K], words(torch.tensor(8)))
    assert torch.equal(out[2, :3], words(torch.tensor([1, 4, 5])))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_projecting_once_gives_the_numbers_and_gradients_of_projecting_copies(kind):
    config = ReVisionConfig("x", D, 32, projector=kind, visual_tokens=576)
    projector, rows = Projector(config).double(), torch.randn(4, D).double()
    weights = torch.randn(4, 576, 32).double()
    once = projector(rows)
    (once * weights).sum().backward()
    got = [p.grad.clone() for p in projector.parameters()]
    projector.zero_grad()
    unit = torch.nn.functional.normalize(rows, dim=1)
    copies = projector.layers(unit[:, None].expand(-1, 576, -1).reshape(-1, D)).view(4, 576, 32)
    (copies * weights).sum().backward()
    assert torch.allclose(once, copies, rtol=0, atol=1e-12)
    for one, parameter in zip(got, projector.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_visual_tokens_start_at_the_mean_of_the_words(world, kind):
    model = ReVisionModel.start(world / "llama", D, projector=kind, visual_tokens=K)
    mean = model.language_model.get_input_embeddings().weight.detach().mean(0)
    *_, last = model.projector.layers.modules()
    assert last.weight.abs().min() > 0  # rows still tell tokens apart
    last.weight.data.zero_()
    tokens = model.projector(torch.randn(2, D)).detach()
    torch.testing.assert_close(tokens, mean.expand(2, K, -1), rtol=0, atol=1e-6)
    assert mean.abs().max() > 1e-4


def test_a_prefix_has_different_tokens():
    tokens = model_of(tiny_llama(), projector="prefix").projector(torch.randn(2, D))
    assert tokens.shape == (2, K, 64)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_left_and_right_padding_give_the_logits_of_the_sample_alone(name):
    model, rows = model_of(LANGUAGE_MODELS[name]()), torch.randn(3, D)
    for side in ("right", "left"):
        batch = batch_of(*MIXED, side=side)
        logits = model(**batch, image_rows=rows).logits
        for number, (sample, own) in enumerate(
            zip(MIXED, (rows[:1], rows[1:], rows[:0]), strict=True)
        ):
            alone = model(torch.tensor([sample]), image_rows=own).logits[0]
            there = logits[number][batch["attention_mask"][number].bool()]
            assert torch.allclose(there, alone, atol=1e-5), (name, side, number)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generating_with_and_without_cache_is_the_same(name):
    model, rows = model_of(LANGUAGE_MODELS[name]()), torch.randn(3, D)
    batch = batch_of(*MIXED, side="left")
    del batch["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, image_rows=rows, **options)
    assert cached.shape == (3, 6)
    uncached = model.generate(**batch, image_rows=rows, use_cache=False, **options)
    assert torch.equal(cached, uncached)
    for number, (sample, own) in enumerate(zip(MIXED, (rows[:1], rows[1:], rows[:0]), strict=True)):
        ids = list(sample)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids]), image_rows=own).logits[0, -1].argmax()))
        assert ids[len(sample) :] == cached[number].tolist()


def test_generate_uses_the_image():
    model = model_of(tiny_llama())
    options = {"max_new_tokens": 8, "do_sample": False}
    for parameter in model.projector.parameters():
        parameter.data *= 30
    ids = torch.tensor([ids_of(1, "I")] * 8)
    new = model.generate(ids, image_rows=torch.randn(8, D), **options)
    assert len({tuple(one) for one in new.tolist()}) > 1


def test_generate_refuses_padding_on_the_right():
    batch = batch_of(*MIXED)
    with pytest.raises(ValueError, match="padding on the left"):
        model_of(tiny_llama()).generate(
            batch["input_ids"], batch["attention_mask"], torch.randn(3, D)
        )


def test_a_batch_without_images_gives_the_projector_zero_gradients():
    model = model_of(tiny_llama())
    model(**batch_of(MIXED[2])).loss.backward()
    assert all((p.grad == 0).all() for p in model.projector.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = model_of(tiny_llama()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        model(**batch_of(*MIXED), image_rows=torch.ones(3, D)).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("parts", "trains"),
    [
        (["projector"], {"projector"}),
        (["language_model"], {"language_model"}),
        (["projector", "language_model"], {"projector", "language_model"}),
        (["projector", "lora"], {"projector", "lora"}),
    ],
)
def test_which_parts_train_is_as_asked(parts, trains):
    model = model_of(tiny_llama())
    model.train_only(parts)
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    kinds = {"lora" if "lora_" in name else name.split(".")[0] for name in names}
    assert kinds == trains


@pytest.mark.parametrize("parts", [[], ["vision"], ["lora", "language_model"]])
def test_a_wrong_choice_of_parts_is_refused(parts):
    with pytest.raises(ValueError, match="expected some of projector"):
        model_of(tiny_llama()).train_only(parts)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.mark.parametrize("parts", [["projector"], ["projector", "language_model"], ["lora"]])
def test_saved_and_loaded_it_is_the_same(parts, base, tmp_path):
    model = ReVisionModel.start(base, D, visual_tokens=K, projector="prefix")
    model.train_only(parts)
    shake(model)
    model.eval().save_pretrained(tmp_path)
    assert (tmp_path / "language_model").is_dir() == ("language_model" in parts)
    assert (tmp_path / "adapter").is_dir() == ("lora" in parts)
    again = ReVisionModel.from_pretrained(tmp_path)
    rows = torch.randn(3, D)
    want = model(**batch_of(*MIXED), image_rows=rows)
    got = again(**batch_of(*MIXED), image_rows=rows)
    assert torch.equal(want.logits, got.logits)


def shake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


def test_an_adapter_on_a_trained_language_model_is_saved_with_it(base, tmp_path):
    model, rows = ReVisionModel.start(base, D, visual_tokens=K), torch.randn(3, D)
    for stage, parts in ((tmp_path / "one", ["language_model"]), (tmp_path / "two", ["lora"])):
        model.train_only(parts)
        shake(model)
        model.eval().save_pretrained(stage)
        want = model(**batch_of(*MIXED), image_rows=rows).logits
        model = ReVisionModel.from_pretrained(stage)
        assert torch.equal(model(**batch_of(*MIXED), image_rows=rows).logits, want)
    plain = type(tiny_llama()).from_pretrained(tmp_path / "two" / "language_model")
    first = ReVisionModel.from_pretrained(tmp_path / "one").language_model
    pairs = zip(plain.parameters(), first.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_an_adapter_is_merged_before_the_whole_model_trains(base):
    model = ReVisionModel.start(base, D, visual_tokens=K)
    model.train_only(["lora"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    rows = torch.randn(3, D)
    before = model.eval()(**batch_of(*MIXED), image_rows=rows).logits
    model.train_only(["language_model"])
    after = model.eval()(**batch_of(*MIXED), image_rows=rows).logits
    assert torch.allclose(before, after, atol=1e-5)
    assert not hasattr(model.language_model, "peft_config")


def test_mistakes_are_named(base, tmp_path):
    model = model_of(tiny_llama())
    with pytest.raises(ValueError, match=r"hold 3 image tokens, 2 image rows need 6"):
        model(torch.tensor([ids_of(1, "I", 4)]), image_rows=torch.randn(2, D))
    with pytest.raises(ValueError, match=r"shape \[1, 8\], expected \[images, 16\]"):
        model(torch.tensor([ids_of(1, "I", 4)]), image_rows=torch.randn(1, 8))
    with pytest.raises(FileNotFoundError, match="no such directory"):
        ReVisionModel.from_pretrained(tmp_path / "no")
    with pytest.raises(FileNotFoundError, match=r"lacks revision.json.*a plain language model"):
        ReVisionModel.from_pretrained(base)
    with pytest.raises(ValueError, match="embeds in 64, expected 48"):
        model_of(tiny_llama(), hidden_size=48)
    with pytest.raises(ValueError, match="projector is 'cnn'"):
        model_of(tiny_llama(), projector="cnn")
    with pytest.raises(ValueError, match="cannot be loaded as a language model"):
        ReVisionModel.start(tmp_path, D)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "projector.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-9] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"projector\.safetensors: .* numbers that changed since"):
        model.load_trained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks projector.safetensors"):
        ReVisionModel.from_pretrained(tmp_path, language_model=base)


def test_it_accepts_what_trainer_passes():
    """Trainer hands `num_items_in_batch` on only where forward takes keywords."""
    kinds = [one.kind for one in inspect.signature(ReVisionModel.forward).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds
    assert model_of(tiny_llama()).loss_type == "ForCausalLM"
