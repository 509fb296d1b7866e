"""The command line as programs use it: exit status, JSON, events, options from a report, plans."""

import contextlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
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
    for word in ("Input", "Output", "Run", "Engine", "16777216", "Examples:", "1,000,000"):
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


def test_json_of_every_step_of_a_job_array(capsys):
    schema = {"schema_version": 1}
    keys = {}
    for command in (
        ["stats", "--text", "text", "--out", "parts"],
        ["stats", "--image", "image", "--out", "parts"],
        ["merge", *SIDES, "--out", "parts", "--after", "statistics"],
        [
            "stats",
            "--text",
            "text",
            "--out",
            "parts",
            "--aligner",
            "parts/__realign__/half.safetensors",
        ],
        ["merge", *SIDES, "--out", "parts", "--after", "drift"],
        ["apply", "--text", "text", "--aligner", "parts", "--out", "parts", "--shard", "1/2"],
    ):
        assert run(*command) == 0
        found = document(capsys)
        assert found["command"] == command[0] and schema.items() <= found.items()
        keys[command[0]] = set(found)
    assert {"name", "rows", "seconds", "start_seconds", "rows_per_second"} <= keys["stats"]
    assert run("merge", *SIDES, "--out", "parts") == ExitCode.INCOMPLETE
    found = document(capsys)
    assert not found["complete"] and "2 of 4 shards are not finished" in found["next"]
    assert run("apply", "--text", "text", "--aligner", "parts", "--out", "parts") == 0
    capsys.readouterr()
    assert run("merge", *SIDES, "--out", "parts") == 0
    assert document(capsys)["complete"]


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (ALIGN, {"fitted", "passes", "result", "peak_memory_bytes"}),
        (["fit", *SIDES, "--out", "out"], {"fitted", "passes"}),
        (["convert", "text", "out", "--to", "safetensors"], {"rows", "shards", "out"}),
        (["inspect", "text"], {"rows", "dtype", "sample"}),
        (["info"], {"torch", "ops", "gpu"}),
        (["plan", *ALIGN[1:]], {"passes", "rows", "bytes_read", "requests", "hours"}),
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
    """The statistics of one of two jobs, and none of the other side."""
    assert main.main(["stats", "--text", "text", "--out", "out", "--shard", "1/2", "--quiet"]) == 0


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
        "unify --text text --out o", "evaluate-search --text text --image image",
        "inspect text --modality text", "convert text o --to npy --modality image",
        "stats --out out", f"align {TEXT} --cpus-per-task 2", f"merge {TEXT} --threads 0",
        f"pretrain --language-model m {TRAIN} --modality text", "align --config text/emb_0.npy"]),
    (ExitCode.USAGE, other_aligned, [f"fit {OTHER}", f"fit {OTHER} --dry-run", f"merge {OTHER}",
        "stats --text other --out out", "stats --text other --out out --shard 1/2"]),
    (ExitCode.USAGE, aligned, ["stats --image text --out out", f"unify {TEXT}"]),
    (ExitCode.USAGE, unified, [f"fit {TEXT}", f"fit {TEXT} --dry-run", f"align {TEXT}",
        "stats --text text --out out"]),
    (ExitCode.DATA, zero_row, [f"align {TEXT}", f"fit {TEXT}",
        "stats --text text --out out"]),
    (ExitCode.DATA, garbage, [f"align {TEXT}", f"merge {TEXT}", f"plan {TEXT}",
        "apply --aligner list.json --text text --out o", "inspect text", "verify out",
        "unify --text text --image image --out o", "evaluate-search --text text --image image",
        "substitution --text text --image image", "convert text o --to npy",
        "embed --images text --model m --out o", f"pretrain --language-model m {TRAIN}",
        f"finetune --model m {TRAIN}", f"caption {LOOK}", f"chat {LOOK} --row 1",
        "evaluate --model m --data list.json --rows text"]),
    (ExitCode.INCOMPLETE, part, [f"merge {TEXT}", "verify out",
        "apply --aligner out --text text --out out --shard 1/2",
        "stats --text text --out out --aligner out/__realign__/half.safetensors"]),
    (ExitCode.LOCKED, lock, [f"align {TEXT}", f"fit {TEXT}", f"merge {TEXT}", f"unify {TEXT}",
        "verify out", "stats --image image --out out"]),
    (ExitCode.LOCKED, locked_and_fitted, ["apply --aligner fitted --text text --out out"]),
    (ExitCode.PLACE, nothing, ["align --text no --image image --out o",
        "align --text text --image no --out o", "fit --text no --image image --out o",
        "plan --text no --image image --out o", "merge --text no --image image --out o",
        "unify --text no --image image --out o", "evaluate-search --text no --image image",
        "substitution --text no --image image", "stats --image no --out o",
        "stats --text text --out o --aligner no",
        "apply --aligner no --text text --out o", "convert no o --to npy", "inspect no",
        "verify no", "embed --images no --model m --out o", "align --config no",
        "embed --config text", "pretrain --language-model m --data no --rows text --out o",
        "finetune --model m --data no --rows text --out o", "caption --model m --rows no",
        "chat --model m --rows no --row 1", "evaluate --model m --data no --rows text"]),
    (ExitCode.ENGINE, nothing, [f"align {TEXT} {RAY}", f"fit {TEXT} {RAY}", f"unify {TEXT} {RAY}",
        f"stats --text text --out out {RAY}"]),
    (ExitCode.SPACE, full_disk, [f"align {TEXT}", f"fit {TEXT}", f"unify {TEXT}",
        "stats --text text --out out", "convert text o --to npy"]),
    (ExitCode.SPACE, full_disk_and_fitted, ["apply --aligner fitted --text text --out o"]),
    (ExitCode.SPACE, full_stdout, [f"align {TEXT}", f"plan {TEXT}", "inspect text", "info",
        "inspect text --json", "--help", "--version"]),
    (ExitCode.SPACE, full_stdout_aligned, ["verify out", f"merge {TEXT}"]),
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


def test_events_are_lines_of_json(capsys):
    assert main.main([*ALIGN, "--log-json", "--progress-interval", "0", "--json"]) == 0
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.err.splitlines()]
    assert {"progress", "pass"} == {event["event"] for event in events}
    apply = [e for e in events if e["event"] == "progress" and e["name"] == "apply"]
    assert [event["done"] for event in apply] == [50 * D * 2 * n for n in (1, 2, 3, 4)]
    assert all(event["total"] == 200 * D * 2 and event["seconds"] >= 0 for event in apply)
    assert json.loads(captured.out)["command"] == "align"


def test_a_run_is_repeated_from_its_report(capsys, monkeypatch):
    assert main.main([*ALIGN, "--method", "mean-shift", "--batch-bytes", "640", "--quiet"]) == 0
    first = json.loads(Path("out/__realign__/report.json").read_text())
    assert first["run"]["options"]["method"] == "mean-shift"
    assert (
        main.main(["align", "--config", "out/__realign__/report.json", "--out", "two", "--quiet"])
        == 0
    )
    second = json.loads(Path("two/__realign__/report.json").read_text())
    assert second["fitted"] == first["fitted"] and second["run"]["options"]["out"] == "two"
    assert Path("two/emb_3.npy").read_bytes() == Path("out/emb_3.npy").read_bytes()
    os.mkdir("elsewhere")  # relative paths of the report are those of the directory it was run in
    monkeypatch.chdir("elsewhere")
    assert (
        main.main(["align", "--config", "../out/__realign__/report.json", "--out", "o", "--quiet"])
        == 0
    )
    assert Path("o/emb_3.npy").read_bytes() == Path("../out/emb_3.npy").read_bytes()
    text = Path("../out/__realign__/report.json").read_text()
    for command, content, words in (
        ("fit", text, "holds options of align"),
        ("align", text[:-9], "is no JSON, or was cut off"),
        ("align", "{}", "holds no options of a run"),
        ("align", text.replace('"workers": 1', '"workers": true'), "'workers' is True, expected"),
        ("align", text.replace('"source": "text"', '"source": ["T"]'), "'source' is ['T'], exp"),
        ("align", text.replace('"workers": 1', '"worker": 1'), "'worker' is none of this command"),
    ):
        Path("report.json").write_text(content)
        assert ended([command, "--config", "report.json", "--out", "o"]) == ExitCode.USAGE
        assert words in " ".join(capsys.readouterr().err.split())


def test_an_old_spelling_works_and_warns(caplog):
    words = main._respelled(["pretrain", "--side", "text", "--batch=8", "--batch-size", "4"])
    assert words == ["pretrain", "--modality", "text", "--batch-size=8", "--batch-size", "4"]
    assert caplog.text.count("goes with the next release") == 2
    several = ["caption", "--id", "a", "b", "--ask", "x", "--row", "1", "2"]
    expected = ["--id", "a", "--id", "b", "--ask", "x", "--row", "1", "--row", "2"]
    assert main._respelled(several)[1:] == expected


@pytest.mark.parametrize("finished", [False, True])
def test_a_plan_counts_what_the_run_then_does(capsys, monkeypatch, finished):
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-m", "realign_fast"])
    if finished:
        assert main.main([*ALIGN, "--quiet"]) == 0
        rows = np.load("text/emb_2.npy")
        np.save("text/emb_2.npy", rows[::-1])
    assert run("plan", *ALIGN[1:]) == 0
    plan = document(capsys)
    planned = plan["passes"]
    assert plan["start_seconds"] > 0.1  # the imports of this process, which the run makes too
    whole = plan["start_seconds"] + sum(step["seconds"] for step in planned)
    assert plan["seconds"] == pytest.approx(whole) == 3600 * plan["hours"]
    assert run(*ALIGN) == 0
    done = document(capsys)["passes"]
    names = ("name", "rows", "bytes_read", "bytes_written", "finished_before")
    assert [[p[n] for n in names] for p in planned] == [[p[n] for n in names] for p in done]
    assert not Path("out.plan").exists()


def test_a_plan_at_given_rates_reads_no_rows(capsys, reads):
    rates = ["--read-rate", "6400", "--write-rate", "3200", "--machines", "2"]
    assert run("plan", *ALIGN[1:], *rates) == 0
    found, size = document(capsys), 50 * D * 2
    assert reads == [] and found["bytes_read"] == 14 * size and found["bytes_written"] == 4 * size
    assert found["seconds"] == pytest.approx((14 * size / 6400 + 4 * size / 3200) / 2)


def test_a_dry_run_writes_nothing(capsys):
    for command in (ALIGN, ["convert", "text", "new", "--to", "parquet"]):
        sizes = []
        for dtype in ("float16", "float32"):
            assert run(*command, "--dtype", dtype, "--dry-run") == 0
            plan = document(capsys)
            sizes.append(plan["bytes_written"])
        assert plan["rows"] > 0 and sizes[1] == 2 * sizes[0] > 0
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
