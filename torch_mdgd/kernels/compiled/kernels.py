"""What numba compiles: loops over chunks of a list of tensors, each chunk in a core's first cache.

All of it is in one file, because numba's cache on disk is renewed when the file of a kernel changes, and not when one
does that the kernel calls into. ``chunk`` tables are int64 of shape (N, 3): parameter, first number, numbers; addresses
and dtypes ("kinds", places in DTYPES) are int64 of shape (T, V), address 0 for a missing tensor.
"""

# Kernels are typed by numba, not by Python.
# mypy: disable-error-code="no-any-return, no-untyped-call, no-untyped-def, untyped-decorator"

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import float32, float64, int64, types, uint8, uint16, uint32
from numba.extending import intrinsic, overload

FLOAT32, BFLOAT16, FLOAT16, FLOAT64, BOOL = range(5)
# The order of a chunk's sums is the compiler's, so that they fill its registers; NaN and Inf stay what they are.
SUMS = {"reassoc", "contract", "nsz"}


def compiled(*signatures: str) -> Callable[[Any], Any]:
    """Compile now, for these types, and keep it on disk for later runs where that can be written."""

    def compile_(function: Any) -> Any:
        try:
            return numba.njit(list(signatures), nogil=True, cache=True)(function)
        except RuntimeError as error:
            if "no locator" not in str(error):
                raise
            return numba.njit(list(signatures), nogil=True)(function)

    return compile_


def _each(signature: str, dtypes: Sequence[str] = ("float32", "float64")) -> list[str]:
    """A signature for chunks that are held in float32, and the same for float64."""
    table = "int64[:, ::1]"
    return [f"void(int64, int64, {table}, {table}, {table}, {signature})".replace("real", x) for x in dtypes]


# ----------------------------------------------------------------------------------------------------------------------
# Reading and writing.


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(typing_context, address):
        pointer_type = types.CPointer(element)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(pointer_type))

        return pointer_type(int64), generate

    return pointer


_float32, _float64, _uint16, _uint8 = map(_pointer_to, (float32, float64, uint16, uint8))


@intrinsic
def _from_half(typing_context, bits):
    """The float32 of a float16's bits."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return float32(uint16), generate


@intrinsic
def _to_half(typing_context, number):
    """The bits of the float16 nearest to a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return uint16(float32), generate


@intrinsic
def _bits(typing_context, number):
    """The bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return uint32(float32), generate


@intrinsic
def _number(typing_context, bits):
    """The float32 of these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(uint32), generate


@numba.njit
def _to_bfloat16(number):
    """The bits of the bfloat16 nearest to a float32, the even one of two."""
    bits = _bits(number)
    rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    return uint16(0x7FC0) if number != number else uint16(rounded)


@numba.njit
def _as_float32(address, start, size):
    return numba.carray(_float32(address + 4 * start), (size,))


@numba.njit
def _as_bytes(address, start, size):
    return numba.carray(_uint8(address + start), (size,))


@numba.njit
def _read(address, kind, start, size, out):
    """Fill the beginning of ``out`` with a chunk's numbers; of address 0 with zeros."""
    if address == 0:
        for i in range(size):
            out[i] = 0
    elif kind == FLOAT32:
        x = _as_float32(address, start, size)
        for i in range(size):
            out[i] = x[i]
    elif kind == BFLOAT16:
        b = numba.carray(_uint16(address + 2 * start), (size,))
        for i in range(size):
            out[i] = _number(uint32(b[i]) << uint32(16))
    elif kind == FLOAT16:
        h = numba.carray(_uint16(address + 2 * start), (size,))
        for i in range(size):
            out[i] = _from_half(h[i])
    elif kind == FLOAT64:
        w = numba.carray(_float64(address + 8 * start), (size,))
        for i in range(size):
            out[i] = w[i]
    else:
        m = _as_bytes(address, start, size)
        for i in range(size):
            out[i] = m[i]


def _chunk(address, kind, start, size, scratch):
    """A chunk's numbers in the scratch's dtype: where they are, if they have it, else read into the scratch."""
    raise NotImplementedError("inside kernels only")


@overload(_chunk)
def _(address, kind, start, size, scratch):
    def in_place(address, kind, start, size, scratch):
        if kind == FLOAT32 and address != 0:
            return _as_float32(address, start, size)
        _read(address, kind, start, size, scratch)
        return scratch[:size]

    def copied(address, kind, start, size, scratch):
        _read(address, kind, start, size, scratch)
        return scratch[:size]

    return in_place if scratch.dtype == float32 else copied


@numba.njit
def _write(address, kind, start, size, x):
    """Round the beginning of ``x`` to the tensor's dtype, into its chunk."""
    if kind == FLOAT32:
        single = _as_float32(address, start, size)
        for i in range(size):
            single[i] = x[i]
    elif kind == BFLOAT16:
        b = numba.carray(_uint16(address + 2 * start), (size,))
        for i in range(size):
            b[i] = _to_bfloat16(float32(x[i]))
    elif kind == FLOAT16:
        h = numba.carray(_uint16(address + 2 * start), (size,))
        for i in range(size):
            h[i] = _to_half(float32(x[i]))
    else:
        w = numba.carray(_float64(address + 8 * start), (size,))
        for i in range(size):
            w[i] = x[i]


# ----------------------------------------------------------------------------------------------------------------------
# Inner products, in float64: the products of float32 numbers are exact there.


@numba.njit(fastmath=SUMS)
def _one(x, y):
    xy = 0.0
    for i in range(len(x)):
        xy += float64(x[i]) * float64(y[i])
    return xy


@numba.njit(fastmath=SUMS)
def _three(x, y):
    xx = xy = yy = 0.0
    for i in range(len(x)):
        a, b = float64(x[i]), float64(y[i])
        xx += a * a
        xy += a * b
        yy += b * b
    return xx, xy, yy


@numba.njit(fastmath=SUMS)
def _six(x, y, z):
    xx = xy = xz = yy = yz = zz = 0.0
    for i in range(len(x)):
        a, b, c = float64(x[i]), float64(y[i]), float64(z[i])
        xx += a * a
        xy += a * b
        xz += a * c
        yy += b * b
        yz += b * c
        zz += c * c
    return xx, xy, xz, yy, yz, zz


@compiled(*_each("real[:, ::1], float64[:, :, ::1]"))
def products(first, end, chunks, at, kinds, scratch, out):
    """Out[n] = all inner products of the vectors' chunks n, for first ≤ n < end; those of a missing one are 0."""
    vectors = at.shape[1]
    for n in range(first, end):
        t, start, size = chunks[n]
        table = out[n]
        x = _chunk(at[t, 0], kinds[t, 0], start, size, scratch[0])
        if vectors == 1:
            table[0, 0] = _one(x, x)
        elif vectors == 2:
            y = _chunk(at[t, 1], kinds[t, 1], start, size, scratch[1])
            table[0, 0], table[0, 1], table[1, 1] = _three(x, y)
        elif vectors == 3:
            y = _chunk(at[t, 1], kinds[t, 1], start, size, scratch[1])
            z = _chunk(at[t, 2], kinds[t, 2], start, size, scratch[2])
            table[0, 0], table[0, 1], table[0, 2], table[1, 1], table[1, 2], table[2, 2] = _six(x, y, z)
        else:
            for i in range(vectors):
                x = _chunk(at[t, i], kinds[t, i], start, size, scratch[i])
                for j in range(i, vectors):
                    table[i, j] = _one(x, _chunk(at[t, j], kinds[t, j], start, size, scratch[j]))
        for i in range(vectors):
            for j in range(i, vectors):
                if at[t, i] == 0 or at[t, j] == 0:
                    # Also where the other one holds NaN or Inf.
                    table[i, j] = 0
                table[j, i] = table[i, j]


# ----------------------------------------------------------------------------------------------------------------------
# Linear combinations, which add up in the scratch and are rounded once.


@numba.njit
def _begin(total, x, weight):
    for i in range(len(total)):
        total[i] = weight * x[i]


@numba.njit
def _add(total, x, weight):
    for i in range(len(total)):
        total[i] += weight * x[i]


@compiled(*_each("real[:, ::1], real[:, ::1]"))
def combine(first, end, chunks, at, kinds, weights, scratch):
    """Tensor 0 = tensor 1, a mask or missing, times the sum of weights[t, r] · tensor 2 + r; of two rows of scratch."""
    for n in range(first, end):
        t, start, size = chunks[n]
        total = scratch[0][:size]
        begun = False
        for r in range(weights.shape[1]):
            if at[t, 2 + r] != 0:
                x = _chunk(at[t, 2 + r], kinds[t, 2 + r], start, size, scratch[1])
                if begun:
                    _add(total, x, weights[t, r])
                else:
                    _begin(total, x, weights[t, r])
                    begun = True
        if not begun:
            total[:] = 0
        if at[t, 1] != 0:
            mask = _as_bytes(at[t, 1], start, size)
            for i in range(size):
                total[i] *= mask[i]
        _write(at[t, 0], kinds[t, 0], start, size, total)


# ----------------------------------------------------------------------------------------------------------------------
# Selection. Tensor 0 is the mask, then come the score itself, or what it is computed from: g, v and g₀.


@numba.njit
def _scores(at, kinds, t, start, size, scale, scratch):
    """A chunk's scores: of one vector as they are, of three (g − scale[t] v) g₀."""
    if at.shape[1] == 2:
        return _chunk(at[t, 1], kinds[t, 1], start, size, scratch[0])
    _read(at[t, 1], kinds[t, 1], start, size, scratch[0])
    s = scratch[0][:size]
    if len(scale):
        v = _chunk(at[t, 2], kinds[t, 2], start, size, scratch[1])
        for i in range(size):
            s[i] -= scale[t] * v[i]
    g0 = _chunk(at[t, 3], kinds[t, 3], start, size, scratch[1])
    for i in range(size):
        s[i] *= g0[i]
    return s


@numba.njit
def _longer(x, least):
    out = np.empty(2 * least, dtype=x.dtype)
    out[: len(x)] = x
    return out


@compiled(
    *(
        x.replace("void", "Tuple((int64[::1], float64[::1]))")
        for x in _each("float64[::1], real, real, real[:, ::1], int64[:, ::1]")
    )
)
def between(first, end, chunks, at, kinds, scale, low, high, scratch, out):
    """Mask what is at least ``high``; out[n] = how many that are, how many lie strictly between, and how many NaN.

    Returns:
        the scores strictly between, in order: the addresses of their masks, and the scores.
    """
    places, found = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
    k = 0
    flags = np.empty((scratch.shape[1] + 7) // 8 * 8, dtype=np.uint8)
    octets = flags.view(np.uint64)
    for n in range(first, end):
        t, start, size = chunks[n]
        s = _scores(at, kinds, t, start, size, scale, scratch)
        mask = _as_bytes(at[t, 0], start, size)
        reach, near, nan = uint32(0), uint32(0), uint32(0)
        for i in range(size):
            x = s[i]
            mask[i] = x >= high
            flags[i] = (x > low) & (x < high)
            # A sum of numbers of 32 bits is one of 64 unless it is said.
            reach = uint32(reach + uint32(x >= high))
            near = uint32(near + uint32((x > low) & (x < high)))
            nan = uint32(nan + uint32(x != x))
        out[n, 0], out[n, 1], out[n, 2] = reach, near, nan
        if k + near > len(places):
            places, found = _longer(places, k + near), _longer(found, k + near)
        flags[size:] = 0
        for octet in range((size + 7) // 8):
            if octets[octet]:
                for i in range(8 * octet, 8 * octet + 8):
                    if flags[i]:
                        places[k] = at[t, 0] + start + i
                        found[k] = s[i]
                        k += 1
    return places[:k], found[:k]


@compiled(*_each("float64[::1], real, real[:, ::1], int64[::1], int64[:, ::1]"))
def ties(first, end, chunks, at, kinds, scale, threshold, scratch, taken, out):
    """Mask what is above the threshold, and the first taken[n] that equal it; out[n] = how many are and equal it."""
    for n in range(first, end):
        t, start, size = chunks[n]
        s = _scores(at, kinds, t, start, size, scale, scratch)
        mask = _as_bytes(at[t, 0], start, size)
        above, equal = 0, 0
        for i in range(size):
            mask[i] = s[i] > threshold
            above += s[i] > threshold
            if s[i] == threshold:
                mask[i] = equal < taken[n]
                equal += 1
        out[n, 0], out[n, 1] = above, equal


@compiled("void(int64[::1])")
def mark(places):
    """Set the bytes at these addresses."""
    for i in range(len(places)):
        _as_bytes(places[i], 0, 1)[0] = 1
