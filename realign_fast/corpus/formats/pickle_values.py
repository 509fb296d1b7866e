"""Values of a pickle other than lists, dicts and the like: numpy's arrays, types and scalars.

`pickle_interpreter.py` builds these. Each checks what the file says about it, and raises a
`ValueError` for anything that numpy would not write.
"""

from __future__ import annotations

import math
import re
import sys
from typing import Any, SupportsIndex

import numpy as np

PLAIN_TYPE = re.compile("[fiub][0-9]{1,2}|[US][0-9]{1,6}")  # never O, objects

ARRAY_BYTES = 160  # memory of a numpy array beside its numbers
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
GLOBALS["_codecs", "encode"] = _ENCODE  # with this and the next ones protocol 2 writes bytes
GLOBALS |= {
    (module, name): name
    for module in ("builtins", "__builtin__")
    for name in ("bytes", "set", "frozenset")
}


class Name(str):
    """The name of a global of `GLOBALS` on the stack, in place of the object that it names."""

    __slots__ = ()

    def __reduce_ex__(self, _: Any) -> Any:
        raise ValueError(f"{self} stands where a value is expected")


class Type:
    """A dtype that is being built."""

    __slots__ = ("dtype",)

    def __init__(self, text: Any) -> None:
        name = text if type(text) is str else type(text).__name__
        if name is not text or not PLAIN_TYPE.fullmatch(name):
            raise ValueError(f"dtype {name!r:.40}: only numbers and text (never object arrays)")
        self.dtype = np.dtype(text)

    def build(self, state: Any) -> None:
        """Set the byte order from the state of a numpy dtype."""
        order, text = state[1], self.dtype.kind in "US"
        sizes = (self.dtype.itemsize, 4 if self.dtype.kind == "U" else 1) if text else (-1, -1)
        if order not in ("<", "|", "=", ">") or state[2:7] != (None, None, None, *sizes):
            raise ValueError("a dtype with fields, shape or objects is not plain")
        self.dtype = self.dtype.newbyteorder(order if order == ">" else "<")

    def __reduce_ex__(self, _: Any) -> Any:
        return self.dtype.__reduce__()


class Array:
    """An array that is being built; `value` is None until it is."""

    __slots__ = ("value",)

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value

    def build(self, state: Any) -> None:
        """Set the value from the state of a numpy array: version, shape, dtype, order, bytes."""
        _, shape, dtype, fortran, data = state
        self.value = array(data, dtype, shape, "F" if fortran is True else "C")

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle the array that this stands for."""
        if self.value is None:
            raise ValueError("an array was begun and not built")
        return self.value.__reduce_ex__(protocol)


def array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return an array that views `data`."""
    if type(dtype) is not Type or type(shape) is not tuple or order not in ("C", "F"):
        raise ValueError("an array is not described by dtype, shape and order")
    if type(data) is not bytes:
        raise ValueError("an array is not made of bytes (object arrays are never built)")
    if len(shape) > 8 or not all(type(count) is int and count >= 0 for count in shape):
        raise ValueError("an array has more than 8 dimensions, or sizes that are no numbers")
    if dtype.dtype.itemsize * math.prod(shape) != len(data):
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    return np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def call(name: Any, values: Any) -> Any:
    """Return what a global of `GLOBALS` makes of its arguments."""
    if type(name) is not Name or type(values) is not tuple:
        raise ValueError("calls something that is no numpy constructor")
    if name == _ARRAY and values[0] == "ndarray" and type(values[0]) is Name:
        return Array()
    if name == _DTYPE:
        return Type(values[0])
    if name == _SCALAR:
        return array(values[1], values[0], (), "C")[()]
    if name == _BUFFER:
        data, dtype, shape, order = values
        return Array(array(data, dtype, shape, order))
    if name == _ENCODE and type(values[0]) is str and values[1:] == ("latin1",):
        return values[0].encode("latin1")
    if name == "bytes" and values == ():
        return b""
    if name in ("set", "frozenset") and len(values) == 1 and type(values[0]) is list:
        return (set if name == "set" else frozenset)(map(plain_key, values[0]))
    raise ValueError(f"calls {name} with arguments that numpy does not give it")


def plain_key(key: Any) -> Any:
    """Return a key of a dict or set that is text or a number; hashing others may take for ever."""
    if type(key) not in (str, int, float, bool, type(None)):
        raise ValueError(f"a key is {type(key).__name__}, expected text or a number")
    return key


def memory_of(value: Any) -> int:
    """Return the bytes that a value takes in memory, without those that it refers to."""
    return sys.getsizeof(value) + (ARRAY_BYTES if type(value) is Array else 0)
