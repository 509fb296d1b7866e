"""Sound files are read, damaged ones refused by name; a short form of the long runs.

docs/reliability.md gives the commands of the long runs. Faults that they found are tested here or
beside the code by the damage that showed them.
"""

import json
import warnings

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("transformers")

from hostile import fuzz_native, fuzz_readers
from hostile.targets import fault_of, place, targets

SLOW_READERS = {"resume-manifest", "resume-aligner", "resume-statistics", "resume-result"}


@pytest.mark.parametrize("name", targets())
def test_sound_files_are_read_and_damaged_ones_refused_by_name(name, tmp_path):
    target = targets()[name]
    for number, seed in enumerate(target.seeds()):
        place(target, tmp_path / str(number), seed)
        target.read(tmp_path / str(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count = 8 if name in SLOW_READERS else 80
        for number, data in enumerate(fuzz_readers.inputs(name, count, 1)):
            assert not fuzz_readers.check(name, data, tmp_path / f"damaged-{number}"), number


def test_the_inputs_of_a_seed_are_the_same():
    first, again, other = (list(fuzz_readers.inputs("npy", 40, seed)) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) > 30


def test_a_reader_that_does_not_name_its_file_is_found(tmp_path):
    def read(folder):
        raise ValueError("wrong")

    target = targets()["npy"]._replace(read=read)
    assert "does not name the file" in fault_of(target, tmp_path / "a", b"")


@pytest.mark.parametrize(
    "old, new",
    [
        ('"_stats/apply/', '"_staps/apply/'),
        ('"checksum": ', '"checksum": 1'),
        ('"zero_rows": 0', '"zero_rows": 3'),
    ],
)
def test_a_damaged_record_of_a_result_is_written_anew(tmp_path, old, new):
    target = targets()["resume-result"]
    (seed,) = target.seeds()
    folder = tmp_path / "out"
    damaged = seed.decode().replace(old, new).encode()
    assert damaged != seed
    place(target, folder, damaged)
    target.read(folder)
    entry = json.loads((folder / target.file).read_bytes())["entry"]
    assert entry == json.loads(seed)["entry"]


def test_moments_with_an_unknown_flag_are_refused(tmp_path):
    target = targets()["moments"]
    (seed,) = target.seeds()
    (tmp_path / target.file).write_bytes(seed.replace(b"normalize", b"normalizd"))
    with pytest.raises(ValueError, match=r"moments\.safetensors: expected moments written by"):
        target.read(tmp_path)


@pytest.mark.slow
def test_the_native_readers_for_a_moment(tmp_path):
    if not (clang := fuzz_native.compiler()):
        pytest.skip("no clang++ with libFuzzer on this machine")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    assert fuzz_native.write_seeds(corpus) == 62
    program = fuzz_native.build(clang, tmp_path / "fuzz_io")
    found = fuzz_native.fuzz(program, corpus, runs=5000, seconds=20, seed=1)
    assert found["status"] == 0 and found["inputs"] >= 62 and found["edges"] > 500
