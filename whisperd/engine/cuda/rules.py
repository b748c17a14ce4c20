"""Which tokens a row may write next, and which rows repeat themselves: openai-whisper's rules for many rows at once.

Everything stays on the device; nothing here waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_INITIAL_TIMESTAMP = 50  # in steps of 0.02 s: no text starts later than 1 s into its window
NEVER = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """The state of each row that the rules need; all tensors have one entry for each row.

    ``n_tokens`` counts what was written, ``last`` and ``previous`` are the last two of it. ``last_timestamp`` is the
    last timestamp token, -1 where there is none. ``timestamps`` says whether the row writes any. ``min_tokens``: the
    text does not end earlier.
    """

    n_tokens: Tensor
    last: Tensor
    previous: Tensor
    last_timestamp: Tensor
    timestamps: Tensor
    min_tokens: Tensor


class TokenRules:
    """The rules of one model.

    Args:
        size: of the vocabulary.
        eot: id of the end token; text ids are below it.
        no_timestamps: id that switches timestamps off; 0.00 s is the id after it.
        suppressed: ids that are never written.
        suppressed_first: ids that are not written first.
        device: where the logits are.
    """

    def __init__(
        self,
        *,
        size: int,
        eot: int,
        no_timestamps: int,
        suppressed: tuple[int, ...],
        suppressed_first: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.eot = eot
        self.begin = no_timestamps + 1
        self._ids = torch.arange(size, device=device)
        self._is_timestamp = self._ids >= self.begin
        self.suppressed = torch.zeros(size, dtype=torch.bool, device=device)
        self.suppressed[list(suppressed)] = True
        self.suppressed_first = torch.zeros_like(self.suppressed)
        self.suppressed_first[list(suppressed_first)] = True
        self._no_timestamps = self._ids == no_timestamps

    def __call__(self, logits: Tensor, history: History) -> Tensor:
        """float32 [rows, vocabulary] to the same with -inf for every token that may not come now."""
        first = (history.n_tokens == 0)[:, None]
        early = (history.n_tokens < history.min_tokens)[:, None] & (self._ids == self.eot)
        plain = logits.masked_fill(self.suppressed | (first & self.suppressed_first) | early, NEVER)
        timed = plain.masked_fill(self._no_timestamps | self._out_of_order(history, first), NEVER)
        timed = timed.masked_fill(self._timestamp_is_likelier(timed) & ~self._is_timestamp, NEVER)
        return torch.where(history.timestamps[:, None], timed, plain)

    def _out_of_order(self, history: History, first: Tensor) -> Tensor:
        """Timestamps open the text, come in pairs except before the end, and never go back."""
        after_timestamp = (history.n_tokens >= 1) & (history.last >= self.begin)
        after_pair = after_timestamp & ((history.n_tokens < 2) | (history.previous >= self.begin))
        after_lone = after_timestamp & ~after_pair
        # a closing timestamp may be repeated to open the next segment; otherwise time moves on
        earliest = torch.where(after_lone, history.last_timestamp, history.last_timestamp + 1)
        backwards = (history.last_timestamp >= 0)[:, None] & (self._ids < earliest[:, None])
        late_start = first & (self._ids > self.begin + MAX_INITIAL_TIMESTAMP)
        return (
            (self._is_timestamp & (after_pair[:, None] | backwards))
            | (after_lone[:, None] & (self._ids < self.eot))
            | (first & ~self._is_timestamp)
            | late_start
        )

    def _timestamp_is_likelier(self, logits: Tensor) -> Tensor:
        """bool [rows, 1]: all timestamps together against the likeliest other token."""
        together = logits[:, self.begin :].logsumexp(dim=-1, keepdim=True)
        return together > logits[:, : self.begin].amax(dim=-1, keepdim=True)


PERIOD_MAX_TOKENS = 40
ROUNDS_MIN = 3
REPEATED_MIN_TOKENS = 40  # shorter ones occur in what people say: telephone numbers, counting, songs
NONE = -1  # no token


class Loops:
    """Finds rows that repeat themselves. Only text counts: in a loop with timestamps the times move on.

    For each row and each period, it counts how many of the last text tokens equal the one that many places before."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self.recent = torch.full((n_rows, PERIOD_MAX_TOKENS), NONE, dtype=torch.int64, device=device)
        self.equal = torch.zeros_like(self.recent)
        periods = torch.arange(1, PERIOD_MAX_TOKENS + 1, device=device)
        self._needed = torch.maximum((ROUNDS_MIN - 1) * periods, REPEATED_MIN_TOKENS - periods)

    def begin(self, rows: Tensor) -> None:
        """Resets rows."""
        self.recent[rows] = NONE
        self.equal[rows] = 0

    def append(self, rows: Tensor, tokens: Tensor, text: Tensor) -> None:
        """Rows (int64 [rows]) wrote tokens (int64 [rows]); ``text`` (bool [rows]) says which of them are text."""
        recent, equal, text = self.recent[rows], self.equal[rows], text[:, None]
        counted = torch.where(recent == tokens[:, None], equal + 1, 0)
        self.equal[rows] = torch.where(text, counted, equal)
        self.recent[rows] = torch.where(text, torch.cat([tokens[:, None], recent[:, :-1]], dim=1), recent)

    def going(self, rows: Tensor) -> Tensor:
        """bool [rows]: True if the text ends in enough rounds, and enough tokens, of the same."""
        return (self.equal[rows] >= self._needed).any(dim=1)
