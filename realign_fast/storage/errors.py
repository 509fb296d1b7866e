"""Errors of fsspec's many packages: which may be temporary, and one ``OSError`` for all others.

The packages share no classes, so an error is known by what all have: an HTTP status, somewhere
down the chain of causes, or the name of a class.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from ..interface.option_values import OptionError

Participle = Literal["read", "written", "removed"]

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_NO_CREDENTIALS |= {"DefaultCredentialsError", "LocalTokenNotFoundError"}

# Parameters that sign a URL (AWS, Google, Azure, CloudFront): they change and the file does not.
_SIGNING = "x-(amz|goog)-.*|(aws|google)accesskeyid|key-pair-id|policy|signature|expires"
_SIGNING += "|s[a-z]|sig|sdd|skoid|sktid|skt|ske|sks|skv|spr|ses|rs.."
_UNREACHABLE = re.compile("Connector|EndpointConnection|ConnectTimeout|ConnectionRefused")


def redacted(text: str) -> str:
    """Return a text without the passwords, tokens and signatures of the URLs in it.

    Of a parameter of a web URL that does not sign it a hash of 32 bits is left, so that the URLs of
    two files differ.
    """
    text = re.sub(r"(?<=://)([^/?#@\s:]*):[^/?#\s]*@", r"\1:***@", text)
    text = re.sub(r"(?<=http://|ttps://)[^/?#\s]*@", "***@", text)
    return re.sub(r"https?://[^?\s]*\?[^\s'\"<>)\]]+", _redact_query, text)


def _redact_query(url: re.Match[str]) -> str:
    def _redact(parameter: re.Match[str]) -> str:
        name, value = parameter[1] or "", parameter[2]
        signs = re.fullmatch(_SIGNING, name.removesuffix("="), re.IGNORECASE)
        shown = "" if signs else hashlib.blake2b(value.encode(), digest_size=4).hexdigest()
        return f"{name}***{shown}"

    return re.sub("(?<=[?&])([^=&]*=)?((?:(?!::)[^&])+)", _redact, url[0])


@contextmanager
def explained(explanation: Callable[[str], str]) -> Iterator[None]:
    """Raise errors of the operating system again, with the message ``explanation(reason)``."""
    try:
        yield
    except OSError as error:
        if not error.errno or error.strerror != os.strerror(error.errno):
            raise  # whoever raised it has said what is wrong
        raise OSError(error.errno, explanation(error.strerror)) from error


class NoMemoryError(OSError):
    """Memory ran out; the message says so and what to do."""


@contextmanager
def memory_explained() -> Iterator[None]:
    """Raise the errors of numpy, torch and mmap for memory that ran out as ``NoMemoryError``."""
    try:
        yield
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if not lacks_memory(error) or isinstance(error, NoMemoryError):
            raise
        reason = getattr(error, "strerror", None) or error
        cause = " ".join(str(reason).split()) or "MemoryError"
        message = f"memory ran out ({cause}); what is finished is kept: run the same command again "
        message += "with fewer workers, smaller batches, or a higher limit (ulimit -v)"
        raise NoMemoryError(errno.ENOMEM, message) from error


def lacks_memory(error: Exception) -> bool:
    """Return whether an error says that the system gave no memory, for data, code or a thread."""
    if isinstance(error, OSError) and error.errno:
        return error.errno == errno.ENOMEM
    pattern = ""
    if isinstance(error, RuntimeError):
        pattern = "alloc|out of memory|can't start new thread"
    elif isinstance(error, ImportError | OSError):  # of a library, from the loader of the system
        pattern = "cannot allocate memory|failed to map segment from shared object(?!: Op)"
    has_words = bool(pattern) and bool(re.search(pattern, str(error), re.IGNORECASE))
    return isinstance(error, MemoryError) or has_words


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


def explained_error(
    url: object, error: Exception, attempts: int, operation: Participle = "read"
) -> Exception:
    """Return one error with the URL, the cause and a remedy in its message, and without secrets.

    It is an ImportError if the package of the protocol is not installed, a ValueError if fsspec
    does not know the protocol, and an OSError in all other cases.
    """
    if isinstance(error, ImportError):
        reason = "its protocol is read through another package: install the one that is named"
        return ImportError(f"{url}: {reason} ({error})")
    reason = redacted(str(error))
    cause = f"{type(error).__name__}: {reason}".rstrip(": ")
    if _is_denied(error):
        advice = f"give credentials with which it may be {operation}, as its package wants them"
        return PermissionError(errno.EACCES, f"{url}: access is refused ({cause}); {advice}")
    if isinstance(error, FileNotFoundError) and not may_be_temporary(error):
        written = operation == "written"
        fault = f"its bucket or folder is not there ({reason})" if written else "is not there"
        if not written and "bucket does not exist" in reason:
            fault = "its bucket is not there"
        return FileNotFoundError(errno.ENOENT, f"{url}: {fault}; check its name")
    if "Protocol not known" in reason:
        return OptionError(f"{url}: {reason}; expected one that fsspec knows")
    if "range requests" in reason:
        fault = "its server sends whole files, not the ranges asked for"
        return OSError(errno.EOPNOTSUPP, f"{url}: {fault}; read simplecache::{url}")
    for link in _causes(error):
        if _UNREACHABLE.search(type(link).__name__):
            cause = f"its server cannot be reached: {redacted(str(link))}"
            break
    tries = f" in {attempts} attempts" if may_be_temporary(error) else ""
    advice = "check its name and the connection, then run the same command again"
    if 400 in _http_statuses(error):  # of S3 to HEAD: the answer has no body that names the cause
        advice = f"its credentials may be wrong or expired: renew them; else {advice}"
    return OSError(errno.EIO, f"{url}: cannot be {operation}{tries} ({cause}); {advice}")


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
