"""Sources: their items, the order and ids of the items, and the files that are refused."""

import io
import json
import os
import tarfile

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from support.small_models import picture, write_pictures

from realign_fast.embed import Columns, open_source
from realign_fast.embed.decode import Unreadable, decode
from realign_fast.embed.sources import identity, read_image


def png(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def all_items(source):
    return list(source)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_parquet(path, columns, **options):
    table = pytest.importorskip("pyarrow").table(columns)
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)
    return path


def test_a_folder_in_natural_order_with_its_subfolders(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 11)
    write_pictures(folder / "deep" / "er", 2)
    (folder / ".hidden.png").write_bytes(png(0))
    (folder / "notes.md").write_text("no image")
    source = open_source(folder, "images")
    ids = [f"p_{i}" for i in range(11)] + ["deep/er/p_0", "deep/er/p_1"]
    assert [item.id for item in all_items(source)] == ids
    assert read_image(all_items(source)[3]) == (folder / "p_3.png").read_bytes()


def test_files_that_are_no_images_are_left_out(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "a.heic").write_bytes(b"x")
    assert open_source(folder, "images").total == open_source(folder, "pairs").total == 2


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    folder, other = (write_pictures(tmp_path / name, 1) for name in ("one", "other"))
    (folder / "link").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    assert [item.id for item in all_items(open_source(folder, "images"))] == ["p_0", "link/p_0"]


def test_pairs_in_a_folder_take_the_text_beside(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "p_1.txt").unlink()
    first, second = all_items(open_source(folder, "pairs"))
    assert first.caption == "a small picture of number 0"
    assert second.failure == "no caption, but None"


def test_a_tar_of_samples(tmp_path):
    members = [("a/1.png", png(1)), ("a/1.txt", b"one\n"), ("a/2.json", b'{"caption": "two"}')]
    members += [("a/2.jpg", b"bytes"), ("a/3.txt", b"three")]
    source = open_source(write_tar(tmp_path / "s.tar", members), "pairs")
    first, second, third = all_items(source)
    assert [(item.id, item.caption) for item in (first, second)] == [("a/1", "one"), ("a/2", "two")]
    assert read_image(first) == png(1)
    assert read_image(second) == b"bytes"
    assert third.failure == "has no image member, only txt"
    texts = open_source(tmp_path / "s.tar", "texts")
    assert [(item.caption, item.failure) for item in all_items(texts)] == [
        ("one", None),
        ("two", None),
        ("three", None),
    ]


def pairs_of(source):
    return [(item.id, item.caption, read_image(item)) for item in all_items(source)]


@pytest.mark.parametrize(
    ("image", "caption"), [("input.jpg", "outputs.txt"), ("img", "cap"), ("jpg", "json")]
)
def test_members_of_other_names_are_chosen(tmp_path, image, caption):
    """Endings of members in a tar, and ends of names in a folder; case does not matter."""
    members, values = [], {"title": "from json", "uid": 7, "caption": "no"}
    for number in range(3):
        members += [(f"s{number}.{image}", png(number)), (f"s{number}.preview.webp", b"small")]
        other = json.dumps(values).encode() if caption == "json" else b"from a member\n"
        members += [(f"s{number}.{caption}", other)]
    by_key = caption == "json"
    columns = Columns(
        image=image.upper(), caption="title" if by_key else caption, id="uid" if by_key else None
    )
    (tmp_path / "folder").mkdir()
    for name, data in members:
        (tmp_path / "folder" / name).write_bytes(data)
    expected = [
        ("7", "from json", png(n)) if by_key else (f"s{n}", "from a member", png(n))
        for n in range(3)
    ]
    for path in (write_tar(tmp_path / "s.tar", members), tmp_path / "folder"):
        assert pairs_of(open_source(path, "pairs", columns)) == expected


def test_a_sample_without_what_was_chosen_fails_with_the_reason(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("1.png", png(1)), ("1.txt", b"one"), ("2.png", png(2))])
    reasons = {"image": "has no jpg member, only png, txt", "id": "has no id in uid"}
    for role, name in (("image", "jpg"), ("caption", "cap"), ("id", "uid")):
        items = all_items(open_source(path, "pairs", Columns(**{role: name})))
        assert items[0].failure == reasons.get(role, "no caption, but None")
    first, second = all_items(open_source(path, "pairs", Columns(caption="txt", image="png")))
    assert (first.caption, first.failure, second.caption) == ("one", None, None)
    with pytest.raises(ValueError, match="holds no images"):
        open_source(write_pictures(tmp_path / "folder", 1), "images", Columns(image="jpg"))


def write_img2dataset(folder, layout):
    """Two shards as img2dataset 1.47 leaves them, with its index and statistics beside each."""
    for shard in range(2):
        keys = [f"{shard:05}{i:04}" for i in range(3)]
        members = []
        for number, key in enumerate(keys):
            caption = {"caption": f"cat {key}", "key": key, "status": "success"}
            members += [(f"{key}.jpg", png(number)), (f"{key}.json", json.dumps(caption).encode())]
            if layout == "webdataset" or number:  # the last word is json's where there is no txt
                members += [(f"{key}.txt", f"cat {key}".encode())]
        index = {"url": ["u"] * 4, "caption": ["dog"] * 4, "key": [*keys, "failed"]}
        (folder / f"{shard:05}").mkdir(parents=True)
        if layout == "webdataset":
            (folder / f"{shard:05}").rmdir()
            write_tar(folder / f"{shard:05}.tar", members)
        for name, data in members if layout == "files" else ():
            (folder / f"{shard:05}" / name).write_bytes(data)
        write_parquet(folder / f"{shard:05}.parquet", index)
        (folder / f"{shard:05}_stats.json").write_text('{"count": 4, "successes": 3}')
    return folder


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_folders_of_img2dataset(tmp_path, layout):
    folder = write_img2dataset(tmp_path / layout, layout)
    source = open_source(folder, "pairs")
    prefix = {"files": "{0}/", "webdataset": ""}[layout]
    ids = [f"{shard:05}{i:04}" for shard in range(2) for i in range(3)]
    assert pairs_of(source) == [
        (prefix.format(key[:5]) + key, f"cat {key}", png(int(key[-1]))) for key in ids
    ]
    assert open_source(folder, "images").total == 6
    # The texts of folders are those of the index, which also has what could not be downloaded.
    assert open_source(folder, "texts").total == (6 if layout == "webdataset" else 8)


def test_an_index_of_img2dataset_alone_is_a_table(tmp_path):
    folder = write_img2dataset(tmp_path / "wds", "webdataset")
    (folder / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"has \*\.parquet and \*\.tar"):  # of which tar?
        open_source(folder, "pairs")
    (folder / "00000.tar").unlink()
    assert [item.id for item in all_items(open_source(folder, "texts"))][3] == "failed"
    with pytest.raises(ValueError, match="choose one with --image-column, of: url, caption, key"):
        open_source(folder, "images")


def test_a_folder_of_tars_goes_on_from_one_to_the_next(tmp_path):
    for number in (2, 10):
        members = [(f"{number}-{i}.png", png(i)) for i in range(3)]
        write_tar(tmp_path / f"part{number}.tar", members)
    source = open_source(tmp_path, "images")
    ids = ["2-0", "2-1", "2-2", "10-0", "10-1", "10-2"]
    assert [item.id for item in all_items(source)] == ids


@pytest.mark.parametrize("column_type", ["bytes", "struct", "path"])
def test_images_in_parquet(tmp_path, column_type):
    data, paths = [png(i) for i in range(70)], [f"p_{i}.png" for i in range(70)]
    for path, image in zip(paths, data, strict=True):
        (tmp_path / path).write_bytes(image)
    struct = [{"bytes": data[i] if i % 2 else None, "path": paths[i]} for i in range(70)]
    column = {"bytes": data, "struct": struct, "path": paths}[column_type]
    columns = {"id": [f"i{n}" for n in range(70)], "image": column, "caption": ["x"] * 70}
    source = open_source(write_parquet(tmp_path / "t.parquet", columns, row_group_size=20), "pairs")
    items = all_items(source)
    assert [(item.id, item.caption) for item in items] == [(f"i{n}", "x") for n in range(70)]
    for place in (0, 1, 19, 20, 65, 3, 69):  # forward, and back
        assert read_image(items[place]) == data[place]


def test_a_null_image_in_parquet_fails_alone(tmp_path):
    source = open_source(write_parquet(tmp_path / "t.parquet", {"image": [png(0), None]}), "images")
    items = all_items(source)
    assert decode(read_image(items[0])).size == (40, 48)
    with pytest.raises(Unreadable, match="the column holds None"):
        read_image(items[1])


TABLES = {
    "t.txt": "a cat\n\na dög\n",
    "t.jsonl": '{"text": "a cat"}\n\n{"text": ""}\n{"text": "a dög"}\n',
    "t.csv": 'n,caption\n1,a cat\n2,""\n3,a dög\n',
    "t.tsv": "n\tcaption\n1\ta cat\n2\t\n3\ta dög\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_texts(tmp_path, name, ends):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + TABLES[name].replace("\n", ends).encode())
    rows = [(item.id, item.caption) for item in all_items(open_source(tmp_path / name, "texts"))]
    assert rows == [("0", "a cat"), ("1", ""), ("2", "a dög")]


def test_columns_are_chosen(tmp_path):
    rows = [{"key": n, "title": f"t{n}", "caption": "no"} for n in (5, 6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path / "t.jsonl", "texts", Columns(id="key", caption="title"))
    assert [(item.id, item.caption) for item in all_items(source)] == [("5", "t5"), ("6", "t6")]


def test_a_csv_record_may_span_lines(tmp_path):
    (tmp_path / "t.csv").write_text('id,text\n1,"a cat,\nand a dog"\n2,x\n')
    captions = [item.caption for item in all_items(open_source(tmp_path / "t.csv", "texts"))]
    assert captions == ["a cat,\nand a dog", "x"]


def test_several_files_of_texts_have_ids_of_their_own(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one\ntwo\n")
    ids = [item.id for item in all_items(open_source(tmp_path, "texts"))]
    assert ids == ["a-0", "a-1", "b-0", "b-1"]


def test_a_caption_that_is_no_text_fails_alone(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": 5}\n{"other": 1}\n{"text": "x"}\n')
    first, second, third = all_items(open_source(tmp_path / "t.jsonl", "texts"))
    assert first.failure == "no caption, but 5"
    assert (second.caption, third.caption) == (None, "x")


def test_the_papers_dataset_json(tmp_path):
    write_pictures(tmp_path / "img", 2)
    value = {
        "images": [{"id": 7, "image": "img/p_0.png"}, {"id": "b", "image": "img/p_1.png"}],
        "texts": [{"id": "t", "text": "a cat"}],
    }
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(value))
    images, texts = open_source(path, "images"), open_source(path, "texts")
    assert [item.id for item in all_items(images)] == ["7", "b"]
    assert read_image(all_items(images)[1]) == (tmp_path / "img" / "p_1.png").read_bytes()
    assert [(item.id, item.caption) for item in all_items(texts)] == [("t", "a cat")]


def test_another_content_is_another_identity(tmp_path):
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    before = identity(all_items(open_source(tmp_path / "t.txt", "texts")))
    assert before == identity(all_items(open_source(tmp_path / "t.txt", "texts")))
    (tmp_path / "t.txt").write_text("one\ntwq\n")
    assert before != identity(all_items(open_source(tmp_path / "t.txt", "texts")))


REFUSED = {
    "t.jsonl": [
        b'{"text": "x"}\n{"text": ',
        b"[1]\n",
        b'{"a": 1}\n',
        b"[" * 200_000,
        b"\xff\n",
        b"",
    ],
    "t.csv": [
        b"id,text\n1,2,3\n",
        b"id,id\n1,2\n",
        b"a,b\n1,2\n",
        b"text\n\xff\n",
        b"text\n\0x,y\n",
    ],
    "t.txt": [b"ok\n\xff\n", b""],
    "t.parquet": [b"PAR1garbagePAR1", b""],
    "t.tar": [b"\0" * 100, b"x" * 2048, b"\0" * 1024],
    "t.json": [b"{", b"[]", b'{"texts": 5}', b'{"texts": [{"id": 1}]}', b"[" * 100_000],
    "t.pkl": [b"x"],
}


@pytest.mark.parametrize(
    ("name", "data"), [(name, data) for name, contents in REFUSED.items() for data in contents]
)
def test_what_is_refused_names_the_file_in_one_line(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=name) as caught:
        all_items(open_source(tmp_path / name, "texts"))
    assert "\n" not in str(caught.value)


def test_a_tar_that_ends_early_is_refused(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("1.png", png(1)), ("2.png", png(2))])
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match="not a whole tar"):
        open_source(path, "images")


def test_folders_of_two_kinds_or_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path, "images")
    with pytest.raises(ValueError, match="a directory without any"):
        open_source(tmp_path, "texts")
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "a.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"has \*\.csv and images"):
        open_source(tmp_path, "images")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(tmp_path / "none", "images")


def test_parquet_without_images_is_refused(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", {"image": [1, 2]})
    with pytest.raises(Unreadable, match="holds 1, expected bytes or a path"):
        read_image(all_items(open_source(path, "images"))[0])
    with pytest.raises(ValueError, match="choose one with --image-column, of: image"):
        all_items(open_source(path, "images", Columns(image="picture")))


def test_a_pipe_is_no_image(tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    os.mkfifo(folder / "pipe.png")
    source = open_source(folder, "images")
    with pytest.raises(Unreadable, match="not a regular file"):
        read_image(all_items(source)[1])


def test_a_tar_that_webdataset_wrote(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as tar:
        for number in range(3):
            tar.write({"__key__": f"{number:05}", "png": png(number), "txt": f"text {number}"})
    items = all_items(open_source(tmp_path / "s.tar", "pairs"))
    samples = [(item.id, item.caption) for item in items]
    assert samples == [(f"{n:05}", f"text {n}") for n in range(3)]
    assert [read_image(item) for item in items] == [png(n) for n in range(3)]


def test_parquet_that_datasets_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [picture(n) for n in range(3)], "text": ["a", "b", "c"]}
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    made = datasets.Dataset.from_dict(columns, features=features)
    made.to_parquet(str(tmp_path / "t.parquet"))
    items = all_items(open_source(tmp_path / "t.parquet", "pairs"))
    assert [item.caption for item in items] == ["a", "b", "c"]
    for number, item in enumerate(items):
        assert decode(read_image(item)).tobytes() == picture(number).tobytes()
