"""The population of mutants is fixed by its seed, and each mutant is other code that compiles."""

from hostile.mutants import COVERED, ROOT, native_mutants, population

PYTHON, NATIVE = "realign_fast/storage/atomic.py", "csrc/cpu/row_map.h"


def test_the_population_is_that_of_its_seed():
    first, again, other = (population(20, seed, [PYTHON]) for seed in (1, 1, 2))
    assert first == again != other and len({mutant.text for mutant in first}) == 20
    for mutant in first:
        compile(mutant.text, mutant.file, "exec")
        assert mutant.file == PYTHON and " -> " in mutant.change


def test_every_mutant_has_a_name_of_its_own():
    """Results are found by it; a line may hold the same number twice."""
    mutants = population(1000, 1, ["realign_fast/pipeline/verify.py"])
    names = {mutant[:3] for mutant in mutants}
    assert len(names) == len(mutants) and any(name[2].endswith(" (2)") for name in names)


def test_a_native_mutant_changes_one_line():
    original = (ROOT / NATIVE).read_text().splitlines()
    mutants = list(native_mutants(NATIVE))
    assert len(mutants) > 50
    for mutant in mutants:
        lines = mutant.text.splitlines()
        assert len(lines) == len(original)
        changed = [
            number
            for number, pair in enumerate(zip(lines, original, strict=True))
            if len({*pair}) == 2
        ]
        assert changed == [mutant.line - 1]


def test_every_covered_file_and_test_is_there():
    for file, cover in COVERED.items():
        whole, first = cover.whole_in_order(), cover.first.split()
        assert all((ROOT / name).is_file() for name in (file, *whole))
        assert whole[-len(first) :] == sorted(first) and len({*whole}) == len(whole)
