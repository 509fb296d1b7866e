"""Sources of images and texts: items to embed, in a fixed order, without a list of all in memory.

A :class:`Source` walks its files in natural order and counts the items of each. A shard of the
result is a range of items, so its rows depend on the source and on ``shard_rows`` alone. A subclass
reads one kind of files: `Folder` and `Tars` hold samples, which are the files or members of one
name (an image, its caption and a json file); `Table` reads parquet, jsonl, csv, tsv, txt and the
paper's `dataset.json`. :func:`open_source` alone looks at what a path is.

A column of images in a table holds the bytes of image files (in parquet: binary, or the struct of
bytes and path of Hugging Face's `Image`), or paths relative to the table's folder. Decoding
processes read the images of parquet files, forward and a few rows at a time.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from errno import ENOENT
from functools import partial
from itertools import chain, dropwhile, islice, repeat
from pathlib import Path
from tarfile import TarInfo
from typing import Any, Literal, NamedTuple

from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..corpus.formats.webdataset import opened_tar, samples
from ..storage.paths import natural_order
from .decode import SUFFIXES, Unreadable

MAX_IMAGE_BYTES = 1 << 30
MAX_CAPTION_BYTES = 1 << 20
TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
READ_ROWS = 32  # images read at a time
BUFFER_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 20
USUAL_NAMES = {
    "id": ("id", "key", "image_id"),
    "caption": ("caption", "text", "TEXT"),
    "image": ("image", "jpg", "png", "webp", "image_path", "file_name", "path"),
}
ReadMember = Callable[[str], bytes | None]  # of an ending such as "txt"; None: no such member
CAPTION_NAMES = ("txt", "caption", "text")  # endings of members, or keys of the json member
Content = Literal["images", "texts", "pairs"]  # a pair is an image with its caption
NEEDED = {"images": ("image",), "texts": ("caption",), "pairs": ("image", "caption")}


class Item(NamedTuple):
    """One image, one text, or a pair of them. Its `repr` enters the keys of finished shards."""

    id: str
    path: str  # the file that holds it
    at: Any = None  # where its image lies in that file; None: the image is the file
    caption: str | None = None
    failure: str | None = None  # a reason, known before anything is decoded, why it has no row


class Columns(NamedTuple):
    """Names of columns of tables, or of members of samples; None stands for the usual names."""

    id: str | None = None
    caption: str | None = None
    image: str | None = None


class Source:
    """The items of `path`, which are images, texts or pairs (`content`)."""

    def __init__(
        self, path: Path, files: Sequence[Path], content: Content, columns: Columns
    ) -> None:
        self.ignored: dict[str, int] = {}  # the number of files that are no items, by suffix
        self.path, self.files, self.content, self.columns = path, files, content, columns
        self.reads_images = content != "texts"
        self.total = sum(self.count(file) for file in files)  # items in all files
        self._position, self._walk = 0, self._walk_files()
        if not self.total:
            raise ValueError(f"{path}: holds no {content}; `embed --help` lists what is read")

    def count(self, file: Path) -> int:
        """Return the number of items in one file."""
        return sum(1 for _ in self.walk(file))

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the items of one file, in order."""
        raise NotImplementedError

    def read(self, item: Item) -> bytes:
        """Return the encoded image of an item; decoding processes call it.

        Unreadable if this image cannot be read; the others may be.
        """
        state = os.stat(item.path)
        if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device might never end
            raise Unreadable("not a regular file")
        return read_at(item.path, 0, state.st_size)

    def items(self, start: int, stop: int) -> list[Item]:
        """Return items `start` to `stop`. Rising ranges are served by a single walk.

        ValueError if there are fewer items than were counted.
        """
        if start < self._position:
            self._position, self._walk = 0, self._walk_files()
        items = list(islice(self._walk, start - self._position, stop - self._position))
        if len(items) != stop - start:
            raise ValueError(f"{self.path}: changed while it was read; run the command again")
        self._position = stop
        return items

    def _walk_files(self) -> Iterator[Item]:
        return chain.from_iterable(map(self.walk, self.files))


def read_at(path: str, offset: int, size: int) -> bytes:
    """Return `size` bytes of a file from `offset` on.

    Unreadable if the file ends earlier, or no image is that large.
    """
    if size > MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, expected at most {MAX_IMAGE_BYTES}")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise Unreadable(f"got {len(data)} of its {size} bytes")
    return data


def identity(items: Sequence[Item]) -> str:
    """Return a BLAKE2b digest of items and of the size and time of each file that holds them."""
    digest = hashlib.blake2b(digest_size=16)
    stamps: dict[str, tuple[int, int] | str | None] = {}
    for item in items:
        if item.path not in stamps:
            try:
                state = os.stat(item.path)
                stamps[item.path] = (state.st_size, state.st_mtime_ns)
            except OSError as error:
                stamps[item.path] = error.strerror
        digest.update(repr((item, stamps[item.path])).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _text(read: ReadMember, names: Iterable[str], types: Any = str) -> str | None:
    """Return the first text by one of `names`, each an ending or a key of the `json` member.

    ValueError or OSError if it cannot be read.
    """
    values: Any = None
    for name in names:
        if (data := read(name.lower())) is not None:
            return data.decode("utf-8-sig").strip()
        try:
            values = values or json.loads(read("json") or b"{}")
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if isinstance(values, dict) and isinstance(value := values.get(name), types):
            return str(value)
    return None


class Folder(Source):
    """Every image below a folder; its id is its path in the folder without the suffix.

    The suffix tells which files are images. Files with other suffixes are counted in `ignored`,
    hidden files are skipped. In pairs the caption of `a/b.jpg` is the text of `a/b.txt`, or
    `caption` or `text` of `a/b.json`, as img2dataset writes them. Other files are chosen by the
    end of their names, and other values of the json file by their key.
    """

    def count(self, file: Path) -> int:
        """Return the number of images below the folder `file`; sets `ignored`."""
        suffixes: Counter[str] = Counter()  # of the files that are no images
        images = 0
        for path in _files(os.fspath(file)):
            if self._stem(path) is None:
                suffixes[os.path.splitext(path)[1][1:].lower()] += 1
            else:
                images += 1
        if self.content == "pairs":
            for ending in ("txt", "json", self.columns.caption or "txt"):
                del suffixes[ending.rpartition(".")[2].lower()]
        self.ignored = dict(sorted(suffixes.items()))
        return images

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the images below the folder `file`."""
        names = (self.columns.caption,) if self.columns.caption else CAPTION_NAMES
        for path in _files(os.fspath(file)):
            if (stem := self._stem(path)) is None:
                continue
            name, caption, failure = os.path.relpath(stem, file).replace(os.sep, "/"), None, None
            read = partial(_file_content, stem)
            missing = f"no caption: {os.path.basename(stem)}.{names[0]}"
            try:
                if self.columns.id:
                    name = _text(read, (self.columns.id,), str | int) or name
                if self.content == "pairs":
                    caption = _text(read, names)
                    failure = f"{missing}: {os.strerror(ENOENT)}" if caption is None else None
            except (OSError, ValueError) as error:
                failure = f"{missing}: {getattr(error, 'strerror', error)}"
            yield Item(name, path, None, caption, failure)

    def _stem(self, path: str) -> str | None:
        """Return the path of an image without the ending that makes it one; None of others."""
        if self.columns.image is None:
            stem, suffix = os.path.splitext(path)
            return stem if suffix[1:].lower() in SUFFIXES else None
        ending = f".{self.columns.image.lower()}"
        return path[: -len(ending)] if path.lower().endswith(ending) else None


def _file_content(stem: str, ending: str) -> bytes | None:
    try:
        with open(f"{stem}.{ending}", "rb") as file:
            return file.read(MAX_CAPTION_BYTES)
    except FileNotFoundError:
        return None


def _files(folder: str, parents: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield visible files in natural order, those of a folder before those of its subfolders.

    Memory holds one listing a level. Links to folders are followed unless they lead to a parent.
    """
    parents = (*parents, os.path.realpath(folder))
    with os.scandir(folder) as listing:
        visible = [entry for entry in listing if entry.name[0] != "."]
        entries = sorted((natural_order(e.name), e.path, e.is_dir()) for e in visible)
    yield from (path for _, path, is_folder in entries if not is_folder)
    for _, path, is_folder in entries:
        if is_folder and os.path.realpath(path) not in parents:
            yield from _files(path, parents)


class Tars(Source):
    """Samples of `.tar` files, as WebDataset groups them; their id is the key.

    The caption is the `txt` member, or else `caption` or `text` of the `json` member. Other
    members are chosen by their ending, and other values of the `json` member by their key. A walk
    reads headers and captions; images are read later, by their position in the file.
    """

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield the samples of a tar; the position of an image is its offset and size.

        ValueError if no sample has a member or a key that was chosen.
        """
        chosen, needed = self.columns._asdict(), {"id", *NEEDED[self.content]}
        unseen = {role for role, name in chosen.items() if name and role in needed}
        image_endings = SUFFIXES if chosen["image"] is None else (chosen["image"].lower(),)
        endings: set[str] = set()
        with opened_tar(file) as tar, open(file, "rb") as data:
            for key, members in samples(file, tar):
                endings.update(members if len(endings) < 20 else ())
                image = next((info for end, info in members.items() if end in image_endings), None)
                read = partial(_member_content, data.fileno(), members)
                name, caption, failure = None, None, None
                try:
                    name = _text(read, filter(None, [chosen["id"]]), str | int)
                    captions = [chosen["caption"]] if chosen["caption"] else CAPTION_NAMES
                    caption = _text(read, captions)
                except ValueError as error:
                    failure = f"its caption cannot be read: {error}"
                if self.content == "images":
                    failure = None  # the image may still be good
                if self.reads_images and image is None:
                    failure = f"has no image member, only {', '.join(members)}"
                values = {"id": name, "caption": caption, "image": image}
                unseen -= {role for role, value in values.items() if value is not None}
                at = image and (image.offset_data, image.size)
                yield Item(name or key, str(file), at, caption, failure)
        for role in sorted(unseen if endings else ()):
            raise ValueError(
                f"{file}: no sample has {chosen[role]!r}; choose with --{role}-column the ending "
                f"of a member, of: {', '.join(sorted(endings))}; or a key of its json member"
            )

    def read(self, item: Item) -> bytes:
        """Return the bytes of the image member."""
        return read_at(item.path, *item.at)


def _member_content(file: int, members: dict[str, TarInfo], ending: str) -> bytes | None:
    if (member := members.get(ending)) is None:
        return None
    return os.pread(file, min(member.size, MAX_CAPTION_BYTES), member.offset_data)


class Table(Source):
    """Rows of tables of one suffix.

    Without a column of ids the id is the row's number, after the file's name where there are
    several files.
    """

    def __init__(self, path: Path, files: list[Path], content: Content, columns: Columns) -> None:
        # The images at hand: their file, the number of the next row, and what is left of them.
        self._images: tuple[str, int, Iterator[tuple[int, Any]]] = ("", 0, iter(()))
        super().__init__(path, files, content, columns)

    def walk(self, file: Path) -> Iterator[Item]:
        """Yield an item for each row; its position is the row's number where images are inside."""
        names, rows, images_inside = self._rows(file)
        prefix = f"{file.stem}-" if len(self.files) > 1 else ""
        for number, row in enumerate(rows):
            row_id, caption, failure = row.get(names.id), row.get(names.caption), None
            name = f"{prefix}{number}" if row_id in (None, "") else str(row_id)
            if not isinstance(caption, str | None):
                if self.content != "images":
                    failure = f"its caption is {type(caption).__name__}, expected text"
                caption = None
            path, at = str(file), None
            if images_inside or not self.reads_images:
                at = None if file.suffix == ".json" else number  # it enters keys of version 0.1.0
            elif isinstance(image := row.get(names.image), str) and image:
                path = os.path.join(file.parent, image)
            else:
                failure = f"no image: {names.image} is {image!r:.40}, expected a path"
            yield Item(name, path, at, caption, failure)

    def _rows(self, file: Path) -> tuple[Columns, Iterable[dict[Any, Any]], bool]:
        """Return the columns, the rows without images, and whether images lie in the file."""
        suffix = file.suffix.lower()
        if suffix != ".parquet":
            json_rows = partial(_dataset_rows, content=self.content)
            rows = (json_rows if suffix == ".json" else _TEXT_ROWS[suffix])(file)
            if (first := next(rows, None)) is None:
                return Columns(), [], False
            return self._names(file, list(first)), chain([first], rows), False
        table = _opened(file)
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
        names = self._names(file, schema.names)
        inside = bool(names.image) and _holds_bytes(file, schema.field(names.image))
        columns = (names.id, names.caption, None if inside else names.image)
        read = list({name: None for name in columns if name})
        return names, _parquet_rows(file, table, read) if read else repeat({}, num_rows), inside

    def _names(self, file: Path, present: list[str]) -> Columns:
        """Return the name of each column: the chosen one, or the first usual one present."""
        names: dict[str, str | None] = {}
        for role, chosen in self.columns._asdict().items():
            needed = role in NEEDED[self.content]
            if role == "image" and not needed:
                continue
            usual = (name for name in USUAL_NAMES[role] if name in present)
            names[role] = chosen or next(usual, None)
            if names[role] not in present and (chosen or needed):
                missing = f"column {chosen!r}" if chosen else f"column for the {role}"
                advice = f"choose one with --{role}-column, of: {', '.join(present)}"
                if not present:
                    advice = "its first entry names no column; correct it"
                raise ValueError(f"{file}: has no {missing}; {advice}")
        return Columns(**names)

    def read(self, item: Item) -> bytes:
        """Return the encoded image of a row, from the table or from the file that it names."""
        if item.at is None:
            return super().read(item)
        value = self._image(item.path, item.at)
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                folder = os.path.dirname(item.path)
                return super().read(Item("", os.path.join(folder, value["path"])))
            value = value.get("bytes")
        if value is None:
            raise Unreadable("no image: the column is null")
        return bytes(value)

    def _image(self, path: str, row: int) -> Any:
        """Return the image column of a row of a parquet file, reading on to it."""
        previous, next_row, values = self._images
        if path != previous or row < next_row:
            values = self._image_values(Path(path), row)
        with decoded(path):
            for number, value in values:
                if number == row:
                    self._images = (path, row + 1, values)
                    return value
        raise ValueError(f"{path}: changed while it was read; run the command again")

    def _image_values(self, file: Path, row: int) -> Iterator[tuple[int, Any]]:
        """Yield the number and the image of each row, from the row group of `row` on."""
        table, first, group = _opened(file), 0, 0
        column = self._names(file, table.schema_arrow.names).image
        while (after := first + table.metadata.row_group(group).num_rows) <= row:
            first, group = after, group + 1
        groups = range(group, table.num_row_groups)
        batches = table.iter_batches(READ_ROWS, groups, [column], use_threads=False)
        return enumerate(chain.from_iterable(b.column(0).to_pylist() for b in batches), first)


def _parquet_rows(file: Path, table: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    with decoded(file):
        for batch in table.iter_batches(1024, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _opened(path: Path) -> Any:
    with decoded(path):
        return pyarrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)


def _holds_bytes(path: Path, field: Any) -> bool:
    """Return whether a column of images holds files; otherwise it holds paths."""
    types, column_type = pyarrow().types, field.type
    if types.is_struct(column_type) and column_type.get_field_index("bytes") >= 0:
        column_type = column_type.field("bytes").type
    if types.is_binary(column_type) or types.is_large_binary(column_type):
        return True
    if types.is_string(column_type) or types.is_large_string(column_type):
        return False
    advice = "expected bytes of image files, or paths; choose another column"
    raise TypeError(f"{path}: column {field.name!r} is {field.type}, {advice}")


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of each line; blank lines are skipped."""
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"line {number} is not valid JSON ({error})"
            raise ValueError(f"{path}: {reason}; write it again") from error
        if not isinstance(value, dict):
            actual = type(value).__name__
            raise ValueError(f"{path}: line {number} is a {actual}, expected an object {{...}}")
        yield value


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a csv file (tsv: with tabs) whose first record names the columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = dropwhile(str.isspace, (line for _, line in _lines(path)))
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: its header names a column twice; rename one")
        for record in reader:
            if None in record or None in record.values():
                fault = f"line {reader.line_num} has not as many fields as the header"
                raise ValueError(f"{path}: {fault}; quote fields that contain the separator")
            yield record
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; write the csv again") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number of each line, from 1, and its text; memory holds one line at a time."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            place = f"{path}: line {number}"
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(f"{place} has over {MAX_LINE_BYTES} bytes; write one text a line")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{place} is not UTF-8 ({reason}); convert the file") from error


def _txt_rows(path: Path) -> Iterator[dict[str, Any]]:
    return ({"text": line.strip()} for _, line in _lines(path))


_TEXT_ROWS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".txt": _txt_rows}


def _dataset_rows(path: Path, content: Content) -> Iterator[dict[str, Any]]:
    """Yield the entries of one side of the paper's `dataset.json`, which memory holds.

    It is `{"images": [{"id", "image": PATH}], "texts": [{"id", "text"}]}`.
    """
    if content == "pairs":
        raise ValueError(f"{path}: its sides are no pairs; give it to --images and to --texts")
    dataset = None
    with suppress(ValueError, RecursionError):
        dataset = json.loads(path.read_bytes())
    entries = dataset.get(content) if isinstance(dataset, dict) else None
    if not isinstance(entries, list):
        actual = sorted(dataset) if isinstance(dataset, dict) else "no JSON object"
        expected = f'expected {{"images": [...], "texts": [...]}} with {content!r}'
        raise ValueError(f"{path}: {expected}, got {actual}; write it as the paper does")
    name = content.removesuffix("s")
    for number, entry in enumerate(entries):
        value = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(value, str) or not isinstance(entry.get("id"), str | int):
            form = f"{{'id': ..., {name!r}: '...'}}"
            raise ValueError(f"{path}: entry {number} of {content!r} is not {form}; correct it")
        yield {"id": entry["id"], name: value}


def open_source(
    path: str | os.PathLike[str], kind: Content, columns: Columns | None = None
) -> Source:
    """Open the images, texts or pairs (an image with its caption) of `path`.

    Args:
        path: a `.tar`, `.parquet`, `.jsonl`, `.csv`, `.tsv` or `.txt` file, the paper's
            `dataset.json`, or a directory of files of one of these formats; any other directory
            is one of image files.
        kind: "images", "texts" or "pairs".
        columns: of tables whose columns do not have the usual names; of samples in tars and
            folders the endings of members, or keys of their `json` member.

    Raises:
        ValueError, TypeError, OSError: names the file and what is wrong with it.
    """
    path, columns = Path(os.path.abspath(path)), columns or Columns()
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; name a file or a directory of {kind}")
    files = _files_of(path, kind) if path.is_dir() else [path]
    suffix = files[0].suffix.lower() if files else ""
    if suffix == ".tar":
        return Tars(path, files, kind, columns)
    if suffix in (*TABLE_SUFFIXES, ".json") and not (suffix == ".txt" and kind != "texts"):
        return Table(path, files, kind, columns)
    if path.is_dir() and kind != "texts":
        return Folder(path, [path], kind, columns)
    expected = ".tar, .parquet, .jsonl, .csv, .tsv, .json (the paper's)"
    expected += ", .txt" if kind == "texts" else " or a directory of image files"
    actual = "a directory without any" if path.is_dir() else repr(path.suffix)
    raise ValueError(f"{path}: as {kind} expected {expected}, got {actual}")


def _files_of(folder: Path, content: Content) -> list[Path]:
    """Return the tars or tables of a folder, all of one suffix; none for a folder of images.

    A parquet file beside a tar or a folder of images of its name is img2dataset's index of it.
    """
    known = (".tar", *TABLE_SUFFIXES)
    visible = [p for p in sorted(folder.iterdir(), key=natural_order) if not p.name.startswith(".")]
    indexed = {p.stem for p in visible if p.suffix.lower() == ".tar"}
    indexed |= {p.name for p in visible if content != "texts" and p.is_dir()}
    visible = [p for p in visible if p.suffix.lower() != ".parquet" or p.stem not in indexed]
    files = {suffix: [p for p in visible if p.suffix.lower() == suffix] for suffix in known}
    images = any(path.suffix[1:].lower() in SUFFIXES for path in visible if path.is_file())
    present = [suffix for suffix in known if files[suffix] and not (suffix == ".txt" and images)]
    if len(present) > 1 or (present and images):
        formats = " and ".join(f"*{suffix}" for suffix in present) + " and images" * images
        raise ValueError(f"{folder}: has {formats}; name a file, or a folder of one format")
    return files[present[0]] if present else []
