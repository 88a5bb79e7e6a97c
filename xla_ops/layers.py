"""Whole layers of InternImage as one operator, for small maps on a GPU."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

from xla_ops import _ffi, _targets
from xla_ops.custom_call import Forward, Shapes, Target, call
from xla_ops.dcnv3 import dcnv3_fused
from xla_ops.dwconv import dwconv_norm_gelu
from xla_ops.geometry import Record
from xla_ops.layer_norm import layer_norm, norm_add
from xla_ops.linear import linear
from xla_ops.mlp import mlp
from xla_ops.operands import (
    ATTRIBUTES,
    are_known,
    arrays,
    at_least_float32,
    check_dtype,
    check_epsilon,
    check_integer,
    check_operand,
)

# The largest map, in numbers over all images, for which it is used by default: none, since it has
# not been timed on a GPU yet. T at batch 1 has 200,704 on its first level, B 351,232.
MOST_NUMBERS = 0
# Whether its kernels start before those before them have ended; to be compared with False.
EARLY = True


class LayerParameters(NamedTuple):
    """The parameters of a layer of C channels, K between the products of its MLP.

    Kernels of products are (inputs, outputs), in x's dtype. Vectors are in x's dtype or float32;
    the two of a norm share one dtype, and so do the depthwise kernel and its three vectors.
    """

    norm1_scale: jax.Array  # (C,)
    norm1_bias: jax.Array  # (C,)
    depthwise_kernel: jax.Array  # (size, size, C), size odd
    depthwise_bias: jax.Array  # (C,)
    depthwise_norm_scale: jax.Array  # (C,)
    depthwise_norm_bias: jax.Array  # (C,)
    input_kernel: jax.Array  # (C, C)
    input_bias: jax.Array  # (C,)
    record_kernel: jax.Array  # (C, width of `Record(group, 9)`)
    record_bias: jax.Array
    output_kernel: jax.Array  # (C, C)
    output_bias: jax.Array  # (C,)
    norm2_scale: jax.Array  # (C,)
    norm2_bias: jax.Array  # (C,)
    fc1_kernel: jax.Array  # (C, K)
    fc1_bias: jax.Array  # (K,)
    fc2_kernel: jax.Array  # (K, C)
    fc2_bias: jax.Array  # (C,)


def layers(
    x: jax.Array,
    parameters: Sequence[LayerParameters],
    *,
    group: int,
    offset_scale: float = 1.0,
    post_norm: bool = False,
    epsilon: float = 1e-6,
    implementation: Literal["kernel", "jnp"] | None = None,
) -> jax.Array:
    """Returns what layers, one after the other, make of a map.

    Each adds to it what DCNv3 and an MLP make of it, with their norms. With the norms before these
    branches it is v + mlp(norm2(v)) for v = x + attend(norm1(x)), with `post_norm` it is
    v + norm2(mlp(v)) for v = x + norm1(attend(x)). `attend` is DCNv3 of nine points between two
    products, its offsets and masks a product of `dwconv_norm_gelu`.

    On CUDA in half precision, on data centres' GPUs from compute capability 9.0 on (H100, H200), it
    is one call of seven or eight kernels a layer, each on its way before the one before it has
    ended. Under differentiation, and everywhere else, it is the operators of this package one after
    the other.

    Args:
        x: (N, H, W, C), float32, bfloat16, float16 or float64.
        parameters: Of each layer, one at least, all of the same shapes.
        group: Groups of DCNv3.
        offset_scale: As for `xla_ops.dcnv3_fused`.
        post_norm: Whether the norms come after the branches.
        epsilon: Of all norms.
        implementation: "jnp" is the operators in their jnp form; "kernel" the one call; None takes
            it where it is known to serve and to pay, and elsewhere the operators at their best.

    Returns:
        (N, H, W, C) of x's dtype.

    Raises:
        ValueError: A shape or setting does not fit; the message names it.

    Reference: Wang et al., InternImage (CVPR 2023, arXiv 2211.05778), section 3.2.
    """
    (x,) = arrays(x=x)
    parameters = [LayerParameters._make(arrays(**layer._asdict())) for layer in parameters]
    group = check_integer("group", group, at_least=1)
    _check(x, parameters, group, epsilon)
    plain = "jnp" if implementation == "jnp" else None
    operator = Layers(
        *(len(parameters), group, float(offset_scale), bool(post_norm), float(epsilon), plain)
    )
    serving = _serving()
    taken = serving if _takes(x, group, parameters[0].fc1_bias.shape[0]) else ()
    if implementation is None and not layers_pay(x, group):
        taken = ()
    operands = x, *itertools.chain.from_iterable(parameters)
    refusal = _TAKEN if serving else ""
    return call(
        operator, implementation, *operands, platforms=taken, refusal=refusal, gradients=False
    )


_TAKEN = (
    "on CUDA, from compute capability 9.0 on with 180 KB of shared memory a block, it takes "
    "bfloat16 and float16, up to 1024 channels in 16s, 8, 16, 32 or 64 for each group, and up to "
    "4096 in the MLP, of more than 1024 in 64s"
)


def layers_pay(x: jax.Array | jax.ShapeDtypeStruct, group: int) -> bool:
    """Whether `layers` of a map like x is one call by default, where the kernel serves."""
    if not are_known(x.shape) or math.prod(x.shape) > MOST_NUMBERS:
        return False
    return _takes(x, group) and bool(_serving())


def _serving() -> tuple[str, ...]:
    return _ffi.serving(_targets.LAYERS_FORWARD)


def _takes(x: jax.Array | jax.ShapeDtypeStruct, group: int, hidden: int = 16) -> bool:
    """Whether the one call computes layers of a map like x, of so many channels in the MLP."""
    if x.dtype.itemsize != 2 or not are_known((*x.shape, hidden)):
        return False
    _, height, width, channels = x.shape
    fits = channels <= 1024 and channels % 16 == 0 and channels // group in (8, 16, 32, 64)
    mlp_fits = hidden <= 4096 and hidden % (16 if hidden <= 1024 else 64) == 0
    return fits and mlp_fits and height * width < 1 << 19


@dataclass(frozen=True)
class Layers(Forward):
    """`layers` as `xla_ops.custom_call` takes it."""

    count: int
    group: int
    offset_scale: float
    post_norm: bool
    epsilon: float
    implementation: Literal["jnp"] | None = None  # of the operators that it consists of

    @property
    def forward(self) -> Target:
        attributes = (
            ("group", np.int64(self.group)),
            ("offset_scale", np.float64(self.offset_scale)),
            ("epsilon", np.float64(self.epsilon)),
            ("post_norm", self.post_norm),
            ("early", bool(EARLY)),
            *ATTRIBUTES,
        )
        axes = (3, *_AXES * self.count)
        return Target(
            *(_targets.LAYERS_FORWARD, axes, (3, 3), _map_and_scratch, attributes),
            shared=tuple(range(1, len(axes))),
            unread=1,
        )

    def definition(self, *operands: jax.Array) -> jax.Array:
        x, *parameters = operands
        each = len(_AXES)
        for first in range(0, len(parameters), each):
            x = self._one(x, LayerParameters(*parameters[first : first + each]))
        return x

    @functools.partial(jax.jit, static_argnums=0)  # traced once for all
    def _one(self, x: jax.Array, p: LayerParameters) -> jax.Array:
        normalise = functools.partial(
            layer_norm, epsilon=self.epsilon, implementation=self.implementation
        )
        add = functools.partial(norm_add, epsilon=self.epsilon, implementation=self.implementation)
        if self.post_norm:
            x = add(self._attend(x, p), x, p.norm1_scale, p.norm1_bias)
            return add(self._mlp(x, p), x, p.norm2_scale, p.norm2_bias)
        x += self._attend(normalise(x, p.norm1_scale, p.norm1_bias), p)
        return x + self._mlp(normalise(x, p.norm2_scale, p.norm2_bias), p)

    def _attend(self, x: jax.Array, p: LayerParameters) -> jax.Array:
        product = functools.partial(linear, implementation=self.implementation)
        features = dwconv_norm_gelu(
            *(x, p.depthwise_kernel, p.depthwise_bias),
            *(p.depthwise_norm_scale, p.depthwise_norm_bias),
            epsilon=self.epsilon,
            implementation=self.implementation,
        )
        y = dcnv3_fused(
            product(x, p.input_kernel, p.input_bias),
            product(features, p.record_kernel, p.record_bias),
            group=self.group,
            offset_scale=self.offset_scale,
            implementation="gather" if self.implementation == "jnp" else None,
        )
        return product(y, p.output_kernel, p.output_bias)

    def _mlp(self, x: jax.Array, p: LayerParameters) -> jax.Array:
        parameters = p.fc1_kernel, p.fc1_bias, p.fc2_kernel, p.fc2_bias
        return mlp(x, *parameters, implementation=self.implementation)


def _shapes(channels: int, group: int, size: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes, in their order."""
    record = Record(group, 9).width
    others = {
        "depthwise_kernel": (size, size, channels),
        "input_kernel": (channels, channels),
        "record_kernel": (channels, record),
        "record_bias": (record,),
        "output_kernel": (channels, channels),
        "fc1_kernel": (channels, hidden),
        "fc1_bias": (hidden,),
        "fc2_kernel": (hidden, channels),
    }
    return {name: others.get(name, (channels,)) for name in LayerParameters._fields}


# Axes of the parameters.
_AXES = tuple(len(shape) for shape in _shapes(1, 1, 1, 1).values())


def _map_and_scratch(x: jax.Array, *parameters: jax.Array) -> Shapes:
    """The result's, and that of what lies between the kernels."""
    p = LayerParameters(*parameters[: len(_AXES)])
    width = 6 * x.shape[-1] + p.record_bias.shape[-1] + p.fc1_bias.shape[-1]
    return [(x.shape, x.dtype), ((*x.shape[:-1], width), x.dtype)]


# The first of the parameters that have to be of one dtype, by what their names begin with.
_OF_ONE_DTYPE = {"norm1": "norm1_scale", "depthwise": "depthwise_kernel", "norm2": "norm2_scale"}


def _check(x: jax.Array, parameters: Sequence[LayerParameters], group: int, epsilon: float) -> None:
    """Raises a `ValueError` about the operand or setting that does not fit."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected shape (N, H, W, C), a map not empty, got {x.shape}")
    check_dtype(x)
    check_epsilon(epsilon)
    channels = x.shape[-1]
    if channels % group:
        raise ValueError(f"group: expected an integer that divides {channels}, got {group}")
    if len(parameters) == 0:
        raise ValueError("parameters: expected those of one layer at least, got none")
    depthwise = parameters[0].depthwise_kernel
    size = next(iter(depthwise.shape), 0)
    if depthwise.shape != (size, size, channels) or size % 2 == 0:
        raise ValueError(
            f"depthwise_kernel: expected shape (K, K, {channels}) with K odd, got {depthwise.shape}"
        )
    hidden = next(iter(parameters[0].fc1_bias.shape), 0)
    shapes = _shapes(channels, group, size, hidden)
    for layer, (name, wanted) in itertools.product(parameters, shapes.items()):
        dtypes = (x.dtype, at_least_float32(x.dtype))
        first = _OF_ONE_DTYPE.get(name.partition("_")[0])
        if first is not None and getattr(layer, first).dtype in dtypes:
            dtypes = (getattr(layer, first).dtype,)
        elif name.endswith("kernel"):
            dtypes = (x.dtype,)
        check_operand(name, getattr(layer, name), wanted, *dtypes)
