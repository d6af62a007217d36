"""Text to tokens and back: any tokenizer the model brings, its chat template, and detokenizing as tokens arrive."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from .chat_template import ChatTemplate
from .literals import Literals, encoding
from .loaders.spec import ModelError, TokenizerData
from .types import InvalidRequest

Message = Mapping[str, Any]  # at least `role` and `content`


class Tokenizer:
    """The tokenizer of a model, equal to the one `transformers` would build from the same files."""

    def __init__(self, backend: Backend, data: TokenizerData | None = None) -> None:
        data = data or TokenizerData()
        self._backend = backend
        self._special_tokens = data.special_tokens or {}
        self._template_text = data.chat_template
        self._literals = Literals(backend)
        # Of tokens that were asked for: a server asks for each again and again.
        self._token_bytes: dict[int, bytes] = {}
        self._token_text: dict[int, str | None] = {}

    @classmethod
    def from_data(cls, data: TokenizerData) -> Tokenizer:
        """Raises ModelError, naming the kind or key at fault, for a tokenizer that cannot be built."""
        if data.json is not None:
            try:
                backend = Backend.from_str(data.json)
            except Exception as error:  # the library raises bare Exception for malformed input
                raise ModelError(f"tokenizer.json: {error}") from error
            backend.no_truncation()  # a length limit or padding saved with the file is not the server's
            backend.no_padding()
            return cls(backend, data)
        if data.gguf is not None:
            return cls(_from_gguf(data.gguf, data.add_bos_token), data)
        raise ModelError("the model brings no tokenizer")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template_text is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises InvalidRequest (`prompt`) for text that is not valid Unicode."""
        try:
            return encoding(self._backend, text, add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:  # not a string, or one with lone surrogates
            raise InvalidRequest("prompt", "must be valid Unicode text") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the text the model was trained on. Raises InvalidRequest (`messages`)."""
        return self._template.render(messages, add_generation_prompt, self._special_tokens)

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, add_special_tokens: bool = False
    ) -> list[int]:
        """The conversation as the template writes it. Control tokens are its alone; in messages they are text."""
        text = self.apply_chat_template(self._literals.hide(list(messages)), add_generation_prompt)
        return self._literals.encode(text, add_special_tokens)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self._template_text is None:
            raise InvalidRequest("messages", "this model has no chat template; send a plain prompt instead")
        return ChatTemplate(self._template_text)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    @cached_property
    def byte_level(self) -> bool:
        """Whether text is the tokens' bytes one after the other, with nothing changed at their borders."""
        return isinstance(self._backend.decoder, decoders.ByteLevel)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Tokens that stand for one byte (`<0x0A>`), where the decoder joins runs of them to characters."""
        tokens = ((byte, self._backend.token_to_id(f"<0x{byte:02X}>")) for byte in range(256))
        found = [token for _, token in tokens if token is not None]
        return frozenset(found if len(found) == 256 else ())

    def token_bytes(self, token: int) -> bytes:
        """What a token of a byte-level vocabulary stands for; b"" for an id without a token."""
        known = self._token_bytes.get(token)
        if known is None:
            text = self._backend.id_to_token(token)
            if text is None:
                return b""
            known = self._token_bytes[token] = _bytes_of(text)
        return known

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for inside a text, whatever the tokenizer's kind; b"" for an id without one."""
        if self.byte_level:
            return self.token_bytes(token)
        text = self._backend.id_to_token(token)
        if text is None:
            return b""
        if token in self.byte_ids:
            return bytes([int(text[3:5], 16)])
        # Decoders change what is at the start of a text, such as its leading space: the second of two shows the token.
        once, twice = (self.decode([token] * count, skip_special_tokens=False) for count in (1, 2))
        return twice[len(once) :].encode()

    def token_text(self, token: int) -> str | None:
        """What a token of a byte-level vocabulary stands for, where that is whole characters."""
        try:
            return self._token_text[token]
        except KeyError:
            known = self.token_bytes(token)
            try:
                text = known.decode()
            except UnicodeDecodeError:
                text = None
            if known:  # there is such a token
                self._token_text[token] = text
            return text


def _bytes_of(text: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in text)
    except KeyError:  # an added token: literal text, not spelled in the byte alphabet
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

# --- Tokenizers stored in GGUF files ---------------------------------------------------------------------------------

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre: the patterns that cut a text before merging, each applied to the pieces of the one before
_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_CL100K % "{1,3}",),
    "qwen2": (_CL100K % "",),
}


def _from_gguf(keys: Mapping[str, Any], add_bos: bool) -> Backend:
    """Raises ModelError, naming the key, for a kind that is not supported or pieces that do not fit together."""
    kind = keys.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    tokens = _texts(keys, "tokens")
    types = _numbers(keys, "token_type", len(tokens)) if "tokenizer.ggml.token_type" in keys else [1.0] * len(tokens)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError("tokenizer.ggml.tokens holds the same token twice")
    try:
        backend = _byte_level_bpe(keys, vocab) if kind == "gpt2" else _sentencepiece_bpe(keys, vocab, tokens, types)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception, for instance for a merge of unknown tokens
        raise ModelError(f"tokenizer.ggml.merges: {error}") from error
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    own = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _USER_DEFINED]
    backend.add_tokens([AddedToken(token, normalized=False) for token in own])
    bos = keys.get("tokenizer.ggml.bos_token_id")
    if add_bos:
        if not isinstance(bos, int) or not 0 <= bos < len(tokens):
            raise ModelError(f"tokenizer.ggml.bos_token_id must be a token id below {len(tokens)}, got {bos!r}")
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
        )
    return backend


def _texts(keys: Mapping[str, Any], name: str) -> list[str]:
    value = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ModelError(f"tokenizer.ggml.{name} must be a list of strings")
    return value


def _numbers(keys: Mapping[str, Any], name: str, count: int) -> list[float]:
    value = keys.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or len(value) != count or not all(isinstance(item, (int, float)) for item in value):
        raise ModelError(f"tokenizer.ggml.{name} must hold a number for each of the {count} tokens")
    return value


def _byte_level_bpe(keys: Mapping[str, Any], vocab: dict[str, int]) -> Backend:
    pre = keys.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise ModelError(f"tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}")
    merges = []
    for merge in _texts(keys, "merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    # Llama 3's vocabulary holds tokens that its merges do not reach.
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PRE_TOKENIZERS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    keys: Mapping[str, Any], vocab: dict[str, int], tokens: list[str], types: Sequence[float]
) -> Backend:
    """SentencePiece's BPE stores scores instead of merges: two pieces merge if their union is one, best score first."""
    scores = _numbers(keys, "scores", len(tokens))
    ranked = []
    for token, score, type_ in zip(tokens, scores, types, strict=True):
        if type_ != 1:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    ranked.sort()
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == _UNKNOWN), None)
    merges = [(left, right) for *_, left, right in ranked]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = keys.get("tokenizer.ggml.add_space_prefix") is not False
    spaces = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


# --- Detokenizing as tokens arrive -----------------------------------------------------------------------------------


class IncrementalDetokenizer:
    """Turns a growing list of tokens into text, and ends it at the first stop string.

    What `append` and `flush` return, joined, is `.text`: without stop strings, exactly `decode` of all tokens, however
    they were split. A character whose bytes are not complete is held back, and so is text that may turn out to be the
    start of a stop string. A stop string matches where it ends first in the text (then: where it starts first), across
    token borders; `.text` ends before it, or after it with `include_stop_str_in_output`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._stream = (_ByteStream if tokenizer.byte_level else _WindowStream)(tokenizer, skip_special_tokens)
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._held = ""  # characters that can no longer change, held back as the possible start of a stop string
        self._begun = [0] * len(self._stop)  # how many characters at the end of those each stop string begins with
        self._text = ""
        self.matched_stop: str | None = None

    @property
    def text(self) -> str:
        """What has been returned so far."""
        return self._text

    def append(self, tokens: Iterable[int], *, match_stop: bool = True) -> str:
        """The text that became certain with these tokens. After a stop string matched: always "".

        With match_stop=False no stop string may end in these tokens' text (an output shorter than min_tokens).
        """
        released = ""
        for token in tokens:
            if self.matched_stop is None and (new := self._stream.append(token)):
                released += self._extend(new, match_stop)
        return released

    def flush(self) -> str:
        """The text held back, as it is: there are no more tokens."""
        if self.matched_stop is not None:
            return ""
        released = self._extend(self._stream.flush(), match_stop=True)
        return released if self.matched_stop is not None else released + self._release(self._held, "")

    def _extend(self, new: str, match_stop: bool) -> str:
        """A match starts in what is held back or in `new`: what could be the start of one is never released."""
        if not self._stop:
            return self._release(new, "")
        before, text = len(self._held), self._held + new
        # A place before a stop string's own start has been ruled out for good: none is looked at twice.
        stops = [(stop, before - begun) for stop, begun in zip(self._stop, self._begun, strict=True)]
        if match_stop:
            matches = [(at + len(stop), at, stop) for stop, start in stops if (at := text.find(stop, start)) >= 0]
            if matches:
                end, start, self.matched_stop = min(matches)
                return self._release(text[: end if self._include_stop else start], "")
        self._begun = [_begun(stop, text, start) for stop, start in stops]
        certain = len(text) - max(self._begun)
        return self._release(text[:certain], text[certain:])

    def _release(self, text: str, held: str) -> str:
        whole = self._text
        self._text = ""  # the local name is now the string's only owner, so that += extends it instead of copying it
        whole += text
        self._text, self._held = whole, held
        return text


def _begun(stop: str, text: str, start: int) -> int:
    """Length of the longest end of the text, from `start` on, that is a beginning of the stop string and not all."""
    place = text.find(stop[0], max(start, len(text) - len(stop) + 1))
    while place >= 0 and not stop.startswith(text[place:]):
        place = text.find(stop[0], place + 1)
    return len(text) - place if place >= 0 else 0


class _ByteStream:
    """For byte-level vocabularies: text is the concatenated bytes, so UTF-8 is decoded as it comes."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._between = True  # no character has begun and not ended

    def append(self, token: int) -> str:
        if token in self._skipped:
            return ""
        if self._between and (text := self._tokenizer.token_text(token)) is not None:
            return text
        text = self._decoder.decode(self._tokenizer.token_bytes(token))
        self._between = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """For decoders that look at neighbours (leading spaces, runs of byte tokens): decodes a short window twice.

    The window starts with the tokens that gave the last text, so that a new token is never at the start of a text
    unless it is. A run of byte tokens is decoded once it is over: one invalid byte changes all of its characters.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._read = 0  # tokens of the window whose text is out

    def append(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._window.append(token)
        return "" if token in self._tokenizer.byte_ids else self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        if self._read == len(self._window):
            return ""
        before = self._tokenizer.decode(self._window[: self._read], skip_special_tokens=False)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)[len(before) :]
        if text.endswith("\ufffd") and not final:  # maybe a character whose bytes are not complete
            return ""
        if text:
            self._window = self._window[self._read :]
        self._read = len(self._window)
        return text
