"""Compiles every Triton kernel for GPUs that need not be there, and reads what the assembler says of the result.

    python -m benchmarks.gpu.compiled

prints registers, spilled bytes and shared memory of each kernel for each architecture. Nothing here needs a GPU: it
says that the kernels compile and do not spill, and nothing about their speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as nvidia
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from whisperd.engine.cuda import alignment_kernel, kernels, sampling_kernel

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50
FP8_ARCHITECTURE = 89
WIDTH = 64  # of a head, in every release of Whisper
TYPES = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32", "fp8": "*fp8e4nv"}
PATTERN = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One kernel with the types of its arguments; ``constants`` are those that it is compiled for."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, object]
    oldest: int = 80
    n_warps: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one program of a kernel takes: registers of a thread, bytes of its stack, and shared bytes."""

    registers: int
    stack_bytes: int
    shared_bytes: int


def variants() -> Iterator[Variant]:
    """Every kernel, in every type that the engine gives it. Sizes of models are arguments, and need no variant."""
    for dtype in ("fp16", "bf16", "fp32"):
        for cache in (dtype, "fp8"):
            if (dtype, cache) == ("fp32", "fp8"):
                continue
            yield from _attention(dtype, cache)
        for block in (1, kernels.PUT_BLOCK):
            states = dict.fromkeys(("cache_keys", "cache_values", "keys", "values"), TYPES[dtype])
            yield Variant(
                name=f"put_states {dtype} {block}",
                kernel=kernels.put_states,
                types=states | {"slots": "*i64", "first": "*i64"},
                constants={"WIDTH": WIDTH, "BLOCK": block},
            )
        for sampled in (False, True):
            yield _choice(dtype, sampled=sampled)
    yield Variant(
        name="dtw forward",
        kernel=alignment_kernel._forward,
        types={"diagonals": "*fp64", "totals": "*fp64", "steps": "*i8"},
        constants={"BLOCK": 256},
    )
    yield Variant(
        name="dtw backward",
        kernel=alignment_kernel._backward,
        types={"steps": "*i8", "firsts": "*i64", "rows": "*i64", "columns": "*i64"},
        constants={},
        n_warps=1,
    )


def _attention(dtype: str, cache: str) -> Iterator[Variant]:
    scaled = cache == "fp8"
    shared = {"query": TYPES[dtype], "result": TYPES[dtype], "keys": TYPES[cache], "values": TYPES[cache]}
    shared |= {"slots": "*i64", "live": "*i64", "scale": "fp32"}
    shared |= dict.fromkeys(("key_scales", "value_scales"), "*fp32" if scaled else "*i64")
    oldest = FP8_ARCHITECTURE if scaled else ARCHITECTURES[0]
    for whole in (True, False):
        parts = dict.fromkeys(("sums", "maxima", "weights"), TYPES[dtype] if whole else "*fp32")
        yield Variant(
            name=f"attend_one {dtype} {cache} {'whole' if whole else 'parts'}",
            kernel=kernels.attend_one,
            types=shared | parts,
            constants={"WIDTH": WIDTH, "BLOCK": kernels.BLOCK, "SCALED": scaled, "WHOLE": whole},
            oldest=oldest,
        )
    yield Variant(
        name=f"attend_several {dtype} {cache}",
        kernel=kernels.attend_several,
        types=shared,
        constants={
            "WIDTH": WIDTH,
            "BLOCK": kernels.CHUNK_BLOCKS[4 if dtype == "fp32" else 2],
            "QUERIES": kernels.CHUNK_QUERIES,
            "SCALED": scaled,
        },
        oldest=oldest,
    )


def _choice(dtype: str, *, sampled: bool) -> Variant:
    integers = ("rows", "noise_seed", "min_tokens", "max_tokens", "n_tokens", "last", "previous", "last_timestamp")
    types = dict.fromkeys((*integers, "tokens", "recent", "equal"), "*i64")
    types |= {"logits": TYPES[dtype], "flags": "*u8", "timestamps": "*u8", "done": "*u8"}
    return Variant(
        name=f"choose_token {dtype}{' sampled' if sampled else ''}",
        kernel=sampling_kernel.choose_token,
        types=types | {"temperature": "*fp32", "sum_logprob": "*fp32"},
        constants={
            "MAX_TOKENS": 224,
            "LATEST_START": 50,
            "PERIOD": 40,
            "PERIOD_BLOCK": 64,
            "BLOCK": sampling_kernel.BLOCK,
            "SAMPLED": sampled,
        },
        n_warps=sampling_kernel.N_WARPS,
    )


def usage(variant: Variant, architecture: int) -> Usage:
    """Compiles a kernel for a GPU of this compute capability (80 is 8.0); raises what Triton raises."""
    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "i32") for name in names} | dict.fromkeys(variant.constants, "constexpr")
    source = ASTSource(
        fn=variant.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        # tensors of PyTorch start at multiples of 512 bytes, and strides are multiples of the width of a head
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if types[name].startswith("*") or name.endswith("_stride")
        },
    )
    compiled = compile_kernel(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": variant.n_warps}
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(binary: bytes, shared_bytes: int) -> Usage:
    tool = Path(nvidia).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = PATTERN.search(told.stdout)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {told.stdout}")
    registers, stack, local = map(int, found.groups())
    return Usage(registers=registers, stack_bytes=stack + local, shared_bytes=shared_bytes)


def main() -> None:
    """Prints the table."""
    print(f"{'kernel':32s} {'sm':>4s} {'registers':>9s} {'stack bytes':>11s} {'shared bytes':>12s}")
    for variant in variants():
        for architecture in (one for one in ARCHITECTURES if one >= variant.oldest):
            found = usage(variant, architecture)
            figures = f"{found.registers:9d} {found.stack_bytes:11d} {found.shared_bytes:12d}"
            print(f"{variant.name:32s} {architecture:4d} {figures}", flush=True)


if __name__ == "__main__":
    main()
