"""The parts of every command: its registration, its result, its exit status and what it prints."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, TextIO, TypeVar

from ..storage.paths import StoragePath

LOGGER = logging.getLogger("realign_fast")
CommandFunction = TypeVar("CommandFunction", bound="Callable[..., Result | None]")


class ExitCode(IntEnum):
    """The exit status of every command; docs/commands.md explains each for a scheduler."""

    DONE = 0
    FAULTS = 1  # verify found some
    USAGE = 2  # options that are unknown, missing, or exclude each other
    DATA = 3  # a file, a row or a model is refused
    INCOMPLETE = 4  # shards of other jobs are not finished
    LOCKED = 5  # another process works on the output
    PLACE = 6  # a file, a bucket or a server is not there, or may not be used
    ENGINE = 7  # Ray cannot be reached, or worker processes die
    SPACE = 8  # a disk is full, or memory ran out
    PACKAGE = 9  # an optional package is missing
    UNEXPECTED = 70  # a fault of this program
    INTERRUPTED = 130
    TERMINATED = 143


class Result(NamedTuple):
    """The result of a command: fields for ``--json``, and a text for people."""

    facts: dict[str, Any]
    text: str
    status: ExitCode = ExitCode.DONE
    answer: bool = False  # the text is what was asked for, which --quiet keeps
    report: StoragePath | None = None  # was written, and also keeps the options of the run


class Command(NamedTuple):
    """A command: its name, help and options are those of ``function``."""

    function: Callable[..., Result | None]
    group: str
    examples: tuple[str, ...]


COMMANDS: list[Command] = []


def command(group: str, *examples: str) -> Callable[[CommandFunction], CommandFunction]:
    """Register a function, whose ``options`` are shared and whose other arguments are its own."""

    def _register(function: CommandFunction) -> CommandFunction:
        COMMANDS.append(Command(function, group, examples))
        return function

    return _register


def escaped(text: str, mark: str = "\\x") -> str:
    """Return a text with the bytes of names that are not UTF-8 as a shell takes them in $'...'.

    What a terminal would obey is escaped as in JSON.
    """
    text = re.sub("[\0-\b\v-\x1f\x80-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", text)
    return re.sub("[\udc80-\udcff]", lambda byte: f"{mark}{ord(byte[0]) - 0xDC00:02x}", text)


def unwritable_output(reason: str | None) -> str:
    """Return the message of an error of standard output."""
    advice = "make room where it goes, and run the same command again"
    return f"standard output: cannot be written ({reason}); {advice}"


def write(text: str = "", stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a text, and what was printed before it, at once; on stdout if no stream is given.

    A reader of the stream that has ended, such as ``head``, is no error, but a full disk is one.
    """
    stream = stream or sys.stdout
    try:
        if text:
            stream.write(escaped(text) + end)
        stream.flush()
    except OSError as error:
        if stream not in (sys.stdout, sys.stderr):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # takes what is buffered
        if stream is sys.stdout and not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, unwritable_output(error.strerror)) from error
