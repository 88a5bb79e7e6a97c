"""The trial of a platform's kernels: small calls whose results are known, before any other call.

Most get one pixel, whose sample in the middle of the kernel is the pixel. DCNv3 as the released
models have it, nine points and 16 channels a group, has forms of its own, which are held to the
plain one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xla_ops import _targets
from xla_ops._targets import VERSION
from xla_ops.geometry import Record

# Of what two forms of the nine points give, relative to the largest: bfloat16 rounds to 2^-9.
_TOLERANCE = 2e-2


class _Call(NamedTuple):
    target: str
    operands: tuple[np.ndarray, ...]
    attributes: dict[str, Any]
    like: tuple[np.ndarray, ...]  # arrays like the results
    expected: list[Any]  # what these begin with


def failures(targets: Collection[str], device: Any, platform: str) -> dict[str, str]:
    """Calls each of `targets` on a device; returns those that gave something wrong, and what.

    Raises whatever the runtime does where the program fails.
    """
    cuda = platform == "cuda"
    single = [call for call in _single_calls(cuda) if call.target in targets]
    pairs = [pair for dtype in (np.float32, jnp.bfloat16) for pair in _nine_points(dtype, cuda)]
    pairs = [pair for pair in pairs if {call.target for call in pair} <= set(targets)]
    calls = [*single, *(call for pair in pairs for call in pair)]

    # One program, since compiling is most of the time.
    def call_all(operands: list[tuple[np.ndarray, ...]]) -> list[Any]:
        found = []
        for call, arrays in zip(calls, operands, strict=True):
            like = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in call.like]
            found.append(jax.ffi.ffi_call(call.target, like)(*arrays, **call.attributes))
        return found

    with jax.default_device(device):
        results = iter(jax.jit(call_all)([call.operands for call in calls]))
    wrong = {}
    for call in single:
        for array, expected in zip(next(results), call.expected, strict=False):
            wanted = np.asarray(expected, np.float64).ravel()
            got = np.asarray(array).astype(np.float64).ravel()[: wanted.size]
            (differ,) = np.nonzero(got != wanted)
            if differ.size:
                i = differ[0]
                wrong[call.target] = f"its trial gave {got[i]:g}, expected {wanted[i]:g}"
    for plain, fused in pairs:
        for wanted, array in zip(_as_fused(plain, next(results)), next(results), strict=False):
            difference = np.abs(np.asarray(array).astype(np.float64) - wanted).max()
            if not difference <= _TOLERANCE * np.abs(wanted).max():  # NaN is not either
                dtype = array.dtype
                why = f"its forms of nine points differ by {difference:g} in {dtype}"
                wrong |= {plain.target: why, fused.target: why}
    return wrong


def _single_calls(cuda: bool) -> Iterator[_Call]:
    one, pair = np.ones((1, 1, 1, 1), np.float32), np.zeros((1, 1, 1, 2), np.float32)
    record = np.zeros((1, 1, 1, 8), np.float32)
    scratch = (np.zeros((1, 1, 1, 1), np.uint32),) if cuda else ()  # a result more
    plain = _dcnv3(kernel=1, pad=0, group=1)
    fused = plain | {"center_feature_scale": False}
    operands = (one * 3, pair, one * 2)
    yield _Call(_targets.DCNV3_FORWARD, operands, plain, (one,), [6.0])
    results = (one, pair, one, *scratch)
    yield _Call(_targets.DCNV3_BACKWARD, (*operands, one), plain, results, [2.0, -6.0, 3.0])
    yield _Call(_targets.DCNV3_FUSED_FORWARD, (one * 3, record), fused, (one,), [3.0])
    results = (one, record, *scratch)
    yield _Call(_targets.DCNV3_FUSED_BACKWARD, (one * 3, record, one), fused, results, [1.0, -3.0])

    version: dict[str, Any] = {"version": np.int64(VERSION)}
    layer = (one * 3, one[0], one[0, 0, 0], one[0, 0, 0], one[0, 0, 0] * 13)  # to gelu(0 + 13)
    dwconv = version | {"epsilon": np.float64(1e-6)}
    yield _Call(_targets.DWCONV_FORWARD, layer, dwconv, (one,), [13.0])
    results = (one, np.zeros((1, 1, 4, 1), np.float32), *((one,) if cuda else ()))
    yield _Call(_targets.DWCONV_BACKWARD, (*layer, one), dwconv, results, [0.0, 1.0])

    operands = (one * 6, one[0, 0, 0] * 7)
    yield _Call(_targets.GELU_FORWARD, operands, version, (one,), [13.0])
    yield _Call(_targets.GELU_BACKWARD, (*operands, one * 5), version, (one,), [5.0])

    norm = version | {"epsilon": np.float64(7)}
    scale, bias = pair[0, 0, 0] + 8, pair[0, 0, 0] + 50
    x, other, residual = (np.array([[[v]]], np.float32) for v in ([0, 6], [-1, 5], [3, 5]))
    yield _Call(_targets.NORM_FORWARD, (x, scale, bias), norm, (pair,), [[44.0, 56.0]])
    operands, results = (pair + 1, other, scale, bias), (pair, pair)
    yield _Call(_targets.ADD_NORM_FORWARD, operands, norm, results, [[0.0, 6.0], [44.0, 56.0]])
    operands = (x, residual, scale, bias)
    yield _Call(_targets.NORM_ADD_FORWARD, operands, norm, (pair,), [[47.0, 61.0]])
    dy, dtotal = (np.array([[[v]]], np.float32) for v in ([1, 3], [5, 1]))
    results, sums = (pair, np.zeros((1, 1, 2, 2), np.float32)), [[-0.75, 2.25], [1.0, 3.0]]
    operands, found = (x, scale, dy), [[-0.875, 0.875], sums]
    yield _Call(_targets.NORM_BACKWARD, operands, norm, results, found)
    operands, found = (x, scale, dtotal, dy), [[4.125, 1.875], sums]
    yield _Call(_targets.ADD_NORM_BACKWARD, operands, norm, results, found)

    operands, product = _product()
    yield _Call(_targets.LINEAR_GELU_FORWARD, operands, version, (product,), [product])
    if not cuda:  # which takes half precision alone
        operands = tuple(a.astype(np.float32) for a in operands)
        product = product.astype(np.float32)
    yield _Call(_targets.LINEAR_FORWARD, operands, version, (product,), [product])
    x, dy = operands[0], product % 3
    gradient = np.tensordot(x, dy, ((0, 1, 2), (0, 1, 2)))
    yield _Call(_targets.LINEAR_BACKWARD, (x, dy), version, (gradient,), [gradient])
    operands = np.ones((1, 3, 2, 1), np.float32), np.ones((3, 3, 1, 1), np.float32), one[0, 0, 0]
    results = (np.zeros((1, 2, 1, 1), np.float32),)
    yield _Call(_targets.CONVOLUTION_FORWARD, operands, version, results, [5.0, 5.0])
    # Rows of three pixels, two places: the middle column of the kernel sees two pixels more.
    seen = [[[0.0, 1.0, 1.0], [0.0, 2.0, 2.0], [0.0, 1.0, 1.0]]]
    operands = np.ones((1, 3, 2, 1), np.float32), results[0] + 1
    results = (np.zeros((3, 3, 1, 1), np.float32),)
    yield _Call(_targets.CONVOLUTION_BACKWARD, operands, version, results, seen)
    operands, products = _two_products(cuda)
    yield _Call(_targets.MLP_FORWARD, operands, version, (products,), [products])
    operands, whole, scratch = _layers()
    settings: dict[str, Any] = {"group": np.int64(1), "offset_scale": np.float64(1)}
    settings |= {"post_norm": False, "early": True, "epsilon": np.float64(0)} | version
    yield _Call(_targets.LAYERS_FORWARD, operands, settings, (whole, scratch), [whole])


def _dcnv3(*, kernel: int, pad: int, group: int) -> dict[str, Any]:
    numbers = (kernel, kernel, 1, 1, pad, pad, 1, 1, group, 0, VERSION)
    return {"geometry": np.array(numbers, np.int64), "offset_scale": np.float64(1)}


_RECORD = Record(group=2, points=9)
_PIXELS = 256, 2, 2  # so many images that the forms for large batches take them


def _nine_points(dtype: Any, cuda: bool) -> Iterator[tuple[_Call, _Call]]:
    """Calls of the plain form and the fused one that are to give the same, forward and backward.

    The weights are 1, 1/2, 1/4 or 1/8, which a softmax of zeros gives exactly; the places are on
    pixels, between two or four, and outside.
    """
    random = np.random.RandomState(0)
    group, points = _RECORD
    x = random.randint(0, 8, (*_PIXELS, group * 16)).astype(dtype)
    dy = random.randint(-2, 3, x.shape).astype(dtype)
    offset = random.randint(-2, 3, (*_PIXELS, group * points * 2)) / 2
    order = random.rand(*_PIXELS, group, points).argsort(-1)
    taken = order < 2 ** random.randint(0, 4, (*_PIXELS, group, 1))
    mask = (taken / taken.sum(-1, keepdims=True)).reshape(*_PIXELS, -1)
    logits = np.where(taken, 0, -200).reshape(mask.shape)
    record = np.asarray(_RECORD.join(offset, logits)).astype(dtype)
    operands = x, offset.astype(dtype), mask.astype(dtype)

    plain = _dcnv3(kernel=3, pad=1, group=group)
    fused = plain | {"center_feature_scale": False}
    yield (
        _Call(_targets.DCNV3_FORWARD, operands, plain, (x,), []),
        _Call(_targets.DCNV3_FUSED_FORWARD, (x, record), fused, (x,), []),
    )
    scratch = (np.zeros((_PIXELS[0], 1, 1, 1), np.uint32),) if cuda else ()
    results = (*operands, *scratch)
    yield (
        _Call(_targets.DCNV3_BACKWARD, (*operands, dy), plain, results, []),
        _Call(_targets.DCNV3_FUSED_BACKWARD, (x, record, dy), fused, (x, record, *scratch), []),
    )


def _as_fused(call: _Call, results: list[Any]) -> list[np.ndarray]:
    """What a call of the plain form gave, as the fused form has it, in float64."""
    y_or_dx, *others = (np.asarray(array).astype(np.float64) for array in results)
    if call.target == _targets.DCNV3_FORWARD:
        return [y_or_dx]
    doffset, dmask = others[:2]
    mask = call.operands[2].astype(np.float64)
    # The derivative of a softmax.
    mask, dmask = (a.reshape(*_PIXELS, _RECORD.group, -1) for a in (mask, dmask))
    dlogits = mask * (dmask - (mask * dmask).sum(-1, keepdims=True))
    return [y_or_dx, np.asarray(_RECORD.join(doffset, dlogits.reshape(*_PIXELS, -1)))]


def _product() -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x, kernel and bias of several tiles that are not full, of the smallest kind, and the result.

    On a CPU with AMX they are just enough to be products of pieces in float32.

    Small integers, whose sums bfloat16 holds and GELU leaves as they are, and so many kinds of row
    and column that none can stand for another unseen.
    """
    draw = np.random.RandomState(0).randint
    x, kernel = draw(0, 2, (1, 5, 11, 136)), draw(0, 2, (136, 72))
    bias = 13 + np.arange(72)
    operands = tuple(a.astype(jnp.bfloat16) for a in (x, kernel, bias))
    return operands, (x @ kernel + bias).astype(jnp.bfloat16)


def _two_products(cuda: bool) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """x, kernels and biases of an MLP, and the result; of small integers too.

    The second kernel takes every other column of what the first product gives.
    """
    draw = np.random.RandomState(0).randint
    # As each platform's kernel takes it.
    inputs, hidden, dtype = (64, 128, jnp.bfloat16) if cuda else (136, 72, np.float32)
    x, kernel = draw(0, 2, (1, 5, 31, inputs)), draw(0, 2, (inputs, hidden))
    bias, other = 13 + np.arange(hidden) % 72, np.arange(hidden // 2) % 36
    operands = x, kernel, bias, np.eye(hidden, dtype=int)[:, ::2], other
    result = (x @ kernel + bias)[..., ::2] + other
    return tuple(a.astype(dtype) for a in operands), result.astype(dtype)


def _layers() -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """x and the parameters of two layers, the result, and an array like the scratch.

    Rows of x are of ones and minus ones, as many of both: so are their norms. DCNv3 gives what it
    is given, by its middle point alone. The MLP's first product gives small integers that GELU
    leaves as they are, and its second takes some of them. The second layer adds one.
    """
    # So many that a GPU's cluster of blocks makes the last product.
    channels, hidden, pixels = 16, 512, (1, 5, 7)
    random = np.random.RandomState(0)
    signs = np.where(random.rand(*pixels, channels).argsort(-1) % 2, 1, -1)
    one, zero, unit = np.ones(channels), np.zeros(channels), np.eye(channels)
    record = Record(group=1, points=9)
    logits = np.where(np.arange(record.width) == record.mask[4], 0, -200.0)
    logits[record.offset] = 0
    fc1, bias = random.randint(0, 2, (channels, hidden)), 29 + np.arange(hidden) % 8
    parameters = [
        *(one, zero, np.ones((3, 3, channels)), zero, one, zero),
        *(unit, zero, np.zeros((channels, record.width)), logits, 2 * unit, zero),
        *(one, zero, fc1, bias, np.eye(hidden)[:, ::32], zero),
    ]
    nothing = list(parameters)
    nothing[10], nothing[16], nothing[17] = 0 * unit, 0 * parameters[16], one  # the last products
    whole = 3 * signs + (signs @ fc1 + bias)[..., ::32] + 1
    scratch = np.zeros((*pixels, 6 * channels + record.width + hidden))
    operands = tuple(a.astype(jnp.bfloat16) for a in (signs, *parameters, *nothing))
    return operands, whole.astype(jnp.bfloat16), scratch.astype(jnp.bfloat16)
