"""The promises of SECURITY.md about data and models of others, one test for each."""

import contextlib
import io
import json
import os
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from support.revision_parts import CHATML, tiny_llama, word_tokenizer

from realign_fast import Corpus
from realign_fast.cli.main import main
from realign_fast.embed.encoders.hugging_face import LOCAL
from realign_fast.revision.model import load_pretrained
from realign_fast.revision.templates import Chat

ROOT = Path(__file__).resolve().parents[2]
DIMENSION = 8
VISUAL_TOKENS = 4


def rows_of(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)


def contents(folder, *without):
    """The bytes of every file, and the target of every link, below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not any(path.is_relative_to(other) for other in without) and not path.is_dir():
            found[path] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return found


def test_every_promise_has_tests_that_exist():
    promises = (ROOT / "SECURITY.md").read_text().partition("## What is not promised")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| **")]
    assert len(rows) == 9
    for row in rows:
        names = re.findall(r"`(tests/[\w/]+(?:\.py)?)?(?:::(\w+))?`", row)
        names = [name for name in names if any(name)]
        assert names, row
        path = ROOT
        for file, test in names:
            path = ROOT / file if file else path  # a test without a file is in that of the last
            assert path.exists(), path
            assert not test or f"def {test}(" in path.read_text(), (path, test)


# Paths in records and archives.

CLIMBING = ("../victim.npy", "../../victim.npy", "a/../../victim.npy", "{folder}/victim.npy")


def renamed(manifest, place, path):
    """The manifest with a path that its other entries do not have."""
    apply = manifest["passes"]["apply"]
    if place == "folder":
        apply["facts"]["folder"] = path
    else:
        apply["shards"][0][place] = path
    return manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with two sides and the output of align, beside a file of somebody else."""
    folder = tmp_path_factory.mktemp("finished")
    for number, side in enumerate(("text", "image")):
        np.save(folder / f"{side}.npy", rows_of(40, number))
    sides = ["--text", str(folder / "text.npy"), "--image", str(folder / "image.npy")]
    assert main(["align", *sides, "--out", str(folder / "out"), "--quiet"]) == 0
    np.save(folder / "victim.npy", rows_of(40, 2))
    return folder, sides, (folder / "out/__realign__/manifest.json").read_text()


@pytest.mark.parametrize("path", CLIMBING)
@pytest.mark.parametrize("place", ["folder", "name", "stats"])
def test_a_manifest_reaches_no_file_outside_its_output(finished, place, path, capsys):
    folder, sides, sound = finished
    out = folder / "out"
    manifest = out / "__realign__/manifest.json"
    path = path.format(folder=folder.resolve())
    manifest.write_text(json.dumps(renamed(json.loads(sound), place, path)))
    before = contents(folder, out)
    align = ["align", *sides, "--out", str(out)]
    commands = [["verify", str(out)], ["report", str(out)], align]
    for command in commands:
        assert main([*command, "--quiet"]) != 0, command
        assert path[:30] in capsys.readouterr().err  # the rest of a long one is left out
    manifest.unlink()
    assert main([*align, "--quiet"]) == 0
    assert contents(folder, out) == before
    assert main(["verify", str(out), "--quiet"]) == 0


def write_tar(path, names, link):
    """A WebDataset whose samples have these names, and one more member that is a link."""
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            data = io.BytesIO()
            np.save(data, rows_of(1, number)[0])
            for ending, value in (("npy", data.getvalue()), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
        member = tarfile.TarInfo(f"{name}.{'x' if link else 'json'}")
        member.type, member.linkname = (link or tarfile.DIRTYPE), "../victim.npy"
        tar.addfile(member)


@pytest.mark.parametrize("link", [None, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_members_of_a_tar_become_no_files(tmp_path, link, capsys):
    """Names that climb out are names of samples; nothing is unpacked."""
    inside = tmp_path / "inside"
    inside.mkdir()
    np.save(tmp_path / "victim.npy", rows_of(3))
    absolute = str(tmp_path.resolve() / "victim")
    names = ["../victim", "../../victim", absolute, "C:\\victim", "~/victim", "a/../../victim"]
    write_tar(inside / "rows.tar", names, link)
    np.save(inside / "image.npy", rows_of(len(names), 9))
    before = contents(tmp_path)
    read = 0
    for kind in ("npy", "parquet", "tar"):
        command = ["convert", str(inside / "rows.tar"), str(inside / kind), "--to", kind]
        read += main([*command, "--quiet"]) == 0
    sides = ["--text", str(inside / "rows.tar"), "--image", str(inside / "image.npy")]
    read += main(["align", *sides, "--out", str(inside / "aligned"), "--quiet"]) == 0
    outputs = [inside / name for name in ("npy", "parquet", "tar", "aligned")]
    assert contents(tmp_path, *outputs) == before
    assert not any(path.is_symlink() for output in outputs for path in output.rglob("*"))
    found = {path.name for output in outputs for path in contents(output)}
    assert not any("victim" in name for name in found), found
    if link is None:
        assert read == 4, capsys.readouterr().err
        assert len(Corpus(inside / "aligned")) == len(names)


def test_entries_of_an_npz_become_no_files(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    np.save(tmp_path / "victim.npy", rows_of(3))
    entries = {"../victim": rows_of(5), "/victim": rows_of(5, 1)}
    np.savez(inside / "rows.npz", **entries)
    before = contents(tmp_path)
    for column in entries:
        out = inside / str(len(list(inside.iterdir())))
        command = ["convert", str(inside / "rows.npz"), str(out), "--column", column]
        assert main([*command, "--to", "npy", "--quiet"]) in (0, 3)
        assert contents(tmp_path, *inside.glob("[0-9]")) == before


# Models and their templates.

REACH = "cycler.__init__.__globals__.os"
TEMPLATES = {
    "a function of the system": "{{ " + REACH + ".mkdir(PLACE) }}",
    "modules of a helper": "{{ lipsum.__globals__['os'].mkdir(PLACE) }}",
    "classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by filter": "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
    "attributes by format": "{{ '{0.__class__.__mro__}'.format('').x.y }}",
    "frames of a function": "{{ raise_exception.__code__.co_filename }}",
    "a file": "{% include '/etc/hostname' %}",
    "a module": "{% import 'os' as os %}",
    "changed messages": "{{ messages.append(messages[0]) }}",
    "a changed message": "{{ messages[0].update(role='system') }}",
    "a long loop": "{% for i in range(999999999) %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_reaches_nothing(tmp_path, name):
    place = tmp_path / "ran"
    template = TEMPLATES[name].replace("PLACE", repr(str(place)))
    with pytest.raises(ValueError, match="the chat template refuses turns of user"):
        Chat(word_tokenizer(template + CHATML), VISUAL_TOKENS)
    assert not place.exists()


def test_the_templates_would_run_elsewhere(tmp_path):
    """The test above can fail: jinja2 without its sandbox does what the template says."""
    import jinja2

    place = tmp_path / "ran"
    template = TEMPLATES["a function of the system"].replace("PLACE", repr(str(place)))
    jinja2.Environment().from_string(template).render()
    assert place.exists()


CODE = """
from pathlib import Path
from transformers import {base}
Path({place!r}).touch()
class Own({base}):
    pass
"""
PARTS = {
    "AutoConfig": "LlamaConfig",
    "AutoModelForCausalLM": "LlamaForCausalLM",
    "AutoTokenizer": "PreTrainedTokenizerFast",
}


@pytest.fixture(params=PARTS)
def model_with_code(request, tmp_path, monkeypatch):
    """(part, folder, touched): a model whose part is code in its folder, which makes a file.

    transformers asks on the terminal whether to run such code. The answer is yes.
    """
    part, folder, touched = request.param, tmp_path / "model", tmp_path / "touched"
    monkeypatch.setattr("builtins.input", lambda text="": "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(place=str(touched), base=PARTS[part]))
    is_tokenizer = part == "AutoTokenizer"
    file = folder / ("tokenizer_config.json" if is_tokenizer else "config.json")
    settings = json.loads(file.read_text())
    settings["auto_map"] = {part: [None, "own.Own"] if is_tokenizer else "own.Own"}
    settings |= {"tokenizer_class": "Own"} if is_tokenizer else {}
    settings |= {"model_type": "own"} if part == "AutoConfig" else {}
    file.write_text(json.dumps(settings))
    return part, folder, touched


def test_a_language_model_brings_no_code(model_with_code):
    """A class of transformers' own takes its place, or the model is refused."""
    part, folder, touched = model_with_code
    try:
        loaded = load_pretrained(part, folder)
    except ValueError as error:
        assert f"{folder}: cannot be loaded as a language model" in str(error)
    else:
        assert type(loaded).__module__.startswith("transformers.")
    assert not touched.exists()


def test_no_part_of_a_model_is_loaded_with_its_code():
    """Every call of a class of transformers that would ask says no, as the call above does."""
    calls = [
        call
        for path in (ROOT / "realign_fast").rglob("*.py")
        for call in re.findall(r"Auto\w+\.from_pretrained\(.*", path.read_text())
    ]
    assert len(calls) >= 3
    assert [call for call in calls if "**LOCAL" not in call and "=False" not in call] == []
    assert LOCAL["trust_remote_code"] is False


def test_the_code_of_a_model_would_run_elsewhere(model_with_code):
    """The test above can fail: transformers runs the code if it is told to."""
    part, folder, touched = model_with_code
    with contextlib.suppress(Exception):
        getattr(transformers, part).from_pretrained(folder, trust_remote_code=True)
    assert touched.exists()


# Names and texts in a page.


class Elements(HTMLParser):
    """Counts the elements of a page, and collects what could run or load something."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.active = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name.startswith("on") or name in ("src", "href", "action"):
                self.active.append((tag, name, value))


def test_hostile_names_in_a_report_stay_text(tmp_path):
    """Names of folders, files and columns, as far as a file system takes them."""
    attack = "</script><img src=x onerror=alert(1)><script>alert(2)<"
    pages = []
    for name, column in (("rows", "embedding"), ("<img src=x onerror=alert(1)>", attack)):
        folder = tmp_path / name
        folder.mkdir()
        sides = []
        for number, side in enumerate(("text", "image")):
            path = folder / f"{name} & {side}.parquet"
            columns = {"id": list(map(str, range(60))), column: rows_of(60, number).tolist()}
            pq.write_table(pa.table(columns), path)
            sides += [f"--{side}", str(path)]
        out = folder / f"out '{name}\""
        command = ["align", *sides, "--column", column, "--target-column", column]
        assert main([*command, "--out", str(out), "--quiet"]) == 0
        assert main(["report", str(out), "--quiet"]) == 0
        (page,) = out.rglob("*.html")
        pages.append(page.read_text())
    usual, hostile = map(Elements, pages)
    assert hostile.tags == usual.tags and hostile.active == usual.active
    assert "onerror=alert(1)>" not in pages[1] and "onerror=alert(1)&gt;" in pages[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path, capsys, as_json):
    name = "a\x1b[31mRED\x1b]0;title\x07\x9b1m.npy"
    rows = rows_of(40)
    rows[7] = np.nan
    for side in ("text", "image"):
        (tmp_path / side).mkdir()
        np.save(tmp_path / side / name, rows)
    sides = [f"--{side}={tmp_path / side}" for side in ("text", "image")]
    assert main(["align", *sides, "--out", str(tmp_path / "out"), *["--json"][:as_json]])
    out, err = capsys.readouterr()
    assert not re.search("[\0-\b\v-\x1f\x80-\x9f]", out + err)
    assert r"a\u001b[31mRED\u001b]0;title\u0007\u009b1m.npy" in err
    assert not as_json or name in json.loads(out)["error"]["message"]
