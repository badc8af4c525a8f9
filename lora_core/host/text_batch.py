"""Captions through the host's text encoders in batches.

The host's API encodes one text: the sections of a call become one conditioning. Its encoders
(comfy/sd1_clip.py ClipTokenWeightEncoder) do take many rows of tokens, through `encode`. So each
caption is encoded as the host does it, up to the first rows that are not known yet; all rows that
were asked for are then encoded together, and the captions are tried again.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

from comfy.sd1_clip import ClipTokenWeightEncoder
from torch import Tensor

TOKENS_PER_BATCH = 2048  # 26 captions of CLIP's 77 tokens, 8 of T5's 256

_Rows = tuple[tuple[int, ...], ...]  # token rows of one length: the sections of one text
_Answers = dict[tuple[int, _Rows], Any]


class _Unknown(Exception):
    """An encoder is asked for rows that are not encoded yet."""

    def __init__(self, encoder: int, rows: _Rows) -> None:
        self.asked = (encoder, rows)


class _NotByRows(Exception):
    """An encoder's result has tensors without a first axis of its token rows."""


def encoded_together(
    clip: Any, texts: Sequence[str], encode: Callable[[str], Any]
) -> dict[str, Any]:
    """{text: encode(text)}, where `encode` uses `clip`; equal but for the rounding of a batch.

    Rows of one length share a batch: padding would change what an encoder makes of them.
    """
    encoders = [
        module
        for module in clip.cond_stage_model.modules()
        if isinstance(module, ClipTokenWeightEncoder)
    ]
    answers: _Answers = {}
    results: dict[str, Any] = {}
    pending = list(dict.fromkeys(texts))
    while pending:
        asked: list[tuple[int, _Rows]] = []
        with _answering(encoders, answers):
            for text in pending:
                try:
                    results[text] = encode(text)
                except _Unknown as unknown:
                    asked.append(unknown.asked)
        for encoder, batch in _batches(asked):
            answers |= _encode(encoders[encoder], encoder, batch)
        pending = [text for text in pending if text not in results]
    return results


@contextmanager
def _answering(encoders: Sequence[Any], answers: _Answers) -> Iterator[None]:
    """While it lasts, the encoders give what is known of token rows, or raise _Unknown."""
    before = [vars(encoder).get("encode") for encoder in encoders]
    try:
        for number, encoder in enumerate(encoders):
            vars(encoder)["encode"] = partial(_answer, answers, number, encoder.encode)
        yield
    finally:
        for encoder, own in zip(encoders, before, strict=True):
            vars(encoder)["encode"] = own
            if own is None:
                del vars(encoder)["encode"]


def _answer(
    answers: _Answers, number: int, encode: Callable[[Any], Any], tokens: Sequence[Sequence[Any]]
) -> Any:
    if not all(isinstance(token, numbers.Integral) for row in tokens for token in row):
        return encode(tokens)  # embeddings among the tokens: a text of its own
    rows = tuple(tuple(map(int, row)) for row in tokens)
    if (number, rows) not in answers:
        raise _Unknown(number, rows)
    return answers[number, rows]


def _batches(asked: Sequence[tuple[int, _Rows]]) -> Iterator[tuple[int, list[_Rows]]]:
    """What was asked for by encoder and length of its rows, in parts of TOKENS_PER_BATCH."""
    alike: dict[tuple[int, int], list[_Rows]] = {}
    for encoder, rows in dict.fromkeys(asked):
        alike.setdefault((encoder, len(rows[0])), []).append(rows)
    for (encoder, _), texts in alike.items():
        batch: list[_Rows] = []
        for rows in texts:
            num_tokens = sum(len(row) for text in (*batch, rows) for row in text)
            if batch and num_tokens > TOKENS_PER_BATCH:
                yield encoder, batch
                batch = []
            batch.append(rows)
        yield encoder, batch


def _encode(encoder: Any, number: int, batch: Sequence[_Rows]) -> _Answers:
    """The encoder's results for each text of the batch, cut out of those for all rows."""
    num_rows = [len(text) for text in batch]
    whole = encoder.encode([list(row) for text in batch for row in text])
    try:
        parts = [
            _cut(whole, slice(end - num, end), sum(num_rows))
            for num, end in zip(num_rows, accumulate(num_rows), strict=True)
        ]
    except _NotByRows:
        parts = [encoder.encode([list(row) for row in text]) for text in batch]
    return {(number, text): part for text, part in zip(batch, parts, strict=True)}


def _cut(value: Any, rows: slice, num_rows: int) -> Any:
    """The rows of every tensor; copies, since the host may write into what it is given."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != num_rows:
            raise _NotByRows
        return value[rows].clone()
    if isinstance(value, dict):
        return {name: _cut(part, rows, num_rows) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(part, rows, num_rows) for part in value)
    return value
