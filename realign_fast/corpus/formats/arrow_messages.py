"""The number of rows of an Arrow IPC file or stream, from the heads of its messages alone.

pyarrow reads whole messages, which would fetch all rows of a remote file in order to count them. A
file is a stream behind 8 bytes, with a footer. Each message (arrow.apache.org, "Serialization and
Interprocess Communication") is `ff ff ff ff`, the length of its head, the head, then its body. The
head is a flatbuffer table with the length of the body and, for a record batch, that of its columns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...storage.paths import OpenedFile, StoragePath

CONTINUES = b"\xff\xff\xff\xff"
RECORD_BATCH = 3  # in the union MessageHeader
MAX_HEAD = 64 << 20
FIRST_BYTES = 1 << 12  # fetched at once: most heads are shorter


def rows_of_batches(path: StoragePath, file: OpenedFile, is_stream: bool) -> Iterator[int]:
    """Yield the number of rows of each record batch in turn."""
    offset = 0 if is_stream else 8
    while True:
        start = file.pread(FIRST_BYTES, offset)
        prefix = 8 if start[:4] == CONTINUES else 4  # Arrow before 0.15 wrote the length alone
        if len(start) < prefix:
            problem = f"no message at byte {offset}: truncated or damaged"
            raise ValueError(f"{path}: {problem}; write it again")
        (length,) = struct.unpack_from("<i", start, prefix - 4)
        if length == 0:
            return
        if not 0 < length <= MAX_HEAD:
            problem = f"a message of {length} bytes at byte {offset}"
            raise ValueError(f"{path}: {problem}; write it again")
        offset += prefix
        head = start[prefix : prefix + length]
        if len(head) < length:
            head += file.pread(length - len(head), offset + len(head))
        try:
            body, num_rows = _body_and_rows(head)
        except (struct.error, IndexError) as error:
            raise ValueError(f"{path}: damaged message at byte {offset}; write it again") from error
        if min(body, num_rows or 0) < 0 or offset + length + body > file.size:
            problem = f"truncated or damaged: byte {offset} tells of more than there is"
            raise ValueError(f"{path}: {problem}; write it again")
        if num_rows is not None:
            yield num_rows
        offset += length + body


def _body_and_rows(head: bytes) -> tuple[int, int | None]:
    """Return the length of the body, and the number of rows of a record batch, else None."""
    (root,) = struct.unpack_from("<I", head, 0)
    header_type, table, body = (_field(head, root, number) for number in (1, 2, 3))
    length = struct.unpack_from("<q", head, body)[0] if body else 0
    if not header_type or head[header_type] != RECORD_BATCH:
        return length, None
    (offset,) = struct.unpack_from("<I", head, table)
    count = _field(head, table + offset, 0)
    return length, struct.unpack_from("<q", head, count)[0] if count else 0


def _field(data: bytes, table: int, number: int) -> int:
    """Return the offset of a field of a flatbuffer table; 0 if the field is left out."""
    (back,) = struct.unpack_from("<i", data, table)
    size = struct.unpack_from("<H", data, table - back)[0]
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", data, table - back + place)[0] if place < size else 0
    return table + offset if offset else 0
