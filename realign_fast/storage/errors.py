"""What fsspec's many packages raise, sorted: what may pass, and one OSError to say the rest with.

They agree on no classes, so errors are known by what all have: an HTTP status, somewhere down the
chain of causes, or the name of a class.
"""

from __future__ import annotations

import errno
import re
from typing import NoReturn

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
_PACKAGES |= {"az": "adlfs", "http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
_PACKAGES |= {"sftp": "paramiko", "ssh": "paramiko", "oss": "ossfs", "gdrive": "gdrivefs"}
_REFUSED = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_REFUSED |= {"DefaultCredentialsError", "LocalTokenNotFoundError"}

_NOBODY = re.compile("Connector|EndpointConnection|ConnectTimeout|ConnectionRefused")


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _statuses(error: Exception) -> set[int]:
    """The HTTP statuses that an error came of."""
    found = set()
    for one in _causes(error):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):  # botocore's
            found.add(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        found |= {getattr(one, "status", None), getattr(answer, "status_code", None)}
    return {status for status in found if isinstance(status, int)}


def _denied(error: Exception) -> bool:
    names = {type(one).__name__ for one in _causes(error)}
    refused = isinstance(error, PermissionError) or names & _REFUSED
    return bool(refused or _statuses(error) & {401, 403})


def may_pass(error: Exception) -> bool:
    """Whether another attempt can help: connections break, servers are busy."""
    if _denied(error) or isinstance(error, ImportError | IsADirectoryError | NotADirectoryError):
        return False
    if statuses := _statuses(error):
        return bool(statuses & {408, 429}) or max(statuses) >= 500
    if isinstance(error, FileNotFoundError):  # of fsspec's HTTP also if nobody answers
        return any("Connect" in type(one).__name__ for one in _causes(error))
    return not isinstance(error, ValueError | TypeError | NotImplementedError | FileExistsError)


def _unanswered(error: Exception) -> BaseException | None:
    """What says that nobody answers, where that is the cause."""
    return next((one for one in _causes(error) if _NOBODY.search(type(one).__name__)), None)


def refuse(url: object, error: Exception, attempts: int, done: str = "read") -> NoReturn:
    """Raise what there is to say, once, with the URL in it; `done` is what was to be done."""
    if isinstance(error, ImportError):
        if str(url) in str(error):
            raise error
        protocol = re.findall("([a-z0-9+.-]+)://", str(url))[-1]
        package = _PACKAGES.get(protocol)
        how = f"pip install {package}" if package else "install the package that it names"
        raise ImportError(f"{url}: {protocol}:// is read through another package: {how} ({error})")
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    if _denied(error):
        advice = "as the package of its protocol wants them"
        advice = f"give credentials with which it may be {done}, {advice}"
        raise OSError(errno.EACCES, f"{url}: access is refused ({said}); {advice}") from error
    if isinstance(error, FileNotFoundError) and not may_pass(error):
        what = f"its bucket or folder is not there ({error})" if done == "written" else ""
        raise OSError(errno.ENOENT, f"{url}: {what or 'is not there'}; check its name") from error
    if "Protocol not known" in str(error):
        raise ValueError(f"{url}: {error}; expected one that fsspec knows") from error
    if "range requests" in str(error):
        what = "its server sends whole files, not the ranges asked for"
        raise OSError(errno.EOPNOTSUPP, f"{url}: {what}; read simplecache::{url}") from error
    tries = f" in {attempts} attempts" if may_pass(error) else ""
    advice = "what is finished is kept: run the same command again"
    if nobody := _unanswered(error):
        said = f"its server cannot be reached: {nobody}"
    raise OSError(errno.EIO, f"{url}: cannot be {done}{tries} ({said}); {advice}") from error
