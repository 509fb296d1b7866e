"""Lists joined by id to rows: what is read, what is counted, what is held in memory."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from support.processes import run_apart
from support.revision_parts import CHATML, list_entry, word_tokenizer, write_corpus, write_lines
from torch.utils.data import DataLoader

from realign_fast.align import ReAlign
from realign_fast.corpus import Corpus
from realign_fast.corpus.convert import convert
from realign_fast.corpus.formats import arrow_columns
from realign_fast.revision import conversation_files
from realign_fast.revision.templates import Chat, Plain
from realign_fast.revision.training_data import Collator, prepare


def arrow():
    pytest.importorskip("pyarrow")
    return arrow_columns.pyarrow()


K = 2
IDS = [f"x{number}" for number in range(40)]
ODD = ['a "quoted" } ] , dog', "猫 on the mat", "back\\slash", "line\nbreak", "[1, 2"]


def write_list(path, entries):
    if path.suffix == ".json":
        path.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        write_lines(path, entries)
    else:
        pyarrow = arrow()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture
def root(tmp_path):
    rows = write_corpus(tmp_path / "corpus", IDS)
    return tmp_path / "corpus", rows


def sample_of(entry):
    return conversation_files.read_sample(entry, "")


def ready(path, corpus, template, cache, **options):
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus, "text")
    return prepare(path, corpus, template, cache, side="image", **options)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_format_of_lists_gives_the_samples(suffix, root, tokenizer, tmp_path):
    order = np.random.default_rng(0).permutation(len(IDS))
    entries = [list_entry(IDS[place], ODD[place % len(ODD)]) for place in order]
    path = write_list(tmp_path / f"list{suffix}", entries)
    found = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    assert len(found) == len(IDS)
    for number, place in enumerate(order):
        assert found.sample(number).caption == ODD[place % len(ODD)]
        assert found.sample(number).turns[1] == ("assistant", ODD[place % len(ODD)])
        assert torch.equal(found[number]["image_rows"], torch.from_numpy(root[1][place])[None])
    batch = found.__getitems__([5, 0, 5])
    assert [one["id"] for one in batch] == [IDS[order[n]] for n in (5, 0, 5)]
    assert torch.equal(batch[0]["image_rows"][0], torch.from_numpy(root[1][order[5]]))


def test_several_images_and_none(root, tokenizer, tmp_path):
    two = list_entry("q", images=["x7", "x3"])
    two["conversations"][0]["value"] = "<image> and <image> ?"
    none = {"id": "t", "messages": [{"role": "user", "content": "hi"},
                                    {"role": "assistant", "content": "yes"}]}  # fmt: skip
    path = write_list(tmp_path / "list.jsonl", [two, none, list_entry("x1")])
    found = ready(path, root[0], Chat(tokenizer, K), tmp_path / "cache")
    assert torch.equal(found[0]["image_rows"], torch.from_numpy(root[1][[7, 3]]))
    assert found[1]["image_rows"].shape == (0, 16)
    batch = Collator(0)(found.__getitems__([0, 1, 2]))
    assert torch.equal(batch["image_rows"], torch.from_numpy(root[1][[7, 3, 1]]))
    assert list(batch) == ["input_ids", "attention_mask", "labels", "image_rows"]


@pytest.mark.parametrize("kind", ["parquet", "hf", "pickle", "safetensors", "tar"])
def test_ids_beside_the_rows_in_formats_that_hold_them(kind, root, tokenizer, tmp_path):
    pyarrow = arrow()
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(root[1].reshape(-1)), 16)
    folder = tmp_path / "table"
    folder.mkdir()
    ids = [str(number * 7 % 40) for number in range(40)]
    named = pyarrow.array([int(one) for one in ids] if kind == "safetensors" else ids)
    columns = pyarrow.table({"id": named, "embedding": column})
    pyarrow.parquet.write_table(columns, folder / "part_0.parquet")
    corpus = Corpus(folder)
    if kind != "parquet":
        convert(corpus, tmp_path / "out", kind)
        corpus = Corpus(tmp_path / "out", allow_pickle=True)
    path = write_list(tmp_path / "list.jsonl", [list_entry(ids[9]), list_entry(ids[30])])
    found = ready(path, corpus, Plain(tokenizer, K), tmp_path / "cache")
    assert torch.equal(found[0]["image_rows"][0], torch.from_numpy(root[1][9]))
    assert torch.equal(found[1]["image_rows"][0], torch.from_numpy(root[1][30]))


def test_ids_from_elsewhere_and_row_numbers(root, tokenizer, tmp_path):
    bare = Corpus(root[0] / "text_emb")
    path = write_list(tmp_path / "list.jsonl", [list_entry("x30")])
    plain, cache = Plain(tokenizer, K), tmp_path / "cache"
    with pytest.raises(ValueError, match=r"holds no ids, and .*metadata is not there.*--ids"):
        ready(path, bare, plain, cache)
    found = ready(path, bare, plain, cache, ids=root[0])
    assert torch.equal(found[0]["image_rows"][0], torch.from_numpy(root[1][30]))
    path = write_list(tmp_path / "rows.jsonl", [list_entry(12)])
    found = ready(path, bare, plain, cache, ids="row")
    assert torch.equal(found[0]["image_rows"][0], torch.from_numpy(root[1][12]))


def test_a_list_without_ids_says_so(root, tokenizer, tmp_path):
    entries = [{"caption": text} for text in ("a dog", "a cat")]
    path = write_list(tmp_path / "list.jsonl", entries)
    expected = r"2 entries have no `id`; with --ids row, write row numbers.*list.jsonl: entry 0"
    with pytest.raises(ValueError, match=expected):
        ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    marked = [list_entry("x1") | {"id": None}]
    with pytest.raises(ValueError, match="1 entries have no `id`"):
        ready(write_list(path, marked), root[0], Chat(tokenizer, K), tmp_path / "cache")


def test_row_numbers_that_count_from_1_are_refused(root, tokenizer, tmp_path):
    path, plain, cache = tmp_path / "list.jsonl", Plain(tokenizer, K), tmp_path / "cache"
    bare, options = Corpus(root[0] / "text_emb"), {"ids": "row", "max_skipped": 0.5}
    write_list(path, map(list_entry, range(1, 41)))
    with pytest.raises(ValueError, match=r"has the id 40 and no id 0.*; subtract 1 from every id"):
        ready(path, bare, plain, cache, **options)
    assert not list(cache.iterdir())
    for numbers, used in ((range(41), 40), (range(1, 40), 39)):
        write_list(path, map(list_entry, numbers))
        assert len(ready(path, bare, plain, cache, **options)) == used


def test_metadata_in_parquet(root, tokenizer, tmp_path):
    pyarrow = arrow()
    for file in list((root[0] / "metadata").glob("*.jsonl")):
        names = [json.loads(line)["id"] for line in file.read_text().splitlines()]
        pyarrow.parquet.write_table(pyarrow.table({"key": names}), file.with_suffix(".parquet"))
        file.unlink()
    path = write_list(tmp_path / "list.jsonl", [list_entry("x30")])
    found = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    assert torch.equal(found[0]["image_rows"][0], torch.from_numpy(root[1][30]))


def test_ids_that_do_not_fit_are_refused(root, tokenizer, tmp_path):
    path = write_list(tmp_path / "list.jsonl", [list_entry("x1")])
    file = root[0] / "metadata" / "metadata_1.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    plain, cache = Plain(tokenizer, K), tmp_path / "cache"
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"metadata_1.jsonl: has 19 entries, .* has 20 rows"):
        ready(path, root[0], plain, cache)
    file.write_text("".join([*lines[:-1], json.dumps({"id": "x3"}) + "\n"]))
    with pytest.raises(ValueError, match=r"rows 3 and 39 have the same id 'x3'"):
        ready(path, root[0], plain, cache)
    file.write_text("".join([*lines[:-1], json.dumps({"url": "x3"}) + "\n"]))
    with pytest.raises(ValueError, match=r"metadata_1.jsonl: row 19: no column id or key"):
        ready(path, root[0], plain, cache)
    assert not list(cache.iterdir())


def test_what_cannot_be_used_is_counted_and_over_a_share_an_error(root, tokenizer, tmp_path):
    entries = [list_entry(name) for name in IDS]
    entries[3]["id"] = "nobody"
    entries[4]["conversations"][0]["value"] = "what ?"
    entries[4]["image"] = "x4.jpg"
    entries[5]["conversations"][1]["value"] = "  "
    entries[6] = list_entry("x6", "a red dog " * 50)
    entries[7]["conversations"].reverse()
    path, chat = write_list(tmp_path / "list.json", entries), Chat(tokenizer, K)
    options = {"max_length": 60}
    with pytest.raises(ValueError, match=r"5 of 40 samples cannot be used \(12.5%, at most 1.0%"):
        ready(path, root[0], chat, tmp_path / "cache", **options)
    found = ready(path, root[0], chat, tmp_path / "cache", max_skipped=0.125, **options)
    kinds = ("missing_ids", "missing_images", "empty_captions", "missing_questions", "over_long")
    assert [found.report[kind] for kind in kinds] == [1, 1, 1, 1, 1]
    assert found.report["examples"]["over_long"] == ["x6"]
    assert (found.report["used"], len(found)) == (35, 35)
    assert {found.sample(n).id for n in range(35)} == set(IDS) - {f"x{n}" for n in range(3, 8)}
    longest = max(len(found[number]["input_ids"]) for number in range(35))
    assert longest <= 60 < len(chat.encode(sample_of(entries[6])).ids)


@pytest.mark.parametrize("template", [Plain, Chat])
def test_answers_before_the_first_question_are_skipped_and_counted(
    template, root, tokenizer, tmp_path
):
    system, leading = {"from": "system", "value": "be short"}, {"from": "gpt", "value": "hello"}
    first, second, third = (list_entry(name, None, "<image> ?") for name in ("x1", "x2", "x3"))
    for entry in (first, second, third):
        entry["conversations"][1]["value"] = "a red dog"
    first["conversations"].insert(0, leading)
    second["conversations"][:0] = [system, leading, leading]
    path = write_list(tmp_path / "list.jsonl", [first, second, third])
    dataset = ready(path, root[0], template(tokenizer, K), tmp_path / "cache")
    assert (dataset.report["used"], dataset.report["skipped_turns"]) == (3, 3)
    ids = [item["input_ids"] for item in dataset.__getitems__([0, 1, 2])]
    assert ids[0] == ids[2]
    assert "hello" not in tokenizer.decode([token for token in ids[1] if token >= 0])
    assert dataset.sample(1).turns[0] == ("system", "be short")


def test_a_conversation_that_cannot_be_labelled_is_named_before_training(root, tmp_path):
    """The second answers are cut, or there is a system turn that the template refuses."""
    cut = CHATML.replace("message['content']", "message['content'][:9 + 99 * loop.last]")
    refuses = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    again = [{"from": "human", "value": "and ?"}, {"from": "gpt", "value": "a small tree"}]
    system = [{"from": "system", "value": "be short"}]
    for template, first, last, reason in (
        (cut, [], again, "renders answer 'a red dog sits' in another way"),
        (refuses + CHATML, system, [], "refuses turns of system, user, assistant: no system"),
    ):
        entries = [list_entry(name, "a red dog sits", "<image>") for name in IDS[:4]]
        entries[2]["conversations"] = first + entries[2]["conversations"] + last
        path = write_list(tmp_path / "list.jsonl", entries)
        chat = Chat(word_tokenizer(template), K)
        with pytest.raises(ValueError, match=rf"list.jsonl: entry 2 \(x2\): .*{reason}"):
            ready(path, root[0], chat, tmp_path / "cache")


@pytest.mark.parametrize("kind", [Plain, Chat])
def test_samples_beyond_the_positions_of_the_language_model_are_left_out(
    kind, root, tokenizer, tmp_path
):
    entries = [list_entry("x1"), list_entry("x2", "cat " * 70), list_entry("x3", "cat " * 20)]
    path, template = write_list(tmp_path / "list.jsonl", entries), kind(tokenizer, K)
    template.positions = 64
    found = ready(path, root[0], template, tmp_path / "cache", max_skipped=0.5)
    assert found.report["over_long"] == 1 and found.report["examples"]["over_long"] == ["x2"]
    assert max(len(item["input_ids"]) for item in found.__getitems__([0, 1])) <= 64
    template.positions = K
    with pytest.raises(ValueError, match="3 of 3 samples cannot be used"):
        ready(path, root[0], template, tmp_path / "cache")


def test_a_sample_of_just_the_greatest_length_is_used(root, tokenizer, tmp_path):
    plain = Plain(tokenizer, K)
    path = write_list(tmp_path / "list.jsonl", [list_entry("x1")])
    length = len(plain.encode(sample_of(list_entry("x1"))).ids)
    assert len(ready(path, root[0], plain, tmp_path / "a", max_length=length)) == 1
    with pytest.raises(ValueError, match="1 of 1 samples cannot be used"):
        ready(path, root[0], plain, tmp_path / "b", max_length=length - 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"id": "x1", "caption": "a"}, {"id": "x2", ', "not a JSON list"),
        ('{"id": "x1", "caption": "a"}\n{"id": \n', "entry 1: is no JSON"),
        ('["x1"]', r'entry 0: is a str, expected an object such as \{"id": "0", "caption"'),
        ('[{"id": "x1"}]', "has neither a caption nor conversations, but 'id'"),
        ('[{"conversations": [{"from": "bot", "value": "x"}]}]', "a turn is"),
        ("[]", "holds no entry"),
    ],
)
def test_a_damaged_list_is_refused_and_nothing_is_left(text, words, root, tokenizer, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_was_prepared_is_used_again_until_something_changes(root, tokenizer, tmp_path):
    path = write_list(tmp_path / "list.jsonl", [list_entry("x1"), list_entry("x2")])
    first = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    stamp = (first.folder / "report.json").stat().st_mtime_ns
    again = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    assert (again.folder / "report.json").stat().st_mtime_ns == stamp
    assert ready(path, root[0], Plain(tokenizer, 3), tmp_path / "cache").folder != first.folder
    write_list(path, [list_entry("x1"), list_entry("x2"), list_entry("x3")])
    assert len(ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")) == 3


def test_names_where_row_numbers_are_asked_for_have_a_hint(root, tokenizer, tmp_path):
    advice = "leave out --ids row, or write numbers from 0 as ids"
    for name, has_hint in (("x1", True), (str(len(IDS) + 1), False)):
        path = write_list(tmp_path / f"{name}.jsonl", [list_entry(name)])
        with pytest.raises(ValueError, match="1 images whose id has no row") as error:
            ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache", ids="row")
        assert (advice in str(error.value)) is has_hint


@pytest.mark.parametrize("held_out", [1, 7, 13, 20])
def test_held_out_samples_and_the_rest_are_the_list(held_out, root, tokenizer, tmp_path):
    path = write_list(tmp_path / "list.jsonl", [list_entry(name) for name in IDS])
    whole = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    rest, held = whole.split(held_out)
    names = [[part.sample(n).id for n in range(len(part))] for part in (rest, held)]
    assert len(names[1]) == held_out
    assert sorted(names[0] + names[1]) == sorted(IDS)
    assert held.__getitems__([0])[0]["id"] == names[1][0]
    with pytest.raises(ValueError, match="got 21, expected 1 to 20, half of the samples, or 0"):
        whole.split(21)


def test_one_sample_cannot_be_held_out(root, tokenizer, tmp_path):
    path = write_list(tmp_path / "list.jsonl", [list_entry("x1")])
    with pytest.raises(ValueError, match="got 1, expected 0, of one sample, for none"):
        ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache").split(1)


def test_raw_rows_are_aligned_as_they_are_read(root, tokenizer, tmp_path):
    path = write_list(tmp_path / "list.jsonl", [list_entry(name) for name in IDS])
    whole = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    image = torch.randn(200, 16) + 1
    aligner = ReAlign.fit(torch.from_numpy(root[1]), image)
    batch = Collator(0)(whole.aligned(aligner).__getitems__([3, 1]))
    assert torch.equal(batch["image_rows"], aligner(torch.from_numpy(root[1][[3, 1]])))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_pads_where_it_is_told(side, root, tokenizer, tmp_path):
    path = write_list(
        tmp_path / "list.jsonl", [list_entry("x1"), list_entry("x2", "a dog on the mat")]
    )
    whole = ready(path, root[0], Plain(tokenizer, K), tmp_path / "cache")
    samples = whole.__getitems__([0, 1])
    batch = Collator(9, side=side)(samples)
    for number, one in enumerate(samples):
        real = batch["attention_mask"][number].bool()
        assert batch["input_ids"][number][real].tolist() == one["input_ids"]
        assert batch["labels"][number][real].tolist() == one["labels"]
        assert (batch["input_ids"][number][~real] == 9).all()
        assert (batch["labels"][number][~real] == -100).all()
    assert batch["attention_mask"][0, -1 if side == "right" else 0] == 0
    with pytest.raises(ValueError, match="expected 'left' or 'right'"):
        Collator(0, side="top")


def test_workers_make_the_same_batches(root, tokenizer, tmp_path):
    path = write_list(
        tmp_path / "list.jsonl", [list_entry(n, ODD[i % 5]) for i, n in enumerate(IDS)]
    )
    whole = ready(path, root[0], Chat(tokenizer, K), tmp_path / "cache")
    runs = []
    for workers in (0, 1, 2):
        order = np.random.default_rng(5).permutation(len(whole)).tolist()
        options = {"sampler": order, "collate_fn": Collator(0)}
        runs.append(list(DataLoader(whole, 8, num_workers=workers, **options)))
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)


def measure_epochs(folders, out):
    """The anonymous memory in KiB after an epoch of each folder, as a JSON list in `out`."""
    plain, collate, sizes = Plain(word_tokenizer(), 2), Collator(0), []
    for folder in folders:
        whole = prepare(folder / "list.jsonl", Corpus(folder), plain, folder / "cache", ids="row")
        order = np.random.default_rng(0).permutation(len(whole))
        for start in range(0, len(order), 64):
            collate(whole.__getitems__(order[start : start + 64]))
        smaps = Path("/proc/self/smaps_rollup").read_text()
        sizes.append(int(re.search(r"Anonymous: +([0-9]+)", smaps)[1]))
    out.write_text(json.dumps(sizes))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps")
def test_the_memory_of_a_process_does_not_grow_with_the_corpus(tmp_path):
    """Eight times the samples and rows; the rows alone would be 14 MiB more.

    (Few different words: a tokenizer keeps up to 10,000 words that it has cut.)
    """
    for name, count in (("small", 500), ("large", 4_000)):
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "part_0.npy", np.ones((count, 1024), np.float32))
        text = [json.dumps({"id": n, "caption": f"a dog {n % 50}"}) + "\n" for n in range(count)]
        (folder / "list.jsonl").write_text("".join(text))
    folders = [tmp_path / "small", tmp_path / "large"]
    run_apart(measure_epochs, tmp_path / "log", folders, tmp_path / "sizes.json")
    small, large = json.loads((tmp_path / "sizes.json").read_text())
    assert large - small < 4 * 1024, f"KiB of anonymous memory: {small}, {large}"
