"""Errors of fsspec's many packages: which may be temporary, and one ``OSError`` for all others.

The packages share no classes, so an error is known by what all have: an HTTP status, somewhere
down the chain of causes, or the name of a class.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn

Participle = Literal["read", "written", "removed"]

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_NO_CREDENTIALS |= {"DefaultCredentialsError", "LocalTokenNotFoundError"}

_UNREACHABLE = re.compile("Connector|EndpointConnection|ConnectTimeout|ConnectionRefused")


@contextmanager
def explained(explanation: Callable[[str], str]) -> Iterator[None]:
    """Raise errors of the operating system again, with the message ``explanation(reason)``."""
    try:
        yield
    except OSError as error:
        if not error.errno or error.strerror != os.strerror(error.errno):
            raise  # whoever raised it has said what is wrong
        raise OSError(error.errno, explanation(error.strerror)) from error


def may_be_temporary(error: Exception) -> bool:
    """Return whether another attempt can help: connections break, and servers are busy."""
    permanent = (ImportError, IsADirectoryError, NotADirectoryError)
    if _is_denied(error) or isinstance(error, permanent):
        return False
    if statuses := _http_statuses(error):
        return bool(statuses & {408, 429}) or max(statuses) >= 500
    if isinstance(error, FileNotFoundError):  # fsspec's HTTP raises it also if nobody answers
        return any("Connect" in type(cause).__name__ for cause in _causes(error))
    return not isinstance(error, ValueError | TypeError | NotImplementedError | FileExistsError)


def raise_explained(
    url: object, error: Exception, attempts: int, operation: Participle = "read"
) -> NoReturn:
    """Raise one error with the URL, the cause and a remedy in its message.

    Args:
        url: what was asked for.
        error: what a package of fsspec raised.
        attempts: how often it was tried.
        operation: what was to be done with the URL.

    Raises:
        ImportError: the package of the protocol is not installed.
        OSError: the server refuses, has no such file, or cannot be reached.
        ValueError: fsspec does not know the protocol.
    """
    if isinstance(error, ImportError):
        _raise_missing_package(url, error)
    cause = f"{type(error).__name__}: {error}".rstrip(": ")
    if _is_denied(error):
        advice = f"give credentials with which it may be {operation}, "
        advice += "as the package of its protocol wants them"
        raise OSError(errno.EACCES, f"{url}: access is refused ({cause}); {advice}") from error
    if isinstance(error, FileNotFoundError) and not may_be_temporary(error):
        fault = "is not there"
        if operation == "written":
            fault = f"its bucket or folder is not there ({error})"
        raise OSError(errno.ENOENT, f"{url}: {fault}; check its name") from error
    if "Protocol not known" in str(error):
        raise ValueError(f"{url}: {error}; expected one that fsspec knows") from error
    if "range requests" in str(error):
        fault = "its server sends whole files, not the ranges asked for"
        raise OSError(errno.EOPNOTSUPP, f"{url}: {fault}; read simplecache::{url}") from error
    if unreachable := _unreachable_cause(error):
        cause = f"its server cannot be reached: {unreachable}"
    tries = f" in {attempts} attempts" if may_be_temporary(error) else ""
    advice = "what is finished is kept: run the same command again"
    message = f"{url}: cannot be {operation}{tries} ({cause}); {advice}"
    raise OSError(errno.EIO, message) from error


def _raise_missing_package(url: object, error: ImportError) -> NoReturn:
    if str(url) in str(error):
        raise error
    from fsspec.registry import known_implementations

    protocol = re.findall("([a-z0-9+.-]+)://", str(url))[-1]
    package = known_implementations.get(protocol, {"class": ""})["class"].partition(".")[0]
    known = package not in ("", "fsspec")  # those of fsspec itself need further packages
    advice = f"pip install {package}" if known else "install the package that it names"
    reason = f"{protocol}:// is read through another package"
    raise ImportError(f"{url}: {reason}: {advice} ({error})")


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _http_statuses(error: Exception) -> set[int]:
    """Return the HTTP statuses in the chain of causes."""
    statuses = set()
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            statuses.add(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        statuses |= {getattr(cause, "status", None), getattr(response, "status_code", None)}
    return {status for status in statuses if isinstance(status, int)}


def _is_denied(error: Exception) -> bool:
    names = {type(cause).__name__ for cause in _causes(error)}
    without_credentials = isinstance(error, PermissionError) or names & _NO_CREDENTIALS
    return bool(without_credentials or _http_statuses(error) & {401, 403})


def _unreachable_cause(error: Exception) -> BaseException | None:
    """Return the cause which says that nobody answers, if there is one."""
    causes = _causes(error)
    return next((cause for cause in causes if _UNREACHABLE.search(type(cause).__name__)), None)
