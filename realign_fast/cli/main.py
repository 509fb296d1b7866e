"""The command ``realign-fast``: its arguments and signals, and the commands info and demo."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from inspect import Signature
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .. import __version__, _startup
from ..interface.option_values import OptionError, UnfinishedShards
from ..storage.errors import explained, memory_explained
from ..storage.paths import write_json
from . import align_commands, corpus_commands, result_commands, revision_commands  # noqa: F401
from . import options as opts
from .app import COMMANDS, LOGGER, ExitCode, Result, command, escaped, unwritable_output, write

SCHEMA_VERSION = 1  # of every JSON document that is printed; a field that is added keeps it

_UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that Typer brings
_GROUPS = ("Align", "Rows", "Results", "ReVision")  # of commands, in help
_WORDING = (  # of pydantic, which checks the values of options, and ours
    (": Value error, ", ": "),
    ("Input should be a valid", "expected a valid"),
    ("Input should be", "expected a number"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run ``realign-fast`` and return its exit status (:class:`.app.ExitCode`).

    Raises:
        SystemExit: help or the version was asked for, or the options cannot be read (status 2).
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):  # names that are not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    name = "".join(word for word in arguments[:1] if not word.startswith("-"))
    as_json = "--json" in arguments
    LOGGER.handlers = [Messages("--log-json" in arguments, as_json)]
    show_warning = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: LOGGER.warning("%s", message)
    try:
        with memory_explained():
            return _invoke(arguments)
    except (Exception, KeyboardInterrupt) as error:
        code = _report_error(error, name, as_json)
        if isinstance(error, _UsageError):
            raise SystemExit(code) from error
        return code
    finally:
        warnings.showwarning = show_warning
        LOGGER.handlers = []  # a program that calls main has its own
        LOGGER.setLevel(logging.NOTSET)


def _invoke(arguments: list[str]) -> int:
    application = _application()
    if "_REALIGN_FAST_COMPLETE" in os.environ:
        application.main(arguments, "realign-fast")
    output = explained(unwritable_output) if "--help" in arguments else nullcontext()
    try:
        with output, application.make_context("realign-fast", arguments) as context:
            return int(application.invoke(context))
    except (typer.Exit, SystemExit) as done:  # of rich with status 1: head has read enough of help
        write()
        raise SystemExit(getattr(done, "exit_code", ExitCode.DONE)) from None


@cache
def _application() -> Any:
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback()(_root)
    for entry in sorted(COMMANDS, key=lambda entry: _GROUPS.index(entry.group)):
        name = entry.function.__name__.replace("_", "-")
        lines = [f"realign-fast {name} {example}" for example in entry.examples]
        epilog, panel = "\n\n".join(["Examples:", *lines]), entry.group
        run: Any = lambda function=entry.function, **values: _execute(function, **values)  # noqa: E731
        run.__signature__ = Signature(opts.parameters(entry.function))
        app.command(name, help=entry.function.__doc__, epilog=epilog, rich_help_panel=panel)(run)
    return typer.main.get_command(app)


def _execute(function: Callable[..., Result | None], **values: Any) -> ExitCode:
    """Run a command with the values of its options, print its result, return the exit status."""
    if values.get("backend"):  # for the processes of a run too, and before the kernels are loaded
        os.environ["REALIGN_FAST_BACKEND"] = values["backend"]
    with _startup.without_collection():
        from .. import ops  # noqa: F401  # torch and the kernels
    hints = get_type_hints(function)
    options: opts.Common = hints["options"](**values)
    LOGGER.setLevel("ERROR" if options.quiet else options.log_level.upper())
    logging.getLogger("realign_fast.progress").setLevel("INFO" if options.log_json else "WARNING")
    logging.getLogger("realign_fast.passes").setLevel("NOTSET")
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    own = {name: values[name] for name in hints.keys() & values.keys()}
    result = function(options, **own) or Result({}, "")
    if result.report:
        left_out = {*get_type_hints(opts.Common), "dry_run"}
        chosen = {key: value for key, value in vars(options).items() if key not in left_out}
        run = {"command": function.__name__, "directory": os.getcwd(), "options": chosen}
        write_json(result.report, json.loads(result.report.read_bytes()) | {"run": run})
    if options.as_json and result.facts:
        write(_document(function.__name__.replace("_", "-"), result.facts))
    elif result.text and (result.answer or not options.quiet):
        write(result.text)
    write()  # what the command printed itself
    return result.status


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit status that an error stands for."""
    full = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM)
    of_numbers = {errno.EBUSY: ExitCode.LOCKED, **dict.fromkeys(full, ExitCode.SPACE)}
    codes: list[tuple[Any, ExitCode]] = [
        (Terminated, ExitCode.TERMINATED),
        (KeyboardInterrupt, ExitCode.INTERRUPTED),
        ((OptionError, _UsageError), ExitCode.USAGE),
        (UnfinishedShards, ExitCode.INCOMPLETE),
        (ImportError, ExitCode.PACKAGE),
        ((ConnectionError, ChildProcessError), ExitCode.ENGINE),
        (OSError, of_numbers.get(getattr(error, "errno", None) or 0, ExitCode.PLACE)),
        ((ValueError, TypeError), ExitCode.DATA),
    ]
    return next((code for known, code in codes if isinstance(error, known)), ExitCode.UNEXPECTED)


def _report_error(error: BaseException, name: str, as_json: bool) -> ExitCode:
    """Print an error, as a JSON document too if that is asked for, and return its exit status."""
    code = exit_code_of(error)
    try:
        write()
    except OSError as full:  # then this is what the error was, unless it is of another kind
        error = full if code is ExitCode.SPACE else error
    message = " ".join(str(error).splitlines())
    if isinstance(error, OSError) and error.strerror:  # without "[Errno]"
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, KeyboardInterrupt):
        message = message or "files that it wrote, if any, are whole"
    if isinstance(error, _UsageError):
        message = " ".join(error.format_message().split())
        if cause := getattr(error.__cause__, "errors", None):  # of pydantic
            message += f", got {cause()[0]['input']!r}" * ("Input should be" in message)
        for wording in _WORDING:
            message = message.replace(*wording)
        context = getattr(error, "ctx", None)
        usage = context.get_usage() if context else "usage: realign-fast COMMAND"
        LOGGER.error(f"{usage[0].lower()}{usage[1:]}", extra={"event": {"event": "usage"}})
    if code is ExitCode.UNEXPECTED:
        trace = "".join(traceback.format_exception(error)).rstrip()
        LOGGER.error(trace, extra={"event": {"event": "trace"}})
        message = f"{type(error).__name__}: {message}; this is a fault of realign-fast: report it"
    if as_json:
        fields = {"exit_code": int(code), "kind": code.name.lower(), "message": message}
        try:
            write(_document(name, {"error": fields}))
        except OSError as full:
            LOGGER.error(full.strerror)
    LOGGER.error(message, extra={"event": {"event": "error", "kind": code.name.lower()}})
    return code


def _document(name: str, facts: dict[str, Any]) -> str:
    return _json({"schema_version": SCHEMA_VERSION, "command": name, **facts}, indent=2)


def _json(facts: dict[str, Any], indent: int | None = None) -> str:
    """Return JSON that holds bytes of names which are not UTF-8 as texts such as ``\\xff``."""
    text = json.dumps(facts, default=str, ensure_ascii=False)
    return json.dumps(json.loads(escaped(text, "\\\\x")), indent=indent)


class Messages(logging.Handler):
    """Messages of the package: for people on stdout and stderr, or lines of JSON on stderr."""

    def __init__(self, as_lines: bool, as_json: bool) -> None:
        super().__init__()
        self.as_lines, self.on_stderr = as_lines, as_json or as_lines

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        text, event = record.getMessage(), getattr(record, "event", {})
        if self.as_lines:
            facts = {"time": record.created, "level": record.levelname.lower(), "message": text}
            text = _json(facts | event)
        elif event.get("event") not in ("pass", "usage", "trace"):
            label = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            if event.get("kind") in ("interrupted", "terminated"):
                label = "stopped; "
            text = f"realign-fast: {label}{text}"
        on_stdout = event.get("event") == "pass" and not self.on_stderr
        write(text, sys.stdout if on_stdout else sys.stderr)


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: the run stops as with Ctrl-C."""


def _terminate(*_: object) -> None:
    if callable(signal.getsignal(signal.SIGCHLD)):
        # A DataLoader's handler would raise an error of its workers, which got SIGTERM as well.
        signal.signal(signal.SIGCHLD, lambda *_: None)
    raise Terminated


def _print_version(is_given: bool) -> None:
    if is_given:
        write(f"realign-fast {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """Move the embeddings of one modality into the distribution of another."""


@command("Results", "", "--json")
def info(options: opts.Common) -> Result:
    """Show versions and which kernel computes each op, and why."""
    import platform

    import numpy
    import torch

    from .. import ops
    from .._libraries import build_info
    from ..corpus.io_extension import reader_description
    from ..ops.chooser import verdict_of

    cuda = torch.cuda.is_available()
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if cuda else None
    facts: dict[str, Any] = {
        "realign_fast": __version__,
        "commit": build_info().get("commit") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu": f"{ops.cpu_instruction_set()} kernels, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "cuda kernels": ops.why_no_cuda() or "loaded",
        "files": reader_description(),
    }
    lines = [f"{name:13} {value or 'none that torch can use'}" for name, value in facts.items()]
    facts |= {"ops": {op: {} for op in ops.OPS}, "checks": {}}
    devices = ("cpu", "cuda") if cuda else ("cpu",)
    for device in devices:
        verdict = facts["checks"][device] = verdict_of(torch.device(device))
        summary = "; ".join(verdict["faults"]) or "every result was right"
        dated = f"{verdict['date']}, {summary}" if verdict["date"] else "none (realign-fast check)"
        lines.append(f"{'check':13} {device}: {dated}")
    for op, device in product(ops.OPS, devices):
        backend = ops.backend_of(op, device)
        facts["ops"][op][device] = backend._asdict()
        lines.append(f"{op:13} {device}: {backend.kernel} ({backend.why})")
    return Result(facts, "\n".join(lines), answer=True)


@command("Results", "", "--device cuda --json")
def check(options: opts.Common, device: opts.Device = None) -> Result:
    """Try every kernel on a device against float64, and time those that are right."""
    from .. import device_check
    from ..interface.devices import check_device

    facts = device_check.check(check_device(device))
    status = ExitCode.FAULTS if facts["faults"] else ExitCode.DONE
    return Result(facts, device_check.table_of(facts), status, answer=True)


@command("Align", "", "--report", "--out DIR --quiet")
def demo(
    options: opts.Common,
    out: opts.LocalOut = "realign_fast_demo",
    report_too: opts.WithReport = False,
) -> Result:
    """Align the built-in embeddings and answer three questions about the result."""
    import contextlib

    from .. import demo

    logging.getLogger("realign_fast.passes").setLevel("WARNING")  # rates are no answer
    with contextlib.redirect_stdout(io.StringIO()) as text:
        facts = demo.run(Path(out), progress=not options.quiet)
    result = Result({"out": out, **facts}, text.getvalue().rstrip(), answer=True)
    return result_commands.with_report(result, out, options, report_too)
