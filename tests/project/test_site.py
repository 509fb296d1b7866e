"""The site: it builds without a warning, its code runs, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from support.pages import PAGES, README, ROOT, blocks, run_page
from support.programs import run_ranks

import realign_fast
from realign_fast import Corpus, ReAlign
from realign_fast.cli.main import main
from realign_fast.demo import DATA

DOCS = ROOT / "docs"


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_nb", "furo", "matplotlib"):
        pytest.importorskip(package)
    committed = (DOCS / "command_line.md").read_text()
    options = ["-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    run = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    api = (tmp_path / "site" / "api" / "package.html").read_text()
    assert 'id="realign_fast.ReAlign.fit"' in api
    notebook = (tmp_path / "site" / "notebook.html").read_text()
    assert re.search(r"texts that find their image: \d+% before, \d+% in the space", notebook)
    assert notebook.count("data:image/png") + notebook.count("_images/") >= 2
    assert (DOCS / "command_line.md").read_text() == committed, "commit the page that was written"


def test_the_api_index_lists_every_public_name(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS))
    conf = importlib.import_module("conf")
    index = (DOCS / "api" / "index.md").read_text()
    assert conf.api_tables() in index, "build the site, and commit the page that was written"
    for module, page in conf._PUBLIC.items():
        assert module in (DOCS / "api" / f"{page}.md").read_text()
    for module, (names, page) in conf._FURTHER.items():
        text = (DOCS / "api" / f"{page}.md").read_text()
        assert all(f"{module}.{name}" in text for name in names)
    tables = re.sub(r"^\| argument \|.*?\n\n", "", conf.api_tables(), flags=re.S | re.MULTILINE)
    entries = re.findall(r"^\| `(.*?)` \| (.*) \|$", tables, re.MULTILINE)
    assert len(entries) > 100 and not [name for name, text in entries if len(text.strip()) < 10]
    for name in ("ReAlign", "Moments", "SharedSpace", "Corpus"):
        kind = getattr(realign_fast, name)
        section = index.split(f"\n### {name}\n")[1].split("\n#")[0]
        members = {name for name in vars(kind) if not name.startswith("_")}
        listed = {re.split(r"\W", shown)[0] for shown in re.findall(r"^\| `(.*?)`", section, re.M)}
        assert {name for name in members if inspect.isfunction(vars(kind)[name])} <= listed


def test_pages_import_public_names_alone(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS))
    conf = importlib.import_module("conf")
    public = {
        module: set(conf._public_names(importlib.import_module(module))) for module in conf._PUBLIC
    }
    public |= {module: {*names} for module, (names, _) in conf._FURTHER.items()}
    modules = {name.rpartition(".")[2] for name in public}
    hidden = []
    for page in PAGES:
        for block in blocks(page):
            pattern = r"^from (realign_fast[\w.]*) import (\w[\w, ]*)$"
            for module, names in re.findall(pattern, block.code, re.MULTILINE):
                if block.language == "python":
                    listed = public.get(module, set()) | modules
                    hidden += [
                        f"{page.name}: {module}.{name}"
                        for name in names.split(", ")
                        if name not in listed
                    ]
    assert not hidden


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names and files that the pages' code starts from, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text, image = (
        torch.from_numpy(np.asarray(Corpus(DATA / "heldout", side))).float()
        for side in ("text", "image")
    )
    for folder in ("embeddings", "part_1", "part_2", "parts"):
        Path(folder).mkdir()
        np.save(f"{folder}/{folder}.npy", text.numpy())
    lines = (DATA / "heldout" / "metadata" / "metadata_0.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    rows = {"text_rows": text, "image_rows": image, "query_rows": text[:50]}
    return rows | {"text_captions": captions, "image_captions": captions}


RUN = [page for page in PAGES[1:] if any(block.is_run for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, names, capsys):
    run_page(page, names)
    if page.stem == "pytorch":
        fitted = ReAlign.fit(names["text_rows"], names["image_rows"])
        torch.testing.assert_close(names["streamed"].recentre, fitted.recentre)
        text = names["text_rows"]
        assert torch.equal(names["empty"](text), names["model"](text))
        assert names["model"][1].weight.grad.any() and names["rows"].grad.isfinite().all()
        assert int(names["checkpoint"]["moments"]["counts"][0]) == len(text)
        saved, loaded = names["documents_module"], names["Documents"](names["space"])
        save_model(saved, "documents.safetensors")
        load_model(loaded, "documents.safetensors")
        assert torch.equal(loaded(text), saved(text))
        assert not torch.equal(saved(text), names["space"].text(text))
    if page.stem == "measure":
        figures = re.findall(
            r"^\w+ [\w ]+\d\.\d{4} \d\.\d{4}$", capsys.readouterr().out, re.MULTILINE
        )
        assert (
            len(figures) == 10 and "".join(f"    {line}\n" for line in figures) in page.read_text()
        )
    if page.stem == "revision":
        printed = capsys.readouterr().out
        assert "".join(f"    {line}\n" for line in printed.splitlines()) in page.read_text()
    if page.stem == "start":
        assert "0.392881 -> 0.000462" in capsys.readouterr().out, "the page quotes these figures"
        assert names["scores"].argmax(axis=1).tolist() == [0, 1, 2, 3, 4]


def test_the_maps_of_the_page_are_compared(names, capsys):
    page = DOCS / "measure.md"
    (block,) = (b for b in blocks(page) if b.comment.endswith("test_site.py runs this"))
    code = block.code.replace("steps=4000", "steps=50").replace("seeds=range(3)", "seeds=range(2)")
    assert code.count("steps=50,") == code.count("seeds=range(2)") == 1
    exec(compile(code, page.name, "exec"), names)
    line = r"^(\w[\w ]*\w) +\.?\d.* \(.* to .*\)$"
    printed = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert printed == ["source", "ReAlign", "centred", "optimal transport", "target"]
    quoted = re.findall(line.replace("^", "^    "), page.read_text(), re.MULTILINE)
    assert quoted == printed


def test_the_script_for_ddp_continues_after_its_checkpoint(tmp_path):
    (block,) = (
        b for b in blocks(DOCS / "pytorch.md") if b.comment.endswith("test_site.py runs this")
    )

    def train(script, steps, ranks=2):
        code = block.code.replace("CHECKPOINT = 64, 4, 2", f"CHECKPOINT = 64, {steps}, 2")
        assert code.count(f"= 64, {steps}, 2") == 1
        if script == "whole":
            code = code.replace('"checkpoint.pt"', '"whole.pt"')
        (tmp_path / f"{script}.py").write_text(code)
        return run_ranks(ranks, f"{script}.py", cwd=tmp_path).strip()

    assert train("half", 2) == "began at step 0, 512 rows of 2 ranks"
    assert train("train", 4) == "began at step 2, 1024 rows of 2 ranks"
    assert train("whole", 4) == "began at step 0, 1024 rows of 2 ranks"
    states = [
        torch.load(tmp_path / name, weights_only=True) for name in ("checkpoint.pt", "whole.pt")
    ]
    for name, value in states[0]["model"].items():
        exact = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(value, states[1]["model"][name], **exact)
    # On fewer and on more ranks no moments are lost and none count twice.
    assert train("fewer", 6, ranks=1) == "began at step 4, 1280 rows of 1 ranks"
    assert train("more", 8, ranks=3) == "began at step 6, 2048 rows of 3 ranks"


def test_blocks_that_are_not_run_say_why():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python" and not block.is_run:
                test = re.match(r"(tests/\S+) runs this", block.comment)
                assert not test or page.name in (ROOT / test[1]).read_text(), block.comment
            known = block.language in ("python", "sh", "json", "sql", "dockerfile")
            known = known or block.language.startswith("{")
            assert known, f"{page.name}: {block.code[:60]}"


def test_the_support_page_has_the_minimum_versions_of_pyproject():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    demands = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    minimums = {}
    for demand in demands:
        name, version = re.match(r"([\w-]+)(?:\[\w+\])?(?:>=([\d.]+))?", demand).groups()
        minimums.setdefault(name, set()).add(version or "none")
    section = (
        (DOCS / "support.md").read_text().split("## Versions of packages\n")[1].split("\n#")[0]
    )
    table = re.findall(r"^\| ([\w, -]+) \|[^|]*\| ([\d.]+|none) \|", section, re.MULTILINE)
    assert len(table) > 10
    for names, minimum in table:
        assert {name: minimums[name] for name in names.split(", ")} == {
            name: {minimum} for name in names.split(", ")
        }


def test_pictures_are_small():
    assert not [path.name for path in (DOCS / "images").iterdir() if path.stat().st_size > 150_000]


@pytest.mark.slow
def test_the_pictures_are_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    pictures = pytest.importorskip("pictures")
    monkeypatch.setattr(pictures, "IMAGES", tmp_path)
    pictures.main()
    names = [
        sorted(path.name for path in folder.iterdir()) for folder in (tmp_path, DOCS / "images")
    ]
    assert names[0] == names[1]


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in slugs(target), f"{page.name} links to {link}#{anchor}"


LINES = [
    line.split("#")[0].split()
    for page in PAGES
    if page.stem not in ("command_line", "changelog")
    for block in blocks(page)
    if block.language == "sh"
    for line in re.findall(r"realign-fast \w.*", block.code.replace("\\\n", " "))
]
COMMANDS = {
    words[1]: {word for line in LINES if line[1] == words[1] for word in line} for words in LINES
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_knows_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {word for word in COMMANDS[command] if word.startswith("--")} <= known


SCRIPTS = [
    path
    for folder in ("examples", "benchmarks", "tests/hostile", "tests/support", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".sh", "") and path.is_file()
]
OF_OTHER_PROGRAMS = set(
    "--help --install-completion --mem --time --requeue --constraint --minutes --remove --format "
    "--object-store-memory --no-deps --inplace --all-files --nproc-per-node --config_file".split()
)
PROSE = [page for page in PAGES if page.stem not in ("changelog", "command_line")]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_prose_names_nothing_that_is_gone(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert {*re.findall(r"realign-fast\s+([a-z][\w-]*)", prose)} <= {*COMMANDS}
    code = "\n".join(re.findall(r"`([^`]+)`", prose))
    options = {*re.findall(r"(?<![\w-])--[a-z][\w-]+", code)} - OF_OTHER_PROGRAMS
    known = (DOCS / "command_line.md").read_text()
    options = {option for option in options if f"`{option}`" not in known}
    defined = "\n".join(path.read_text("utf-8") for path in SCRIPTS) if options else ""
    assert not {option for option in options if f'"{option}"' not in defined}
    roots = {"metrics": realign_fast.metrics, "realign_fast": realign_fast}
    roots |= {"whiten": importlib.import_module("realign_fast.whiten")}
    public = {name: getattr(realign_fast, name) for name in realign_fast.__all__}
    roots |= {name: kind for name, kind in public.items() if inspect.isclass(kind)}
    names = rf"(?<![\w./\"-])({'|'.join(roots)})\.(\w*[a-z]\w*)(?![\w/]|\.(?:py|md|so))"
    for root, name in re.findall(names, code):
        owner = roots[root]
        found = hasattr(owner, name) or name in getattr(owner, "__annotations__", {})
        if not found and inspect.ismodule(owner):
            found = importlib.util.find_spec(f"{owner.__name__}.{name}")
        assert found, f"{root}.{name}"


def test_the_pages_show_every_command():
    documented = set(re.findall(r"^### ([\w-]+)", (DOCS / "command_line.md").read_text(), re.M))
    assert documented == set(COMMANDS)
    assert README in PAGES
