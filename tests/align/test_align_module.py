"""ReAlign as a module: dtypes, shapes, files, copies, gradients, torch.compile."""

import copy
import json
import math
import pickle

import pytest
import torch
from support.op_checks import random_rows
from test_align import NUMBERS, VECTORS, same, text_and_image
from torch import nn
from torch.autograd import gradcheck

import realign_fast
from realign_fast import Moments, ReAlign, SharedSpace, align_rows
from realign_fast.methods import METHODS


@pytest.fixture(scope="module")
def fitted():
    return ReAlign.fit(*text_and_image())


class Model(nn.Module):
    def __init__(self, aligner):
        super().__init__()
        self.aligner = aligner
        self.projector = nn.Linear(aligner.dimension, 3)

    def forward(self, rows):
        return self.projector(self.aligner(rows))


CASTS = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float": lambda model: model.float(),
    "and back": lambda model: model.bfloat16().double(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_buffers_stay_float64_to_the_bit_whatever_the_model_becomes(fitted, cast):
    model = CASTS[cast](Model(copy.deepcopy(fitted)))
    assert same(model.aligner, fitted)
    dtype = model.projector.weight.dtype
    assert model(random_rows(4, 12, dtype)).dtype == dtype
    assert not list(fitted.parameters()), "nothing to train"


def test_rows_may_have_any_leading_axes(fitted):
    rows = random_rows(24, 12, torch.float32)
    flat = fitted(rows)
    assert torch.equal(flat, align_rows(rows, *fitted.row_map))
    assert torch.equal(fitted(rows.reshape(2, 3, 4, 12)), flat.reshape(2, 3, 4, 12))
    assert torch.equal(fitted(rows[0]), flat[0])
    assert fitted(rows[:0]).shape == (0, 12)
    assert fitted(rows[:0].reshape(5, 0, 12)).shape == (5, 0, 12)


def test_strided_and_expanded_batches(fitted):
    rows = random_rows(24, 24, torch.float32)[:, 5:17]
    expected = fitted(rows.clone())
    assert torch.equal(fitted(rows), expected)
    turned = rows.reshape(4, 6, 12).transpose(0, 1)
    assert torch.equal(fitted(turned), expected.reshape(4, 6, 12).transpose(0, 1))
    assert torch.equal(fitted(rows[:1].expand(7, 12)), expected[:1].expand(7, 12))


def test_the_callers_dtype_or_out(fitted):
    rows = random_rows(6, 12, torch.float32)
    assert fitted(rows, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    out = torch.full((6, 12), math.nan)
    assert fitted(rows, out=out) is out
    assert torch.equal(out, fitted(rows))
    with pytest.raises(ValueError, match=r"shape \[6, 5\], the aligner was fitted on 12 columns"):
        fitted(rows[:, :5])


def test_an_unfitted_module_refuses_rows():
    """A state_dict that was never loaded must not pass for an alignment."""
    rows = random_rows(6, 12, torch.float32)
    for module in (ReAlign(12), ReAlign(12, "noise"), ReAlign(12, method="coral")):
        for use in (module, module.save):
            with pytest.raises(ValueError, match="ReAlign: not fitted yet; use"):
                use(rows)
        assert "not fitted" in repr(module)
    with pytest.raises(ValueError, match="ReAlign: not fitted yet; use"):
        torch.compile(module, backend="eager")(rows)
    empty = ReAlign(12).to_empty(device="cpu")
    empty.method_number.fill_(1 << 40)  # as memory that nothing was written to
    assert "not fitted" in repr(empty)
    with pytest.raises(ValueError, match="not fitted yet"):
        empty(rows)
    for dimension in (0, -3):
        with pytest.raises(ValueError, match=f"dimension is {dimension}, expected"):
            ReAlign(dimension)
    with pytest.raises(ValueError, match="method='zca' is none of realign, mean-shift"):
        ReAlign(12, "zca")


@pytest.mark.parametrize("method", METHODS)
def test_its_buffers_have_the_shapes_of_the_fitted_ones(method):
    """Loaders that compare shapes, or assign tensors without a call of ours, find room."""
    aligner = ReAlign.fit(*text_and_image(), method=method, residual=False)
    with torch.device("meta"):
        empty = ReAlign(12, method)
    shapes = {name: (buffer.shape, buffer.dtype) for name, buffer in aligner.named_buffers()}
    assert shapes == {n: (b.shape, b.dtype) for n, b in empty.half().named_buffers()}
    assert f"method={method}, without numbers, on the device meta" in repr(empty)
    assert empty(torch.empty(3, 12, device="meta")).shape == (3, 12)
    state = {name: tensor.half() for name, tensor in aligner.state_dict().items()}
    empty.load_state_dict(aligner.state_dict(), assign=True)
    assert same(empty, aligner)
    assert torch.equal(empty(rows := random_rows(4, 12)), aligner(rows))
    other = ReAlign(12).to_empty(device="cpu")  # of another method
    other.load_state_dict(aligner.state_dict())
    assert same(other, aligner) and torch.equal(other(rows), aligner(rows))
    with torch.device("meta"):
        empty = ReAlign(12, method)
    with pytest.warns(UserWarning, match="keys shift, .*linear, .*seed of .* were cast to"):
        empty.load_state_dict(state, assign=True)  # float64 again, of the half that was stored
    assert empty.shift.dtype == torch.float64
    assert empty.shift.equal(aligner.shift.half().double()) and empty.method == method


def test_what_it_is_follows_buffers_that_are_written_to_in_place():
    """As DDP, FSDP and training loops do; nothing calls a method of the module."""
    sides, rows = text_and_image(), random_rows(6, 12)
    fitted = {m: ReAlign.fit(*sides, method=m, residual=False) for m in ("realign", "noise")}
    receiver = ReAlign(12)
    for aligner in (*fitted.values(), fitted["realign"]):
        for name, buffer in receiver.named_buffers():
            buffer.data.copy_(getattr(aligner, name))
        assert torch.equal(receiver(rows), aligner(rows))
        assert receiver.method == aligner.method and repr(receiver) == repr(aligner)
        compiled = torch.compile(receiver, backend="eager", fullgraph=True)
        assert torch.equal(compiled(rows), aligner(rows))
        torch.compiler.reset()
        wide = aligner(rows.half(), out=torch.empty(6, 12))  # rounded once, to the type of `out`
        assert torch.equal(wide, aligner(rows.half(), out_dtype=torch.float32))


def test_a_fit_in_inference_mode_can_be_trained_with_and_goes_on():
    text, image = text_and_image()
    with torch.inference_mode():
        aligner = ReAlign.fit(text, image)
        moments = Moments(covariance=True).update(text[:200])
    aligner(text.requires_grad_()).sum().backward()
    with torch.inference_mode():
        aligner.to(torch.float32)
        stored = copy.deepcopy(aligner)
    stored(text).sum().backward()
    aligner.load_state_dict(ReAlign.fit(text, image, residual=False).state_dict())
    graphs = []
    through = lambda rows: graphs.append(torch.is_grad_enabled()) or rows  # noqa: E731
    Moments().update(text, through=through)
    assert not any(graphs), "no graph of a model is kept"
    moments.update(text[200:]).merge(Moments(covariance=True).update(text))
    assert moments.count == 800


def test_whole_modules_load_as_weights_only(fitted, tmp_path):
    objects = [fitted, Moments(covariance=True).update(text_and_image()[0])]
    objects += [SharedSpace.fit(text=text_and_image()[0], image=text_and_image()[1])]
    fitted(random_rows(40, 12))
    torch.save(objects, tmp_path / "all.pt")
    aligner, moments, space = torch.load(tmp_path / "all.pt", weights_only=True)
    assert same(aligner, fitted) and moments.mean.equal(objects[1].mean)
    assert space.record == objects[2].record


def by_pickle(aligner, folder):
    return pickle.loads(pickle.dumps(aligner))


def by_state_dict(aligner, folder):
    torch.save(Model(aligner).state_dict(), folder / "state.pt")
    model = Model(ReAlign(12)).to(torch.bfloat16)  # a model of another dtype takes every bit
    model.load_state_dict(torch.load(folder / "state.pt"))
    return model.aligner


def by_file(aligner, folder):
    aligner.save(folder / "a.safetensors")
    assert [file.name for file in folder.iterdir()] == ["a.safetensors"], "no partial file stays"
    assert same(ReAlign.from_pretrained(folder / "a.safetensors"), aligner)
    return ReAlign.load(folder / "a.safetensors")


def by_directory(aligner, folder):
    aligner.save_pretrained(folder / "new" / "one")
    return ReAlign.from_pretrained(str(folder / "new" / "one"))


@pytest.mark.parametrize(
    "travel", (by_pickle, by_state_dict, by_file, by_directory, lambda a, _: copy.deepcopy(a))
)
@pytest.mark.parametrize("residual", (True, False))
def test_every_way_to_copy_or_store_keeps_every_bit(tmp_path, travel, residual):
    aligner = ReAlign.fit(*text_and_image(), residual=residual)
    arrived = travel(aligner, tmp_path)
    assert same(arrived, aligner)
    assert arrived.record == aligner.record and repr(arrived) == repr(aligner)
    arrived.shift.zero_()
    assert bool(aligner.shift.any()), "a copy shares no memory"


def test_the_state_dict_holds_what_is_documented(fitted):
    counts = ("source_count", "target_count")
    state = fitted.state_dict()
    assert state.keys() == {*NUMBERS, *VECTORS, *counts, "linear", "method_number", "noise", "seed"}
    assert all(state[name].dtype == torch.float64 for name in (*NUMBERS, *VECTORS))
    assert all(state[name].dtype == torch.int64 for name in counts)


def test_config_json_says_what_it_was_fitted_on(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in fitted.record} == fitted.record
    assert config["library_name"] == "realign_fast"
    assert config["library_version"] == realign_fast.__version__
    names = {"README.md", "config.json", "model.safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_files_that_are_none_are_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no aligner")
    with pytest.raises(ValueError, match=r"notes\.txt: expected an aligner written by"):
        ReAlign.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="holds none of model"):
        ReAlign.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file; expected a file written"):
        ReAlign.from_pretrained(tmp_path / "missing.safetensors")
    hub = pytest.importorskip("huggingface_hub")
    message = "^runs/aligner: no such folder here, and .* hub: cannot find the requested files"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FileNotFoundError, match=message):
        patch.setattr(hub, "hf_hub_download", offline)
        ReAlign.from_pretrained("runs/aligner")


def offline(*arguments, **options):
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("cannot find the requested files in the local cache")


def test_gradcheck_through_forward(fitted):
    rows = random_rows(2, 36).reshape(2, 3, 12).requires_grad_()
    assert gradcheck(fitted, rows)


def test_gradient_is_that_of_the_formula_in_plain_torch(fitted):
    def formula(rows):
        u = rows / rows.norm(dim=-1, keepdim=True)
        mapped = fitted.target_mean + fitted.scale * (u - fitted.source_mean)
        mapped = mapped / mapped.norm(dim=-1, keepdim=True) + fitted.recentre
        return mapped / mapped.norm(dim=-1, keepdim=True)

    rows = random_rows(9, 12).requires_grad_()
    weights = random_rows(9, 12, seed=4)
    (expected,) = torch.autograd.grad((formula(rows) * weights).sum(), rows)
    (gradient,) = torch.autograd.grad((fitted(rows) * weights).sum(), rows)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_a_model_that_holds_one_compiles_to_one_graph_and_trains(fitted, dtype):
    """inductor, the compiler people use; the op stays one call inside."""
    model = Model(copy.deepcopy(fitted)).to(dtype)
    compiled = torch.compile(model, fullgraph=True)
    rows = random_rows(6, 12, dtype).reshape(2, 3, 12).requires_grad_()
    result, expected = compiled(rows), model(rows)
    torch.testing.assert_close(result, expected)
    (gradient,) = torch.autograd.grad(result[..., 0].sum(), rows)
    (again,) = torch.autograd.grad(expected[..., 0].sum(), rows)
    assert bool(gradient.any())
    torch.testing.assert_close(gradient, again)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method_number", 99, "aligner.method_number: method number 99 is unknown to this version"),
        ("method_number", -1, "method number -1 is unknown to this version"),
        ("shift", math.nan, "aligner.shift holds a NaN or an infinity"),
        ("recentre", math.inf, "aligner.recentre holds a NaN or an infinity"),
    ],
)
def test_a_state_dict_that_is_no_map_of_this_version_changes_nothing(fitted, key, value, message):
    model, other = Model(copy.deepcopy(fitted)), Model(ReAlign.fit(*text_and_image()[::-1]))
    state = other.state_dict()
    state[f"aligner.{key}"].view(-1)[-1:].fill_(value)
    for options in ({}, {"assign": True}, {"strict": False}):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, **options)
        assert same(model.aligner, fitted)
    rows = random_rows(4, 12)
    assert torch.equal(model.aligner(rows), fitted(rows))


def test_a_map_of_which_keys_are_missing_is_refused_until_they_arrive(fitted):
    """A checkpoint in several files loads one after the other with strict=False."""
    model = Model(ReAlign(12))
    state = Model(fitted).state_dict()
    last = {"aligner.shift": state.pop("aligner.shift")}
    rows = random_rows(4, 12)
    model.load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match="the state_dict lacked shift"):
        model(rows)
    model.load_state_dict({"projector.bias": torch.zeros(3)}, strict=False)  # no key of the map
    with pytest.raises(ValueError, match="the state_dict lacked shift"):
        model(rows)
    model.load_state_dict(last, strict=False)
    assert torch.equal(model.aligner(rows), fitted(rows))
    model.load_state_dict({"projector.bias": torch.zeros(3)}, strict=False)
    assert torch.equal(model.aligner(rows), fitted(rows))
