"""The texts of the decoder's rows: state on the device, one entry for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whisperd.engine.base import MAX_NEW_TOKENS
from whisperd.engine.cuda.device import uploaded
from whisperd.engine.cuda.rules import History, Loops, TokenRules


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """The plan for one row.

    ``prefix`` is read first; ``start_at`` is the place of the start token in it. ``temperature`` 0 is greedy.
    The text has at least ``min_tokens`` and at most ``max_tokens``; equal, they force its length.
    """

    prefix: tuple[int, ...]
    start_at: int = 0
    timestamps: bool = True
    temperature: float = 0.0
    min_tokens: int = 0
    max_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class RowText:
    """The text of one row, without the end token; ``sum_logprob`` includes it. ``looped``: it was stopped."""

    tokens: tuple[int, ...]
    sum_logprob: float
    no_speech_prob: float
    looped: bool = False


class Rows:
    """The tensors of all rows; the host reads ``done`` after each turn, and the rest of a row once."""

    def __init__(self, n_rows: int, *, eot: int, timestamp_begin: int, device: torch.device) -> None:
        def integers(value: int = 0) -> Tensor:
            return torch.full((n_rows,), value, dtype=torch.int64, device=device)

        self._eot = eot
        self._timestamp_begin = timestamp_begin
        self._device = device
        self.window = integers()
        self.position = integers()
        self.done = torch.ones(n_rows, dtype=torch.bool, device=device)
        self.no_speech = torch.zeros(n_rows, device=device)
        self.tokens = torch.zeros((n_rows, MAX_NEW_TOKENS), dtype=torch.int64, device=device)
        self.n_tokens, self.last, self.previous, self.last_timestamp = (
            integers(),
            integers(),
            integers(),
            integers(),
        )
        self.min_tokens, self.max_tokens = integers(), integers()
        self.timestamps = torch.zeros_like(self.done)
        self.temperature = torch.zeros_like(self.no_speech)
        self.sum_logprob = torch.zeros_like(self.no_speech)
        self.loops = Loops(n_rows, device)

    def begin(self, rows: Tensor, windows: Sequence[int], plans: Sequence[RowPlan]) -> None:
        """Resets rows for new plans; ``position`` is where the first written token will stand."""

        def put(target: Tensor, values: Sequence[float]) -> None:
            target[rows] = uploaded(values, self._device, target.dtype)

        put(self.window, windows)
        put(self.position, [len(plan.prefix) for plan in plans])
        put(self.timestamps, [plan.timestamps for plan in plans])
        put(self.temperature, [plan.temperature for plan in plans])
        put(self.min_tokens, [plan.min_tokens for plan in plans])
        put(self.max_tokens, [plan.max_tokens for plan in plans])
        for target in (self.n_tokens, self.last, self.previous, self.sum_logprob, self.no_speech, self.done):
            target[rows] = 0
        self.last_timestamp[rows] = -1
        self.loops.begin(rows)

    def write(self, rows: Tensor, logits: Tensor, rules: TokenRules, *, sampled: bool) -> None:
        """Chooses the next token of each row from logits [rows, vocabulary]; rows that are done stay as they are.

        ``sampled`` False: all rows are greedy, and no noise is drawn.
        """
        history = self.history(rows)
        allowed = rules(logits.float(), history)
        picked = self._picked(rows, allowed, sampled=sampled)
        logprob = allowed.log_softmax(dim=-1).gather(1, picked[:, None])[:, 0]
        alive = ~self.done[rows]
        text = alive & (picked != self._eot)
        self.extend(rows, picked, text)
        self.sum_logprob[rows] += torch.where(alive, logprob, 0.0)
        self.done[rows] |= (picked == self._eot) | (self.n_tokens[rows] >= self.max_tokens[rows])

    def extend(self, rows: Tensor, picked: Tensor, text: Tensor) -> None:
        """Appends tokens (int64 [rows]) to those rows that ``text`` (bool [rows]) names."""
        history = self.history(rows)
        at = history.n_tokens.clamp(max=MAX_NEW_TOKENS - 1)
        self.tokens[rows, at] = torch.where(text, picked, self.tokens[rows, at])
        self.n_tokens[rows] += text
        self.previous[rows] = torch.where(text, history.last, history.previous)
        self.last[rows] = torch.where(text, picked, history.last)
        timestamp = text & (picked >= self._timestamp_begin)
        self.last_timestamp[rows] = torch.where(timestamp, picked, history.last_timestamp)
        self.loops.append(rows, picked, text & (picked < self._eot))

    def copy(self, source: Tensor, rows: Tensor) -> None:
        """Copies the texts of the rows ``source`` (int64 [rows]) to ``rows``; both have the same plan."""
        for target in (self.tokens, self.n_tokens, self.last, self.previous, self.last_timestamp, self.sum_logprob):
            target[rows] = target[source]

    def progress(self, rows: Tensor) -> Tensor:
        """bool [2, rows]: True if the text is complete, and if it repeats itself."""
        return torch.stack([self.done[rows], self.loops.going(rows)])

    def texts(self, rows: Tensor) -> list[RowText]:
        """The texts of rows; the host waits for them."""
        counts = self.n_tokens[rows].tolist()
        tokens = self.tokens[rows].tolist()
        figures = torch.stack([self.sum_logprob[rows], self.no_speech[rows]], dim=1).tolist()
        return [
            RowText(tokens=tuple(ids[:count]), sum_logprob=sum_logprob, no_speech_prob=no_speech)
            for count, ids, (sum_logprob, no_speech) in zip(counts, tokens, figures, strict=True)
        ]

    def history(self, rows: Tensor) -> History:
        """The state that the rules need."""
        return History(
            n_tokens=self.n_tokens[rows],
            last=self.last[rows],
            previous=self.previous[rows],
            last_timestamp=self.last_timestamp[rows],
            timestamps=self.timestamps[rows],
            min_tokens=self.min_tokens[rows],
        )

    def _picked(self, rows: Tensor, allowed: Tensor, *, sampled: bool) -> Tensor:
        """The likeliest token, or one drawn by chance: the largest after Gumbel noise is a draw from the softmax."""
        if not sampled:
            return allowed.argmax(dim=-1)
        temperature = self.temperature[rows, None]
        noise = -torch.empty_like(allowed).exponential_().log()
        drawn = allowed / temperature.clamp(min=1e-6) + noise
        return torch.where(temperature > 0, drawn, allowed).argmax(dim=-1)
