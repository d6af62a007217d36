"""Vocabularies the tests share: SmolLM2's, a small byte-level one and a small SentencePiece one."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastserve.loaders import TokenizerData, open_model
from fastserve.tokenizer import Tokenizer

quick = settings(max_examples=150, deadline=None, derandomize=True)
texts = st.text(
    st.one_of(
        st.sampled_from(list("the quick brown fox'll jump 1234567890 \n\t\r.,!?+=^$ÀéßñДда你好世界🙂👩‍🚀\u00a0\u2028")),
        st.characters(codec="utf-8"),
    ),
    max_size=60,
)


@cache
def smollm2_data() -> TokenizerData:
    data = open_model("smollm2").tokenizer_data()
    assert data is not None
    return data


@cache
def smollm2() -> Tokenizer:
    return Tokenizer.from_data(smollm2_data())


CORPUS = [
    "the quick brown fox jumps over the lazy dog 123 4567",
    "it's they'll WE'RE naïve 你好 🙂",
    "a  b\n\n c\t!?",
] * 3


def trained(pre: pre_tokenizers.PreTokenizer) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def gguf_keys(backend: Backend, pre: str) -> dict[str, Any]:
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<eos>" else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }


@cache
def small_gguf() -> dict[str, Any]:
    return gguf_keys(trained(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2")


@cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.from_data(TokenizerData(gguf=small_gguf()))


WORDS = ["▁the", "▁a", "▁cat", "▁sat", "▁", "t", "h", "e", "c", "a", "s", "at", "th", "ca", "cat", "▁c", "▁s", "!"]


@cache
def sentencepiece() -> Tokenizer:
    return Tokenizer.from_data(sentencepiece_data())


def sentencepiece_data() -> TokenizerData:
    """A SentencePiece vocabulary as GGUF stores it: scores, byte tokens, `▁` for a space."""
    words = WORDS
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    scores = [0.0] * 259 + [-float(index) for index in range(len(words))]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
    }
    return TokenizerData(gguf=keys, add_bos_token=True)
