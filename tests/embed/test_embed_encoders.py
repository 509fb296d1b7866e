"""Encoders give the rows of the libraries they wrap, and errors of one sentence."""

import json
import os
import string
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
from support import programs
from support.small_models import (
    TOWER,
    picture,
    require,
    write_hugging_face,
    write_open_clip,
    write_tokenizer,
)

from realign_fast.embed import HuggingFaceEncoder, OpenClipEncoder, load_encoder

TEXTS = ["a red cat", "a small picture of a blue dog", "green " * 40]


def unit(rows):
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@pytest.fixture(scope="module")
def open_clip_files(tmp_path_factory):
    require("open_clip")
    return write_open_clip(tmp_path_factory.mktemp("models") / "open_clip")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def hugging_face_folder(request, tmp_path_factory):
    require("transformers")
    return write_hugging_face(tmp_path_factory.mktemp("models") / request.param, request.param)


def test_open_clip_rows_are_open_clips_own(open_clip_files):
    config, weights = open_clip_files
    encoder = load_encoder(config, weights, device="cpu")
    assert isinstance(encoder, OpenClipEncoder)
    library = require("open_clip")
    model, _, preprocess = library.create_model_and_transforms("small-clip", str(weights))
    images = [picture(0), picture(1, 200, 60)]
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in images])
        expected = model.eval().encode_image(pixels, normalize=True)
        expected_text = model.encode_text(
            library.get_tokenizer("small-clip")(TEXTS), normalize=True
        )
    torch.testing.assert_close(encoder.embed_images(images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), expected_text, rtol=0, atol=1e-6)
    assert encoder.dimension == expected.shape[1] == 24


def test_hugging_face_rows_are_transformers_own(hugging_face_folder):
    encoder = load_encoder(hugging_face_folder, device="cpu")
    assert isinstance(encoder, HuggingFaceEncoder)
    library, folder = require("transformers"), hugging_face_folder
    model = library.AutoModel.from_pretrained(folder).eval()
    process = library.AutoImageProcessor.from_pretrained(folder)
    tokenize = library.AutoTokenizer.from_pretrained(folder)
    images = [picture(0), picture(1, 200, 60)]
    with torch.no_grad():
        expected = model.get_image_features(**process(images=images, return_tensors="pt"))
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = tokenize(TEXTS, **options)
        names = (
            ["input_ids"] if "Siglip" in type(model).__name__ else ["input_ids", "attention_mask"]
        )
        expected_text = model.get_text_features(**{name: tokens[name] for name in names})
    expected, expected_text = (
        unit(getattr(output, "pooler_output", output)) for output in (expected, expected_text)
    )
    torch.testing.assert_close(encoder.embed_images(images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.embed_texts(TEXTS), expected_text, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_are_unit_float32_in_either_precision(open_clip_files, precision):
    encoder = load_encoder(*open_clip_files, device="cpu", precision=precision)
    for rows in (encoder.embed_images([picture(0)]), encoder.embed_texts(TEXTS)):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=0, atol=1e-6)


def test_bf16_is_close_to_fp32_and_not_the_same(open_clip_files):
    one, other = (
        load_encoder(*open_clip_files, device="cpu", precision=p).embed_images([picture(0)])
        for p in ("fp32", "bf16")
    )
    assert not torch.equal(one, other)
    assert torch.cosine_similarity(one, other).item() > 0.999


def test_no_rows_of_nothing(open_clip_files):
    encoder = load_encoder(*open_clip_files, device="cpu")
    assert encoder.embed_images([]).shape == encoder.embed_texts([]).shape == (0, 24)


def test_other_weights_are_another_encoder(open_clip_files, tmp_path):
    config, weights = open_clip_files
    state = torch.load(weights, weights_only=True)
    state["text_projection"][0, 0] += 1
    torch.save(state, tmp_path / "other.pt")
    facts = [load_encoder(config, one).facts() for one in (weights, tmp_path / "other.pt")]
    assert facts[0]["weights"] != facts[1]["weights"]
    assert facts[0]["settings"] == facts[1]["settings"]


def refused(model, pretrained=None, **options):
    with pytest.raises((ValueError, OSError)) as caught:
        load_encoder(model, pretrained, device="cpu", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_open_clip_refusals(open_clip_files, tmp_path):
    config, weights = open_clip_files
    assert "'ViT-B-33' not found" in refused("ViT-B-33", "x")
    assert "with --pretrained, a known tag" in refused("ViT-B-32")
    assert "'no-such-tag' is not a known tag" in refused("ViT-B-32", "no-such-tag")
    assert "config file missing" in refused(tmp_path)
    assert "leave 'x' out" in refused(tmp_path, "x")
    (tmp_path / "bad.json").write_text("{}")
    assert "'bad' not found" in refused(tmp_path / "bad.json", weights)
    (tmp_path / "half.pt").write_bytes(weights.read_bytes()[:9999])
    assert f"{tmp_path / 'half.pt'}: cannot be loaded" in refused(config, tmp_path / "half.pt")
    wider = json.loads(config.read_text()) | {"embed_dim": 32}
    (tmp_path / "wider.json").write_text(json.dumps(wider))
    assert "size mismatch" in refused(tmp_path / "wider.json", weights)


def test_a_checkpoint_that_would_run_code_is_refused(open_clip_files, tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": Runs()}, tmp_path / "evil.pt")
    assert "Weights only load failed" in refused(open_clip_files[0], tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_hugging_face_refusals(tmp_path):
    require("transformers")
    folder = write_hugging_face(tmp_path / "clip", "clip")
    assert "leave 'tag' out" in refused(folder, "tag")
    (folder / "preprocessor_config.json").rename(tmp_path / "processor")
    assert "preprocessor_config.json" in refused(folder)
    (tmp_path / "processor").rename(folder / "preprocessor_config.json")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    assert str(folder) in refused(folder)
    (folder / "config.json").write_text("{]")
    assert str(folder) in refused(folder)


def test_code_beside_the_weights_is_not_run(tmp_path):
    require("transformers")
    folder = write_hugging_face(tmp_path / "clip", "clip")
    rows = load_encoder(folder, device="cpu").embed_texts(TEXTS)
    (folder / "modeling_other.py").write_text("raise SystemExit('code in a model ran')\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"auto_map": {"AutoModel": "modeling_other.OtherModel"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    assert torch.equal(load_encoder(folder, device="cpu").embed_texts(TEXTS), rows)
    unknown = own | {"model_type": "other", "architectures": ["OtherModel"]}
    (folder / "config.json").write_text(json.dumps(config | unknown))
    assert "cannot be loaded" in refused(folder)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_name_of_the_hugging_face_hub(weights, tmp_path, monkeypatch):
    """By the hub's own library, from the cache that a download leaves."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--small--clip"
    folder = write_hugging_face(repository / "snapshots" / "0123abcd", "clip")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    expected = load_encoder(folder, device="cpu")
    if weights.endswith(".bin"):
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / weights)
        (folder / "model.safetensors").unlink()
    encoder = load_encoder("small/clip", device="cpu")
    assert encoder.name == "small/clip"
    assert encoder.facts() == expected.facts()
    assert torch.equal(encoder.embed_texts(TEXTS), expected.embed_texts(TEXTS))
    assert "expected a directory, or a model of the hub" in refused("small/other")


def test_devices_and_precisions(open_clip_files):
    with pytest.raises(ValueError, match="expected cpu, cuda"):
        load_encoder(*open_clip_files, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees 0 CUDA devices"):
            load_encoder(*open_clip_files, device="cuda")
    assert "expected one of fp32, bf16" in refused(*open_clip_files, precision="fp8")


def test_an_encoder_of_another_kind_is_refused(tmp_path):
    transformers = require("transformers")
    size = write_tokenizer(tmp_path, ["<unk>", "</s>"], "$A </s>", pad_token="</s>")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=size,
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    assert "no attribute 'text_config'" in refused(tmp_path)


def write_siglip2(folder, model_type, tokenizer_class, **options):
    """SigLIP 2 as published: Gemma's tokenizer, of one token a byte or letter, keeps case."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    transformers = require("transformers")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *string.ascii_letters]
    vocabulary = {word: number for number, word in enumerate(words)}
    bpe = models.BPE(vocabulary, [], fuse_unk=True, unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.add_special_tokens(special)
    marks = [("<eos>", 1)]
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=marks)
    text = TOWER | {"vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"projection_size": 32, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    if model_type == "siglip":
        vision = TOWER | {"image_size": 32, "patch_size": 8}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config)
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        vision = TOWER | {"num_patches": 16, "patch_size": 16}
        config = transformers.Siglip2Config(text_config=text, vision_config=vision)
        model, processor = transformers.Siglip2Model(config), transformers.Siglip2ImageProcessor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    settings = {f"{mark.strip('<>')}_token": mark for mark in special}
    settings |= {"tokenizer_class": tokenizer_class, "model_max_length": 10**30, **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("tokenizer_class", "options", "lowers"),
    [
        ("GemmaTokenizer", {"padding_side": "right"}, True),
        ("GemmaTokenizerFast", {}, True),
        ("Siglip2Tokenizer", {}, True),
        ("GemmaTokenizer", {"do_lower_case": False}, False),
        ("PreTrainedTokenizerFast", {}, False),
        ("PreTrainedTokenizerFast", {"do_lower_case": True}, True),
    ],
)
def test_siglip_2_takes_lower_case_texts_padded_on_the_right(
    tmp_path, tokenizer_class, options, lowers
):
    folder = write_siglip2(tmp_path, "siglip", tokenizer_class, **options)
    encoder = load_encoder(folder, device="cpu")
    upper, lower = encoder.embed_texts(["A Cat", "a cat"])
    assert torch.equal(upper, lower) == lowers
    (ids,) = encoder.prepare_texts(["a cat"])["input_ids"].tolist()
    names = [encoder._tokenizer.convert_ids_to_tokens(number) for number in ids]
    assert names == [*"a\u2581cat", "<eos>", *["<pad>"] * 10]  # to the 16 positions, no <bos>
    model = require("transformers").SiglipModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = unit(model.get_text_features(input_ids=torch.tensor([ids])).pooler_output[0])
    torch.testing.assert_close(lower, expected, rtol=0, atol=1e-6)


def test_a_naflex_model_is_refused(tmp_path):
    folder = write_siglip2(tmp_path, "siglip2", "Siglip2Tokenizer")
    message = refused(folder)
    assert message.startswith(f"{folder}: cannot be loaded (NaFlex models of SigLIP 2 are not")
    assert "save_pretrained" not in message  # it is a directory that save_pretrained wrote


@pytest.mark.parametrize(
    ("package", "extra"), [("open_clip", "clip"), ("transformers", "clip,train")]
)
def test_a_missing_package_names_the_extra(package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "config.json").write_text("{}")
    model = {"open_clip": "ViT-B-32", "transformers": tmp_path}[package]
    with pytest.raises(ImportError, match=rf"pip install 'realign_fast\[{extra}\]'"):
        load_encoder(model, device="cpu")


def test_importing_embed_loads_nothing_heavy():
    heavy = ["open_clip", "transformers", "PIL", "torchvision", "pyarrow"]
    code = "import sys, realign_fast.cli.main; print([m for m in sys.argv[1:] if m in sys.modules])"
    ran = programs.run("-c", code, *heavy)
    assert ran.stdout.strip() == "[]", ran.stderr
