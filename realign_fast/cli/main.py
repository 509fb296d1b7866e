"""The command ``realign-fast``: its arguments and signals, and the commands info and demo."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from functools import cache
from inspect import Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from .. import __version__
from ..interface.option_values import OptionError, UnfinishedShards
from ..storage.errors import memory_explained
from . import align_commands, corpus_commands, embed_commands, revision_commands
from .app import COMMANDS, LOGGER, ExitCode, Result, command
from .options import Common, Configured, DemoOptions, parameters

SCHEMA_VERSION = 1  # of every JSON document that is printed; a field that is added keeps it

_UsageError: Any = typer.BadParameter.__mro__[1]  # of the click that Typer brings
_OLD_SPELLINGS = {"--side": "--modality", "--batch": "--batch-size"}  # for one release more
_GROUPS = ("Align", "Job arrays", "Rows", "Results", "ReVision")  # of commands, in help
_SEVERAL = {"caption": ("--row", "--id", "--image")}  # options that take several values


def main(arguments: list[str] | None = None) -> int:
    """Run ``realign-fast`` and return its exit status (:class:`.app.ExitCode`).

    Raises:
        SystemExit: help or the version was asked for, or the options cannot be read (status 2).
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that are not UTF-8 are printed as they are
        sys.stdout.reconfigure(errors="surrogateescape")
    words = _words(sys.argv[1:] if arguments is None else arguments)
    try:
        completing = "_REALIGN_FAST_COMPLETE" in os.environ
        application = _application(None if completing else "".join(words[:1]))
        done = application.main(words, "realign-fast", standalone_mode=False)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        usage = context.get_usage() if context else "usage: realign-fast COMMAND"
        message = " ".join(error.format_message().split())
        print(f"{usage[0].lower()}{usage[1:]}\nrealign-fast: error: {message}", file=sys.stderr)
        raise SystemExit(ExitCode.USAGE) from error
    if isinstance(done, tuple):
        return int(done[0])
    raise SystemExit(done)


@cache
def _application(chosen: str | None) -> Any:
    """Return the command of Typer; only the chosen command has its options, None gives all."""
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
    app.callback()(_root)
    for entry in sorted(COMMANDS, key=lambda entry: _GROUPS.index(entry.group)):
        name = entry.function.__name__
        lines = [f"realign-fast {name} {example}" for example in entry.examples]
        settings: dict[str, Any] = {"help": entry.function.__doc__, "rich_help_panel": entry.group}
        settings["epilog"] = "\n\n".join(["Examples:", *lines])
        is_whole = chosen in (None, name)
        run = _with_signature(name, entry.function) if is_whole else lambda: None
        app.command(name, **settings)(run)
    return typer.main.get_command(app)


def _with_signature(name: str, function: Callable[[Any], Result | None]) -> Callable[..., Any]:
    """Return a function for Typer, which reads the options from its signature."""
    options_class = get_type_hints(function)["options"]

    def run(**values: Any) -> tuple[ExitCode]:
        return (_execute(name, function, options_class(**values)),)

    run.__signature__ = Signature(parameters(options_class))  # type: ignore[attr-defined]
    return run


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit status that an error stands for."""
    number = getattr(error, "errno", None)
    kinds: list[tuple[object, ExitCode]] = [
        (isinstance(error, Terminated), ExitCode.TERMINATED),
        (isinstance(error, KeyboardInterrupt), ExitCode.INTERRUPTED),
        (isinstance(error, OptionError), ExitCode.USAGE),
        (isinstance(error, UnfinishedShards), ExitCode.INCOMPLETE),
        (isinstance(error, ImportError), ExitCode.PACKAGE),
        (isinstance(error, ConnectionError | ChildProcessError), ExitCode.ENGINE),
        (number == errno.EBUSY, ExitCode.LOCKED),
        (number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM), ExitCode.SPACE),
        (isinstance(error, OSError), ExitCode.PLACE),
    ]
    return next((code for holds, code in kinds if holds), ExitCode.DATA)


def _execute(name: str, function: Callable[[Any], Result | None], options: Common) -> ExitCode:
    """Run a command, print its result or its error, and return the exit status."""
    _configure_messages(options)
    if threads := getattr(options, "threads", None):
        import torch

        torch.set_num_threads(threads)
    head = {"schema_version": SCHEMA_VERSION, "command": name}
    try:
        with memory_explained():
            result = function(options)
        if result is None:
            return ExitCode.DONE
        if isinstance(options, Configured) and result.has_report:
            _write_options(name, options)
        if options.as_json:
            print(json.dumps(head | result.facts, indent=2, default=str))
        elif result.text and (result.answer or not options.quiet):
            print(result.text)
        return result.status
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except (ValueError, TypeError, OSError, ImportError, KeyboardInterrupt) as error:
        code, message = exit_code_of(error), str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            message = error.strerror  # the message of this package's errors, without "[Errno]"
        if isinstance(error, KeyboardInterrupt):
            message = message or "what was written is whole"
        if options.as_json:
            fields = {"exit_code": int(code), "kind": code.name.lower(), "message": message}
            print(json.dumps(head | {"error": fields}, indent=2))
        LOGGER.error(message, extra={"event": {"event": "error", "kind": code.name.lower()}})
        return code
    finally:
        LOGGER.handlers = []  # a program that calls main has its own


class Messages(logging.Handler):
    """Messages of the package: for people on stdout and stderr, or lines of JSON on stderr."""

    def __init__(self, options: Common) -> None:
        super().__init__()
        self.as_lines, self.on_stderr = options.log_json, options.as_json or options.log_json

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        text, event = record.getMessage(), getattr(record, "event", {})
        if self.as_lines:
            facts = {"time": record.created, "level": record.levelname.lower(), "message": text}
            text = json.dumps(facts | event, default=str)
        elif event.get("event") != "pass":
            kind = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            if event.get("kind") in ("interrupted", "terminated"):
                kind = "stopped; "
            text = f"realign-fast: {kind}{text}"
            # Bytes of names that are not UTF-8, as a shell takes them in $'...'.
            text = re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text)
        on_stdout = event.get("event") == "pass" and not self.on_stderr
        print(text, file=sys.stdout if on_stdout else sys.stderr, flush=True)


def _configure_messages(options: Common) -> None:
    LOGGER.handlers = [Messages(options)]
    LOGGER.setLevel("WARNING" if options.quiet else options.log_level.upper())
    level = "INFO" if options.log_json else "WARNING"
    logging.getLogger("realign_fast.progress").setLevel(level)
    logging.getLogger("realign_fast.passes").setLevel("NOTSET")
    if options.log_json:
        from ..interface import progress

        progress.interval_seconds = options.progress_interval
    logging.captureWarnings(options.log_json)
    logging.getLogger("py.warnings").handlers = LOGGER.handlers if options.log_json else []


def _write_options(name: str, options: Configured) -> None:
    """Add the options of a run to the report beside its result, where ``--config`` finds them."""
    from ..storage.paths import output_path, write_json

    left_out = {parameter.name for parameter in parameters(Configured)} | {"dry_run"}
    values = {key: value for key, value in vars(options).items() if key not in left_out}
    path = output_path(getattr(options, "out", "")) / options.report
    run = {"command": name, "directory": os.getcwd(), "options": values}
    write_json(path, json.loads(path.read_bytes()) | {"run": run})


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: the run stops as with Ctrl-C."""


def _terminate(*_: object) -> None:
    raise Terminated


def _words(arguments: list[str]) -> list[str]:
    """Return the arguments with present spellings, and with one value after each option."""
    words: list[str] = []
    several, option = _SEVERAL.get((arguments or [""])[0], ()), ""
    for word in arguments:
        name, equals, value = word.partition("=")
        if new := _OLD_SPELLINGS.get(name):
            advice = f"{name} is called {new} now; the old name goes with the next release"
            print(f"realign-fast: warning: {advice}", file=sys.stderr)
            word = new + equals + value
        if word.startswith("--"):
            option = ""
        elif option and words[-1] != option:
            words.append(option)  # --id a b means --id a --id b
        words.append(word)
        option = word if word in several else option
    return words


def _print_version(asked: bool) -> None:
    if asked:
        print(f"realign-fast {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """Move the embeddings of one modality into the distribution of another."""


@command("Results", "", "--json")
def info(options: Common) -> Result:
    """Show versions and which kernel computes each op, and why."""
    import platform

    import numpy
    import torch

    from .. import ops
    from ..corpus.io_extension import reader_description

    cuda = torch.cuda.is_available()
    gpu = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if cuda else None
    facts: dict[str, Any] = {
        "realign_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu": f"{ops.cpu_instruction_set()} kernels, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "cuda kernels": ops.why_no_cuda() or "loaded",
        "files": reader_description(),
    }
    backends = {
        op: {device: ops.backend_of(op, device) for device in ("cpu", *["cuda"] * cuda)}
        for op in ops.OPS
    }
    shown = facts | {"gpu": gpu or "none that torch can use"}
    files = shown.pop("files")
    lines = [f"{name:13} {value}" for name, value in shown.items()]
    for op, kernels in backends.items():
        lines += [
            f"{op:13} {device}: {kernel} ({why})" for device, (kernel, why) in kernels.items()
        ]
    lines.append(f"{'files':13} {files}")
    facts["ops"] = {
        op: {device: backend._asdict() for device, backend in kernels.items()}
        for op, kernels in backends.items()
    }
    return Result(facts, "\n".join(lines), answer=True)


@command("Align", "", "--out DIR --quiet")
def demo(options: DemoOptions) -> Result | None:
    """Align the built-in embeddings and draw the result."""
    import contextlib

    from .. import demo

    logging.getLogger("realign_fast.passes").setLevel("WARNING")  # its table has the rates
    text = sys.stderr if options.as_json else sys.stdout
    with contextlib.redirect_stdout(text):
        facts = demo.run(Path(options.out), progress=not options.quiet)
    return Result({"out": options.out, **facts}, "")


__all__ = ["align_commands", "corpus_commands", "embed_commands", "main", "revision_commands"]

if __name__ == "__main__":
    sys.exit(main())
