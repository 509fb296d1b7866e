"""Plain data from a pickle, by a machine that can do nothing else.

Python's unpickler calls what the file names. This one knows the opcodes by which protocols 2 to 5
build lists, dicts, tuples, sets, numbers, text, bytes and numpy arrays; the few globals in
`GLOBALS` are names to it, never objects: "calling" one makes a value of ours. It does not recurse,
allocates nothing by a number that the file states, and does at most `MAX_STEPS` steps.
Everything wrong is one ValueError.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

MAX_STEPS = 1 << 27
PLAIN_TYPE = re.compile("[fiub][0-9]{1,2}|[US][0-9]{1,6}")  # above all not O, objects

_ARRAY, _DTYPE, _SCALAR, _BUFFER, _ENCODE = "array", "dtype", "scalar", "frombuffer", "encode"
GLOBALS = {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): _DTYPE} | {
    (f"{core}.{module}", name): token
    for core in ("numpy.core", "numpy._core")
    for module, name, token in (
        ("multiarray", "_reconstruct", _ARRAY),
        ("multiarray", "scalar", _SCALAR),
        ("numeric", "_frombuffer", _BUFFER),
    )
}
GLOBALS[("_codecs", "encode")] = _ENCODE  # how protocol 2 writes bytes, and these:
GLOBALS |= {
    (module, name): name
    for module in ("builtins", "__builtin__")
    for name in ("bytes", "set", "frozenset")
}


class Name(str):
    """A global of `GLOBALS`: a word on the stack, not the thing."""

    __slots__ = ()

    def __reduce_ex__(self, _: Any) -> Any:
        raise ValueError(f"{self} stands where a value is expected")


class Type:
    """A dtype in the making."""

    __slots__ = ("dtype",)

    def __init__(self, text: Any) -> None:
        if type(text) is not str or not PLAIN_TYPE.fullmatch(text):
            raise ValueError(f"dtype {text!r:.40}: only numbers and text (never object arrays)")
        self.dtype = np.dtype(text)

    def build(self, state: Any) -> None:
        order, text = state[1], self.dtype.kind in "US"
        sizes = (self.dtype.itemsize, 4 if self.dtype.kind == "U" else 1) if text else (-1, -1)
        if order not in ("<", "|", "=", ">") or state[2:7] != (None, None, None, *sizes):
            raise ValueError("a dtype with fields, shape or objects is not plain")
        self.dtype = self.dtype.newbyteorder(order if order == ">" else "<")

    def __reduce_ex__(self, _: Any) -> Any:
        return self.dtype.__reduce__()


class Array:
    """An array in the making; `value` is None until it is built."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def build(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        self.value = array(data, kind, shape, "F" if fortran is True else "C")

    def __reduce_ex__(self, protocol: int) -> Any:
        """It is pickled as the array that it stands for."""
        if self.value is None:
            raise ValueError("an array was begun and not built")
        return self.value.__reduce_ex__(protocol)


def array(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if type(kind) is not Type or type(shape) is not tuple or order not in ("C", "F"):
        raise ValueError("an array is not described by dtype, shape and order")
    if type(data) is not bytes or not all(type(n) is int for n in shape):
        raise ValueError("an array is not made of bytes (object arrays are never built)")
    size = kind.dtype.itemsize
    for count in shape:
        size *= count
    if len(shape) > 8 or any(count < 0 for count in shape) or size != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def call(name: Any, values: Any) -> Any:
    """What a global makes of its arguments; an unknown one never comes so far."""
    if type(name) is not Name or type(values) is not tuple:
        raise ValueError("calls something that is no numpy constructor")
    if name == _ARRAY and values[0] == "ndarray" and type(values[0]) is Name:
        return Array()
    if name == _DTYPE:
        return Type(values[0])
    if name == _SCALAR:
        return array(values[1], values[0], (), "C")[()]
    if name == _BUFFER:
        data, kind, shape, order = values
        return Array(array(data, kind, shape, order))
    if name == _ENCODE and type(values[0]) is str and values[1:] == ("latin1",):
        return values[0].encode("latin1")
    if name == "bytes" and values == ():
        return b""
    if name in ("set", "frozenset") and len(values) == 1 and type(values[0]) is list:
        return (set if name == "set" else frozenset)(map(_key, values[0]))
    raise ValueError(f"calls {name} with arguments that numpy does not give it")


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
    m.top(dict)[_key(key)] = value


def _setitems(m):
    values = m.since_mark()
    target = m.top(dict)
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[_key(key)] = value


def _key(key: Any) -> Any:
    """Keys are text or numbers: others could hash by what a file nests in them."""
    if type(key) not in (str, int, float, bool, type(None)):
        raise ValueError(f"a key is {type(key).__name__}, expected text or a number")
    return key


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
    return lambda m: m.stack.append(make(map(_key, m.since_mark())))


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
        "\x90": lambda m: (lambda values: m.top(set).update(map(_key, values)))(m.since_mark()),
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
