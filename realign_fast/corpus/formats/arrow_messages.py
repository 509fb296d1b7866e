"""How many rows an Arrow IPC file or stream has, from the heads of its messages alone.

pyarrow reads a message whole; far away that would fetch all rows to count them. A file is a stream
behind 8 bytes, with a footer. Each message (arrow.apache.org, "Serialization and Interprocess
Communication") is `ff ff ff ff`, the length of its head, the head, then its body; the head is a
flatbuffer table that tells the length of the body and, of a record batch, that of its columns.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...storage.paths import OpenedFile, StoragePath

CONTINUES = b"\xff\xff\xff\xff"
RECORD_BATCH = 3  # of the union MessageHeader
MAX_HEAD = 64 << 20
FIRST_BYTES = 1 << 12  # fetched at once: most heads are shorter


def rows_of_batches(path: StoragePath, file: OpenedFile, stream: bool) -> Iterator[int]:
    """The rows of each record batch in turn.

    Raises:
        ValueError: the messages do not follow each other to the end.
    """
    at = 0 if stream else 8
    while True:
        start = file.pread(FIRST_BYTES, at)
        if start[:4] != CONTINUES or len(start) < 8:
            raise ValueError(
                f"{path}: no message at byte {at}: truncated or damaged; write it again"
            )
        (length,) = struct.unpack_from("<i", start, 4)
        if length == 0:
            return
        if not 0 < length <= MAX_HEAD:
            raise ValueError(f"{path}: a message of {length} bytes at byte {at}; write it again")
        head = start[8 : 8 + length]
        if len(head) < length:
            head += file.pread(length - len(head), at + 8 + len(head))
        try:
            body, rows = _told(head)
        except (struct.error, IndexError) as error:
            raise ValueError(f"{path}: damaged message at byte {at}; write it again") from error
        if body < 0 or at + 8 + length + body > file.size:
            raise ValueError(f"{path}: truncated: byte {at} tells of more than there is")
        if rows is not None:
            yield rows
        at += 8 + length + body


def _told(head: bytes) -> tuple[int, int | None]:
    """The length of the body; the rows, if it is a record batch."""
    (root,) = struct.unpack_from("<I", head, 0)
    kind, table, body = (_field(head, root, number) for number in (1, 2, 3))
    length = struct.unpack_from("<q", head, body)[0] if body else 0
    if not kind or head[kind] != RECORD_BATCH:
        return length, None
    (offset,) = struct.unpack_from("<I", head, table)
    rows = _field(head, table + offset, 0)
    return length, struct.unpack_from("<q", head, rows)[0] if rows else 0


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer table is; 0 if it is left out."""
    (back,) = struct.unpack_from("<i", data, table)
    size = struct.unpack_from("<H", data, table - back)[0]
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", data, table - back + place)[0] if place < size else 0
    return table + offset if offset else 0
