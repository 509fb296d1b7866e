"""The same weights in another architecture are another model, whose rows no output mixes."""

import json

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from hostile.kills import embedded_files
from support.small_models import (
    require,
    write_hugging_face,
    write_open_clip,
    write_pictures,
)

from realign_fast.embed import EmbedSettings, embed, load_encoder, open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(write_pictures(tmp_path_factory.mktemp("pictures") / "p", 3), "pairs")


def run(model, out, source):
    encoder = load_encoder(*model, device="cpu")
    return embed(encoder, out, pairs=source, settings=EmbedSettings(2, 0, progress=False))


def write_model(kind, folder):
    """Write a model and return the arguments that load it and the file of its config."""
    if kind == "open_clip":
        config, weights = write_open_clip(folder)
        config = config.rename(folder / "ViT-B-32.json")  # a name that open_clip knows too
        return (config, weights), config
    require("transformers")
    return (write_hugging_face(folder, kind),), folder / "config.json"


def change(config, setting, value):
    content = json.loads(config.read_text())
    *parents, name = setting.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[name] = value
    config.write_text(json.dumps(content))


CHANGES = [
    ("open_clip", "quick_gelu", True, "settings.config.quick_gelu null, now it is true"),
    ("open_clip", "text_cfg.heads", 4, "settings.config.text_cfg.heads 2, now it is 4"),
    ("clip", "text_config.eos_token_id", 2, "model.settings.files.config.json .*, now it is"),
    ("clip", "vision_config.hidden_act", "relu", "model.settings.files.config.json"),
    ("siglip", "text_config.layer_norm_eps", 0.1, "model.settings.files.config.json"),
]


@pytest.mark.parametrize(("kind", "setting", "value", "words"), CHANGES)
def test_another_architecture_of_the_same_weights_is_refused(
    tmp_path, source, kind, setting, value, words
):
    model, config = write_model(kind, tmp_path / "model")
    out = tmp_path / "out"
    assert run(model, out, source)["embedded_now"] == 3
    before = embedded_files(out)
    assert run(model, out, source)["embedded_now"] == 0
    change(config, setting, value)
    with pytest.raises(ValueError, match=f"begun with .*{words}"):
        run(model, out, source)
    assert embedded_files(out) == before


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("tokenizer.json", "normalizer", {"type": "Lowercase"}),
        ("preprocessor_config.json", "resample", 2),
    ],
)
def test_another_tokenizer_or_processor_is_refused(tmp_path, source, name, setting, value):
    model, _ = write_model("clip", tmp_path / "model")
    run(model, tmp_path / "out", source)
    change(tmp_path / "model" / name, setting, value)
    with pytest.raises(ValueError, match=rf"begun with model\.settings\.files\.{name} "):
        run(model, tmp_path / "out", source)


def test_an_output_of_another_version_is_refused_with_its_name(tmp_path, source):
    model, _ = write_model("open_clip", tmp_path / "model")
    run(model, tmp_path / "out", source)
    facts = tmp_path / "out" / "__realign__/_embed" / "run.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"code": "realign_fast 0.1.0, 1"}))
    with pytest.raises(
        ValueError, match=r'begun with code "realign_fast 0\.1\.0, 1".*another --out'
    ):
        run(model, tmp_path / "out", source)


def test_weights_that_lack_a_part_of_the_model_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    (folder,), _ = write_model("clip", tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["text_projection.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights lack text_projection\.weight and 0 others"):
        load_encoder(folder, device="cpu")
