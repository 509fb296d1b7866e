"""bfloat16 rows on disk: safetensors has them, numpy and the other formats do not."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from realign_fast import Moments
from realign_fast.cli import main
from realign_fast.corpus import Corpus, ShardWriter
from realign_fast.corpus.convert import convert
from realign_fast.corpus.format_registry import FORMATS
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.checkpoints import checksum
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify

D, QUIET = 12, Settings(progress=False)
OTHERS = [one for one in FORMATS if one not in ("pt", "safetensors")]


def write(folder, seed, sizes=(50, 31), dtype=torch.bfloat16):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for index, size in enumerate(sizes):
        rows = (torch.randn(size, D, generator=generator) + seed).to(dtype)
        ids = torch.arange(size)
        save_file({"embedding": rows, "id": ids}, folder / f"emb_{index}.safetensors")
    return folder


def rows_of(path, **how):
    return torch.cat([batch.rows for batch in Corpus(path, **how).batches(batch_rows=7)])


@pytest.fixture
def corpora(tmp_path):
    return write(tmp_path / "text", 1), write(tmp_path / "image", 2)


def test_rows_and_ids_are_read_as_they_are(corpora):
    shards = [load_file(corpora[0] / f"emb_{i}.safetensors")["embedding"] for i in (0, 1)]
    corpus = Corpus(corpora[0])
    assert corpus.dtype == torch.bfloat16
    assert torch.equal(rows_of(corpora[0]), torch.cat(shards))
    assert torch.equal(corpus.take([80, 0, 80]), torch.cat(shards)[[80, 0, 80]])


def test_alignment_keeps_the_dtype_and_what_is_beside_the_rows(tmp_path, corpora):
    report = align(*corpora, tmp_path / "out", QUIET)
    assert report["source"]["dtype"] == "bfloat16"
    made = load_file(tmp_path / "out/emb_1.safetensors")
    assert made["embedding"].dtype == torch.bfloat16
    assert torch.equal(made["id"], torch.arange(31))
    norms = made["embedding"].double().norm(dim=1)
    assert float((norms - 1).abs().max()) < 2**-8
    assert verify(tmp_path / "out")[1] == []


def test_aligned_rows_are_those_of_float32_rounded_once(tmp_path, corpora):
    """The same numbers in float32, aligned: each bfloat16 entry is within an ulp of those."""
    for folder in corpora:
        convert(Corpus(folder), tmp_path / "wide" / folder.name, "safetensors", dtype=torch.float32)
    align(*corpora, tmp_path / "out", QUIET)
    align(tmp_path / "wide/text", tmp_path / "wide/image", tmp_path / "wide/out", QUIET)
    got, exact = rows_of(tmp_path / "out"), rows_of(tmp_path / "wide/out").bfloat16()
    apart = (got.view(torch.int16).int() - exact.view(torch.int16).int()).abs()
    assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.01


def test_a_finished_run_is_not_repeated(tmp_path, corpora):
    align(*corpora, tmp_path / "out", QUIET)
    before = (tmp_path / "out/emb_0.safetensors").read_bytes()
    passes = align(*corpora, tmp_path / "out", QUIET)["passes"]
    assert [one["rows"] for one in passes] == [0] * len(passes)
    assert (tmp_path / "out/emb_0.safetensors").read_bytes() == before


def test_verify_finds_a_changed_bit(tmp_path, corpora):
    align(*corpora, tmp_path / "out", QUIET)
    path = tmp_path / "out/emb_0.safetensors"
    data = bytearray(path.read_bytes())
    place = Corpus(path).shards[0].offset + 21
    data[place] ^= 1
    path.write_bytes(data)
    assert [one for one in verify(tmp_path / "out")[1] if "checksum is" in one]


def test_the_checksum_is_one_of_the_bits():
    rows = torch.randn(5, D).bfloat16()
    assert checksum(rows) == checksum(rows.view(torch.float16))


def test_moments_are_those_of_the_same_numbers_in_float64(corpora):
    rows = rows_of(corpora[0])
    got, want = Moments().update(rows), Moments().update(rows.double())
    assert torch.allclose(got.mean, want.mean, atol=1e-7)


@pytest.mark.parametrize("to", OTHERS)
def test_a_format_without_bfloat16_asks_for_a_dtype(to, tmp_path, corpora):
    with pytest.raises(ValueError, match=f"text: {to} has no bfloat16; give dtype .*float32"):
        convert(Corpus(corpora[0]), tmp_path / "made", to)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("to", OTHERS)
def test_by_way_of_float32_nothing_is_lost(to, tmp_path, corpora):
    convert(Corpus(corpora[0]), tmp_path / "wide", to, dtype=torch.float32)
    wide = Corpus(tmp_path / "wide", allow_pickle=True)
    convert(wide, tmp_path / "back", "safetensors", dtype=torch.bfloat16)
    assert torch.equal(rows_of(tmp_path / "wide", allow_pickle=True), rows_of(corpora[0]).float())
    assert torch.equal(rows_of(tmp_path / "back"), rows_of(corpora[0]))


def test_the_command_line_converts(tmp_path, corpora, capsys):
    command = ["convert", str(corpora[0]), str(tmp_path / "made"), "--to", "npy", "--quiet"]
    assert main.main(command) == 3
    assert "--dtype" in capsys.readouterr().err
    assert main.main([*command, "--dtype", "float16"]) == 0
    assert torch.equal(rows_of(tmp_path / "made"), rows_of(corpora[0]).half())


def test_a_number_beyond_float16_is_refused(tmp_path):
    rows = torch.ones(4, D).bfloat16()
    rows[2, 3] = 1e5
    save_file({"embedding": rows}, tmp_path / "emb.safetensors")
    corpus = Corpus(tmp_path / "emb.safetensors")
    with pytest.raises(ValueError, match=r"emb.safetensors: row 2 holds a number beyond"):
        convert(corpus, tmp_path / "made", "npy", dtype=torch.float16)
    assert not [*(tmp_path / "made").rglob("*.npy")]


def test_a_npy_shard_of_bfloat16_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"bfloat16 only in safetensors"):
        ShardWriter(tmp_path / "a.npy", 1, D, torch.bfloat16)
