"""Compile every Triton kernel without a GPU and print, as JSON, what the compiler made of it.

Run as a program, because a process in which Triton interprets cannot compile.
"""

import json
import re
import warnings
from contextlib import redirect_stdout
from io import StringIO

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_mdgd.kernels.triton import chunks, combine, products, selection

# Each dtype alone is compiled for the first; every kernel, on several dtypes, for all.
ARCHITECTURES = (80, 90, 100)
ALONE = {"float32", "bfloat16", "float16", "float64"}
FLOAT32, BFLOAT16, FLOAT16, FLOAT64, BOOL = range(5)
WIDTH = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT64: 8, BOOL: 1}
POINTERS = {"partial": "*fp64", "out": "*fp64", "coefficients": "*fp64", "scale": "*fp64"}
NUMBERS_A_THREAD = chunks.TILE // (32 * chunks.WARPS)


def kernels():
    """(name, kernel, constants, dtypes read through wide loads, dtype written through wide stores)."""
    common = {"ALIGNED": True, "TILE": chunks.TILE}
    for name, codes in {
        "float32": (0, 0, 0), "bfloat16": (1, 1, 1), "float16": (2, 2, 2), "float64": (3, 3, 3), "mixed": (0, 1, 0),
    }.items():  # fmt: skip
        table = {"LEFT": (0, 1, 2), "RIGHT": (0, 1, 2), "SYMMETRIC": True, "CODES": codes, **common}
        yield f"products {name}", products._products_kernel, table, codes, None
        # Over its first term, as d is over g.
        table = {"OUT": 0, "MASK": -1, "TERMS": (0, 1, 2), "CODES": codes, **common}
        yield f"combine {name}", combine._combine_kernel, table, codes, codes[0]
    most = tuple(range(products.COLUMNS))
    table = {"LEFT": (products.COLUMNS,), "RIGHT": most, "SYMMETRIC": False, "CODES": (0,) * (len(most) + 1), **common}
    yield "products of a move", products._products_kernel, table, table["CODES"], None
    table = {"LEFT": most, "RIGHT": most, "SYMMETRIC": True, "CODES": (0,) * len(most), **common}
    yield "products of many", products._products_kernel, table, table["CODES"], None
    table = {"OUT": 0, "MASK": -1, "TERMS": (1, 2), "CODES": (BFLOAT16,) * 3, **common}
    yield "combine elsewhere", combine._combine_kernel, table, (BFLOAT16, BFLOAT16), BFLOAT16
    # A thread's eight mask bytes are less than a wide load.
    table = {"OUT": 0, "MASK": 1, "TERMS": (0, 2), "CODES": (BFLOAT16, BOOL, BFLOAT16), **common}
    yield "combine masked", combine._combine_kernel, table, (BFLOAT16, BFLOAT16), BFLOAT16
    yield "products sum", products._sum_kernel, {"CELLS": 9, "BLOCK": products.SUM_BLOCK}, (), None
    for bits, pattern, codes, scale in (
        (32, (0, 1), (BOOL, FLOAT32), None),
        (32, (0, 1), (BOOL, BFLOAT16), None),
        (64, (0, 1, 2, 3), (BOOL, FLOAT32, FLOAT32, FLOAT32), "*fp64"),
    ):
        table = {"PATTERN": pattern, "CODES": codes, "BITS": bits, **common} | ({} if scale else {"scale": None})
        title = f"top-k of {'similarities' if scale else ('float32', 'bfloat16')[codes[1]]}"
        rest = bits % selection.DIGIT
        for digit in ({"KNOWN": 0, "WIDTH": selection.DIGIT}, {"KNOWN": bits - rest, "WIDTH": rest}):
            yield f"{title} count {digit['KNOWN']}", selection._count_kernel, table | digit, codes[1:], None
        yield f"{title} ties", selection._ties_kernel, table, codes[1:], None
        yield f"{title} mask", selection._mask_kernel, table, codes[1:], None
    table = {"WIDTH": selection.DIGIT, "SIZE": 1 << selection.DIGIT}
    yield "top-k digit", selection._digit_kernel, table, (), None


def wide_bytes(ptx, operation):
    """How many bytes a thread moves by instructions of 128 bits or more."""
    total = 0
    for count, bits in re.findall(rf"{operation}\.global[\w.:]*\.v(\d)\.b(\d+)", ptx):
        size = int(count) * int(bits) // 8
        total += size if size >= 16 else 0
    return total


def compile_one(kernel, constants, architecture):
    signature = {p.name: "constexpr" if p.name in constants else POINTERS.get(p.name, "*i64") for p in kernel.params}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
    with redirect_stdout(StringIO()) as report:
        ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=chunks.OPTIONS).asm["ptx"]
    return ptx, report.getvalue()


def main():
    warnings.simplefilter("ignore")
    # What the assembler says of registers, which is not kept with what it made.
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    results = []
    for name, kernel, constants, reads, writes in kernels():
        for architecture in ARCHITECTURES[:1] if ALONE & set(name.split()) else ARCHITECTURES:
            ptx, report = compile_one(kernel, constants, architecture)
            results.append(
                {
                    "kernel": name,
                    "function": kernel.fn.__name__,
                    "architecture": f"sm_{architecture}",
                    "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
                    "stack": int(re.search(r"(\d+) bytes stack frame", report).group(1)),
                    "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
                    "local": len(re.findall(r"(?:ld|st)\.local", ptx)),
                    "wide_loads": wide_bytes(ptx, "ld"),
                    "wide_stores": wide_bytes(ptx, "st"),
                    "wanted_loads": NUMBERS_A_THREAD * sum(WIDTH[code] for code in reads),
                    "wanted_stores": NUMBERS_A_THREAD * (WIDTH[writes] if writes is not None else 0),
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
