"""The table of slots in docs/gpu.md is the one that the engine computes."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.gpu.sizing import SIZES_GB, table

DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu.md"


def test_the_document_holds_the_table() -> None:
    """docs/gpu.md has the output of ``python -m benchmarks.gpu.sizing``, line by line."""
    assert table() in DOCUMENT.read_text(encoding="utf-8")


def test_more_memory_never_holds_less() -> None:
    """In each line the numbers grow, and 8 bits hold at least as many windows as 16."""
    for line in table().splitlines()[2:]:
        cells = [re.findall(r"\d+", cell) for cell in line.split("|")[2:-1]]
        assert len(cells) == len(SIZES_GB)
        found = [[int(number) for number in cell] for cell in cells if cell]
        assert found == sorted(found)
        assert all(len(pair) == 1 or pair[1] >= pair[0] for pair in found)
