"""Tensors on different devices, with fake CUDA tensors: they have a device and hold no numbers."""

import re
from itertools import permutations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from realign_fast import add_scatter_, align_rows, sum_rows

DEVICES = ("cpu", "cuda:0", "cuda:1")


def tensors(device, **places):
    """Arguments of every op for rows [5, 8] on ``device``; ``places`` puts some elsewhere."""
    shapes = {"rows": (5, 8), "out": (5, 8), "shift": (8,), "recentre": (8,), "centre": (8,)}
    shapes |= {"scatter": (8, 8), "total": (8,), "weights": (5,)}
    return {
        name: torch.ones(shape, dtype=torch.float64, device=places.get(name, device))
        for name, shape in shapes.items()
    }


def align(given):
    return align_rows(given["rows"], 0.9, given["shift"], given["recentre"], out=given["out"])


def map_by_a_matrix(given):
    matrix = torch.eye(8, dtype=torch.float64, device=given["shift"].device)
    return align_rows(given["rows"], matrix, given["shift"], out=given["out"])


def add_scatter(given):
    sums = (given["scatter"], given["total"], given["rows"], given["centre"])
    return add_scatter_(*sums, given["weights"])


REFUSED = [(align, "align_rows", "out"), (map_by_a_matrix, "align_rows", "out")]
REFUSED += [(add_scatter, "add_scatter_", name) for name in ("scatter", "total", "weights")]


@pytest.mark.parametrize(("device", "elsewhere"), permutations(DEVICES, 2))
@pytest.mark.parametrize(("call", "op", "name"), REFUSED)
def test_a_tensor_on_another_device_than_the_rows_is_refused(call, op, name, device, elsewhere):
    with FakeTensorMode():
        given = tensors(device, **{name: elsewhere})
        words = f"{op}: {name} is on {elsewhere}, the rows are on {device}; move"
        with pytest.raises(ValueError, match=re.escape(words)):
            call(given)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_on_the_device_of_the_rows_are_taken(device):
    with FakeTensorMode():
        given = tensors(device, centre="cpu")
        given["weights"] = None  # (fake weights have no values to look at)
        assert align(given) is given["out"]
        assert map_by_a_matrix(given) is given["out"]
        assert add_scatter(given).device == torch.device(device)


@pytest.mark.parametrize(("device", "elsewhere"), permutations(DEVICES, 2))
def test_a_map_from_another_device_is_copied(device, elsewhere):
    with FakeTensorMode():
        given = tensors(device, shift=elsewhere, recentre=elsewhere)
        assert align(given).device == torch.device(device)
        sums = sum_rows(given["rows"], 0.9, given["shift"], given["recentre"])
        assert {tensor.device for tensor in sums} == {torch.device(device)}
