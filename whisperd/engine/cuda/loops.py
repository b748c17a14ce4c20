"""Which rows repeat themselves, kept up to date with each token and without a word to the host.

Only text counts: in a loop with timestamps the times move on while the words stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

PERIOD_MAX_TOKENS = 40
ROUNDS_MIN = 3
REPEATED_MIN_TOKENS = 40  # shorter ones occur in what people say: telephone numbers, counting, songs
NONE = -1  # no token


class Loops:
    """For each row and each period, how many of its last text tokens equal the one that many places before."""

    def __init__(self, n_rows: int, device: torch.device) -> None:
        self._recent = torch.full((n_rows, PERIOD_MAX_TOKENS), NONE, dtype=torch.int64, device=device)
        self._equal = torch.zeros_like(self._recent)
        periods = torch.arange(1, PERIOD_MAX_TOKENS + 1, device=device)
        self._needed = torch.maximum((ROUNDS_MIN - 1) * periods, REPEATED_MIN_TOKENS - periods)

    def begin(self, rows: Tensor) -> None:
        """Rows start anew."""
        self._recent[rows] = NONE
        self._equal[rows] = 0

    def append(self, rows: Tensor, tokens: Tensor, text: Tensor) -> None:
        """Rows (int64 [rows]) wrote tokens (int64 [rows]); ``text`` (bool [rows]) says which of them are text."""
        recent, equal, text = self._recent[rows], self._equal[rows], text[:, None]
        counted = torch.where(recent == tokens[:, None], equal + 1, 0)
        self._equal[rows] = torch.where(text, counted, equal)
        self._recent[rows] = torch.where(text, torch.cat([tokens[:, None], recent[:, :-1]], dim=1), recent)

    def going(self, rows: Tensor) -> Tensor:
        """bool [rows]: whose text ends in so many rounds, and so many tokens, of the same."""
        return (self._equal[rows] >= self._needed).any(dim=1)
