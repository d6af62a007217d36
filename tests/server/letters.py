"""A tokenizer of single letters for the stand-in engine, and what its jobs put out when nobody disturbs them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from stand_in import CONTEXT, EOS, VOCAB, expected_output
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastserve.ipc import Add
from fastserve.server.jobs import OpenJob
from fastserve.tokenizer import Tokenizer
from fastserve.types import SamplingParams

# Token 3 ends a sequence; tokens 4 and 5 are the halves of one character; every other one is a letter or a digit.
LETTERS = "ab <éécdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234"[:VOCAB]
_HALVES = {4: "Ã", 5: "©"}  # the bytes of é in the alphabet of byte-level vocabularies


@cache
def letters() -> Tokenizer:
    vocab = {character: token for token, character in enumerate(LETTERS) if character not in " <é"}
    vocab |= {"Ġ": LETTERS.index(" "), "</s>": EOS, **{byte: token for token, byte in _HALVES.items()}}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    assert backend.get_vocab_size() == VOCAB
    return Tokenizer(backend)


@cache
def undisturbed(
    prompt: tuple[int, ...], params: SamplingParams, seed: int
) -> tuple[list[int], str, str, str | int | None]:
    """Tokens, text, finish_reason and stop_reason of a job, worked out from its end: slow, and without our code."""
    output, reason = expected_output(Add(0, list(prompt), params, seed, 0, 0.0, []))
    for count in range(1, len(output) + 1):
        shown = output[: count - 1] if reason == "stop" and count == len(output) else output[:count]
        text = letters().decode(shown)
        found = [(text.find(stop), stop) for stop in params.stop if stop in text]
        if found:
            place, stop = min(found)
            return output[:count], text[:place], "stop", stop
    hidden = reason == "stop"
    stop_token = output[-1] if hidden and output[-1] in params.stop_token_ids else None
    return output, letters().decode(output[:-1] if hidden else output), reason, stop_token


def check_finished(job: OpenJob) -> None:
    """The job has put out what it would have undisturbed, to the byte."""
    expected = undisturbed(tuple(job.prompt), job.params, job.seed)
    assert (job.output, job.text, job.finish_reason, job.stop_reason) == expected
    check_logprobs(job)


def check_growing(job: OpenJob) -> None:
    """What is there is the beginning of that."""
    whole = replace(job.params, stop=())
    output, text, _, _ = undisturbed(tuple(job.prompt), whole, job.seed)
    assert job.output == output[: len(job.output)]
    assert text.startswith(job.text)
    check_logprobs(job)


def check_logprobs(job: OpenJob) -> None:
    tokens = [each.token for each in job.logprobs]
    assert tokens == (job.output if job.params.logprobs is not None else [])
    assert [each.logprob for each in job.logprobs] == [
        -(job.seed % 7) - count / 1024 for count in range(1, len(tokens) + 1)
    ]


__all__ = ["CONTEXT", "EOS", "VOCAB", "check_finished", "check_growing", "letters", "undisturbed"]
