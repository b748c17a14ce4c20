"""In steady decoding the host never waits for the device, and launches little outside of recorded graphs.

The true architectures on PyTorch's device "meta", which computes nothing: reading a number from it fails, as do shapes
that depend on numbers, and a copy from it to the host is seen. Every operation that is no view counts as one launch;
some are two on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.random_whisper import SHAPES
from tests.support.speech import silence
from whisperd.speech.tokenizer import Vocabulary

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from torch.utils._python_dispatch import TorchDispatchMode

from whisperd.engine.checkpoints import Checkpoint, Shape
from whisperd.engine.cuda.graphs import Action
from whisperd.engine.cuda.rows import RowPlan
from whisperd.engine.cuda.runner import Kernels, Runner

META = torch.device("meta")
SLOTS = 128
# kernels of a layer in one decode step: 3 norms, 6 products, 2 attentions, 1 write, 3 sums, 1 activation, and the
# part that several rows share of them
STEP_LAUNCHES_PER_LAYER = 16
STEP_LAUNCHES_BESIDE = 24
# launches outside of graphs, whatever the model: for 8 windows, for 8 rows without a prompt, for a turn of four steps,
# for a search, and for one step of all searches
OUTSIDE_MOST = {"encode": 30, "begin": 50, "decode": 2, "begin_beams": 220, "beams": 170}


class Launches(TorchDispatchMode):  # type: ignore[misc]
    """Counts operations that are no views, by name; fails where the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        inputs = [one for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        outputs = [one for one in torch.utils._pytree.tree_leaves(found) if isinstance(one, torch.Tensor)]
        was_there = any(one.device == META for one in inputs)
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "unique"}, name
        assert not was_there or all(one.device == META for one in outputs), f"{name} copies to the host"
        if name in {"index", "index_put_"}:
            assert not any(one is not None and one.dtype == torch.bool for one in args[1]), "an index of truth values"
        on_device = any(one.device == META for one in outputs)
        if on_device and not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.counts[name] += 1
        return found

    @property
    def total(self) -> int:
        return self.counts.total()


class OneLaunch:
    """Operations on slots and the choice of tokens, as one operation each: what a Triton kernel is."""

    def attend(self, query: Any, *_: Any) -> Any:
        return query.clone()

    def put(self, cache_keys: Any, *_: Any) -> None:
        cache_keys[0, 0, 0].zero_()

    def choose(self, rows: Any, logits: Any, *, sampled: bool) -> None:
        del rows, sampled
        logits[0].zero_()


def hollow(shape: Shape, vocabulary: Vocabulary) -> Checkpoint:
    """A checkpoint of these sizes whose every tensor is one number."""
    width, hidden = shape.width, shape.hidden
    sizes: dict[str, tuple[int, ...]] = {
        "model.encoder.conv1.weight": (width, shape.n_mels, 3),
        "model.encoder.conv2.weight": (width, width, 3),
        "model.encoder.embed_positions.weight": (shape.frames, width),
        "model.decoder.embed_positions.weight": (shape.positions, width),
        "model.decoder.embed_tokens.weight": (vocabulary.size, width),
    }
    for side, layers in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers)):
        sizes[f"model.{side}.layer_norm.weight"] = (width,)
        for layer in range(layers):
            name = f"model.{side}.layers.{layer}"
            attentions = ("self_attn",) if side == "encoder" else ("self_attn", "encoder_attn")
            for attention in attentions:
                sizes |= {f"{name}.{attention}.{part}_proj.weight": (width, width) for part in ("q", "k", "v", "out")}
                sizes[f"{name}.{attention}_layer_norm.weight"] = (width,)
            sizes[f"{name}.final_layer_norm.weight"] = (width,)
            sizes |= {f"{name}.fc1.weight": (hidden, width), f"{name}.fc2.weight": (width, hidden)}
    biases = {
        name.replace("weight", "bias"): size[:1]
        for name, size in sizes.items()
        if "embed" not in name and "k_proj" not in name
    }
    number = np.zeros((), np.float16)
    return Checkpoint(
        shape=replace(shape, vocabulary_size=vocabulary.size),
        tensors={name: np.broadcast_to(number, size) for name, size in (sizes | biases).items()},
        alignment_heads=((0, 0),),
        suppressed=(1, 2),
        suppressed_first=(220,),
    )


@pytest.fixture(scope="module", params=["tiny", "large-v3"])
def runner(request: pytest.FixtureRequest, vocabulary: Vocabulary) -> Iterator[Runner]:
    """Narrow, but as deep as the model: launches do not depend on widths."""
    shape = replace(SHAPES[request.param], width=64 * SHAPES["tiny"].decoder_heads, encoder_heads=6, decoder_heads=6)
    operations = OneLaunch()
    runner = Runner(
        hollow(shape, vocabulary),
        vocabulary,
        device=META,
        dtype=torch.float16,
        slots=SLOTS,
        kernels=Kernels(slots=operations, chooser=lambda *_: operations.choose),
    )
    yield runner
    runner.close()


@contextmanager
def counted() -> Iterator[Launches]:
    with Launches() as launches:
        yield launches


def replayed(_: Action) -> Action:
    """A recorded graph counts as one launch."""
    return lambda: None


def test_step(runner: Runner) -> None:
    """A recorded decode step has so many kernels, and the host does not wait in it."""
    rows = torch.zeros(SLOTS, dtype=torch.int64, device=META)
    with torch.inference_mode(), counted() as launches:
        runner.write_next(rows, "greedy")
    layers = runner.shape.decoder_layers
    assert launches.total <= STEP_LAUNCHES_PER_LAYER * layers + STEP_LAUNCHES_BESIDE


def test_outside_of_graphs(runner: Runner, vocabulary: Vocabulary) -> None:
    """The launches for an encoding, a prefix, a turn of steps and a step of searches are bounded."""
    runner.record(replayed)
    plan = RowPlan(prefix=(vocabulary.sot, vocabulary.sot + 1), temperature=0.0)
    rows = list(range(8))
    figures = {}
    with counted() as launches:
        runner.encode([silence(1.0)] * 8, rows)
    figures["encode"] = launches.total
    with counted() as launches:
        runner.begin(rows, rows, [plan] * 8)
    figures["begin"] = launches.total
    with counted() as launches:
        runner.decode(rows, 4)
    figures["decode"] = launches.total
    with counted() as launches:
        runner.begin_beams(rows[:5], 0, plan)
    figures["begin_beams"] = launches.total
    with counted() as launches:
        runner.decode_beams([rows[:5]], 1)
    figures["beams"] = launches.total
    for name, most in OUTSIDE_MOST.items():
        assert figures[name] <= most, figures


def test_waits_are_seen(runner: Runner) -> None:
    """The counter detects a read of a result as a wait."""
    with pytest.raises(Exception, match=r"meta|host"), counted():
        runner.progress([0, 1])
