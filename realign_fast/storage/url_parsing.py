"""The text of a URL in parts: its name, its parent, its children. Nothing here asks a server."""

from __future__ import annotations

import os
import re
from typing import TypeVar
from urllib.parse import quote, unquote

Own = TypeVar("Own", bound="UrlName")


class UrlName:
    """The lexical half of a URL. Equal and hashed by its text; pickled as its text."""

    def __init__(self, text: str) -> None:
        self._text = text
        # The first link of a chain that has a path is where names are; what follows encloses it.
        parts = re.fullmatch("(.*?://)(.*?)((?:::.*)?)", text)
        if not parts:
            raise ValueError(f"{text}: expected a URL, as protocol://place")
        self._prefix, path, self._suffix = parts.groups()
        self._web = self._prefix.endswith(("http://", "https://"))
        self._path: str
        self._path, mark, query = path.partition("?") if self._web else (path, "", "")
        self._suffix = mark + query + self._suffix

    @property
    def name(self) -> str:
        """The last part of the path."""
        last = self._path.rstrip("/").rpartition("/")[2]
        return unquote(last) if self._web else last

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return os.path.splitext(self.name)[1]

    @property
    def protocol(self) -> str:
        """The protocol of the innermost place: ``zip`` of ``zip://a::s3://bucket/b.zip``."""
        return self._prefix.rpartition("::")[2].removesuffix("://")

    @property
    def chained(self) -> bool:
        """True if one file system lies in another."""
        return "::" in self._text

    @property
    def is_web(self) -> bool:
        """True if a web server shows it."""
        return self._web

    @property
    def parent(self: Own) -> Own:
        """The directory it lies in; that of a bucket is the bucket."""
        path, _, last = self._path.rstrip("/").rpartition("/")
        parent = path if path.strip("/") else f"{path}/{last}" if path else last
        return type(self)(f"{self._prefix}{parent}{self._suffix}")

    def resolve(self: Own) -> Own:
        """Return the URL without a slash at its end."""
        return (self / "child").parent

    def is_within(self, folder: object) -> bool:
        """Return whether this URL is ``folder`` or lies in it, by their texts."""
        if not isinstance(folder, UrlName):
            return False
        own_path, folder_path = (url._path.strip("/") + "/" for url in (self, folder))
        return self._prefix == folder._prefix and own_path.startswith(folder_path)

    def __truediv__(self: Own, name: str) -> Own:
        name = quote(name) if self._web else name
        base = f"{self._path.rstrip('/')}/" if self._path else ""
        return type(self)(f"{self._prefix}{base}{name}{self._suffix}") if name else self

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._text!r})"

    def __eq__(self, url: object) -> bool:
        return isinstance(url, UrlName) and url._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __lt__(self, url: UrlName) -> bool:
        return self._text < url._text

    def __reduce__(self: Own) -> tuple[type[Own], tuple[str]]:
        return type(self), (self._text,)
