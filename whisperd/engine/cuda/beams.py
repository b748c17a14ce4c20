"""Beam search: several texts of one window side by side, of which the likeliest continue, as in openai-whisper.

The rows of a window share its audio; when a text continues in another row, its keys and values are copied there. The
logits of a step are recorded (``graphs``), the search itself is not: groups start and end at any step. Nothing here
waits for the device but ``texts``. Tested on the CPU; it HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whisperd.engine.cuda.caches import Caches
from whisperd.engine.cuda.rows import Rows, RowText
from whisperd.engine.cuda.rules import TokenRules


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """The possible next tokens of each group, the likeliest first; all [groups, beams * (beams + 1)].

    ``source`` is the row that continues. ``rank`` counts the candidates before it that do not end their text.
    """

    scores: Tensor
    tokens: Tensor
    source: Tensor
    ends: Tensor
    rank: Tensor


class Beams:
    """The finished texts of groups of rows; a group's ``n``th text lies at its ``n``th row.

    Args:
        rows: the texts. Its last row is used by no window.
        caches: their keys and values.
        eot: the end token.
    """

    def __init__(self, rows: Rows, caches: Caches, *, eot: int) -> None:
        self._rows = rows
        self._caches = caches
        self._eot = eot
        self._tokens = torch.zeros_like(rows.tokens)
        self._n_tokens = torch.zeros_like(rows.n_tokens)
        self._sum_logprob = torch.zeros_like(rows.sum_logprob)
        self._n_finished = torch.zeros_like(rows.n_tokens)  # of a group, at its first row

    def begin(self, groups: Tensor) -> None:
        """Resets groups (int64 [groups, beams])."""
        self._n_finished[groups] = 0

    def write(self, groups: Tensor, logits: Tensor, rules: TokenRules, bound: int) -> None:
        """The next token of each row, or its end.

        Args:
            groups: int64 [groups, beams], rows.
            logits: float32 [groups * beams, vocabulary].
            rules: what may come next.
            bound: no row has more positions than this.
        """
        found = self._candidates(groups, logits, rules)
        alive = ~self._rows.done[groups[:, :1]]
        self._finish(groups, found, alive)
        self._go_on(groups, found, alive, bound)
        full = self._n_finished[groups[:, :1]] >= groups.shape[1]
        self._rows.done[groups] |= full | (self._rows.n_tokens[groups] >= self._rows.max_tokens[groups])

    def texts(self, group: Tensor) -> list[RowText]:
        """The finished texts of a group (int64 [beams]), and where they are too few the likeliest others."""
        count = int(self._n_finished[group[0]])
        others = sorted(self._rows.texts(group), key=lambda text: text.sum_logprob, reverse=True)
        lengths, sums = self._n_tokens[group].tolist(), self._sum_logprob[group].tolist()
        finished = [
            RowText(tokens=tuple(tokens[:length]), sum_logprob=total, no_speech_prob=others[0].no_speech_prob)
            for tokens, length, total in zip(self._tokens[group].tolist(), lengths, sums, strict=True)
        ]
        return [*finished[:count], *others][: len(group)]

    def _candidates(self, groups: Tensor, logits: Tensor, rules: TokenRules) -> _Candidates:
        n_beams = groups.shape[1]
        history = self._rows.history(groups.flatten())
        likely, tokens = rules(logits, history).log_softmax(dim=-1).topk(n_beams + 1)
        sums = self._rows.sum_logprob[groups]
        # at the start all rows are the same: only the first one counts
        same = (self._rows.n_tokens[groups] == 0) & (torch.arange(n_beams, device=groups.device) > 0)
        sums = sums.masked_fill(same, float("-inf"))
        scores = (sums[..., None] + likely.view(*groups.shape, -1)).flatten(1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        tokens = tokens.view(len(groups), -1).gather(1, order)
        goes_on = tokens != self._eot
        return _Candidates(
            scores=scores.gather(1, order),
            tokens=tokens,
            source=groups.gather(1, order // (n_beams + 1)),
            ends=~goes_on,
            rank=goes_on.cumsum(dim=1) - goes_on.long(),
        )

    def _finish(self, groups: Tensor, found: _Candidates, alive: Tensor) -> None:
        """Stores texts that end before the last of those that continue, while there is room."""
        n_beams = groups.shape[1]
        ended = found.ends & (found.rank < n_beams) & found.scores.isfinite() & alive
        place = self._n_finished[groups[:, :1]] + ended.cumsum(dim=1) - 1
        fits = ended & (place < n_beams)
        unused = len(self._n_finished) - 1
        target = torch.where(fits, groups.gather(1, place.clamp(0, n_beams - 1)), unused)
        self._tokens[target] = self._rows.tokens[found.source]
        self._n_tokens[target] = self._rows.n_tokens[found.source]
        self._sum_logprob[target] = found.scores
        self._n_finished[groups[:, 0]] += fits.sum(dim=1)

    def _go_on(self, groups: Tensor, found: _Candidates, alive: Tensor, bound: int) -> None:
        n_beams, n_candidates = groups.shape[1], found.ends.shape[1]
        first = torch.where(found.ends, n_candidates, found.rank).argsort(dim=1, stable=True)[:, :n_beams]
        source = torch.where(alive, found.source.gather(1, first), groups).flatten()
        rows, going = groups.flatten(), alive.expand_as(groups).flatten()
        self._caches.copy_text(source, rows, bound)
        self._rows.copy(source, rows)
        self._rows.extend(rows, found.tokens.gather(1, first).flatten(), going)
        scores = found.scores.gather(1, first).flatten()
        self._rows.sum_logprob[rows] = torch.where(going, scores, self._rows.sum_logprob[rows])
