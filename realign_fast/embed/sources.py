"""Sources of images and texts: items to embed, in a fixed order, without a list of all in memory.

A :class:`Source` walks its files in natural order and counts their items. A shard of the result is
a range of items, so its rows depend on the source and on ``shard_rows`` alone. Folders and tars
hold samples, which are the files or members of one name (an image, its caption and a json file);
all other files are tables.

An item says where its image lies, and decoding processes read it there (:func:`read_image`): a
file, a member of a tar, or a row of a parquet file, whose column of images holds the bytes of image
files or the struct of bytes and path of Hugging Face's `Image`. Any column of images may also hold
paths relative to the table's folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby, repeat
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..corpus.formats.arrow_columns import decoded, pyarrow
from ..corpus.formats.webdataset import opened_tar, samples
from ..corpus.row_values import read_entries
from ..storage.paths import natural_order
from .decode import SUFFIXES, Unreadable

MAX_IMAGE_BYTES = 1 << 30
READ_ROWS = 32  # images of a parquet file that are read at a time
USUAL_NAMES = {
    "id": ("id", "key", "image_id"),
    "caption": ("caption", "text", "TEXT"),
    "image": ("image", "jpg", "png", "webp", "image_path", "file_name", "path"),
}
CAPTION_NAMES = ("txt", "caption", "text")  # endings of members, or keys of the json member
Content = Literal["images", "texts", "pairs"]  # a pair is an image with its caption
# The place of a member by its ending, such as "txt": a path, and an offset and a size in a tar.
PlaceOf = Callable[[str], tuple[Any, ...] | None]


class Item(NamedTuple):
    """One image, one text, or a pair of them."""

    id: str
    path: str  # the file that holds it
    # Where its image lies in that file: (offset, size), or (column, row) of parquet.
    at: tuple[Any, ...] | None = None  # None: the image is the file
    caption: str | None = None
    failure: str | None = None  # a reason, known before anything is decoded, why it has no row


class Columns(NamedTuple):
    """Names of columns of tables, or of members of samples; None stands for the usual names."""

    id: str | None = None
    caption: str | None = None
    image: str | None = None


class Source:
    """The items of `path`, which are images, texts or pairs (`content`), to iterate over.

    Each of `walks` begins to yield a part of them anew.
    """

    def __init__(self, path: Path, content: Content, walks: list[partial[Iterator[Item]]]) -> None:
        self.path, self.content, self._walks = path, content, walks
        self.total = sum(1 for _ in self)  # items in all files
        if not self.total:
            raise ValueError(f"{path}: holds no {content}; `embed --help` lists what is read")

    def __iter__(self) -> Iterator[Item]:
        return (item for walk in self._walks for item in walk())


def identity(items: Sequence[Item]) -> str:
    """Return a BLAKE2b digest of items and of the size and time of each file that holds them."""
    digest = hashlib.blake2b(digest_size=16)
    for path, group in groupby(items, lambda item: item.path):
        try:
            state = os.stat(path)
            stamp: Any = (state.st_size, state.st_mtime_ns)
        except OSError as error:
            stamp = error.strerror
        digest.update(repr((stamp, *group)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_image(item: Item) -> bytes:
    """Return the encoded image of an item; Unreadable says why it cannot be read."""
    try:
        if item.at is None or isinstance(item.at[0], int):
            return _read_at(item.path, *item.at or ())
        value = _parquet_value(item.path, *item.at)
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return _read_at(os.path.join(os.path.dirname(item.path), value["path"]))
            value = value.get("bytes")
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types too
        reason = " ".join(str(error).split())
        raise Unreadable(getattr(error, "strerror", None) or reason) from error
    if not isinstance(value, bytes):
        raise Unreadable(f"no image: the column holds {value!r:.40}, expected bytes or a path")
    return value


def _read_at(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Return the bytes of a file, or `size` of them from `offset` on."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):  # reading a pipe or a device might never end
        raise Unreadable("not a regular file")
    size = state.st_size if size is None else size
    if size > MAX_IMAGE_BYTES:
        raise Unreadable(f"has {size} bytes, expected at most {MAX_IMAGE_BYTES}")
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), size, offset)
    if len(data) != size:
        raise Unreadable(f"got {len(data)} of its {size} bytes")
    return data


def _parquet_value(path: str, column: str, row: int) -> Any:
    """Return the value of a row, reading on to it in its row group; an earlier row begins anew."""
    file, group = _opened(path, os.stat(path).st_mtime_ns), 0
    while group < file.num_row_groups and row >= (rows := file.metadata.row_group(group).num_rows):
        row, group = row - rows, group + 1
    for _ in range(2):
        for number, value in _parquet_values(file, column, group):
            if number == row:
                return value
        _parquet_values.cache_clear()
    raise ValueError(f"{path}: changed while it was read; run the command again")


@lru_cache(maxsize=1)
def _opened(path: str, _: int) -> Any:
    """Open a parquet file, again only if its time has changed."""
    with decoded(path):
        return pyarrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)


@lru_cache(maxsize=1)
def _parquet_values(file: Any, column: str, group: int) -> Iterator[tuple[int, Any]]:
    """Return an iterator over the values of a row group that goes on where the last call ended."""
    batches = file.iter_batches(READ_ROWS, [group], [column], use_threads=False)
    return enumerate(value for batch in batches for value in batch.column(0).to_pylist())


def _with_caption(content: Content, item: Item, caption: Any) -> Item:
    """Return an item with its caption, or with the reason why it has no text to embed."""
    failure = None
    if not isinstance(caption, str):
        failure = f"no caption, but {caption!r:.40}"
    elif not caption.strip():
        failure = "empty caption"
    elif re.search("[\ud800-\udfff]", caption):
        failure = "its caption is no Unicode text"
    return item._replace(
        caption=caption if isinstance(caption, str) else None,
        failure=item.failure or (None if content == "images" else failure),
    )


def _sample(content: Content, columns: Columns, item: Item, place: PlaceOf) -> Item:
    """Return a sample with its id and caption: the text of a member, or a value of the json one."""
    caption = None
    try:
        if columns.id:
            name = _value(place, (columns.id,))
            failure = f"has no id in {columns.id}" if name is None else item.failure
            item = item._replace(id=item.id if name is None else str(name), failure=failure)
        caption = _value(place, (columns.caption,) if columns.caption else CAPTION_NAMES)
    except (OSError, ValueError, RecursionError, Unreadable) as error:
        if content != "images" and not item.failure:
            item = item._replace(failure=f"its caption cannot be read: {error}")
    return _with_caption(content, item, caption)


def _value(place: PlaceOf, names: Sequence[str]) -> Any:
    """Return the first member by one of `names`, or else value by such a key in the json member."""
    for name in names:
        if member := place(name.lower()):
            return _read_at(*member).decode("utf-8-sig").strip()
    values = json.loads(_read_at(*member)) if (member := place("json")) else {}
    known = values if isinstance(values, dict) else {}
    return next((known[name] for name in names if known.get(name) is not None), None)


def _folder_items(content: Content, columns: Columns, folder: Path) -> Iterator[Item]:
    """Yield every image below a folder; its id is its path in the folder without the suffix.

    The suffix tells which files are images. In pairs the caption of `a/b.jpg` is the text of
    `a/b.txt`, or `caption` or `text` of `a/b.json`, as img2dataset writes them. Other files are
    chosen by the end of their names, and other values of the json file by their key.
    """
    for path in _files_below(folder):
        stem, suffix = os.path.splitext(path)
        is_image = suffix[1:].lower() in SUFFIXES
        if columns.image is not None:
            is_image = path.lower().endswith(ending := f".{columns.image.lower()}")
            stem = path[: -len(ending)]
        if is_image:
            item = Item(os.path.relpath(stem, folder).replace(os.sep, "/"), path)
            if content == "pairs" or columns.id:
                item = _sample(content, columns, item, partial(_place_beside, stem))
            yield item


def _place_beside(stem: str, ending: str) -> tuple[str] | None:
    path = f"{stem}.{ending}"
    return (path,) if os.path.exists(path) else None


def _files_below(folder: Path) -> Iterator[str]:
    """Yield visible files in natural order, those of a folder before those of its subfolders.

    Links to folders are followed unless they lead to a parent.
    """

    def _raise(error: OSError) -> None:
        raise error

    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        here = Path(root).resolve()
        folders[:] = sorted(
            (n for n in folders if n[0] != "." and not here.is_relative_to((here / n).resolve())),
            key=natural_order,
        )
        visible = (name for name in names if name[0] != ".")
        yield from (os.path.join(root, name) for name in sorted(visible, key=natural_order))


def _tar_items(content: Content, columns: Columns, file: Path) -> Iterator[Item]:
    """Yield the samples of a `.tar` file, as WebDataset groups them; their id is the key.

    The caption is the `txt` member, or else `caption` or `text` of the `json` member. Other
    members are chosen by their ending, and other values of the `json` member by their key. A walk
    reads headers and captions; images are read later, by their position in the file.
    """
    image_endings = SUFFIXES if columns.image is None else (columns.image.lower(),)
    with opened_tar(file) as tar:
        for key, members in samples(file, tar):
            places = {end: (str(file), m.offset_data, m.size) for end, m in members.items()}
            image = next((place for end, place in places.items() if end in image_endings), None)
            failure = None
            if content != "texts" and image is None:
                name = columns.image or "image"
                failure = f"has no {name} member, only {', '.join(members)}"
            item = Item(key, str(file), image and image[1:], None, failure)
            yield _sample(content, columns, item, places.get)


def _table_items(
    is_one_of_several: bool, content: Content, columns: Columns, file: Path
) -> Iterator[Item]:
    """Yield the rows of a table. Without a column of ids the id is the number of the row.

    Text formats hold paths of images; parquet holds those or images.
    """
    prefix = f"{file.stem}-" if is_one_of_several else ""
    rows, names, inside = _text_rows(file, content), None, False
    if file.suffix.lower() == ".parquet":
        table = _opened(str(file), os.stat(file).st_mtime_ns)
        types = {field.name: str(field.type) for field in table.schema_arrow}
        names = _names(file, [*types], content, columns)
        inside = bool(names.image) and types[str(names.image)] not in ("string", "large_string")
        read = set(filter(None, (names.id, names.caption, None if inside else names.image)))
        rows = read_entries(file, read) if read else repeat({}, table.metadata.num_rows)
    for number, row in enumerate(rows):
        names = names or _names(file, list(row), content, columns)
        name, caption, image = (row.get(name) for name in names)
        item = Item(f"{prefix}{number}" if name in (None, "") else str(name), str(file))
        if inside:
            item = item._replace(at=(names.image, number))
        elif isinstance(image, str) and image:
            item = item._replace(path=os.path.join(file.parent, image))
        elif content != "texts":
            failure = f"no image: {names.image} is {image!r:.40}, expected a path"
            item = item._replace(failure=failure)
        yield _with_caption(content, item, caption)


def _names(file: Path, present: list[str], content: Content, columns: Columns) -> Columns:
    """Return the name of each column: the chosen one, or the first usual one present."""
    needed = {"images": ["image"], "texts": ["caption"], "pairs": ["image", "caption"]}[content]
    names: dict[str, str | None] = {}
    for role, chosen in columns._asdict().items():
        if role == "image" and content == "texts":
            continue
        usual = (name for name in USUAL_NAMES[role] if name in present)
        names[role] = chosen or next(usual, None)
        if names[role] not in present and (chosen or role in needed):
            missing = f"column {chosen!r}" if chosen else f"column for the {role}"
            advice = f"choose one with --{role}-column, of: {', '.join(present)}"
            raise ValueError(f"{file}: has no {missing}; {advice}")
    return Columns(**names)


def _text_rows(path: Path, content: Content) -> Iterator[dict[Any, Any]]:
    """Yield the rows of a table in a text format; memory holds all of `dataset.json` alone.

    `dataset.json` is `{"images": [{"id", "image": PATH}], "texts": [{"id", "text"}]}`.
    """
    suffix, number = path.suffix.lower(), 0
    rows: Iterable[Any]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix == ".json":
                dataset = json.load(file)
                rows = dataset.get(content) or () if isinstance(dataset, dict) else ()
            elif suffix == ".jsonl":
                rows = (json.loads(line) for line in file if line.strip())
            elif suffix == ".txt":
                rows = ({"text": line.strip()} for line in file)
            else:
                rows = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
            for row in rows:
                if not isinstance(row, dict) or None in row:
                    raise ValueError(f"expected a value for each column, got {row!r:.60}")
                yield row
                number += 1
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: row {number}: {error}; correct the file") from error


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
    formats = (".tar", ".parquet", ".jsonl", ".csv", ".tsv", *[".txt"] * (kind == "texts"))
    files = _files_of(path, kind, formats) if path.is_dir() else [path]
    suffix = files[0].suffix.lower() if files else ""
    if suffix in (*formats, ".json"):
        walk: Callable[..., Iterator[Item]] = _tar_items
        if suffix != ".tar":
            walk = partial(_table_items, len(files) > 1)
        return Source(path, kind, [partial(walk, kind, columns, file) for file in files])
    if path.is_dir() and kind != "texts":
        return Source(path, kind, [partial(_folder_items, kind, columns, path)])
    expected = f"{', '.join(formats)}, .json (the paper's) or a directory of such files or images"
    actual = "a directory without any" if path.is_dir() else repr(path.suffix)
    raise ValueError(f"{path}: as {kind} expected {expected}, got {actual}")


def _files_of(folder: Path, content: Content, formats: Sequence[str]) -> list[Path]:
    """Return the tars or tables of a folder, all of one suffix; none for a folder of images.

    A parquet file beside a tar or a folder of images of its name is img2dataset's index of it.
    """
    visible = [p for p in sorted(folder.iterdir(), key=natural_order) if p.name[0] != "."]
    indexed = {p.stem for p in visible if p.suffix.lower() == ".tar"}
    indexed |= {p.name for p in visible if content != "texts" and p.is_dir()}
    files: dict[str, list[Path]] = {}
    for path in visible:
        suffix = path.suffix.lower()
        if suffix[1:] in SUFFIXES:
            files.setdefault("images", []).append(path)
        elif suffix in formats and not (suffix == ".parquet" and path.stem in indexed):
            files.setdefault(f"*{suffix}", []).append(path)
    if len(files) > 1:
        present = " and ".join(sorted(files))
        raise ValueError(f"{folder}: has {present}; name a file, or a folder of one format")
    files.pop("images", None)
    return next(iter(files.values()), [])
