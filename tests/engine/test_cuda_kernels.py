"""The Triton kernels give what plain PyTorch gives, in Triton's interpreter; each case runs in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

PREAMBLE = """
import torch
from whisperd.engine.cuda.caches import FP8, Scales, TorchSlots, gathered
from whisperd.engine.cuda.kernels import SlotKernels

torch.manual_seed(0)
DTYPES = ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2))

def compare(n_new, slots, live, positions, width=16):
    for dtype, limit in DTYPES[: 3 if n_new == 1 else 2]:  # the interpreter multiplies no matrices of bfloat16
        keys, values = torch.randn(2, 5, 2, positions, width, dtype=dtype)
        query = torch.randn(len(slots), n_new, 2, width, dtype=dtype).transpose(1, 2)
        given = (query, keys, values, torch.tensor(slots), torch.tensor(live), positions)
        found = SlotKernels().attend(*given)
        assert found.shape == query.shape and found.dtype == dtype
        assert (found.float() - gathered(*given).float()).abs().max() < limit, (n_new, live, positions, dtype)
        small, factors = (torch.rand(2, 5, 2, positions, width) * 800 - 400).to(FP8), torch.rand(2, 5, 2)
        given = (query, *small, *given[3:], Scales(keys=factors[0] / 100, values=factors[1] / 100))
        error = (SlotKernels().attend(*given).float() - gathered(*given).float()).abs().max()
        assert error < 4 * limit, (n_new, live, positions, dtype, "fp8", error)
"""

ONE = """
compare(1, [4, 2, 1], [300, 0, 1], 320)  # four parts
compare(1, [4, 0, 2] * 3, [31, 32, 65] * 3, 100)  # two parts
compare(1, [4, 0, 2, 1] * 5, [31, 32, 33, 0] * 5, 40)  # one
zero = SlotKernels().attend(torch.ones(2, 3, 1, 16), *torch.ones(2, 5, 3, 8, 16), torch.tensor([0, 1]),
                            torch.tensor([0, 8]), 8)
assert not zero[0].any() and (zero[1] - 1).abs().max() < 1e-6
"""

SEVERAL = """
compare(4, [4], [1500], 1500)
compare(4, [4, 0], [1, 33], 448)
compare(32, [3], [128], 160)
compare(17, [3, 1], [1, 65], 160)
"""

PUT = """
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8):
    for n_new, positions in ((1, 448), (4, 448), (70, 70)):
        caches = [torch.zeros(2, 5, 3, positions, 16, dtype=dtype) for _ in range(2)]
        states = torch.randint(0, 200, (3, n_new, 2, 3, 16)).to(dtype)
        keys, values = states.unbind(2)
        first = torch.tensor([0, 7, 9]) * (positions > n_new)
        given = (keys.transpose(1, 2), values.transpose(1, 2), torch.tensor([4, 0, 2]), first)
        for operations, cache in zip((SlotKernels(), TorchSlots()), caches):
            operations.put(*cache, *given)
        assert torch.equal(*caches) and caches[0].any(), (dtype, n_new)
"""

CHOICE = """
from whisperd.engine.cuda.rows import RowPlan, Rows
from whisperd.engine.cuda.rules import TokenRules
from whisperd.engine.cuda.sampling_kernel import TokenChooser

SIZE, EOT, SOT, NO_TIMESTAMPS = 1100, 60, 61, 70
CPU = torch.device("cpu")
rules = TokenRules(size=SIZE, eot=EOT, no_timestamps=NO_TIMESTAMPS, suppressed=(1, 2, 7, SOT, 62),
                   suppressed_first=(5, EOT), device=CPU)
plans = [RowPlan(prefix=(SOT,), timestamps=timed, min_tokens=floor, max_tokens=most)
         for timed, floor, most in ((True, 0, 30), (False, 3, 30), (True, 4, 9), (True, 0, 40), (False, 0, 12))]
steps = {torch.float32: 42, torch.float16: 12, torch.bfloat16: 12}
at = torch.tensor([5, 0, 3, 1, 6])
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    both = [Rows(8, eot=EOT, timestamp_begin=NO_TIMESTAMPS + 1, device=CPU) for _ in range(2)]
    for rows in both:
        rows.begin(at, [0] * len(plans), plans)
    chooser, ended = TokenChooser(both[0], rules), 0
    padded = torch.cat([at, torch.tensor([7, 7])])
    for step in range(steps[dtype]):
        logits = torch.randn(len(padded), SIZE) * 3
        logits[:, NO_TIMESTAMPS + 1:] += torch.randn(len(padded), 1) * 4 - 3
        logits[:, EOT] += torch.randn(len(padded)) * 2
        logits[:, 10:14] += 6 * (step % 3 > 0)  # texts that repeat themselves
        logits = logits.to(dtype)
        chooser(padded, logits, sampled=False)
        both[1].write(at, logits[: len(at)], rules, sampled=False)
        for name in ("tokens", "n_tokens", "last", "previous", "last_timestamp", "done"):
            assert torch.equal(getattr(both[0], name), getattr(both[1], name)), (dtype, step, name)
        assert torch.equal(both[0].loops.recent, both[1].loops.recent), step
        assert torch.equal(both[0].loops.equal, both[1].loops.equal), step
        torch.testing.assert_close(both[0].sum_logprob, both[1].sum_logprob, atol=1e-4, rtol=1e-5)
    assert both[0].n_tokens[at].sum() > 30 and (dtype != torch.float32 or both[0].done[at].all())
"""

SAMPLES = """
from whisperd.engine.cuda.rows import RowPlan, Rows
from whisperd.engine.cuda.rules import TokenRules
from whisperd.engine.cuda.sampling_kernel import TokenChooser

SIZE, EOT, N, HEAT = 100, 60, 200, 0.7
CPU = torch.device("cpu")
rules = TokenRules(size=SIZE, eot=EOT, no_timestamps=70, suppressed=(1,), suppressed_first=(5, EOT), device=CPU)
rows = Rows(N, eot=EOT, timestamp_begin=71, device=CPU)
plan, greedy = (RowPlan(prefix=(61,), timestamps=False, temperature=heat) for heat in (HEAT, 0.0))
rows.begin(torch.arange(N), [0] * N, [greedy] + [plan] * (N - 1))
logits = torch.full((N, SIZE), -50.0)
wanted = torch.tensor([1.0, 0.5, 0.0, -1.0])
logits[:, 10:14] = wanted
TokenChooser(rows, rules)(torch.arange(N), logits, sampled=True)
shares = torch.bincount(rows.last[1:], minlength=SIZE)[10:14] / (N - 1)
assert int(rows.last[0]) == 10
assert (shares - (wanted / HEAT).softmax(0)).abs().max() < 0.1, shares
expected = wanted.log_softmax(0)[rows.last - 10]
torch.testing.assert_close(rows.sum_logprob, expected, atol=1e-4, rtol=1e-4)
"""

CASES = {"one": ONE, "several": SEVERAL, "put": PUT, "choice": CHOICE, "samples": SAMPLES}


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name: str) -> None:
    """Attention of one and of several positions, writes into slots, and the choice of tokens are PyTorch's."""
    run = subprocess.run(
        [sys.executable, "-c", PREAMBLE + CASES[name] + "print('equal')"],
        env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "equal\n", run.stderr
