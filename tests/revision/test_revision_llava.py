"""The same rows through LLaVA's own seam, on a tiny random LLaVA."""

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
from support.revision_parts import tiny_llama
from support.small_models import TOWER

from realign_fast.revision.llava import attach, visual_inputs
from realign_fast.revision.model import IMAGE_TOKEN, ReVisionConfig, ReVisionModel

D, K, LLAVA_IMAGE = 16, 3, 60
CONFIG = ReVisionConfig("nowhere", D, 64, visual_tokens=K)


def tiny_llava(language_model):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
    config = LlavaConfig(
        vision_config=vision, text_config=language_model.config, image_token_id=LLAVA_IMAGE
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.model.language_model.load_state_dict(language_model.model.state_dict())
    llava.lm_head.load_state_dict(language_model.lm_head.state_dict())
    return llava


@pytest.fixture(scope="module")
def pair():
    language_model = tiny_llama()
    torch.manual_seed(3)
    ours = ReVisionModel(CONFIG, language_model).eval()
    return ours, attach(tiny_llava(language_model), CONFIG, ours.projector)


def ids(token):
    return torch.tensor([[1, *[token] * K, 5, 6, 7], [1, 4, *[token] * K, 8, 9]])


def test_the_loss_is_that_of_the_splice(pair):
    ours, llava = pair
    rows, labels = torch.randn(2, D), ids(-100)
    want = ours(ids(IMAGE_TOKEN), labels=labels, image_rows=rows)
    got = llava(input_ids=ids(LLAVA_IMAGE), labels=labels, image_rows=rows)
    assert torch.equal(want.loss, got.loss)
    assert torch.equal(want.logits, got.logits)
    other = llava(input_ids=ids(LLAVA_IMAGE), labels=labels, image_rows=-rows)
    assert not torch.equal(other.loss, want.loss)


def test_it_generates_the_same(pair):
    ours, llava = pair
    rows, options = torch.randn(2, D), {"max_new_tokens": 5, "do_sample": False}
    want = ours.generate(ids(IMAGE_TOKEN), image_rows=rows, **options)
    prompt = ids(LLAVA_IMAGE)
    got = llava.generate(input_ids=prompt, **visual_inputs(llava, rows), **options)
    assert torch.equal(got[:, prompt.shape[1] :], want)


def test_the_projector_gets_gradients_and_is_saved_with_the_model(pair, tmp_path):
    llava = attach(tiny_llava(tiny_llama()), CONFIG)
    llava(
        input_ids=ids(LLAVA_IMAGE), labels=ids(-100), image_rows=torch.randn(2, D)
    ).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in llava.realign_projector.parameters())
    assert any("realign_projector" in name for name in llava.state_dict())


def test_a_language_model_takes_rows_and_shares_the_projector(pair, tmp_path):
    ours, rows, labels = pair[0], torch.randn(2, D), ids(-100)
    model = ReVisionModel(CONFIG, tiny_llama()).eval()
    model.projector.load_state_dict(ours.projector.state_dict())
    attached = attach(model.language_model, CONFIG, model.projector)
    want = ours(ids(IMAGE_TOKEN), labels=labels, image_rows=rows)
    got = attached(input_ids=ids(IMAGE_TOKEN), labels=labels, image_rows=rows)
    assert torch.equal(want.loss, got.loss) and torch.equal(want.logits, got.logits)
    assert torch.equal(model(ids(IMAGE_TOKEN), image_rows=rows).logits, want.logits)
    got.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.projector.parameters())
    text = torch.tensor([[1, 5, 6]])
    assert torch.equal(attached(input_ids=text).logits, ours(text).logits)
    with pytest.raises(ValueError, match="hold 6 image tokens, 1 image rows need 3"):
        attached(input_ids=ids(IMAGE_TOKEN), image_rows=rows[:1])
    model.train_only(["projector"])
    trained = {name for name, value in attached.named_parameters() if value.requires_grad}
    assert trained == {name for name in attached.state_dict() if "realign_projector" in name}
    model.train_only(["projector", "language_model"])
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "language_model" / "model.safetensors")
    assert not any("realign_projector" in name for name in weights)


def test_what_cannot_be_attached_is_refused(pair):
    vision = tiny_llava(tiny_llama()).model.vision_tower  # takes pixels alone
    with pytest.raises(ValueError, match="no seam for ready-made features"):
        attach(vision, CONFIG)
    with pytest.raises(ValueError, match="only once"):
        attach(pair[1], CONFIG)
    with pytest.raises(ValueError, match="embeds in 64, the config says 48"):
        attach(tiny_llava(tiny_llama()), ReVisionConfig("x", D, 48, visual_tokens=K))
