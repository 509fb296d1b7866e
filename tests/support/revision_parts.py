"""What the tests of ReVision share: tiny random language models, a word tokenizer, tiny corpora."""

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


def tiny_llama(vocabulary=64, hidden=64, layers=2, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    return _decoder(LlamaForCausalLM, LlamaConfig, vocabulary, hidden, layers, seed)


def tiny_qwen2(vocabulary=64):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _decoder(Qwen2ForCausalLM, Qwen2Config, vocabulary, tie_word_embeddings=True)


def _decoder(kind, config, vocabulary, hidden=64, layers=2, seed=0, **options):
    torch.manual_seed(seed)
    made = config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    return kind(made).eval()


def tiny_gpt2(vocabulary=64):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


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


def write_corpus(root, ids, dimension=16, seed=0, shards=2, modality="text", rows=None):
    """A clip-retrieval root; the rows, unit and float32 `[N, D]`, come back."""
    if rows is None:
        rows = np.random.default_rng(seed).normal(size=(len(ids), dimension)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    sides = {"text": "text_emb", "image": "img_emb"}
    stem = {"text": "text_emb", "image": "img_emb"}[modality]
    for folder in (sides[modality], "metadata"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, places in enumerate(np.array_split(np.arange(len(ids)), shards)):
        np.save(root / sides[modality] / f"{stem}_{number}.npy", rows[places])
        lines = [json.dumps({"id": ids[place], "caption": "x"}) + "\n" for place in places]
        (root / "metadata" / f"metadata_{number}.jsonl").write_text("".join(lines))
    return rows
