"""Checks of docs/compatibility.md with clients that CI has: an output is read as it is."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "runs"))
import compatibility


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return compatibility.Workspace(tmp_path_factory.mktemp("workspace"))


@pytest.mark.parametrize("name", ["arrow_dataset", "arrow_dataset_of_files", "pandas_frame"])
def test_an_output_is_a_dataset(workspace, name):
    pytest.importorskip("pandas")
    assert getattr(compatibility, name)(workspace) == "12 rows, equal"


def test_an_output_is_a_dataset_of_the_datasets_library(workspace):
    pytest.importorskip("datasets")
    assert compatibility.datasets_parquet(workspace) == "12 rows, equal"


def test_every_line_of_the_table_is_one_of_a_check_that_passed():
    lines = compatibility.known_lines(compatibility.PAGE.read_text())
    assert set(lines) <= {(check.client, check.action) for check in compatibility.CHECKS}
    assert not [line for line in lines.values() if "**fails**" in line]
