"""An interpreter that reads plain data from a pickle and can do nothing else.

It has the opcodes by which protocols 2 to 5 build lists, dicts, tuples, sets, numbers, text, bytes,
numpy arrays and torch tensors, which become arrays. The few `GLOBALS` that it knows stay names,
never objects: `call` makes what numpy would make, after it has checked what the file says. It does
not recurse, allocates nothing by a number that the file states, executes at most `MAX_STEPS`
opcodes, and makes objects of at most `MEMORY_PER_BYTE` bytes for each byte of the file. Everything
wrong with a file is one `ValueError`.
For the opcodes see `pickletools` in Python's standard library, which splits the file into them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable
from itertools import islice, takewhile
from pickletools import genops
from sys import getsizeof
from typing import Any, TypeAlias

import numpy as np
import torch

MAX_STEPS = 1 << 27
MAX_MARKS = 1 << 16  # that wait for their values: each is the nesting of one container
MEMORY_PER_BYTE = 16  # of the objects; lists of one number, the smallest of use, take 17
MEMORY_BASE = 64 << 20  # bytes that the objects of any file may take
DISTANT_BYTES = 100  # memory of a memo entry that is not the next one
PLAIN_TYPE = re.compile("[fiub][0-9]{1,2}|[US][1-9][0-9]{0,5}")  # never O, objects
GLOBALS = {("numpy", "ndarray"), ("numpy", "dtype")}
for _core in ("numpy.core", "numpy._core"):
    GLOBALS |= {(f"{_core}.multiarray", "_reconstruct"), (f"{_core}.multiarray", "scalar")}
    GLOBALS |= {(f"{_core}.numeric", "_frombuffer")}
GLOBALS |= {("_codecs", "encode")}  # with this and the next ones protocol 2 writes bytes
for _name in ("bytes", "set", "frozenset"):
    GLOBALS |= {("builtins", _name), ("__builtin__", _name)}
GLOBALS |= {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}
GLOBALS |= {("torch.storage", "_load_from_bytes"), ("collections", "OrderedDict")}
STORAGE_OPCODES = set(
    "PROTO LONG1 BININT BININT1 BININT2 BINUNICODE NEWTRUE NEWFALSE NONE EMPTY_DICT EMPTY_LIST"
    " MARK BINPUT SETITEMS APPEND TUPLE GLOBAL BINPERSID STOP".split()
)  # that `torch.save` writes for a storage; none of them calls anything
STORAGE_TYPES = {f"torch {name}Storage" for name in ("Half", "Float", "Double", "BFloat16")}


class Name(str):
    """The name of a global of `GLOBALS` on the stack, in place of the object that it names."""

    __slots__ = ()

    def __reduce_ex__(self, _: Any) -> Any:
        raise ValueError(f"{self} stands where a value is expected")


class Machine:
    """The state of the interpreter in one pickle: its stack, marks and memo."""

    def __init__(self, num_bytes: int) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.distant_memo: dict[int, Any] = {}  # entries beyond the end of `memo`
        self.unspent = self.memory = MEMORY_BASE + MEMORY_PER_BYTE * num_bytes

    def spend(self, num_bytes: int) -> None:
        """Count the memory of a new object, or by how much one has grown."""
        self.unspent -= num_bytes
        if self.unspent < 0:
            raise ValueError(f"builds more than {self.memory} bytes, as no plain data do")

    def push_new(self, value: Any) -> None:
        """Push an object that was made now."""
        self.spend(getsizeof(value))
        self.stack.append(value)

    def pop(self, count: int | None = None) -> list[Any]:
        """Remove and return the last `count` values, by default those since the last mark."""
        start = self.marks.pop() if count is None else len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise ValueError("takes values that are not there")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def push_name(self, module: Any, name: Any) -> None:
        """Push the name of a global."""
        if type(module) is not str or type(name) is not str:
            raise ValueError("names a global by other values than text")
        if (module, name) not in GLOBALS:
            problem = "only numpy arrays and torch tensors are built"
            raise ValueError(f"names {module!r:.60}, {name!r:.60}: {problem}")
        self.stack.append(Name(name))

    def put(self, index: int) -> None:
        """Store the last value of the stack in the memo."""
        if index == len(self.memo):
            self.memo.append(self.stack[-1])
        elif index < len(self.memo):
            self.memo[index] = self.stack[-1]
        else:
            self.spend(DISTANT_BYTES)
            self.distant_memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        """Push a value of the memo."""
        memo = self.memo if index < len(self.memo) else self.distant_memo
        self.stack.append(memo[index])


def plain_dtype(text: Any) -> np.dtype[Any]:
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
    if len(shape) > 8 or not all(type(count) is int and count >= 0 for count in shape):
        raise ValueError("an array has more than 8 dimensions, or sizes that are no numbers")
    if dtype.itemsize * math.prod(shape) != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")


def check_storage_file(stream: io.BytesIO, num_bytes: int) -> None:
    """Raise an error unless `torch.save` wrote a stream for one storage of floats.

    Before the numbers stand five pickles: magic number, version, sizes of types, the storage and
    its key. `torch.load` allocates what they state, and more than these opcodes are no storage.
    """
    try:  # a hundred steps are more than `torch.save` writes
        steps = list(islice((step for _ in range(5) for step in genops(stream)), 100))
    except (ValueError, LookupError) as error:
        raise ValueError(f"a tensor has no storage of torch.save ({error!s:.100})") from error
    names = [opcode.name for opcode, _, _ in steps]
    if unknown := set(names) - STORAGE_OPCODES:
        raise ValueError(f"the storage of a tensor has the opcode {min(unknown)}")
    size = max(number or 0 for opcode, number, _ in steps if opcode.name.startswith("BININT"))
    if size > max(num_bytes, 1001):  # the latter is the version of the format
        raise ValueError(f"the storage of a tensor states {size} numbers in {num_bytes} bytes")
    once = [names.count(name) for name in ("LONG1", "GLOBAL", "BINPERSID", "APPEND")]
    if names.count("STOP") != 5 or once != [1, 1, 1, 1]:
        raise ValueError("a tensor is not made of one storage")
    if (storage_type := steps[names.index("GLOBAL")][1]) not in STORAGE_TYPES:
        expected = "expected float16, float32, float64 or bfloat16"
        raise ValueError(f"the storage of a tensor is a {storage_type!r:.60}, {expected}")


def storage_values(data: bytes) -> np.ndarray:
    """Return the numbers `[N]` of a storage that `torch.save` wrote; those of bfloat16 as float32.

    Everything wrong with the file in `data` is a `ValueError`.
    """
    stream = io.BytesIO(data)
    check_storage_file(stream, len(data))
    stream.seek(0)
    try:
        storage = torch.load(stream, weights_only=True, map_location="cpu")
        values = torch.empty(0, dtype=storage.dtype).set_(storage)
    except Exception as error:  # of many kinds; their text advises to load without `weights_only`
        problem = f"torch.load refuses the storage of a tensor ({type(error).__name__})"
        raise ValueError(problem) from error
    stored_bytes = values.view(torch.uint8).numpy().tobytes()
    if not data.endswith(len(values).to_bytes(8, "little") + stored_bytes):
        raise ValueError("the storage of a tensor is not filled by the bytes at its end")
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy().copy()


def tensor_values(values: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """Return a tensor's numbers, which must lie in its storage `values`.

    They are copied: the file could replace the memory of `values` under a view.
    """
    if not isinstance(values, np.ndarray) or values.ndim != 1 or not values.flags.c_contiguous:
        raise ValueError("a tensor is not made of a storage")
    if type(shape) is not tuple or type(strides) is not tuple or len(shape) != len(strides):
        raise ValueError("a tensor is not described by sizes and strides")
    if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor has more than 8 dimensions, or sizes that are no numbers")
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > len(values) or (0 not in shape and last >= len(values)):
        problem = f"offset {offset}, size {shape} and stride {strides}"
        raise ValueError(f"a tensor of {problem} is beyond its storage of {len(values)} numbers")
    steps = tuple(stride * values.itemsize for stride in strides)
    start = 0 if 0 in shape else offset
    return np.lib.stride_tricks.as_strided(values[start:], shape, steps).copy()


def call(name: Any, values: Any) -> Any:
    """Return what a global of `GLOBALS` makes of its arguments."""
    if type(name) is not Name or type(values) is not tuple:
        raise ValueError("calls something that is no numpy constructor")
    if name == "_reconstruct" and values[0] == "ndarray" and type(values[0]) is Name:
        return np.empty(0, np.uint8)  # until its state is set
    if name == "dtype":
        return plain_dtype(values[0])
    if name == "scalar":
        check_array(values[1], values[0], ())
        return np.frombuffer(values[1], values[0])[0]
    if name == "_frombuffer":
        check_array(*values[:3])
        array = np.frombuffer(*values[:2]).reshape(values[2], order=values[3])
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if name == "encode" and type(values[0]) is str and values[1:] == ("latin1",):
        return values[0].encode("latin1")
    if name == "bytes" and values == ():
        return b""
    if name in ("set", "frozenset") and len(values) == 1 and type(values[0]) is list:
        return (set if name == "set" else frozenset)(map(plain_key, values[0]))
    if name == "OrderedDict" and values == ():
        return Name("no hooks")  # of a tensor; it cannot be filled
    if name == "_load_from_bytes" and len(values) == 1 and type(values[0]) is bytes:
        return storage_values(values[0])
    if name.startswith("_rebuild") and type(values[-1]) is Name and values[-1] == "no hooks":
        if name == "_rebuild_tensor_v2" and len(values) == 6:
            return tensor_values(*values[:4])
        if name == "_rebuild_parameter" and len(values) == 3 and isinstance(values[0], np.ndarray):
            return values[0]
    raise ValueError(f"calls {name} with arguments that numpy and torch do not give it")


def plain_key(key: Any) -> Any:
    """Return a key of a dict or set that is text or a number; hashing others may take for ever."""
    if type(key) not in (str, int, float, bool, type(None)):
        raise ValueError(f"a key is {type(key).__name__}, expected text or a number")
    return key


Operation: TypeAlias = Callable[[Machine, Any], object]  # with the argument of the opcode


def _push_text(machine: Machine, text: str) -> None:
    if not text.isascii():
        text.encode()  # an error for surrogates, which `pickletools` lets through
    machine.stack.append(text)


def _make(make: Callable[[Iterable[Any]], object], count: int | None = None) -> Operation:
    return lambda machine, _: machine.push_new(make(machine.pop(count)))


def _fill(
    container: type, add: Callable[[Any, list[Any]], object], count: int | None = None
) -> Operation:
    def _fill_top(machine: Machine, _: None) -> None:
        values, target = machine.pop(count), machine.stack[-1]
        if type(target) is not container:
            raise ValueError(f"expected a {container.__name__} to fill, got another value")
        size = getsizeof(target)
        add(target, values)
        machine.spend(getsizeof(target) - size)

    return _fill_top


def _set_items(target: dict[Any, Any], values: list[Any]) -> None:
    target.update(zip(map(plain_key, values[::2]), values[1::2], strict=True))


def _mark(machine: Machine, _: None) -> None:
    if len(machine.marks) == MAX_MARKS:
        raise ValueError(f"nests more than {MAX_MARKS} containers")
    machine.marks.append(len(machine.stack))


def _build(machine: Machine, _: None) -> None:
    target, state = machine.pop(2)
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
    machine.push_new(target)


def _reduce(machine: Machine, _: None) -> None:
    name, values = machine.pop(2)
    try:
        result = call(name, values)
    except ValueError as error:
        entries = list(takewhile(lambda value: type(value) is dict, machine.stack[1:]))
        if not entries or type(machine.stack[0]) is not list:
            raise
        raise ValueError(f"row {len(machine.stack[0]) + len(entries) - 1}: {error}") from error
    machine.push_new(result)


def _protocol(_: Machine, version: int) -> None:
    if not 2 <= version <= 5:
        raise ValueError("expected protocol 2 to 5")


def _stop(machine: Machine, _: None) -> None:
    if len(machine.stack) != 1 or machine.marks:
        raise ValueError("ends with other than one value")


OPERATIONS: dict[str, Operation] = {
    "PROTO": _protocol,
    "FRAME": lambda machine, length: None,  # the length has no use here
    "MARK": _mark,
    "POP": lambda machine, _: machine.pop(1),
    "POP_MARK": lambda machine, _: machine.pop(),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "BYTEARRAY8": lambda machine, data: machine.stack.append(bytes(data)),
    "TUPLE": _make(tuple),
    "LIST": _make(list),
    "FROZENSET": _make(lambda values: frozenset(map(plain_key, values))),
    "APPEND": _fill(list, list.extend, 1),
    "APPENDS": _fill(list, list.extend),
    "SETITEM": _fill(dict, _set_items, 2),
    "SETITEMS": _fill(dict, _set_items),
    "ADDITEMS": _fill(set, lambda target, values: target.update(map(plain_key, values))),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo) + len(machine.distant_memo)),
    "STACK_GLOBAL": lambda machine, _: machine.push_name(*machine.pop(2)),
    "GLOBAL": lambda machine, names: machine.push_name(*names.split(" ", 1)),
    "REDUCE": _reduce,
    "BUILD": _build,
    "STOP": _stop,
}
PUSHED = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}  # their argument is the value
PUSHED |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
OPERATIONS |= dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _push_text)
OPERATIONS |= {f"TUPLE{count}": _make(tuple, count) for count in (1, 2, 3)}
for _new in (tuple, list, dict, set):
    OPERATIONS[f"EMPTY_{_new.__name__.upper()}"] = _make(_new, 0)
for _form in ("BIN", "LONG_BIN"):
    OPERATIONS |= {f"{_form}PUT": Machine.put, f"{_form}GET": Machine.get}


def load(data: bytes | bytearray | memoryview) -> Any:
    """Return the value that a pickle describes."""
    machine, stream, offset = Machine(len(data)), io.BytesIO(data), 0
    push = machine.stack.append
    try:
        for step, (opcode, argument, place) in enumerate(genops(stream)):
            offset = place or 0
            if step == MAX_STEPS:
                raise ValueError(f"takes more than {MAX_STEPS} steps; write fewer rows a file")
            if (name := opcode.name) in PUSHED:
                push(argument)
            elif operation := OPERATIONS.get(name):
                operation(machine, argument)
            else:
                code = ord(opcode.code)
                raise ValueError(f"opcode {code:#04x} is not one that builds plain data")
        if offset != len(data) - 1:
            raise ValueError("ends before the file does")
    except (LookupError, TypeError, OverflowError, MemoryError, SystemError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"is cut off or damaged at byte {offset} ({reason:.100})") from error
    return machine.stack[0]
