"""``verify`` finds nothing in what a run wrote, and one line for each thing done to it since."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from realign_fast import Corpus, ReAlign
from realign_fast.cli import main
from realign_fast.moments import Moments
from realign_fast.pipeline.align_run import align
from realign_fast.pipeline.checkpoints import checksum
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.verify import verify
from realign_fast.storage.lock import locked

D = 24


def make(folder, dtype="f2", bad_rows="error"):
    for side in ("text", "image"):
        (folder / side).mkdir()
        generator = np.random.default_rng(len(side))
        for index in range(2):
            rows = generator.standard_normal((50 + index, D)) + 0.5
            if side == "text" and bad_rows != "error":
                rows[3], rows[7, 2] = 0, np.nan
            np.save(folder / side / f"emb_{index}.npy", rows.astype(dtype))
    out = folder / "out"
    align(folder / "text", folder / "image", out, Settings(progress=False, bad_rows=bad_rows))
    return out


@pytest.mark.parametrize("bad_rows", ["error", "skip", "keep"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_what_was_written_has_no_fault(tmp_path, dtype, bad_rows):
    out = make(tmp_path, dtype, bad_rows)
    (out / ".cache").mkdir()
    for name in ("cache-0123456789abcdef.arrow", ".cache/x.npy", ".DS_Store", "_SUCCESS"):
        (out / name).write_bytes(b"left by another program")
    assert len(Corpus(out).shards) == 2
    for name in ("metadata/x.parquet", "img_emb/x.npy", "_temporary/x.npy", "plots/x.png"):
        (out / name).parent.mkdir()
        (out / name).write_bytes(b"of another purpose")
    (out / "loop").symlink_to(out)
    checked, faults = verify(out)
    assert faults == [] and checked == {"shards": 2, "rows": 101, "statistics": 8}


def save(out, change):
    """Change the rows of the second shard: in place, or by what ``change`` returns."""
    rows = np.load(out / "emb_1.npy")
    result = change(rows)
    np.save(out / "emb_1.npy", rows if result is None else result)


def set_at(place, value):
    return lambda out: save(out, lambda rows: rows.__setitem__(place, value))


def one_bit(rows):
    rows.view("u2")[4, 3] ^= 1


def other_aligner(out):
    aligner = ReAlign.load(out / "__realign__/aligner.safetensors")
    aligner.recentre += 1
    aligner.save(out / "__realign__/aligner.safetensors")


def other_moments(out):
    path = next((out / "__realign__/_stats" / "source-drift").iterdir())
    Moments().update(torch.ones(2, D)).save(path)


def unlink(name):
    return lambda out: (out / name).unlink()


FAULTS = {
    "one bit": (lambda out: save(out, one_bit), ["emb_1.npy: checksum is"]),
    "rows exchanged": (
        lambda out: save(out, lambda rows: rows[np.r_[1, 0, 2 : len(rows)]]),
        ["emb_1.npy: checksum is"],
    ),
    "a zero row": (set_at(5, 0), ["checksum", "zero_rows is 1, expected 0"]),
    "a NaN": (set_at((5, 2), np.nan), ["checksum", "nonfinite_rows is 1, expected 0"]),
    "a long row": (set_at((5, 2), 9), ["checksum", "1 rows are not unit rows, the first is row 5"]),
    "another dtype": (
        lambda out: save(out, lambda rows: rows.astype("f4")),
        ["emb_1.npy: is [51, 24] float32, expected [51, 24] float16"],
    ),
    "fewer rows": (
        lambda out: save(out, lambda rows: rows[:50]),
        ["is [50, 24] float16, expected [51, 24] float16"],
    ),
    "cut off": (lambda out: os.truncate(out / "emb_1.npy", 999), ["emb_1.npy: truncated"]),
    "no shard": (unlink("emb_1.npy"), ["emb_1.npy: No such file"]),
    "no aligner": (unlink("__realign__/aligner.safetensors"), ["aligner.safetensors: missing"]),
    "another aligner": (other_aligner, ["the manifest says", "the rows went through"]),
    "other statistics": (other_moments, ["source-drift/emb_", "has blake2b"]),
    "another shard": (
        lambda out: np.save(out / "emb_9.npy", np.zeros((3, D))),
        ["emb_9.npy: is a shard that the manifest does not know"],
    ),
    "no report": (
        unlink("__realign__/report.json"),
        ["report.json: missing: the last run did not end"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_line_that_names_the_file(tmp_path, capsys, fault):
    out = make(tmp_path)
    spoil, messages = FAULTS[fault]
    spoil(out)
    assert main.main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if not line.startswith(f"{out}: ")]
    for word in messages:
        assert any(word in line for line in faults), (word, faults)
    assert all(line.startswith(f"{out}/") for line in faults)
    assert lines[-1].endswith(f", {len(faults)} faults")


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"), [("f4", 8e-7, 1.1e-6), ("f8", 2e-14, 1e-9), ("f2", 2e-4, 1.5e-3)]
)
def test_a_row_is_a_unit_row_within_its_rounding(tmp_path, dtype, within, beyond):
    """2^-20 of float32, 2^-45 of float64, and 2^-11 and the subnormals of float16."""
    out = make(tmp_path, dtype)
    rows = np.load(out / "emb_1.npy").astype("f8")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    stretches = {0: False, within: False, -within: False, beyond: True, -beyond: True}
    for stretch, is_fault in stretches.items():
        stretched = (rows * (1 + stretch)).astype(dtype)
        save(out, lambda _, new=stretched: new)
        assert ("51 rows are not unit rows" in "".join(verify(out)[1])) == is_fault, stretch


def test_rows_of_bfloat16_have_no_fault(tmp_path):
    """Half an ulp of 1 is 2^-8 in bfloat16."""
    for side in ("text", "image"):
        rows = (torch.randn(300, D) + 0.5).bfloat16()
        save_file({"embedding": rows}, tmp_path / f"{side}.safetensors")
    sides = tmp_path / "text.safetensors", tmp_path / "image.safetensors"
    align(*sides, tmp_path / "out", Settings(progress=False))
    assert Corpus(tmp_path / "out").dtype == torch.bfloat16
    assert verify(tmp_path / "out")[1] == []


def test_a_column_that_was_chosen_is_the_one_that_is_read_again(tmp_path):
    for side in ("text", "image"):
        (tmp_path / side).mkdir()
        rows = np.random.default_rng(len(side)).standard_normal((30, D)).astype("f4") + 0.5
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), D)
        pq.write_table(
            pa.table({"embedding": lists, "second": lists}), tmp_path / side / "x.parquet"
        )
    text, image = (Corpus(tmp_path / side, column="second") for side in ("text", "image"))
    align(text, image, tmp_path / "out", Settings(progress=False))
    assert verify(tmp_path / "out")[1] == []


def test_an_output_that_a_run_works_on_is_not_verified(tmp_path):
    """It is known by its lock where no report says that a run has ended."""
    out = make(tmp_path)
    records = out / "__realign__"
    with locked(records / "_stats"):
        assert verify(out)[1] == []
        (records / "report.json").unlink()
        with pytest.raises(OSError, match="is working on it"):
            verify(out)
    assert len(verify(out)[1]) == 1


def test_shards_that_are_links_are_known_by_their_own_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for side in ("text", "image"):
        Path(side).mkdir()
        np.save(f"{side}-of-old.npy", np.random.default_rng(len(side)).standard_normal((40, D)))
        Path(side, "emb_0.npy").symlink_to(tmp_path / f"{side}-of-old.npy")
    assert main.main(["align", "--text", "text", "--image", "image", "--out", "out"]) == 0
    assert main.main(["verify", "out"]) == 0


def test_damaged_statistics_are_made_again(tmp_path):
    """One bit of a mean: the file is still one of moments, but not the one that was written."""
    Moments().update(torch.randn(5, D)).save(tmp_path / "m.safetensors")
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="got numbers that changed since it was written; measure"):
        Moments.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_part_of_lists_without_rows_has_no_fault(tmp_path, suffix):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = np.random.default_rng(0).standard_normal((50, D), np.float32)
    table = pa.table({"embedding": pa.array(list(rows), pa.list_(pa.float32()))})
    for number, part in enumerate((table.slice(0, 0), table)):
        path = tmp_path / "text" / f"part-{number}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == "parquet":
            parquet.write_table(part, path)
        else:
            with pa.ipc.new_file(path, part.schema) as file:
                file.write_table(part)
    (tmp_path / "image").mkdir()
    np.save(tmp_path / "image" / "rows.npy", rows - 0.5)
    align(tmp_path / "text", tmp_path / "image", tmp_path / "out", Settings(progress=False))
    assert verify(tmp_path / "out")[1] == []


def test_no_manifest_is_an_error(tmp_path, capsys):
    assert main.main(["verify", str(tmp_path)]) == 6
    assert "has no manifest.json" in capsys.readouterr().err


def test_a_manifest_of_another_format_is_an_error(tmp_path, capsys):
    out = make(tmp_path)
    for text in (json.dumps({"format": 99, "passes": {}}), "{", "[]"):
        (out / "__realign__/manifest.json").write_text(text)
        assert main.main(["verify", str(out)]) == 3
        assert "expected a manifest of format 1" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 3, 6, 16])
def test_a_checksum_does_not_depend_on_batches_and_sees_every_bit(dtype, columns):
    rows = torch.randn(9, columns).to(dtype)
    intact = checksum(rows)
    assert intact == checksum(rows[4:], checksum(rows[:4]))
    checksums = {intact, checksum(rows[torch.tensor([1, 0, *range(2, 9)])])}
    data = rows.numpy().view(np.uint8).reshape(-1)
    for place in range(data.size):
        for bit in range(8):
            data[place] ^= 1 << bit
            assert checksum(rows) != intact
            data[place] ^= 1 << bit
    assert len(checksums) == 2 and checksum(rows) == intact


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"passes": []}, "[] as passes of the manifest"),
        (lambda m: m | {"aligner": 7}, "7 as aligner of the manifest"),
        (lambda m: m | {"passes": {"apply": [1]}}, "[1] as apply of passes"),
        (
            lambda m: m | {"passes": {"apply": {"facts": {}, "shards": {}}}},
            "nothing as column of f",
        ),
        (lambda m: m["passes"]["apply"]["shards"].append(3) or m, "3 as 2 of shards of apply"),
        (
            lambda m: m["passes"]["apply"]["shards"][1].update(rows="9") or m,
            "'9' as rows of 1 of sh",
        ),
        (lambda m: m["passes"]["apply"]["shards"][0].update(checksum=None) or m, "None as checks"),
        (lambda m: m["passes"]["source drift"]["shards"][0].pop("stats") and m, "nothing as stats"),
        (lambda m: [m], "a list"),
        (lambda m: m | {"settings": []}, "[] as settings of the manifest"),
        (lambda m: m["passes"]["apply"]["shards"][1].update(name="../x") or m, "'../x' as name o"),
        (lambda m: m["passes"]["apply"]["facts"].update(folder="../text") or m, "'../text' as fol"),
        (lambda m: m["passes"]["apply"]["shards"][1].update(stats="/etc/x") or m, "'/etc/x' as st"),
        (lambda m: m["passes"]["apply"]["facts"].update(folder=7) or m, "7 as folder of facts of"),
    ],
)
def test_a_manifest_of_other_types_is_one_error(tmp_path, capsys, change, message):
    out = make(tmp_path)
    path = out / "__realign__/manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert main.main(["verify", str(out)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"realign-fast: error: {path}: expected a manifest of format 1, got ")
    assert message in line and line.endswith("or give another --out")
