"""``Rows.write`` as one Triton kernel: rules, choice and bookkeeping of one row by one program.

It reads the logits once, in the type of the model, and writes no row of the vocabulary. Rows that are done cost
nothing. Checked against ``Rows.write`` in Triton's interpreter, and compiled for the GPUs of
``benchmarks/gpu/compiled.py``: IT HAS NEVER RUN ON A GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from whisperd.engine.base import MAX_NEW_TOKENS
from whisperd.engine.cuda.rows import Rows
from whisperd.engine.cuda.rules import MAX_INITIAL_TIMESTAMP, PERIOD_MAX_TOKENS, TokenRules

BLOCK = 1024  # tokens that a program looks at together
N_WARPS = 8


@triton.jit
def _best(score, token, logit):
    """The highest score of all lanes, of equal ones that with the lowest id, as in ``torch.argmax``."""
    most = tl.max(score, 0)
    winner = tl.min(tl.where(score == most, token, 2147483647), 0)
    return most, winner, tl.max(tl.where(token == winner, logit, float("-inf")), 0)


@triton.jit
def _add(top, total, logit):
    """A running sum of exponentials, kept relative to the largest logit so far."""
    larger = tl.maximum(top, logit)
    return larger, total * tl.exp(top - larger) + tl.exp(logit - larger)


@triton.jit
def _allowed(token, logit, flag, eot, begin, count, newest, older, latest, floor, timed, LATEST_START: tl.constexpr):
    """``TokenRules`` for one row: the logit, or -inf for a token that may not come now."""
    first = count == 0
    after = (count >= 1) & (newest >= begin)
    after_pair = after & ((count < 2) | (older >= begin))
    after_lone = after & ~after_pair
    # a closing timestamp may be repeated to open the next segment; otherwise time moves on
    earliest = tl.where(latest < 0, begin, tl.where(after_lone, latest, latest + 1))
    is_time = token >= begin
    never = ((flag & 1) != 0) | (first & ((flag & 2) != 0)) | ((count < floor) & (token == eot))
    late = first & (token > begin + LATEST_START)
    out_of_order = (is_time & (after_pair | (token < earliest) | late)) | (
        ~is_time & (first | (token == begin - 1) | (after_lone & (token < eot)))
    )
    return tl.where(never | (timed & out_of_order), float("-inf"), logit)


@triton.jit
def _pick(
    text_score,
    text_token,
    text_logit,
    text_top,
    text_sum,
    time_score,
    time_token,
    time_logit,
    time_top,
    time_sum,
    timed,
):
    """Joins the lanes: the token, and the logarithm of its probability."""
    text_most, time_most = tl.max(text_top, 0), tl.max(time_top, 0)
    text_total = tl.sum(text_sum * tl.exp(text_top - text_most), 0)
    time_total = tl.sum(time_sum * tl.exp(time_top - time_most), 0)
    text_best, text_id, text_own = _best(text_score, text_token, text_logit)
    time_best, time_id, time_own = _best(time_score, time_token, time_logit)
    # all timestamps together against the likeliest other token
    time_all = tl.where(time_total > 0, time_most + tl.log(tl.maximum(time_total, 1e-30)), float("-inf"))
    only_time = timed & (time_all > tl.where(text_total > 0, text_most, float("-inf")))
    most = tl.where(only_time, time_most, tl.maximum(text_most, time_most))
    total = time_total * tl.exp(time_most - most) + tl.where(only_time, 0.0, text_total * tl.exp(text_most - most))
    is_time = only_time | (time_best > text_best)
    picked = tl.where(is_time, time_id, text_id)
    return picked, tl.where(is_time, time_own, text_own) - most - tl.log(total)


@triton.jit
def _append_text(
    row, picked, count, newest, begin, tokens, n_tokens, last, previous, last_timestamp, MOST: tl.constexpr
):
    """``Rows.extend`` for one row, but for its loops."""
    tl.store(tokens + row * MOST + tl.minimum(count, MOST - 1), picked.to(tl.int64))
    tl.store(n_tokens + row, (count + 1).to(tl.int64))
    tl.store(previous + row, newest.to(tl.int64))
    tl.store(last + row, picked.to(tl.int64))
    if picked >= begin:
        tl.store(last_timestamp + row, picked.to(tl.int64))


@triton.jit
def _append_loop(row, picked, recent, equal, PERIOD: tl.constexpr, PERIOD_BLOCK: tl.constexpr):
    """``Loops.append`` for one row."""
    period = tl.arange(0, PERIOD_BLOCK)
    there = period < PERIOD
    before = tl.load(recent + row * PERIOD + period, mask=there, other=-1)
    equal_so_far = tl.load(equal + row * PERIOD + period, mask=there, other=0)
    tl.debug_barrier()  # all are read before one is overwritten
    tl.store(equal + row * PERIOD + period, tl.where(before == picked, equal_so_far + 1, 0), mask=there)
    tl.store(recent + row * PERIOD + period + 1, before, mask=period + 1 < PERIOD)
    tl.store(recent + row * PERIOD, picked.to(tl.int64))


@triton.jit
def choose_token(
    logits,
    flags,
    rows,
    noise_seed,
    temperature,
    timestamps,
    min_tokens,
    max_tokens,
    n_tokens,
    last,
    previous,
    last_timestamp,
    tokens,
    recent,
    equal,
    sum_logprob,
    done,
    row_stride,
    size,
    eot,
    begin,
    MAX_TOKENS: tl.constexpr,
    LATEST_START: tl.constexpr,
    PERIOD: tl.constexpr,
    PERIOD_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """``flags`` uint8 [vocabulary]: 1 for ids that are never written, 2 for those not written first."""
    place = tl.program_id(0)
    row = tl.load(rows + place)
    if tl.load(done + row) == 0:
        timed = tl.load(timestamps + row) != 0
        count = tl.load(n_tokens + row).to(tl.int32)
        newest = tl.load(last + row).to(tl.int32)
        older = tl.load(previous + row).to(tl.int32)
        latest = tl.load(last_timestamp + row).to(tl.int32)
        floor = tl.load(min_tokens + row).to(tl.int32)
        heat = tl.load(temperature + row)
        seed = tl.load(noise_seed).to(tl.int32)
        lane = tl.arange(0, BLOCK)
        text_score = tl.full([BLOCK], float("-inf"), tl.float32)
        text_logit, time_score, time_logit = text_score, text_score, text_score
        text_top = tl.full([BLOCK], -1e30, tl.float32)
        text_token, time_token, time_top = lane, lane, text_top
        text_sum = tl.zeros([BLOCK], tl.float32)
        time_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            token = start + lane
            there = token < size
            flag = tl.load(flags + token, mask=there, other=1)
            logit = tl.load(logits + place * row_stride + token, mask=there, other=float("-inf")).to(tl.float32)
            logit = _allowed(token, logit, flag, eot, begin, count, newest, older, latest, floor, timed, LATEST_START)
            score = logit
            if SAMPLED:  # the largest after Gumbel noise is a draw from the softmax
                uniform = tl.maximum(tl.rand(seed, (row * size + token).to(tl.int32)), 1e-10)
                score = tl.where(heat > 0, logit / tl.maximum(heat, 1e-6) - tl.log(-tl.log(uniform)), logit)
            is_time = token >= begin
            text_top, text_sum = _add(text_top, text_sum, tl.where(is_time, float("-inf"), logit))
            time_top, time_sum = _add(time_top, time_sum, tl.where(is_time, logit, float("-inf")))
            text_wins = ~is_time & (score > text_score)  # an equal one comes later, and has the higher id
            text_score = tl.where(text_wins, score, text_score)
            text_token = tl.where(text_wins, token, text_token)
            text_logit = tl.where(text_wins, logit, text_logit)
            time_wins = is_time & (score > time_score)
            time_score = tl.where(time_wins, score, time_score)
            time_token = tl.where(time_wins, token, time_token)
            time_logit = tl.where(time_wins, logit, time_logit)
        picked, logprob = _pick(
            text_score, text_token, text_logit, text_top, text_sum,
            time_score, time_token, time_logit, time_top, time_sum, timed,
        )  # fmt: skip
        if picked != eot:
            _append_text(
                row, picked, count, newest, begin, tokens, n_tokens, last, previous, last_timestamp, MAX_TOKENS
            )
        if picked < eot:
            _append_loop(row, picked, recent, equal, PERIOD, PERIOD_BLOCK)
        tl.store(sum_logprob + row, tl.load(sum_logprob + row) + logprob)
        ended = (picked == eot) | (count + 1 >= tl.load(max_tokens + row).to(tl.int32))
        tl.store(done + row, ended.to(tl.uint8))


class TokenChooser:
    """``Rows.write`` for rows on a GPU.

    Args:
        rows: the rows whose tokens it chooses.
        rules: which tokens may come next.
    """

    def __init__(self, rows: Rows, rules: TokenRules) -> None:
        self._rows = rows
        self._rules = rules
        self._flags = rules.suppressed.to(torch.uint8) + 2 * rules.suppressed_first.to(torch.uint8)
        self._seed = torch.randint(0, 2**30, (1,), dtype=torch.int64).to(rows.done.device)

    def __call__(self, rows: Tensor, logits: Tensor, *, sampled: bool) -> None:
        """Writes one token in each of these rows (int64 [n]) from logits [n, vocabulary] of any type."""
        state, rules = self._rows, self._rules
        if sampled:
            self._seed += 1  # on the device: a recorded step draws anew each time
        choose_token[(len(rows),)](
            logits,
            self._flags,
            rows,
            self._seed,
            state.temperature,
            state.timestamps.view(torch.uint8),
            state.min_tokens,
            state.max_tokens,
            state.n_tokens,
            state.last,
            state.previous,
            state.last_timestamp,
            state.tokens,
            state.loops.recent,
            state.loops.equal,
            state.sum_logprob,
            state.done.view(torch.uint8),
            logits.stride(0),
            logits.shape[1],
            rules.eot,
            rules.begin,
            MAX_TOKENS=MAX_NEW_TOKENS,
            LATEST_START=MAX_INITIAL_TIMESTAMP,
            PERIOD=PERIOD_MAX_TOKENS,
            PERIOD_BLOCK=triton.next_power_of_2(PERIOD_MAX_TOKENS),
            BLOCK=BLOCK,
            SAMPLED=sampled,
            num_warps=N_WARPS,
        )
