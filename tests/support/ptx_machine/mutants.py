"""Wrong kernels: the PTX with one thing changed that a test of it has to notice.

Each mutant leaves out a barrier, a wait or a commit, or confuses the fragments of a product. Where
a mutant is not noticed, either a test is missing, or the mutant computes the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A kernel with a fault: what was changed, and the text with the change."""

    kernel: str
    change: str
    module: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.change}"


# Instructions that order threads or copies: each is left out in turn.
ORDERING = r"bar\.sync[^;]*;|bar\.warp\.sync[^;]*;|cp\.async\.wait_group[^;]*;"
ORDERING += r"|cp\.async\.commit_group;"


def _swap(group: int, other: int) -> Callable[[re.Match[str]], str]:
    """Return a replacement that exchanges two groups of a match."""

    def exchanged(match: re.Match[str]) -> str:
        words = list(match.groups())
        words[group - 1], words[other - 1] = words[other - 1], words[group - 1]
        return "".join(words)

    return exchanged


HALF_PRODUCT = r"(mma\.sync\.aligned\.m16n8k16\S+ \{[^}]*\}, \{)(%\w+)(,)(%\w+)(,)(%\w+)(,)(%\w+)"
HALF_PRODUCT += r"(\}, \{)(%\w+)(,)(%\w+)(\})"
# Of every product of a kernel at once: the fragment of A, and that of B.
FRAGMENTS = {
    "words 1 and 2 of A exchanged": (HALF_PRODUCT, _swap(4, 6)),
    "words 0 and 1 of A exchanged": (HALF_PRODUCT, _swap(2, 4)),
    "words of B exchanged": (HALF_PRODUCT, _swap(10, 12)),
    "ldmatrix transposes nothing": (r"\.x4\.trans\.shared", lambda match: ".x4.shared"),
}
DOUBLE_PRODUCT = r"(mma\.sync\.aligned\.m8n8k4\S+ \{[^}]*\}, )(\{%\w+\})(, )(\{%\w+\})"
FRAGMENTS["A and B exchanged"] = (DOUBLE_PRODUCT, _swap(2, 4))


def _rejoin(text: str, match: re.Match[str], replacement: str) -> str:
    return text[: match.start()] + replacement + text[match.end() :]


def _module(text: str) -> str:
    """Return a module of one kernel, given from its name on."""
    return f".entry {text}"


def ordering_mutants(kernel: str, text: str) -> Iterator[Mutant]:
    """Yield the kernel without each of the instructions that order threads or copies."""
    for match in re.finditer(ORDERING, text):
        line = text[: match.start()].count("\n")
        change = f"without {match[0]} of line {line}"
        yield Mutant(kernel, change, _module(_rejoin(text, match, "")))


def fragment_mutants(kernel: str, text: str) -> Iterator[Mutant]:
    """Yield the kernel with the fragments of its products confused."""
    for change, (pattern, replacement) in FRAGMENTS.items():
        changed = re.sub(pattern, replacement, text)
        if changed != text:
            yield Mutant(kernel, change, _module(changed))


def all_mutants(kernel: str, text: str) -> Iterator[Mutant]:
    """Yield every mutant of a kernel, whose text goes from its name to its closing brace."""
    yield from ordering_mutants(kernel, text)
    yield from fragment_mutants(kernel, text)
