"""A corpus, a list and language models, and a model that went through both stages."""

import pytest
from support.revision_parts import QUIET, pretrain_command, words, write_world

from realign_fast.cli.main import main


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder as `write_world` makes it; tests write elsewhere."""
    pytest.importorskip("transformers")
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory):
    """The directory of a model that went through both stages by the command line."""
    pytest.importorskip("accelerate")
    root = tmp_path_factory.mktemp("trained")
    more = ["learning_rate=0.02", "num_train_epochs=6.0", "eval_on_start=true", "eval_steps=0.5"]
    long = [word for setting in more for word in ("--set", setting)]
    assert main(pretrain_command(world, root / "one", *long)) == 0
    where = ["--data", world / "list.jsonl", "--rows", world / "corpus", "--out", root / "two"]
    more = ["learning_rate=0.01", "num_train_epochs=8.0", "eval_steps=0.5"]
    long = [word for setting in more for word in ("--set", setting)]
    long += ["--batch-size", 8, "--held-out", 8]
    assert main(words("finetune", "--model", root / "one", *where, *QUIET, *long)) == 0
    return root / "two"
