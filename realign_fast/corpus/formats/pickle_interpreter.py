"""Plain data from a pickle, by a machine that can do nothing else.

Python's unpickler calls what the file names. This one knows the opcodes by which protocols 2 to 5
build lists, dicts, tuples, sets, numbers, text, bytes and numpy arrays; the few globals it knows
(`plain_values.GLOBALS`) are names to it, never objects: "calling" one makes a value of ours. It
does not recurse, allocates nothing by a number that the file states, and does at most `MAX_STEPS`
steps. Everything wrong is one ValueError.
"""

from __future__ import annotations

import struct
from typing import Any

from .pickle_values import GLOBALS, Array, Name, Type, call, plain_key

MAX_STEPS = 1 << 27


class Machine:
    """One run over the bytes of one pickle."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, codes = self.data, CODES
        for _ in range(MAX_STEPS):
            code = data[self.at]
            self.at += 1
            step = codes.get(code)
            if step is None:
                if code == 0x2E:  # STOP
                    return self._result()
                raise ValueError(f"opcode {code:#04x} is not one that builds plain data")
            step(self)
        raise ValueError(f"takes more than {MAX_STEPS} steps; write fewer rows a file")

    def _result(self) -> Any:
        if len(self.stack) != 1 or self.marks or self.at != len(self.data):
            raise ValueError("ends with other than one value, or before the file does")
        return self.stack[0]

    def take(self, count: int) -> memoryview:
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError("is cut off")
        return self.data[begin : self.at]

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def since_mark(self) -> list[Any]:
        place = self.marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or (module, name) not in GLOBALS:
            raise ValueError(f"names {module!r:.60}, {name!r:.60}: only numpy arrays are built")
        self.stack.append(Name(GLOBALS[module, name]))

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__} to fill, got another value")
        return self.stack[-1]

    def line(self) -> str:
        chunk = bytes(self.data[self.at : self.at + 200])
        self.at += chunk.index(b"\n") + 1
        return chunk[: chunk.index(b"\n")].decode("ascii")


B, H, I, Q, SIGNED = (struct.Struct(form) for form in ("<B", "<H", "<I", "<Q", "<i"))  # noqa: E741
FLOAT = struct.Struct(">d")


def _push(value):
    return lambda m: m.stack.append(value)


def _push_new(make):
    return lambda m: m.stack.append(make())


def _push_number(form):
    return lambda m: m.stack.append(m.number(form))


def _push_long(form):
    return lambda m: m.stack.append(int.from_bytes(m.take(m.number(form)), "little", signed=True))


def _push_text(form):
    return lambda m: m.stack.append(str(m.take(m.number(form)), "utf-8"))


def _push_bytes(form):
    return lambda m: m.stack.append(bytes(m.take(m.number(form))))


def _tuple(count):
    def step(m):
        if len(m.stack) - (m.marks[-1] if m.marks else 0) < count:
            raise ValueError("a tuple of values that are not there")
        values = tuple(m.stack[len(m.stack) - count :])
        del m.stack[len(m.stack) - count :]
        m.stack.append(values)

    return step


def _append(m):
    value = m.stack.pop()
    m.top(list).append(value)


def _appends(m):
    values = m.since_mark()
    m.top(list).extend(values)


def _setitem(m):
    value, key = m.stack.pop(), m.stack.pop()
    m.top(dict)[plain_key(key)] = value


def _setitems(m):
    values = m.since_mark()
    target = m.top(dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[plain_key(key)] = value


def _put(form):
    return lambda m: m.memo.__setitem__(m.number(form), m.stack[-1])


def _get(form):
    return lambda m: m.stack.append(m.memo[m.number(form)])


def _stack_global(m):
    name, module = m.stack.pop(), m.stack.pop()
    m.name(module, name)


def _global(m):
    m.name(m.line(), m.line())


def _reduce(m):
    values, name = m.stack.pop(), m.stack.pop()
    m.stack.append(call(name, values))


def _build(m):
    state = m.stack.pop()
    if type(m.stack[-1]) not in (Array, Type) or type(state) is not tuple:
        raise ValueError("sets the state of something that is no numpy array")
    m.stack[-1].build(state)


def _protocol(m):
    if not 2 <= m.number(B) <= 5:
        raise ValueError("expected protocol 2 to 5")


def _set_of(make):
    return lambda m: m.stack.append(make(map(plain_key, m.since_mark())))


CODES = {
    ord(code): step
    for code, step in {
        "\x80": _protocol,
        "\x95": lambda m: m.number(Q),  # FRAME: its length is of no use here
        "(": lambda m: m.marks.append(len(m.stack)),
        "0": lambda m: m.stack.pop(),
        "1": lambda m: m.since_mark(),
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "K": _push_number(B),
        "M": _push_number(H),
        "J": _push_number(SIGNED),
        "\x8a": _push_long(B),
        "G": _push_number(FLOAT),
        "\x8c": _push_text(B),
        "X": _push_text(I),
        "\x8d": _push_text(Q),
        "C": _push_bytes(B),
        "B": _push_bytes(I),
        "\x8e": _push_bytes(Q),
        "\x96": _push_bytes(Q),  # BYTEARRAY8: the data of protocol 5 in band
        ")": _push(()),
        "]": _push_new(list),
        "}": _push_new(dict),
        "\x8f": _push_new(set),
        "t": lambda m: m.stack.append(tuple(m.since_mark())),
        "l": lambda m: m.stack.append(m.since_mark()),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "a": _append,
        "e": _appends,
        "s": _setitem,
        "u": _setitems,
        "\x91": _set_of(frozenset),
        "\x90": lambda m: (lambda values: m.top(set).update(map(plain_key, values)))(
            m.since_mark()
        ),
        "q": _put(B),
        "r": _put(I),
        "\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),
        "h": _get(B),
        "j": _get(I),
        "\x93": _stack_global,
        "c": _global,
        "R": _reduce,
        "b": _build,
    }.items()
}


def load(data: memoryview) -> Any:
    """The value that a pickle describes; ValueError says why it is not plain data.

    Where arrays are expected there are `Array`s, each with its `value`.
    """
    machine = Machine(data)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, OverflowError, struct.error, MemoryError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"is cut off or damaged at byte {machine.at} ({what:.100})") from error
