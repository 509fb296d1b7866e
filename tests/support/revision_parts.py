"""What the tests of ReVision share: tiny language models, a word tokenizer, corpora, lists."""

from __future__ import annotations

import json

import numpy as np
import torch

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WORDS = (
    "a the cat dog red blue big small sits runs on under mat tree what is this it and ? . "
    "yes no describe system user assistant one two three four five six seven eight nine ten"
).split()


SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = SPECIAL_IDS | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CAPTIONS = ["a red dog sits", "the blue cat runs", "one small tree", "two mats under it"]
IDS = [f"x{number}" for number in range(48)]


def random_model(kind, config):
    """A model in eval mode whose weights the seed 0 gives."""
    torch.manual_seed(0)
    return kind(config).eval()


def tiny_llama(vocabulary=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    return random_model(LlamaForCausalLM, LlamaConfig(vocab_size=vocabulary, **DECODER))


def tiny_qwen2(vocabulary=64):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=vocabulary, tie_word_embeddings=True, **DECODER)
    return random_model(Qwen2ForCausalLM, config)


def tiny_gpt2(vocabulary=64):
    """It has 128 learned positions, where the others have rotary ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return random_model(GPT2LMHeadModel, GPT2Config(vocab_size=vocabulary, **sizes, **SPECIAL_IDS))


LANGUAGE_MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "qwen2": tiny_qwen2}


def word_tokenizer(template=CHATML):
    """A word a token; what it does not know is cut into bytes, so every text survives."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?\w+| ?[^\w\s]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*WORDS, *(" " + word for word in WORDS)]
    tokenizer.train_from_iterator(texts * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )


def list_entry(name, caption="a red dog", question="<image>\nwhat is this ?", **others):
    """An entry of a list with a caption, which is also the answer of its conversation."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"id": name, "caption": caption, "conversations": turns} | others


def write_lines(path, entries):
    """JSON lines; the path comes back."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_world(root):
    """Rows that say their caption (both sides), a list and language models of two kinds."""
    kinds = np.arange(len(IDS)) % len(CAPTIONS)
    rows = np.eye(16, dtype=np.float32)[kinds] + 0.05
    for modality in ("text", "image"):
        write_corpus(root / "corpus", IDS, rows=rows, modality=modality)
    captions = [CAPTIONS[kind] for kind in kinds]
    write_lines(root / "list.jsonl", map(list_entry, IDS, captions))
    for name, make in (("llama", tiny_llama), ("gpt2", tiny_gpt2)):
        make(vocabulary=400).save_pretrained(root / name)
        word_tokenizer().save_pretrained(root / name)
    return root


def write_corpus(root, ids, dimension=16, seed=0, shards=2, modality="text", rows=None):
    """A clip-retrieval root; the rows, unit and float32 `[N, D]`, come back."""
    if rows is None:
        rows = np.random.default_rng(seed).normal(size=(len(ids), dimension)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    side = {"text": "text_emb", "image": "img_emb"}[modality]
    for folder in (side, "metadata"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, places in enumerate(np.array_split(np.arange(len(ids)), shards)):
        np.save(root / side / f"{side}_{number}.npy", rows[places])
        entries = [{"id": ids[place], "caption": "x"} for place in places]
        write_lines(root / "metadata" / f"metadata_{number}.jsonl", entries)
    return rows


QUIET = ["--set", "bf16=false", "--set", "use_cpu=true", "--set", "disable_tqdm=true"]
QUIET += ["--set", "dataloader_num_workers=0", "--set", "logging_steps=1"]


def words(*pieces):
    """The words of a command."""
    return list(map(str, pieces))


def pretrain_command(world, out, *more):
    """Stage 1 on a `write_world`, 5 steps of 8 of its 48 samples with 8 held out."""
    where = ["--data", world / "list.jsonl", "--rows", world / "corpus", "--out", out]
    small = ["--visual-tokens", 2, "--batch-size", 8, "--micro-batch", 4, "--held-out", 8]
    return words("pretrain", "--language-model", world / "llama", *where, *small, *QUIET, *more)
