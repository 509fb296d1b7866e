"""The command line as programs use it: exit status, JSON, events, plans."""

import contextlib
import json
import os
import resource
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from support import programs

import realign_fast
from realign_fast.cli import main
from realign_fast.cli.app import COMMANDS, ExitCode
from realign_fast.cli.options import PANELS, Options, parameters
from realign_fast.corpus.format_registry import FORMATS
from realign_fast.interface import progress
from realign_fast.interface.option_values import FormatName
from realign_fast.storage.lock import locked

ROOT = Path(realign_fast.__file__).parents[1]
SIDES = ["--text", "text", "--image", "image"]
ALIGN = ["align", *SIDES, "--out", "out"]
D = 16


NAMES = [entry.function.__name__ for entry in COMMANDS]


def ended(words):
    """The status of a command, whether it returns one or exits."""
    try:
        return main.main(words)
    except SystemExit as stop:
        return stop.code


@pytest.fixture(autouse=True)
def corpora(tmp_path, monkeypatch):
    """`text/` with four shards and `image/` with two, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for side, shards in (("text", 4), ("image", 2)):
        os.mkdir(side)
        for index in range(shards):
            rows = np.random.default_rng(index).standard_normal((50, D)) + (side == "text")
            np.save(f"{side}/emb_{index}.npy", rows.astype("f2"))


def run(*arguments):
    """Run a command with --json and return its status."""
    return main.main([*arguments, "--json"])


def document(capsys):
    """The one JSON document on stdout."""
    return json.loads(capsys.readouterr().out)


def test_every_command_has_an_example_whose_options_it_knows():
    for entry in COMMANDS:
        options = parameters(entry.function)
        flags = {f"--{o.name.replace('_', '-').rstrip('-')}" for o in options} | {
            flag
            for option in options
            for flag in (option.annotation.__metadata__[0].param_decls or ())
        }
        flags |= {str(option.annotation.__metadata__[0].default) for option in options}
        assert entry.examples and entry.function.__doc__
        for word in " ".join(entry.examples).split():
            assert not word.startswith("--") or word in flags, (entry.function, word)
        for option in options:
            info = option.annotation.__metadata__[0]
            assert info.help and info.rich_help_panel in PANELS


def test_the_formats_of_convert_are_those_of_the_registry():
    assert set(get_args(FormatName)) == set(FORMATS)


def snapshot():
    """Every option of every command: its panel, spellings and default."""
    return {
        entry.function.__name__: {
            option.name: [
                info.rich_help_panel,
                info.show_default if isinstance(info.show_default, str) else str(option.default),
                info.help,
            ]
            for option in parameters(entry.function)
            for info in option.annotation.__metadata__
        }
        for entry in COMMANDS
    }


def test_help_is_the_snapshot():
    """Write it anew with `python tests/cli/test_machine.py` and read the difference."""
    assert snapshot() == json.loads((Path(__file__).parent / "help.json").read_text())


def test_help_of_a_command_shows_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main.main(["align", "--help"])
    printed = capsys.readouterr().out
    for word in ("Input", "Output", "Run", "Engine", "16777216", "Examples:", "coral"):
        assert word in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [("al", "align"), ("align --fit", "--fit-rows"), ("align --method c", "coral")],
)
def test_a_shell_completes_commands_options_and_values(capsys, monkeypatch, words, expected):
    monkeypatch.setenv("_REALIGN_FAST_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"realign-fast {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    with pytest.raises(SystemExit):
        main.main([])
    assert capsys.readouterr().out.split() == [expected]


def test_json_of_every_job_of_an_array(capsys):
    parts = [*ALIGN, "--shard"]
    next_round = "this was not the last round: once all jobs have ended, run them with the same"
    for job, ended_at in (("1/2", "source moments"), ("2/2", "source drift"), ("1/2", None)):
        assert run(*parts, job) == 0
        found = document(capsys)
        assert found["command"] == "align" and found["complete"] is False
        assert {"name", "rows", "seconds", "rows_per_second"} <= set(found["passes"][0])
        expected = f"{next_round} options again ({ended_at}:" if ended_at else "the same command"
        assert found["next"].startswith(expected)
    assert run("verify", "out") == ExitCode.INCOMPLETE
    capsys.readouterr()
    assert run(*ALIGN) == 0
    assert [done["rows"] for done in document(capsys)["passes"]] == [0, 0, 0, 100]


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (ALIGN, {"fitted", "passes", "result", "peak_memory_bytes"}),
        (["fit", *SIDES, "--out", "out"], {"fitted", "passes"}),
        (["convert", "text", "out", "--to", "safetensors"], {"rows", "shards", "out"}),
        (["info"], {"torch", "ops", "gpu"}),
        ([*ALIGN, "--dry-run"], {"passes", "rows", "bytes_read", "bytes_written"}),
    ],
)
def test_json_has_the_documented_fields(capsys, command, keys):
    assert run(*command) == 0
    found = document(capsys)
    assert keys | {"schema_version", "command"} <= set(found)


def zero_row(stack):
    """A row without a direction."""
    np.save("text/emb_1.npy", np.zeros((50, D), "f2"))


def garbage(stack):
    """Files that are not what their names say."""
    for name in ("text/emb_0.npy", "list.json", "out/__realign__/manifest.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("garbage")


def lock(stack):
    """Another process works on the output."""
    os.mkdir("out")
    stack.enter_context(locked(Path("out/__realign__/_stats")))


def fitted(stack):
    """An aligner, which `apply` needs."""
    assert main.main(["fit", *SIDES, "--out", "fitted", "--quiet"]) == 0


def locked_and_fitted(stack):
    fitted(stack)
    lock(stack)


def aligned(stack):
    assert main.main([*ALIGN, "--quiet"]) == 0


def other_aligned(stack):
    """The result of other rows, whose shards have the same names."""
    aligned(stack)
    os.mkdir("other")
    for path in Path("text").iterdir():
        np.save(Path("other") / path.name, -np.load(path))


def unified(stack):
    assert main.main(["unify", *SIDES, "--out", "out", "--quiet"]) == 0


def fault(stack):
    """A shard of a result that is gone."""
    aligned(stack)
    os.unlink("out/emb_0.npy")


def part(stack):
    """The statistics of one of two jobs."""
    assert main.main([*ALIGN, "--shard", "1/2", "--quiet"]) == 0


def full_disk(stack):
    """No file can grow, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)


def full_disk_and_fitted(stack):
    fitted(stack)
    full_disk(stack)


def full_stdout(stack):
    """A full disk under the output of the shell."""
    file = stack.enter_context(open("/dev/full", "w"))
    stack.enter_context(contextlib.redirect_stdout(file))


def full_stdout_aligned(stack):
    aligned(stack)
    full_stdout(stack)


def nothing(stack):
    """Leave the corpora as they are."""


def files_of(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


TEXT, RAY = "--text text --image image --out out", "--engine ray --ray-address 127.0.0.1:9"
OTHER = TEXT.replace("text text", "text other")
TRAIN = "--data list.json --rows text --ids row --out out"
LOOK = "--model nowhere --rows text"
# Everything that can go wrong with a command, as a scheduler sees it.
FAILURES = [
    (ExitCode.FAULTS, fault, ["verify out"]),
    (ExitCode.USAGE, nothing, [f"{name.replace('_', '-')} --unknown" for name in NAMES]),
    (ExitCode.USAGE, nothing, ["align --text text --image image --out text",
        "embed --model m --out o",
        "unify --text text --out o",
        "convert text o --to npy --modality image",
        f"align {TEXT} --cpus-per-task 2", f"align {TEXT} --threads 0",
        f"pretrain --language-model m {TRAIN} --modality text"]),
    (ExitCode.USAGE, other_aligned, [f"fit {OTHER}", f"fit {OTHER} --dry-run",
        f"fit {OTHER} --shard 1/2"]),
    (ExitCode.USAGE, aligned, [f"unify {TEXT}"]),
    (ExitCode.USAGE, unified, [f"fit {TEXT}", f"fit {TEXT} --dry-run", f"align {TEXT}",
        f"align {TEXT} --shard 1/2"]),
    (ExitCode.DATA, zero_row, [f"align {TEXT}", f"fit {TEXT}", f"align {TEXT} --shard 2/2"]),
    (ExitCode.DATA, garbage, [f"align {TEXT}", f"align {TEXT} --dry-run",
        "apply --aligner list.json --text text --out o", "verify out",
        "unify --text text --image image --out o", "convert text o --to npy",
        "embed --images text --model m --out o", f"pretrain --language-model m {TRAIN}",
        f"finetune --model m {TRAIN}", f"caption {LOOK}", f"chat {LOOK} --row 1",
        "evaluate --model m --data list.json --rows text"]),
    (ExitCode.INCOMPLETE, part, ["verify out"]),
    (ExitCode.LOCKED, lock, [f"align {TEXT}", f"fit {TEXT}", f"unify {TEXT}",
        "verify out", f"align {TEXT} --shard 1/2"]),
    (ExitCode.LOCKED, locked_and_fitted, ["apply --aligner fitted --text text --out out"]),
    (ExitCode.PLACE, nothing, ["align --text no --image image --out o",
        "align --text text --image no --out o", "fit --text no --image image --out o",
        "align --text no --image image --out o --dry-run",
        "unify --text no --image image --out o",
        "apply --aligner no --text text --out o", "convert no o --to npy",
        "verify no", "embed --images no --model m --out o",
        "pretrain --language-model m --data no --rows text --out o",
        "finetune --model m --data no --rows text --out o", "caption --model m --rows no",
        "chat --model m --rows no --row 1", "evaluate --model m --data no --rows text"]),
    (ExitCode.ENGINE, nothing, [f"align {TEXT} {RAY}", f"fit {TEXT} {RAY}", f"unify {TEXT} {RAY}"]),
    (ExitCode.SPACE, full_disk, [f"align {TEXT}", f"fit {TEXT}", f"unify {TEXT}",
        "convert text o --to npy"]),
    (ExitCode.SPACE, full_disk_and_fitted, ["apply --aligner fitted --text text --out o"]),
    (ExitCode.SPACE, full_stdout, [f"align {TEXT}", f"align {TEXT} --dry-run",
        "info", "info --json", "--help", "--version"]),
    (ExitCode.SPACE, full_stdout_aligned, ["verify out"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "prepare", "command"),
    [(code, prepare, command) for code, prepare, commands in FAILURES for command in commands],
)
def test_each_failure_of_each_command_has_its_status(capsys, code, prepare, command):
    if code is ExitCode.ENGINE:
        pytest.importorskip("ray")
    with contextlib.ExitStack() as stack:
        prepare(stack)
        capsys.readouterr()
        before = files_of("out")
        status = ended(command.split())
    assert code is not ExitCode.USAGE or files_of("out") == before
    printed = capsys.readouterr()
    assert status == code, printed.err
    assert "Traceback" not in printed.err and (code in (1, 4) or "error: " in printed.err)
    if prepare is full_stdout:
        assert "standard output: cannot be written" in printed.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", NAMES)
def test_a_signal_ends_each_command_with_its_status(capsys, monkeypatch, sent, name):
    """The signal arrives when the command begins; tests of whole processes send it in the midst."""
    command = next(entry for entry in COMMANDS if entry.function.__name__ == name)
    begin = Options.__init__
    monkeypatch.setattr(
        Options, "__init__", lambda *a, **values: [begin(*a, **values), signal.raise_signal(sent)]
    )
    words = shlex.split(command.examples[0])
    assert ended([name.replace("_", "-"), *words, "--json"]) == 128 + sent
    assert document(capsys)["error"]["kind"] in ("interrupted", "terminated")


def test_workers_that_the_same_signal_ended_are_no_fault(capsys, monkeypatch):
    """A scheduler sends SIGTERM to all processes, and torch tells of a worker that it ended."""

    def tell(*_):
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")

    both = [signal.SIGTERM, signal.SIGCHLD]

    def stop(*_, **values):
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)

    monkeypatch.setattr(Options, "__init__", stop)
    before = signal.signal(signal.SIGCHLD, tell)
    try:
        assert run("info") == ExitCode.TERMINATED == 143
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert capsys.readouterr().err.splitlines() == [
        "realign-fast: stopped; files that it wrote, if any, are whole"
    ]


def test_a_fault_of_the_program_has_its_status_and_a_trace(capsys, monkeypatch):
    monkeypatch.setattr(Options, "__init__", lambda *a, **values: 1 / 0)
    assert run("info", "--log-json") == ExitCode.UNEXPECTED == 70
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["kind"] == "unexpected"
    trace, error = [json.loads(line) for line in printed.err.splitlines()]
    assert trace["event"] == "trace" and trace["message"].startswith("Traceback")
    assert error["event"] == "error" and "ZeroDivisionError" in error["message"]


def test_quiet_prints_nothing_and_errors_still(capsys):
    assert main.main([*ALIGN, "--quiet"]) == 0
    assert main.main(["convert", "text", "other", "--to", "npy", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main.main(["verify", "nowhere", "--quiet"]) != 0
    assert capsys.readouterr().err.startswith("realign-fast: error: ")


def test_events_are_lines_of_json(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0)
    assert main.main([*ALIGN, "--log-json", "--json"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert {"progress", "pass"} == {event["event"] for event in events}
    apply = [e for e in events if e["event"] == "progress" and e["name"] == "apply"]
    assert [event["done"] for event in apply] == [50 * D * 2 * n for n in (1, 2, 3, 4)]
    assert all(event["total"] == 200 * D * 2 and event["seconds"] >= 0 for event in apply)
    assert json.loads(captured.out)["command"] == "align"


def test_a_report_keeps_the_options_of_its_run():
    assert main.main([*ALIGN, "--method", "mean-shift", "--batch-bytes", "640", "--quiet"]) == 0
    run = json.loads(Path("out/__realign__/report.json").read_text())["run"]
    assert (run["command"], run["directory"]) == ("align", os.getcwd())
    assert run["options"]["method"] == "mean-shift" and run["options"]["batch_bytes"] == 640


@pytest.mark.parametrize("finished", [False, True])
def test_a_dry_run_counts_what_the_run_then_does(capsys, reads, finished):
    if finished:
        assert main.main([*ALIGN, "--quiet"]) == 0
        rows = np.load("text/emb_2.npy")
        np.save("text/emb_2.npy", rows[::-1])
    reads.clear()
    assert run(*ALIGN, "--dry-run") == 0
    plan, size = document(capsys), 50 * D * 2
    assert reads == [] and (finished or plan["bytes_read"] == 14 * size)
    assert run(*ALIGN) == 0
    done = document(capsys)["passes"]
    names = ("name", "rows", "bytes_read", "bytes_written", "finished_before")
    assert [[p[n] for n in names] for p in plan["passes"]] == [[p[n] for n in names] for p in done]
    for name in names[1:]:
        assert plan[name] == sum(step[name] for step in done)


def test_a_dry_run_says_that_other_options_replace_what_is_there(capsys):
    assert main.main([*ALIGN, "--quiet"]) == 0
    assert run(*ALIGN, "--dry-run") == 0
    assert document(capsys)["notes"] == []
    assert main.main([*ALIGN, "--bad-rows", "skip", "--dry-run"]) == 0
    note = "out: the run replaces its 4 shards, as the options, the sources or the map differ"
    assert capsys.readouterr().out.splitlines()[-1].endswith(note)


def test_a_dry_run_writes_nothing(capsys):
    assert run(*ALIGN, "--dry-run") == 0
    plan = document(capsys)
    assert plan["rows"] > 0 and plan["bytes_written"] == 200 * D * 2
    assert sorted(os.listdir()) == ["image", "text"]


def test_a_job_that_is_terminated_is_resumed_from_a_shell():
    """What a scheduler does: SIGTERM at the time limit, and the same command again."""
    rows = np.random.default_rng(0).standard_normal((400_000, D)).astype("f4")
    for index in range(3):
        np.save(f"text/big_{index}.npy", rows)
        os.unlink(f"text/emb_{index}.npy")
    os.unlink("text/emb_3.npy")
    for index in range(2):
        np.save(f"image/emb_{index}.npy", rows[:90])
    command = ["-W", "ignore", "-m", "realign_fast", *ALIGN, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = programs.Program(
        [*command, "--batch-bytes", "65536"], env=environment, stdout=subprocess.PIPE
    )
    while not list(Path("out").glob("__realign__/_stats/source-moments/[!.]*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    error = json.loads(process.communicate(timeout=60)[0])["error"]
    assert (process.returncode, error["kind"]) == (143, "terminated")
    assert main.main([*ALIGN, "--batch-bytes", "65536", "--quiet"]) == 0
    report = json.loads(Path("out/__realign__/report.json").read_text())
    assert report["passes"][0]["finished_before"] >= 400_000


if __name__ == "__main__":
    (Path(__file__).parent / "help.json").write_text(json.dumps(snapshot(), indent=1) + "\n")
