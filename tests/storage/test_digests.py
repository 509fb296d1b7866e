"""Files of numbers carry a digest: a flipped bit is refused, and an older file loads."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from realign_fast import Moments, ReAlign
from realign_fast.frame import FixedFrame


def aligner():
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(40, 4, generator=generator) + shift for shift in (0.3, -0.3))
    fitted = ReAlign.fit(text, image, method="coral")
    fitted.encoder = "CLIP é 0123"
    return fitted


def frame():
    rows = Moments(covariance=True).update(torch.randn(40, 4))
    return FixedFrame.fit(rows, rows)


@pytest.mark.parametrize("make", [aligner, frame])
def test_every_flipped_bit_of_the_numbers_is_refused(tmp_path, make):
    fitted, path = make(), tmp_path / "fitted.safetensors"
    fitted.save(path)
    whole = path.read_bytes()
    type(fitted).load(path)
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in range(begin, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fitted\.safetensors: expected .* got numbers that"):
            type(fitted).load(path)


def test_the_encoder_is_in_the_digest_and_the_bytes_are_the_same_each_time(tmp_path):
    path, fitted = tmp_path / "fitted.safetensors", aligner()
    fitted.save(path)
    whole = path.read_bytes()
    for _ in range(5):  # safetensors itself writes two texts in any order
        fitted.save(path)
        assert path.read_bytes() == whole
    assert ReAlign.load(path).encoder == "CLIP é 0123"
    path.write_bytes(whole.replace(b"0123", b"0133"))
    with pytest.raises(ValueError, match="numbers that changed since it was written; fit it"):
        ReAlign.load(path)


def test_a_file_without_a_digest_loads(tmp_path):
    path, fitted = tmp_path / "fitted.safetensors", aligner()
    save_file(fitted.state_dict(), path, {"encoder": "CLIP"})
    assert ReAlign.load(path).encoder == "CLIP"
    fitted.save_pretrained(tmp_path / "folder")
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        assert file.metadata()["digest"].startswith("blake2b=")
