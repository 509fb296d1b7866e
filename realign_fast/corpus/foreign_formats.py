"""Files of rows in formats that are not read: what they are, and the line that converts them."""

from __future__ import annotations

import os

_TO_PARQUET = "pyarrow.parquet.write_table({}, 'rows.parquet')"
_TO_NPY = "numpy.save('rows.npy', {})"
# Name of the format, then an expression with the rows of `file`, by suffixes.
FORMATS = {
    ".h5 .hdf5": ("HDF5", _TO_NPY.format("h5py.File(file)[name][:]")),
    ".lance": ("Lance", _TO_PARQUET.format("lance.dataset(file).to_table()")),
    ".zarr": ("Zarr", _TO_NPY.format("zarr.open(file)[:]")),
    ".csv .tsv": ("a table of text", _TO_NPY.format("pandas.read_csv(file)[columns].to_numpy()")),
    ".jsonl .ndjson .json": ("JSON", _TO_PARQUET.format("pyarrow.json.read_json(file)")),
    ".mat": ("MATLAB", _TO_NPY.format("scipy.io.loadmat(file)[name]")),
    ".sqlite .sqlite3 .db": (
        "SQLite",
        _TO_NPY.format("numpy.stack([numpy.frombuffer(blob, '<f4') for blob, in rows])"),
    ),
    ".orc": ("ORC", _TO_PARQUET.format("pyarrow.orc.read_table(file)")),
    ".faiss .index": (
        "an index of faiss",
        "index = faiss.read_index(file); " + _TO_NPY.format("index.reconstruct_n(0, index.ntotal)"),
    ),
    ".fbin": (
        "float32 behind two counts",
        "count = numpy.fromfile(file, '<i4', 2); "
        + _TO_NPY.format("numpy.fromfile(file, '<f4', offset=8).reshape(count)"),
    ),
    ".fvecs": (
        "float32, each row behind its length",
        "length = numpy.fromfile(file, '<i4', 1)[0]; "
        + _TO_NPY.format("numpy.fromfile(file, '<f4').reshape(-1, length + 1)[:, 1:]"),
    ),
    ".bin .dat .raw": (
        "numbers without a header that says their shape",
        _TO_NPY.format("numpy.fromfile(file, '<f4').reshape(-1, columns)"),
    ),
}
_BY_SUFFIX = {suffix: entry for suffixes, entry in FORMATS.items() for suffix in suffixes.split()}
_STARTS = {b"\x89HDF\r\n": ".h5", b"SQLite format 3": ".db", b"MATLAB 5.0": ".mat", b"ORC": ".orc"}


def advice_for(name: str, head: bytes = b"") -> str | None:
    """Return what the file is and how to convert it, by its first bytes or its name, or None."""
    by_start = (suffix for start, suffix in _STARTS.items() if head.startswith(start))
    suffix = next(by_start, os.path.splitext(name.lower())[1])
    if suffix not in _BY_SUFFIX:
        return None
    format_name, conversion = _BY_SUFFIX[suffix]
    return f"is {format_name}, which is not read; convert it: {conversion}"
