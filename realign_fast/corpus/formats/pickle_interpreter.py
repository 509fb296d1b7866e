"""An interpreter that reads plain data from a pickle and can do nothing else.

Python's unpickler calls what the file names. This interpreter has the opcodes by which protocols 2
to 5 build lists, dicts, tuples, sets, numbers, text, bytes and numpy arrays. The few globals that
it knows (`pickle_values.GLOBALS`) stay names, never objects: "calling" one makes a value of
`pickle_values.py`. It does not recurse, allocates nothing by a number that the file states, and
executes at most `MAX_STEPS` opcodes. Everything wrong with a file is one `ValueError`.
For the opcodes see `pickletools` in Python's standard library.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from .pickle_values import GLOBALS, Array, Name, Type, call, plain_key

MAX_STEPS = 1 << 27
STOP = ord(".")
LONGEST_LINE = 200  # bytes of a name that ends with a newline


class Machine:
    """The state of the interpreter in one pickle: its stack, marks, memo and place in the data."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.offset = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Execute the opcodes to the end of the data and return the value that they build."""
        data, opcodes = self.data, OPCODES
        for _ in range(MAX_STEPS):
            code = data[self.offset]
            self.offset += 1
            step = opcodes.get(code)
            if step is None:
                if code == STOP:
                    return self._result()
                raise ValueError(f"opcode {code:#04x} is not one that builds plain data")
            step(self)
        raise ValueError(f"takes more than {MAX_STEPS} steps; write fewer rows a file")

    def _result(self) -> Any:
        if len(self.stack) != 1 or self.marks or self.offset != len(self.data):
            raise ValueError("ends with other than one value, or before the file does")
        return self.stack[0]

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes of the data and step over them."""
        start, self.offset = self.offset, self.offset + count
        if self.offset > len(self.data):
            raise ValueError("is cut off")
        return self.data[start : self.offset]

    def number(self, form: struct.Struct) -> Any:
        """Read the next number of the data."""
        (value,) = form.unpack_from(self.data, self.offset)
        self.offset += form.size
        return value

    def since_mark(self) -> list[Any]:
        """Remove and return what was pushed since the last mark."""
        place = self.marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def push_name(self, module: Any, name: Any) -> None:
        """Push the name of a global."""
        if type(module) is not str or type(name) is not str or (module, name) not in GLOBALS:
            raise ValueError(f"names {module!r:.60}, {name!r:.60}: only numpy arrays are built")
        self.stack.append(Name(GLOBALS[module, name]))

    def top(self, container: type) -> Any:
        """Return the last value of the stack."""
        if type(self.stack[-1]) is not container:
            raise ValueError(f"expected a {container.__name__} to fill, got another value")
        return self.stack[-1]

    def line(self) -> str:
        """Read the next line of the data."""
        chunk = bytes(self.data[self.offset : self.offset + LONGEST_LINE])
        self.offset += chunk.index(b"\n") + 1
        return chunk[: chunk.index(b"\n")].decode("ascii")


Step: TypeAlias = Callable[[Machine], object]
UINT8, UINT16, INT32, UINT32, UINT64, FLOAT64 = map(
    struct.Struct, ("<B", "<H", "<i", "<I", "<Q", ">d")
)


def _push(value: object) -> Step:
    return lambda machine: machine.stack.append(value)


def _push_new(make: Callable[[], object]) -> Step:
    return lambda machine: machine.stack.append(make())


def _push_number(form: struct.Struct) -> Step:
    return lambda machine: machine.stack.append(machine.number(form))


def _push_data(size: struct.Struct, make: Callable[[memoryview], object]) -> Step:
    """Push what `make` returns for the next bytes, whose number is in the data."""
    return lambda machine: machine.stack.append(make(machine.take(machine.number(size))))


def _integer(data: memoryview) -> int:
    return int.from_bytes(data, "little", signed=True)


def _text(data: memoryview) -> str:
    return str(data, "utf-8")


def _push_tuple(machine: Machine, count: int) -> None:
    stack = machine.stack
    start = len(stack) - count
    if start < (machine.marks[-1] if machine.marks else 0):
        raise ValueError("a tuple of values that are not there")
    stack[start:] = [tuple(stack[start:])]


def _append(machine: Machine) -> None:
    value = machine.stack.pop()
    machine.top(list).append(value)


def _appends(machine: Machine) -> None:
    values = machine.since_mark()
    machine.top(list).extend(values)


def _setitem(machine: Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.top(dict)[plain_key(key)] = value


def _setitems(machine: Machine) -> None:
    values = machine.since_mark()
    target = machine.top(dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[plain_key(key)] = value


def _add_items(machine: Machine) -> None:
    values = machine.since_mark()
    machine.top(set).update(map(plain_key, values))


def _put(index: struct.Struct) -> Step:
    return lambda machine: machine.memo.__setitem__(machine.number(index), machine.stack[-1])


def _memoize(machine: Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(index: struct.Struct) -> Step:
    return lambda machine: machine.stack.append(machine.memo[machine.number(index)])


def _stack_global(machine: Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push_name(module, name)


def _global(machine: Machine) -> None:
    machine.push_name(machine.line(), machine.line())


def _reduce(machine: Machine) -> None:
    values, name = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(call(name, values))


def _build(machine: Machine) -> None:
    state = machine.stack.pop()
    if type(machine.stack[-1]) not in (Array, Type) or type(state) is not tuple:
        raise ValueError("sets the state of something that is no numpy array")
    machine.stack[-1].build(state)


def _protocol(machine: Machine) -> None:
    if not 2 <= machine.number(UINT8) <= 5:
        raise ValueError("expected protocol 2 to 5")


def _push_since_mark(make: Callable[[Iterable[Any]], object]) -> Step:
    return lambda machine: machine.stack.append(make(machine.since_mark()))


def _plain_frozenset(values: Iterable[Any]) -> frozenset[Any]:
    return frozenset(map(plain_key, values))


OPCODES: dict[int, Step] = {
    ord(code): step
    for code, step in {
        "\x80": _protocol,
        "\x95": lambda machine: machine.number(UINT64),  # FRAME, whose length has no use here
        "(": lambda machine: machine.marks.append(len(machine.stack)),
        "0": lambda machine: machine.stack.pop(),
        "1": lambda machine: machine.since_mark(),
        "N": _push(None),
        "\x88": _push(True),
        "\x89": _push(False),
        "K": _push_number(UINT8),
        "M": _push_number(UINT16),
        "J": _push_number(INT32),
        "\x8a": _push_data(UINT8, _integer),
        "G": _push_number(FLOAT64),
        "\x8c": _push_data(UINT8, _text),
        "X": _push_data(UINT32, _text),
        "\x8d": _push_data(UINT64, _text),
        "C": _push_data(UINT8, bytes),
        "B": _push_data(UINT32, bytes),
        "\x8e": _push_data(UINT64, bytes),
        "\x96": _push_data(UINT64, bytes),  # BYTEARRAY8: in-band data of protocol 5
        ")": _push(()),
        "]": _push_new(list),
        "}": _push_new(dict),
        "\x8f": _push_new(set),
        "t": _push_since_mark(tuple),
        "l": _push_since_mark(list),
        "\x85": lambda machine: _push_tuple(machine, 1),
        "\x86": lambda machine: _push_tuple(machine, 2),
        "\x87": lambda machine: _push_tuple(machine, 3),
        "a": _append,
        "e": _appends,
        "s": _setitem,
        "u": _setitems,
        "\x91": _push_since_mark(_plain_frozenset),
        "\x90": _add_items,
        "q": _put(UINT8),
        "r": _put(UINT32),
        "\x94": _memoize,
        "h": _get(UINT8),
        "j": _get(UINT32),
        "\x93": _stack_global,
        "c": _global,
        "R": _reduce,
        "b": _build,
    }.items()
}


def load(data: memoryview) -> Any:
    """Return the value that a pickle describes; numpy arrays are `Array`s with a `value`."""
    machine = Machine(data)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, OverflowError, struct.error, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}"
        place = f"is cut off or damaged at byte {machine.offset}"
        raise ValueError(f"{place} ({reason:.100})") from error
