"""The command line: what it prints, how it ends, and that every error is one line, no trace."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import programs

from realign_fast import Corpus, ReAlign, ops
from realign_fast.cli import main
from realign_fast.corpus import ShardWriter
from realign_fast.interface.progress import Progress

D = 16
KEPT = {"__realign__", "_stats", "manifest.json"}  # what a run keeps to resume


def files_in(out):
    return {*os.listdir(out), *os.listdir(f"{out}/__realign__")} - KEPT


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    """`--threads` sets torch's number for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpora(tmp_path, monkeypatch):
    """`text/` with two shards and `image/` with one, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for side, shift in (("text", 0.5), ("image", -0.5)):
        os.mkdir(side)
        rows = np.random.default_rng(len(side)).standard_normal((90, D)) + shift
        for index, part in enumerate(np.split(rows.astype("f2"), [50] if side == "text" else [])):
            np.save(f"{side}/emb_{index}.npy", part)
    return tmp_path


ALIGN = ["align", "--source", "text", "--target", "image", "--out", "out"]


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(main.__file__).parents[2])}
    return programs.run("-W", "ignore", "-m", "realign_fast", *arguments, env=environment)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.npy")}


def test_align_from_a_shell(corpora):
    done = run(*ALIGN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no terminal and a short pass: no bar at all
    lines = done.stdout.splitlines()
    starts = ["source moments", "target moments", "source drift", "apply", "centroid gap", "peak"]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert "M rows/s" in lines[0] and "GB/s" in lines[0]
    report = json.loads((corpora / "out" / "__realign__/report.json").read_text())
    assert f"{report['result']['centroid_gap']:.6f}" in lines[4]
    first = shards(corpora / "out")
    assert main.main([*ALIGN[:-1], "again", "--threads", "1"]) == 0
    assert shards(corpora / "again") == first and len(first) == 2


def test_text_and_image_are_synonyms(corpora):
    assert main.main([*ALIGN, "--quiet"]) == 0
    assert main.main(["align", "--text", "text", "--image", "image", "--out", "again"]) == 0
    assert shards(corpora / "again") == shards(corpora / "out")


def test_fit_then_apply_is_align(corpora, capsys):
    assert main.main([*ALIGN, "--quiet"]) == 0
    assert main.main(["fit", "--text", "text", "--image", "image", "--out", "parts"]) == 0
    assert files_in("parts") == {"aligner.safetensors", "report.json"}
    fitted = ReAlign.load("parts/__realign__/aligner.safetensors")
    assert fitted.record == ReAlign.load("out/__realign__/aligner.safetensors").record
    assert json.loads(open("parts/__realign__/report.json").read())["fitted"] == fitted.record
    apply = ["apply", "--aligner", "parts", "--source", "text"]  # a file or its directory
    capsys.readouterr()
    assert main.main([*apply, "--out", "parts"]) == 0
    assert "centroid gap of the rows fitted on" in capsys.readouterr().out
    assert shards(corpora / "parts") == shards(corpora / "out")
    report = json.loads(open("parts/__realign__/report.json").read())
    assert report["result"] == json.loads(open("out/__realign__/report.json").read())["result"]
    assert [one["name"] for one in report["passes"]] == ["apply"]


def test_bad_rows_are_counted_in_the_summary(corpora, capsys):
    rows = np.load("text/emb_1.npy")
    rows[3], rows[5, 1] = 0, np.nan
    np.save("text/emb_1.npy", rows)
    for policy in ("skip", "keep"):
        assert main.main([*ALIGN, "--bad-rows", policy]) == 0
        assert capsys.readouterr().out.count("1 zero and 1 non-finite rows") == 3
        assert np.isnan(np.load("out/emb_1.npy")[5]).all() == (policy == "keep")


def test_apply_on_rows_that_are_all_bad_does_not_crash(corpora, capsys):
    assert main.main(["fit", *ALIGN[1:]]) == 0
    np.save("zeros.npy", np.zeros((4, D), "f2"))
    apply = ["apply", "--aligner", "out/__realign__/aligner.safetensors", "--source", "zeros.npy"]
    capsys.readouterr()
    assert main.main([*apply, "--out", "empty", "--bad-rows", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "of these now n/a" in printed and "4 zero and 0 non-finite rows" in printed
    assert not np.load("empty/zeros.npy").any()
    report = json.loads(open("empty/__realign__/report.json").read())
    assert report["result"] == {"centroid_gap": None, "trace": None}


def spoil(name):
    """One way for `text/emb_1.npy` to be wrong."""
    path, rows = "text/emb_1.npy", np.load("text/emb_1.npy")
    if name == "zero row":
        rows[7] = 0
    elif name == "nan row":
        rows[8, 1] = np.nan
    elif name == "columns":
        rows = rows[:, :5]
    elif name == "fortran":
        rows = np.asfortranarray(rows)
    elif name == "objects":
        rows = rows.astype(object)
    elif name == "integers":
        rows = rows.astype("i4")
    elif name == "other dtype":
        rows = rows.astype("f4")
    elif name == "one axis":
        rows = rows[0]
    np.save(path, rows)
    if name == "truncated":
        os.truncate(path, os.path.getsize(path) - 1)
    elif name == "no npy":
        with open(path, "w") as file:
            file.write("id,embedding\n")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("zero row", "row 7 is zero"),
        ("nan row", "row 8 holds a NaN"),
        ("columns", "[*, 5]"),
        ("fortran", "Fortran order"),
        ("objects", "pickles"),
        ("integers", "<i4"),
        ("other dtype", "float32"),
        ("one axis", "expected [rows, columns]"),
        ("truncated", "truncated"),
        ("no npy", "not a .npy file"),
    ],
)
def test_a_faulty_file_is_one_error_that_names_it(corpora, capsys, fault, words):
    spoil(fault)
    assert main.main(ALIGN) == 3
    printed = capsys.readouterr()
    error = printed.err.splitlines()
    assert len(error) == 1 and error[0].startswith("realign-fast: error: ")
    assert "text/emb_1.npy" in error[0] and words in error[0]
    assert printed.out == "" and (not os.path.exists("out") or set(os.listdir("out")) <= KEPT)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["align", "--source", "nowhere", *ALIGN[3:]], 6, ["nowhere", "No such file"]),
        (["align", "--source", "empty", *ALIGN[3:]], 6, ["empty", "no .npy file"]),
        (["align", "--source", "root", *ALIGN[3:]], 6, ["root", "no text_emb"]),
        ([*ALIGN[:-1], "text"], 2, ["text", "give another --out"]),
        ([*ALIGN[:-1], "image"], 2, ["image", "give another --out"]),
        ([*ALIGN[:-1], "root/img_emb/x.npy"], 6, ["x.npy: is a file, and --out is"]),
        (["fit", *ALIGN[1:-1], "root/img_emb/x.npy"], 6, ["x.npy: is a file, and --out is"]),
        (
            ["apply", "--aligner", "none", "--source", "text", "--out", "out"],
            6,
            ["none", "no such"],
        ),
        (
            ["apply", "--aligner", "text/emb_0.npy", "--source", "text", "--out", "out"],
            3,
            ["text/emb_0.npy", "fit it again"],
        ),
        (
            ["apply", "--aligner", "text", "--source", "text", "--out", "out"],
            6,
            ["text: holds none"],
        ),
        (["align", "--source", "foo://x", *ALIGN[3:]], 2, ["foo://x", "Protocol not known"]),
        ([*ALIGN, "--device", "cuda:99"], 2, ["--device", "cuda:99"]),
        (["convert", "root/img_emb", "text", "--to", "npy"], 2, ["text/emb_0.npy", "is there"]),
    ],
)
def test_a_wrong_argument_is_one_error_that_names_it(corpora, capsys, arguments, status, words):
    os.makedirs("empty")
    os.makedirs("root/img_emb")
    np.save("root/img_emb/x.npy", np.ones((3, D), "f2"))
    assert main.main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("realign-fast: error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not os.path.exists("out") and len(Corpus("text")) == len(Corpus("image")) == 90


def test_an_aligner_that_cannot_be_written_is_one_error(corpora, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # as on a full disk
    try:
        assert main.main(ALIGN) == 8
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith("realign-fast: error: out") and "room" in error
    assert error.count("\n") == 1 and os.listdir("out/__realign__") == ["_stats"]


def test_an_error_from_a_shell_has_its_status_and_no_trace(corpora):
    spoil("zero row")
    done = run("apply", "--aligner", "missing", "--source", "text", "--out", "out")
    assert done.returncode == 6 and "Traceback" not in done.stderr
    assert done.stderr.startswith("realign-fast: error: missing: no such file")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["align"],
        [*ALIGN, "--threads", "0"],
        [*ALIGN[:-1], ""],
        ["align", "--source", "", *ALIGN[3:]],
        ["verify", ""],
        [*ALIGN, "--bad-rows", "drop"],
    ],
)
def test_a_wrong_option_prints_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert "usage: realign-fast" in capsys.readouterr().err


def test_a_number_out_of_range_says_what_was_expected_and_found(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([*ALIGN, "--threads", "999999"])
    error = f"'--threads': expected a number less than or equal to {4 * os.cpu_count()}, got"
    assert stop.value.code == 2 and f"{error} '999999'" in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_from_a_shell_it_stops_and_leaves_no_half(corpora, sent):
    """A disk made slow, and Ctrl-C (or a batch system's TERM) once the first rows are on it."""
    slow = (
        "import signal, sys, time\nfrom realign_fast import corpus\n"
        "from realign_fast.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may have been ignored
        "write = corpus.ShardWriter.write\n"
        "corpus.ShardWriter.write = lambda *a: (time.sleep(0.2), write(*a))\n"
        f"sys.exit(main.main({[*ALIGN, '--batch-bytes', '64']!r}))\n"
    )
    root = str(Path(main.__file__).parents[2])
    process = programs.Program(
        ["-W", "ignore", "-c", slow],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    )
    partial, deadline = "out/.emb_0.npy.partial", time.monotonic() + 60
    while not os.path.exists(partial) or os.path.getsize(partial) <= 128:  # bytes of the header
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert error == "realign-fast: stopped; files that it wrote, if any, are whole\n"
    assert files_in("out") == {"aligner.safetensors"}


def test_interrupted_in_the_second_shard_the_first_stays(corpora, monkeypatch, capsys):
    write = ShardWriter.write

    def interrupted(self, rows):
        if self.path.name == "emb_1.npy":
            raise KeyboardInterrupt
        write(self, rows)

    monkeypatch.setattr(ShardWriter, "write", interrupted)
    assert main.main(ALIGN) == 130
    assert "whole" in capsys.readouterr().err
    assert files_in("out") == {"aligner.safetensors", "emb_0.npy"}


class Terminal:
    """A terminal to print on: keeps what is written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_a_terminal_sees_progress_unless_quiet(corpora, monkeypatch, options):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main.main([*ALIGN, *options]) == 0
    if options:
        assert terminal.text == ""
    else:
        last = terminal.text.split("\r")[-1]
        assert "apply: 100%" in last and "B/s" in last and "M rows/s" in last


def test_a_log_sees_a_line_now_and_then(capsys):
    with Progress(1000, "apply", unit="B", miniters=1, shown=True) as bar:
        clock = itertools.count(bar.start_t, 7)  # seconds; an update looks at it once
        bar._time = lambda: next(clock)
        for _ in range(100):
            bar.update(10)
    lines = capsys.readouterr().err.strip().split("\r")
    assert 15 < len(lines) < 35 and "100%" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ("align --help | head -n 1 && realign info | head -n 1", " "),
        ("info 0<&- >&-", ""),  # a closed stream is as /dev/null
        (" ".join([*ALIGN, "2>&-"]), "source moments"),
    ],
)
def test_a_stream_that_takes_no_more_is_no_error(corpora, arguments, printed):
    command = f'realign() {{ {sys.executable} -m realign_fast "$@"; }}; realign {arguments}'
    root = str(Path(main.__file__).parents[2])
    environment = {"PYTHONPATH": root, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(printed)


def test_info_tells_which_kernel_answers_and_why(capsys):
    assert main.main(["info"]) == 0
    printed = capsys.readouterr().out
    for op in ops.OPS:
        backend = ops.backend_of(op, "cpu")
        assert f"{backend.kernel} ({backend.why})" in printed
        assert any(line.startswith(op) for line in printed.splitlines())
    names = ("realign_fast", "commit", "python", "torch", "numpy", "cpu", "gpu")
    for word in (*names, ops.cpu_instruction_set()):
        assert word in printed
