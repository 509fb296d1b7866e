"""Run other readers and clients beside this package, and write the table of docs/compatibility.md.

python benchmarks/runs/compatibility.py              # every check whose client is installed
python benchmarks/runs/compatibility.py polars       # the checks of some clients

A check is a function with `@check("client", "what is run")`, where the client is the name of its
distribution. It takes a `Workspace`, which makes the small corpora and outputs that checks share,
and returns the result as a short text; an exception is a failure, which the table and the exit
status show. Checks whose client is not installed, or that were not asked for, keep the line of
their last run.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from pyarrow import parquet

from realign_fast import Corpus, ReAlign
from realign_fast.cli.main import main as realign_fast_main
from realign_fast.corpus.convert import convert
from realign_fast.methods import Method
from realign_fast.pipeline.align_run import align, align_work, execute
from realign_fast.pipeline.settings import Settings
from realign_fast.pipeline.unify_run import SpaceSides, unify
from realign_fast.storage.paths import output_path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- checks -->\n", "<!-- end of the checks -->\n"
HEAD = "| reader or client | version | what was run | result | date |\n|---|---|---|---|---|\n"
SHARD_ROWS, DIMENSION = (7, 5), 8


class Check(NamedTuple):
    """A check: the distribution whose version is shown, what is run, and the function."""

    client: str
    action: str
    function: Callable[[Workspace], str]


CHECKS: list[Check] = []


def check(client: str, action: str) -> Callable[[Callable[[Workspace], str]], Callable[..., str]]:
    """Register a function as the check `action` of the distribution `client`."""

    def register(function: Callable[[Workspace], str]) -> Callable[..., str]:
        CHECKS.append(Check(client, action, function))
        return function

    return register


class Workspace:
    """Small corpora, and the outputs that are made of them once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = np.random.default_rng(0)
        for side, offset in (("text_emb", 0.5), ("img_emb", -0.5)):
            (folder / "root" / side).mkdir(parents=True)
            for number, count in enumerate(SHARD_ROWS):
                rows = generator.standard_normal((count, DIMENSION)) + offset
                np.save(folder / "root" / side / f"{side}_{number}.npy", rows.astype("<f4"))
        self.made = cache(self._made)

    @property
    def root(self) -> Path:
        """A clip-retrieval root with `.npy` shards."""
        return self.folder / "root"

    def aligned(self, form: str) -> Path:
        """Return the output of `align` on shards of a format of `FORMATS`."""
        return self.made("aligned", form)

    def converted(self, form: str) -> Path:
        """Return the texts of the root as `convert` writes them in a format."""
        return self.made("converted", form)

    def outputs(self, form: str) -> list[Path]:
        """Return the outputs of `align`, `apply`, `unify` and `convert` with shards of a format."""
        return [self.made(kind, form) for kind in ("aligned", "applied", "unified", "converted")]

    def _made(self, kind: str, form: str) -> Path:
        out, settings = self.folder / f"{kind}-{form}", Settings(progress=False)
        if kind in ("text", "image", "converted"):
            side: Any = "text" if kind == "converted" else kind
            convert(Corpus(self.root, side), out, form)
            return out
        text, image = (
            Corpus(self.made(side, form), allow_pickle=True) for side in ("text", "image")
        )
        if kind == "aligned":
            align(text, image, out, settings)
        elif kind == "applied":
            path, aligner = output_path(out), ReAlign.from_pretrained(self.aligned(form))
            execute(align_work(text, None, path, settings, aligner=aligner))
        else:
            unify(SpaceSides({"text": text, "image": image}), out, settings)
        return out


def expect_rows(found: Iterable[Any], out: Path) -> str:
    """Return a sentence on the rows `[N, D]` that a client read; raise if `out` has others."""
    sides: Any = ["text", "image"] if (out / "text_emb").is_dir() else [None]
    corpora = [Corpus(out, side, allow_pickle=True) for side in sides]
    rows_of_sides = [torch.cat([batch.rows for batch in corpus.batches()]) for corpus in corpora]
    expected = torch.cat(rows_of_sides).numpy()
    rows = np.stack([np.asarray(row, expected.dtype) for row in found])
    if len(sides) > 1:  # readers walk the folders in an order of their own
        rows, expected = (side[np.lexsort(side.T)] for side in (rows, expected))
    np.testing.assert_array_equal(rows, expected)
    return f"{len(rows)} rows, equal"


@check("numpy", "`np.load` of an aligned `.npy` shard")
def numpy_load(workspace: Workspace) -> str:
    """Read aligned `.npy` shards."""
    out = workspace.aligned("npy")
    return expect_rows(np.concatenate([np.load(path) for path in sorted(out.glob("*.npy"))]), out)


@check("pyarrow", "`pyarrow.dataset.dataset(OUT)` after align, apply, unify and convert, parquet")
def arrow_dataset(workspace: Workspace) -> str:
    """Read outputs with parquet shards as datasets of pyarrow."""
    from pyarrow import dataset

    for out in workspace.outputs("parquet"):
        text = expect_rows(dataset.dataset(out).to_table()["embedding"].to_pylist(), out)
    return text


@check("pyarrow", "`pyarrow.dataset.dataset(OUT, format='arrow')` of Arrow files")
def arrow_dataset_of_files(workspace: Workspace) -> str:
    """Read outputs with Arrow files as datasets of pyarrow."""
    from pyarrow import dataset

    out = workspace.aligned("arrow")
    return expect_rows(
        dataset.dataset(out, format="arrow").to_table()["embedding"].to_pylist(), out
    )


@check("pandas", "`pandas.read_parquet(OUT)` after align, apply, unify and convert")
def pandas_frame(workspace: Workspace) -> str:
    """Read outputs with parquet shards as frames."""
    import pandas

    for out in workspace.outputs("parquet"):
        text = expect_rows(pandas.read_parquet(out)["embedding"], out)
    return text


@check("polars", "`polars.read_parquet(OUT / '*.parquet')`")
def polars_frame(workspace: Workspace) -> str:
    """Read an output with parquet shards as a frame of polars."""
    import polars

    out = workspace.aligned("parquet")
    return expect_rows(polars.read_parquet(out / "*.parquet")["embedding"].to_numpy(), out)


@check("polars", "`polars.read_parquet(OUT)`, which skips no names")
def polars_folder(workspace: Workspace) -> str:
    """Read the folder of a conversion, and meet the error of polars in that of a run."""
    import polars

    converted = workspace.converted("parquet")
    text = expect_rows(polars.read_parquet(converted)["embedding"].to_numpy(), converted)
    try:
        polars.read_parquet(workspace.aligned("parquet"))
    except polars.exceptions.InvalidOperationError:
        return f"after convert {text}; after a run refused: give `OUT/*.parquet`"
    return text


def load_dataset(out: Path, **options: Any) -> Any:
    """Return the rows of `datasets.load_dataset(OUT)`, with a cache in the same folder."""
    import datasets

    datasets.disable_progress_bars()
    cache_folder = str(out.parent / "cache")
    return datasets.load_dataset(str(out), split="train", cache_dir=cache_folder, **options)


@check("datasets", "`datasets.load_dataset(OUT)` after align, apply, unify and convert, parquet")
def datasets_parquet(workspace: Workspace) -> str:
    """Load outputs with parquet shards."""
    for out in workspace.outputs("parquet"):
        text = expect_rows(load_dataset(out)["embedding"], out)
    return text


@check("datasets", "`datasets.load_dataset(OUT)` of Arrow files, of Arrow streams and of tars")
def datasets_arrow_and_tar(workspace: Workspace) -> str:
    """Load outputs with Arrow and WebDataset shards."""
    for form, column in ("arrow", "embedding"), ("arrow-stream", "embedding"), ("tar", None):
        out, name = workspace.aligned(form), column or "embedding.npy"
        text = expect_rows([np.reshape(row, -1) for row in load_dataset(out)[name]], out)
    return text


@check("datasets", "`datasets.load_from_disk(OUT)` of a saved dataset")
def datasets_saved(workspace: Workspace) -> str:
    """Load the output of `align` on a saved dataset."""
    import datasets

    out = workspace.aligned("hf")
    return expect_rows(datasets.load_from_disk(out)["embedding"], out)


@check("embedding-reader", "`EmbeddingReader(OUT)`, npy and parquet")
def embedding_reader(workspace: Workspace) -> str:
    """Read outputs as autofaiss and clip-retrieval do."""
    from embedding_reader import EmbeddingReader

    for form in ("npy", "parquet"):
        out = workspace.aligned(form)
        reader = EmbeddingReader(str(out), file_format=form)
        text = expect_rows([row for rows, _ in reader(4, show_progress=False) for row in rows], out)
    return text


@check(
    "embedding-reader",
    "`EmbeddingReader` of `align` and `unify` beside `metadata/`, npy and parquet",
)
def embedding_reader_metadata(workspace: Workspace) -> str:
    """Read both sides of an output and its metadata, the folders of `clip-retrieval index`."""
    from embedding_reader import EmbeddingReader

    root = workspace.folder / "described"
    shutil.copytree(workspace.root, root)
    (root / "metadata").mkdir()
    for number, count in enumerate(SHARD_ROWS):
        ids = {"id": [f"{number}-{row}" for row in range(count)]}
        parquet.write_table(pyarrow.table(ids), root / "metadata" / f"metadata_{number}.parquet")
    expected = [
        f"{number}-{row}" for number, count in enumerate(SHARD_ROWS) for row in range(count)
    ]
    options = "--text", str(root), "--image", str(root), "--quiet"
    for command in ("align", "unify"):
        out = workspace.folder / f"indexed-{command}"
        if status := realign_fast_main([command, *options, "--out", str(out)]):
            raise RuntimeError(f"{command} ended with {status}")
        shutil.copytree(root / "metadata", out / "metadata")
        if command == "align":
            shutil.copytree(root / "img_emb", out / "img_emb")
        for side in ("text_emb", "img_emb"):
            reader = EmbeddingReader(
                str(out / side), "parquet_npy", "embedding", ["id"], str(out / "metadata")
            )
            batches = [*reader(4, show_progress=False)]
            rows = [row for batch, _ in batches for row in batch]
            text = expect_rows(rows, out / side)
            if [value for _, frame in batches for value in frame["id"]] != expected:
                raise ValueError("other ids")
    return f"both sides, {text}, with their ids"


@check("webdataset", "`webdataset.WebDataset(tars of OUT)`, decoded")
def webdataset_samples(workspace: Workspace) -> str:
    """Read aligned tars."""
    import webdataset

    out = workspace.aligned("tar")
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=False).decode()
    return expect_rows([sample["embedding.npy"].reshape(-1) for sample in samples], out)


class Aligned(torch.nn.Module):
    """A model around a map of method `coral`, whose buffers are matrices."""

    def __init__(self, aligner: ReAlign) -> None:
        super().__init__()
        self.aligner, self.head = aligner, torch.nn.Linear(DIMENSION, 3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the head's numbers of the aligned rows."""
        return self.head(self.aligner(rows))


def fitted(workspace: Workspace, method: Method = "coral") -> tuple[ReAlign, torch.Tensor]:
    """Return a map that was fitted on the root, and its source rows."""
    rows = {
        side: torch.cat([batch.rows for batch in Corpus(workspace.root, side).batches()])
        for side in ("text", "image")
    }
    with warnings.catch_warnings():  # of few rows
        warnings.simplefilter("ignore")
        return ReAlign.fit(rows["text"], rows["image"], method=method), rows["text"]


def expect_same(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Return a sentence on rows that are equal to the last bit; raise if they are not."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return f"{len(found)} rows, the same bytes"


@check("torch", "`DistributedDataParallel` of a model with an aligner, one gloo process")
def torch_ddp(workspace: Workspace) -> str:
    """Wrap a model; two ranks are in tests/align/test_distributed.py."""
    aligner, rows = fitted(workspace)
    model = Aligned(aligner)
    store = f"file://{workspace.folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel(rows).sum().backward()
        return expect_same(parallel(rows), model(rows))
    finally:
        torch.distributed.destroy_process_group()


@check("torch", "`torch.func`: `jacrev`, `jacfwd` and `vmap(grad)` of an aligner")
def torch_func(workspace: Workspace) -> str:
    """Compare forward with reverse mode."""
    aligner, rows = fitted(workspace)
    jacobian = torch.func.jacrev(aligner)(rows)
    torch.testing.assert_close(torch.func.jacfwd(aligner)(rows), jacobian)
    gradient = torch.func.vmap(torch.func.grad(lambda row: aligner(row).sum()))(rows)
    torch.testing.assert_close(gradient, torch.einsum("ndne->ne", jacobian))
    return f"the same derivatives of {len(rows)} rows"


@check("accelerate", "`init_empty_weights` and `load_checkpoint_and_dispatch` of an aligner")
def accelerate_dispatch(workspace: Workspace) -> str:
    """Load a model with an aligner from a file into an empty one."""
    import accelerate
    from safetensors.torch import save_file

    aligner, rows = fitted(workspace)
    model, path = Aligned(aligner), str(workspace.folder / "model.safetensors")
    save_file(model.state_dict(), path)
    with accelerate.init_empty_weights(include_buffers=True):
        empty = Aligned(ReAlign(DIMENSION, "coral"))
    loaded = accelerate.load_checkpoint_and_dispatch(empty, path, device_map={"": "cpu"})
    return expect_same(loaded(rows), model(rows))


@check("transformers", "`from_pretrained(dtype=torch.bfloat16)` of a model with an aligner")
def transformers_load(workspace: Workspace) -> str:
    """Load a `PreTrainedModel` that holds an aligner."""
    import transformers

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.aligned = Aligned(ReAlign(DIMENSION, "coral"))
            self.post_init()

    config = transformers.PretrainedConfig()
    model = Model(config)
    model.aligned.aligner, rows = fitted(workspace)
    model.save_pretrained(workspace.folder / "model")
    loaded = Model.from_pretrained(workspace.folder / "model", config=config, dtype=torch.bfloat16)
    return expect_same(loaded.aligned.aligner(rows), model.aligned.aligner(rows))


@check("onnxscript", "`torch.onnx.export(dynamo=True)` of an aligner, run by onnx's reference")
def onnx_export(workspace: Workspace) -> str:
    """Export a map and run it."""
    from onnx.reference import ReferenceEvaluator

    (aligner, rows), path = fitted(workspace), str(workspace.folder / "map.onnx")
    torch.onnx.export(aligner, (rows,), path, dynamo=True, verbose=False)
    session = ReferenceEvaluator(path)
    (found,) = session.run(None, {session.input_names[0]: rows.numpy()})
    return f"{len(rows)} rows, at most {np.abs(found - aligner(rows).numpy()).max():.0e} apart"


@check("scikit-learn", "`check_estimator` of `integrations.sklearn.StreamingCovariance`")
def sklearn_rules(workspace: Workspace) -> str:
    """Run scikit-learn's own checks."""
    from sklearn.utils.estimator_checks import check_estimator

    from realign_fast.integrations import sklearn

    estimators = [sklearn.StreamingCovariance(), sklearn.StreamingCovariance(store_precision=False)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [check_estimator(estimator, on_skip=None) for estimator in estimators]
    statuses = [result["status"] for checks in results for result in checks]
    return f"{statuses.count('passed')} checks of {len(estimators)} estimators pass"


def run_page(trainer: str) -> str:
    """Run the block of docs/training_codebases.md that holds a name, on tiny models."""
    test = PAGE.parents[1] / "tests" / "revision" / "test_training_codebases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-k", trainer, str(test)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "1 passed" not in done.stdout:
        raise RuntimeError(done.stdout[-300:])
    return "the projector learns"


@check("transformers", "`Trainer` on samples and `Collator` (training_codebases.md)")
def transformers_trainer(workspace: Workspace) -> str:
    """Train a projector for two steps."""
    return run_page("Trainer")


@check("pytorch-lightning", "`Trainer` on samples and `Collator` (training_codebases.md)")
def lightning_trainer(workspace: Workspace) -> str:
    """Train a projector for two steps."""
    return run_page("lightning")


def known_lines(page: str) -> dict[tuple[str, str], str]:
    """Return the lines of the table in `page` by client and action."""
    lines = page.partition(BEGIN)[2].partition(END)[0].splitlines(keepends=True)[2:]
    return {(c[0], c[2]): line for line in lines if (c := line.strip("| \n").split(" | "))}


def run(selected: Check, workspace: Workspace) -> tuple[str, bool]:
    """Return the line of a check in the table, and whether it failed."""
    try:
        result, failed = selected.function(workspace), False
    except Exception as error:
        reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").replace("|", "/")
        result, failed = f"**fails**: {reason:.160}", True
    today = datetime.datetime.now(datetime.timezone.utc).date()
    cells = selected.client, version(selected.client), selected.action, result, str(today)
    return f"| {' | '.join(cells)} |\n", failed


def main() -> int:
    """Run the checks, write the table, and return 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Run readers and clients; write the table.")
    parser.add_argument("clients", nargs="*", help="names of distributions; all by default")
    clients = parser.parse_args().clients
    before, _, rest = PAGE.read_text().partition(BEGIN)
    known, lines, failures = known_lines(PAGE.read_text()), [], 0
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        for selected in CHECKS:
            line = known.get((selected.client, selected.action), "")
            try:
                version(selected.client)
                if not clients or selected.client in clients:
                    line, failed = run(selected, workspace)
                    failures += failed
                    print(line, end="", flush=True)
            except PackageNotFoundError:
                print(f"{selected.client}: not installed; its line stays as it is")
            lines.append(line)
    PAGE.write_text(before + BEGIN + HEAD + "".join(lines) + END + rest.partition(END)[2])
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
