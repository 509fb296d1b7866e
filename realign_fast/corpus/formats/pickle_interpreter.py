"""An interpreter that reads plain data from a pickle and can do nothing else.

It is Python's own unpickler, written in Python, with the opcodes by which protocols 2 to 5 build
lists, dicts, tuples, sets, numbers, text, bytes, numpy arrays and torch tensors, which become
arrays. The few names of `NAMED` become a `Global`, never the object that they name: its function
makes what numpy would make, after it has checked what the file says. Nothing recurses or is
allocated by a number that the file states, and the objects take at most `MEMORY_PER_BYTE` bytes for
each byte of the file. Everything wrong with a file is one `ValueError`.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
from collections.abc import Callable, Iterable
from itertools import chain, takewhile
from sys import getsizeof
from typing import Any, TypeAlias

import numpy as np

MAX_MARKS = 1 << 16  # that wait for their values: each is the nesting of one container
MEMORY_PER_BYTE = 32  # of the objects; lists of one number, the smallest of use, take 17
MEMORY_BASE = 64 << 20  # bytes that the objects of any file may take
PLAIN_TYPE = re.compile("[fiub][0-9]{1,2}|[US][1-9][0-9]{0,5}")  # never O, objects
STORAGES = {"HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8"}  # of torch
STORAGES |= {"BFloat16Storage": "<u2"}
# Opcodes that build nothing but the values that the file and the stack hold.
PLAIN_OPCODES = (
    "PROTO NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINBYTES BINBYTES"
    " BINBYTES8 APPEND APPENDS POP POP_MARK BINGET LONG_BINGET EMPTY_TUPLE STACK_GLOBAL GLOBAL"
    " BINPERSID STOP"
).split()
# Opcodes of a byte or a few that make an object of so many bytes, or an entry of the memo.
COSTS = dict.fromkeys(("MEMOIZE", "BINPUT", "LONG_BINPUT"), 100)
COSTS |= {"EMPTY_LIST": 56, "LIST": 56, "EMPTY_DICT": 64, "EMPTY_SET": 216}
COSTS |= {"TUPLE": 56, "TUPLE1": 56, "TUPLE2": 64, "TUPLE3": 72}


class Global:
    """A name of `NAMED` on the stack, in place of the object that it names."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name, self.make = name, make

    def __reduce_ex__(self, _: Any) -> Any:
        raise ValueError(f"{self.name} stands where a value is expected")


def plain_dtype(text: Any, *_: Any) -> np.dtype[Any]:
    """Return a new dtype of numbers or text, whose state may be set."""
    name = text if type(text) is str else type(text).__name__
    if name is not text or not PLAIN_TYPE.fullmatch(name):
        raise ValueError(f"dtype {name!r:.40}: only numbers and text (never object arrays)")
    return np.dtype(text, False, True)


def check_array(data: Any, dtype: Any, shape: Any) -> None:
    """Raise an error unless `data` are the bytes of an array of that shape."""
    if not isinstance(dtype, np.dtype) or type(shape) is not tuple:
        raise ValueError("an array is not described by dtype, shape and order")
    if type(data) is not bytes:
        raise ValueError("an array is not made of bytes (object arrays are never built)")
    _check_sizes("an array", shape)
    if dtype.itemsize * math.prod(shape) != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")


def _check_sizes(kind: str, sizes: tuple[Any, ...]) -> None:
    if len(sizes) > 17 or not all(type(size) is int and 0 <= size < 1 << 62 for size in sizes):
        raise ValueError(f"{kind} has more than 8 dimensions, or sizes that are no numbers")


def _array_to_fill(array_class: Any, *_: Any) -> np.ndarray:
    if type(array_class) is not Global or array_class.name != "ndarray":
        raise TypeError
    return np.empty(0, np.uint8)  # until its state is set


def _scalar(dtype: Any, data: Any) -> Any:
    check_array(data, dtype, ())
    return np.frombuffer(data, dtype)[0]


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    check_array(data, dtype, shape)
    array: np.ndarray = np.frombuffer(data, dtype).reshape(shape, order=order)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _latin1(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise TypeError
    return text.encode("latin1")


def plain_key(key: Any) -> Any:
    """Return a key of a dict or set that is text or a number; hashing others may take for ever."""
    if type(key) not in (str, int, float, bool, type(None)):
        raise ValueError(f"a key is {type(key).__name__}, expected text or a number")
    return key


def _keys_in(values: Any) -> Iterable[Any]:
    if type(values) is not list:
        raise TypeError
    return map(plain_key, values)


def tensor_values(values: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray:
    """Return a tensor's numbers, which must lie in its storage `values`.

    They are copied: the file could replace the memory of `values` under a view.
    """
    if not isinstance(values, np.ndarray) or values.ndim != 1 or not values.flags.c_contiguous:
        raise ValueError("a tensor is not made of a storage")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise ValueError("a tensor is not described by sizes and strides")
    _check_sizes("a tensor", (offset, *shape, *strides))
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > len(values) or (0 not in shape and last >= len(values)):
        problem = f"offset {offset}, size {shape} and stride {strides}"
        raise ValueError(f"a tensor of {problem} is beyond its storage of {len(values)} numbers")
    steps = tuple(stride * values.itemsize for stride in strides)
    start = 0 if 0 in shape else offset
    return np.lib.stride_tricks.as_strided(values[start:], shape, steps).copy()


def storage_values(data: Any) -> np.ndarray:
    """Return the numbers `[N]` of a storage that `torch.save` wrote; those of bfloat16 as float32.

    Five pickles stand before their count and the numbers; the fourth describes the storage.
    """
    stream = io.BytesIO(data)
    reader = PlainUnpickler(stream, len(data))
    reader.is_storage = True
    try:
        _, storage_class, _, _, stated, _ = [reader.load() for _ in range(5)][3]
        dtype = np.dtype(STORAGES[storage_class.name])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"a tensor has no storage of torch.save ({error!s:.200})") from error
    count, body = int.from_bytes(stream.read(8), "little"), stream.read()
    if count != stated or count * dtype.itemsize != len(body):
        problem = f"states {stated!r:.40} and {count} numbers in {len(body)} bytes"
        raise ValueError(f"the storage of a tensor {problem}")
    values = np.frombuffer(body, dtype)
    return (values.astype("<u4") << 16).view("<f4") if dtype == "<u2" else values


# The functions that stand for the globals of a file, by module and name.
NAMED: dict[str, dict[str, Callable[..., Any]]] = {
    "numpy": {"ndarray": lambda: _array_to_fill(None), "dtype": plain_dtype},
    "numpy._core.multiarray": {"_reconstruct": _array_to_fill, "scalar": _scalar},
    "numpy._core.numeric": {"_frombuffer": _array},
    "_codecs": {"encode": _latin1},  # with this and the next ones protocol 2 writes bytes
    "builtins": {
        "bytes": lambda: b"",
        "set": lambda values: {*_keys_in(values)},
        "frozenset": lambda values: frozenset(_keys_in(values)),
    },
    "torch._utils": {
        "_rebuild_tensor_v2": tensor_values,
        "_rebuild_parameter": lambda tensor, *_: tensor,
    },
    "torch.storage": {"_load_from_bytes": storage_values},
    "torch": dict.fromkeys(STORAGES, lambda: _array_to_fill(None)),  # named, never called
    "collections": {"OrderedDict": lambda: None},  # the hooks of a tensor, of which it has none
}


_Unpickler: Any = pickle._Unpickler


class PlainUnpickler(_Unpickler):  # type: ignore[misc]
    """An unpickler that has the opcodes of plain data alone."""

    is_storage = False  # whether it reads what describes a storage of torch

    def __init__(self, stream: io.BytesIO, num_bytes: int) -> None:
        super().__init__(stream)
        self.unspent = self.memory = MEMORY_BASE + MEMORY_PER_BYTE * num_bytes

    def load(self) -> Any:
        """Return the value of the next pickle in the stream; errors are a `ValueError`."""
        try:
            value = super().load()
            if self.stack or self.metastack:
                raise ValueError("ends with other than one value")
            return value
        except Exception as error:  # damaged files raise many kinds
            reason = str(error)
            if not isinstance(error, ValueError):
                reason = f"is cut off or damaged ({type(error).__name__}: {error})"
            values = [*chain(*self.metastack[:2], self.stack)]
            entries = [*takewhile(lambda value: type(value) is dict, values[1:])]
            if entries and type(values[0]) is list:
                reason = f"row {len(values[0]) + len(entries) - 1}: {reason}"
            raise ValueError(f"{reason:.400}") from error

    def find_class(self, module: str, name: str) -> Any:
        """Return the `Global` of a name."""
        known = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        if name not in NAMED.get(known, ()):
            problem = "only arrays and tensors of float16, float32, float64 and bfloat16 are built"
            raise ValueError(f"names {module!r:.60}, {name!r:.60}: {problem}")
        return Global(name, NAMED[known][name])

    def persistent_load(self, values: Any) -> Any:
        """Return what describes a storage of torch, as it is; nothing else has persistent ids."""
        if not self.is_storage:
            raise ValueError("refers to an object that is not in the file")
        return values

    def spend(self, num_bytes: int) -> None:
        """Count the memory of a new object, or by how much one has grown."""
        self.unspent -= num_bytes
        if self.unspent < 0:
            raise ValueError(f"builds more than {self.memory} bytes, as no plain data do")

    def push_new(self, value: Any) -> None:
        """Push an object that was made now."""
        self.spend(getsizeof(value))
        self.append(value)

    def fill(self, container: Any, items: Iterable[Any]) -> None:
        """Add items to the dict or set on the stack."""
        if type(target := self.stack[-1]) is not container:
            raise ValueError(f"expected a {container.__name__} to fill, got another value")
        size = getsizeof(target)
        target.update(items)
        self.spend(getsizeof(target) - size)

    def mark(self) -> None:
        """Begin a container."""
        if len(self.metastack) == MAX_MARKS:
            raise ValueError(f"nests more than {MAX_MARKS} containers")
        self.load_mark()

    def reduce(self) -> None:
        """Push what a global makes of its arguments."""
        values, called = self.stack.pop(), self.stack.pop()
        if type(called) is not Global or type(values) is not tuple:
            raise ValueError("calls something that is no numpy constructor")
        try:
            self.push_new(called.make(*values))
        except TypeError as error:
            problem = "with arguments that numpy and torch do not give it"
            raise ValueError(f"calls {called.name} {problem}") from error

    def build(self) -> None:
        """Set the state of a numpy array or dtype."""
        state, target = self.stack.pop(), self.stack.pop()
        if not isinstance(target, np.ndarray | np.dtype) or type(state) is not tuple:
            raise ValueError("sets the state of something that is no numpy array")
        if isinstance(target, np.ndarray):
            _, shape, dtype, is_fortran, data = state
            check_array(data, dtype, shape)
            state = 1, shape, dtype, is_fortran is True, data
        else:
            own_state: Any = target.__reduce__()[2]
            if state[1] not in ("<", "|", "=", ">") or state[2:7] != own_state[2:7]:
                raise ValueError("a dtype with fields, shape or objects is not plain")
            state = own_state[0], state[1], *own_state[2:]
        target.__setstate__(state)  # type: ignore[union-attr]
        self.push_new(target)


Operation: TypeAlias = Callable[[Any], object]  # of an unpickler


class _Opcodes(dict[int, Operation]):
    def __missing__(self, code: int) -> Any:
        raise ValueError(f"opcode {code:#04x} is not one that builds plain data")


def _sized(length_form: str, make: Callable[[bytes], Any]) -> Operation:
    """Return the operation of an opcode that a length and so many bytes follow."""
    size = struct.Struct(length_form)
    return lambda self: self.append(make(self.read(size.unpack(self.read(size.size))[0])))


def _costly(operation: Operation, cost: int) -> Operation:
    return lambda self: (self.spend(cost), operation(self))


def _dict_items(items: list[Any]) -> Iterable[Any]:
    return zip(map(plain_key, items[::2]), items[1::2], strict=True)


_inherited: dict[int, Operation] = _Unpickler.dispatch
_operations: dict[str, Operation] = {
    name: _inherited[getattr(pickle, name)[0]] for name in (*PLAIN_OPCODES, *COSTS)
}
_operations |= {name: _costly(_operations[name], cost) for name, cost in COSTS.items()}
_operations |= {
    "MARK": PlainUnpickler.mark,
    "FRAME": lambda self: self.read(8),  # its length has no use here
    "BYTEARRAY8": _sized("<Q", bytes),
    "SHORT_BINUNICODE": _sized("<B", bytes.decode),
    "BINUNICODE": _sized("<I", bytes.decode),
    "BINUNICODE8": _sized("<Q", bytes.decode),
    "FROZENSET": lambda self: self.push_new(frozenset(map(plain_key, self.pop_mark()))),
    "SETITEM": lambda self: self.fill(dict, _dict_items([self.stack.pop(-2), self.stack.pop()])),
    "SETITEMS": lambda self: self.fill(dict, _dict_items(self.pop_mark())),
    "ADDITEMS": lambda self: self.fill(set, map(plain_key, self.pop_mark())),
    "REDUCE": PlainUnpickler.reduce,
    "BUILD": PlainUnpickler.build,
}
PlainUnpickler.dispatch = _Opcodes(
    {getattr(pickle, name)[0]: operation for name, operation in _operations.items()}
)


def load(data: bytes | bytearray | memoryview) -> Any:
    """Return the value that a pickle describes."""
    stream = io.BytesIO(data)
    value = PlainUnpickler(stream, len(data)).load()
    if stream.read(1):
        raise ValueError("ends before the file does")
    return value
