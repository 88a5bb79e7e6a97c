"""What the layers share: how they are built, normalised and dropped out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

import xla_ops
from internimage_jax.config import InternImageConfig
from xla_ops.explicit_axes import undivided
from xla_ops.gelu_jnp import gelu
from xla_ops.operands import at_least_float32

Module = TypeVar("Module")


def _shape_only(key: Any, shape: Sequence[int], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


class _NoKeys:
    """Stands in for `nnx.Rngs` where no values are drawn."""

    def params(self) -> None:
        return None


class Context(NamedTuple):
    """What every layer is built with besides its sizes.

    Layers are built without values: a model is filled once, by its checkpoint or by
    `internimage_jax.initial`. Tracing 600 initializers takes longer than reading a checkpoint.
    """

    config: InternImageConfig
    dtype: DTypeLike  # of the computation
    param_dtype: DTypeLike
    implementation: xla_ops.Implementation | None  # of DCNv3

    @property
    def implementation_of_layers(self) -> Literal["jnp"] | None:
        """That of the other operators: "jnp" if DCNv3's is "gather", else None, the best."""
        return "jnp" if self.implementation == "gather" else None

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "bias_init": _shape_only,
            "rngs": _NoKeys(),
        }

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(
            inputs, outputs, use_bias=bias, kernel_init=_shape_only, **self._arguments
        )

    def conv(
        self, inputs: int, outputs: int, size: int, *, bias: bool = True, **settings: Any
    ) -> nnx.Conv:
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            # On both sides, which SAME is not at stride 2.
            padding=((size // 2, size // 2), (size // 2, size // 2)),
            use_bias=bias,
            kernel_init=_shape_only,
            **settings,
            **self._arguments,
        )

    @overload
    def norm(self, channels: int) -> nnx.LayerNorm: ...
    @overload
    def norm(self, channels: int, kind: str) -> nnx.LayerNorm | nnx.BatchNorm: ...
    def norm(self, channels: int, kind: str = "LN") -> nnx.LayerNorm | nnx.BatchNorm:
        # The fast variance, E[x^2] - E[x]^2, cancels where a channel's mean is large.
        settings = {"use_fast_variance": False, "scale_init": _shape_only, **self._arguments}
        if kind == "BN":
            return nnx.BatchNorm(channels, epsilon=1e-5, momentum=0.9, **settings)
        return nnx.LayerNorm(channels, epsilon=1e-6, **settings)

    def vector(self, channels: int) -> nnx.Param:
        return nnx.Param(_shape_only(None, (channels,), self.param_dtype))


def whole(module: Module) -> Module:
    """Returns the module, or a copy with its parameters gathered if explicit axes divide them.

    On a mesh of such axes JAX takes a parameter's sharding as the user's demand, and refuses most
    of what is done here with a divided one. The two modules share their statistics.
    """
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    gathered = jax.tree.map(undivided, params)
    if all(map(operator.is_, jax.tree.leaves(gathered), jax.tree.leaves(params))):
        return module
    return nnx.merge(graphdef, gathered, rest)


def linear_of(kernel: jax.Array, bias: jax.Array, dtype: DTypeLike) -> nnx.Linear:
    """A linear layer with the parameters given."""
    layer = nnx.Linear(
        *kernel.shape,
        dtype=dtype,
        param_dtype=kernel.dtype,
        kernel_init=_shape_only,
        bias_init=_shape_only,
        rngs=_NoKeys(),  # type: ignore[arg-type]
    )
    layer.kernel.set_value(kernel)
    assert layer.bias is not None
    layer.bias.set_value(bias)
    return layer


def as_built(layer: nnx.Module, *, depthwise: bool = False) -> bool:
    """Whether an operator computes what the layer does, as it does for all that `Context` builds.

    A layer that a user has put in the place of one, such as Flax's LoRALinear, is called instead.
    """
    if type(layer) is nnx.Linear:
        return layer.dot_general is lax.dot_general and layer.promote_dtype is promote_dtype
    if type(layer) is nnx.LayerNorm:
        whole = layer.scale is not None and layer.bias is not None and layer.axis_name is None
        usual = layer.reduction_axes == layer.feature_axes == -1
        return whole and usual and layer.promote_dtype is promote_dtype
    if type(layer) is nnx.Conv:
        size = layer.kernel_size[0] if depthwise else 3
        strides, groups = (1, layer.out_features) if depthwise else (2, 1)
        padding = ((size // 2, size // 2),) * 2
        return (
            (layer.kernel_size, layer.strides, layer.padding) == ((size, size), strides, padding)
            and (layer.input_dilation, layer.kernel_dilation, layer.mask) == (1, 1, None)
            and (layer.conv_general_dilated, layer.promote_dtype)
            == (lax.conv_general_dilated, promote_dtype)
            and layer.feature_group_count == groups
            and (not depthwise or (layer.in_features == groups and size % 2 == 1))
        )
    return False


def put_in_panels(layer: nnx.Module, implementation: Literal["jnp"] | None = None) -> None:
    """Brings the layer's kernel into the layout that products on a CPU read fastest, for good.

    Only where such products are used: elsewhere the kernel would be changed back on each use. A
    kernel that is on several devices stays as it is.
    """
    if not isinstance(layer, nnx.Linear | nnx.Conv) or not as_built(layer):
        return
    value = layer.kernel[...]
    platform = jax.default_backend()
    if isinstance(value, jax.Array) and not isinstance(value, Tracer):
        platforms = [device.platform for device in value.devices()]
        platform = platforms[0] if len(platforms) == 1 else None
    served = implementation is None and layer.dtype != jnp.float64
    if value.ndim == 3 or not served or not xla_ops.reads_panels(platform):
        return
    # A new variable: the old one is that of the model that is fused, too.
    layer.kernel = nnx.Param(on_device(xla_ops.in_panels(on_host(layer.kernel))))


def apply(
    layer: nnx.Linear,
    x: jax.Array,
    implementation: Literal["jnp"] | None = None,
    *,
    gelu: bool = False,
) -> jax.Array:
    """Applies a linear layer to `x` (N, H, W, C) by `xla_ops.linear`."""
    if not as_built(layer):
        x = called(layer, x)
        return activate("GELU", x) if gelu else x
    x = cast(x, layer)
    parameters = kernel_and_bias(layer, x)
    return xla_ops.linear(x, *parameters, gelu=gelu, implementation=implementation)


def apply_mlp(
    layer1: nnx.Linear,
    layer2: nnx.Linear,
    x: jax.Array,
    implementation: Literal["jnp"] | None = None,
) -> jax.Array:
    """Applies two linear layers with GELU between them to `x` (N, H, W, C) by `xla_ops.mlp`."""
    if not (as_built(layer1) and as_built(layer2) and layer1.dtype == layer2.dtype):
        return apply(layer2, apply(layer1, x, implementation, gelu=True), implementation)
    x = cast(x, layer1)
    parameters = (*kernel_and_bias(layer1, x), *kernel_and_bias(layer2, x))
    return xla_ops.mlp(x, *parameters, implementation=implementation)


def convolve(
    conv: nnx.Conv, x: jax.Array, implementation: Literal["jnp"] | None = None
) -> jax.Array:
    """Applies a convolution of 3 x 3 pixels and stride 2 to `x` by `xla_ops.convolution`."""
    if not as_built(conv):
        return called(conv, x)
    x = cast(x, conv)
    return xla_ops.convolution(x, *kernel_and_bias(conv, x), implementation=implementation)


def normalize(
    norm: nnx.LayerNorm | nnx.BatchNorm,
    x: jax.Array,
    train: bool = False,
    implementation: Literal["jnp"] | None = None,
) -> jax.Array:
    """Applies `norm` to `x` (N, H, W, C), a LayerNorm by `xla_ops.layer_norm`.

    A BatchNorm uses and updates the batch's statistics in training only.
    """
    if isinstance(norm, nnx.BatchNorm):
        empty = x.shape[0] == 0  # which has no statistics
        # Its own are float32 and those of a batch need not be.
        with jax.numpy_dtype_promotion("standard"):
            return norm(x, use_running_average=not train or empty)
    if not as_built(norm):
        return called(norm, x)
    x = cast(x, norm)
    scale, bias = operand(x, norm.scale), operand(x, norm.bias)
    return xla_ops.layer_norm(x, scale, bias, epsilon=norm.epsilon, implementation=implementation)


def add_normalize(
    norm: nnx.LayerNorm | None,
    x: jax.Array,
    residual: jax.Array,
    train: bool = False,
    implementation: Literal["jnp"] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns x + residual (N, H, W, C), and `norm` of it by `xla_ops.add_norm`.

    With a norm the sum is in its dtype, as the model's maps are; without one it is as it is.
    """
    if norm is None:
        return x + residual, None
    if not as_built(norm):
        x += residual.astype(x.dtype)
        return x, normalize(norm, x, train)
    x, residual = cast(x, norm), cast(residual, norm)
    scale, bias = operand(x, norm.scale), operand(x, norm.bias)
    return xla_ops.add_norm(
        *(x, residual, scale, bias), epsilon=norm.epsilon, implementation=implementation
    )


def normalize_add(
    norm: nnx.LayerNorm,
    x: jax.Array,
    residual: jax.Array,
    factors: nnx.Param | None,
    train: bool = False,
    implementation: Literal["jnp"] | None = None,
) -> jax.Array:
    """Returns residual + `norm` of x (N, H, W, C), by `xla_ops.norm_add`, in the norm's dtype.

    What is added is times `factors` (C,) if there are any.
    """
    if not as_built(norm):
        y = normalize(norm, x, train)
        if factors is not None:
            y *= along_channels(factors, y)
        return residual.astype(y.dtype) + y
    x, residual = cast(x, norm), cast(residual, norm)
    if factors is None:
        scale, bias = operand(x, norm.scale), operand(x, norm.bias)
    else:
        scale, bias = scaled(norm, factors)
    return xla_ops.norm_add(
        *(x, residual, scale, bias), epsilon=norm.epsilon, implementation=implementation
    )


def scaled(norm: nnx.LayerNorm, factors: nnx.Param) -> list[jax.Array]:
    """Scale and bias, at least float32, of a norm whose result is `norm`'s times `factors` (C,)."""
    of_norm = factors[...].dtype if norm.dtype is None else jnp.dtype(norm.dtype)
    dtype = at_least_float32(of_norm)
    factor, *vectors = (on_host(a).astype(dtype) for a in (factors, norm.scale, norm.bias))
    return [on_device(vector * factor) for vector in vectors]


def activate(act_layer: str, x: jax.Array) -> jax.Array:
    """Applies the function that a config's `act_layer` names."""
    return {"GELU": gelu, "SiLU": jax.nn.silu, "ReLU": jax.nn.relu}[act_layer](x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes values of `x` at `rate` and scales up the others; without a key, returns `x`."""
    if key is None or rate == 0:
        return x
    return x * _kept(key, rate, x.shape).astype(x.dtype)


def path_factors(
    rates: Sequence[float], batch: int, key: jax.Array | None
) -> list[jax.Array | None]:
    """What stochastic depth multiplies the two branches of each layer by: (2, batch), float32.

    A factor is 0 with the layer's rate as its probability, and otherwise above 1 so that the mean
    stays; None where the rate is 0, or without a key. A level's layers share one draw: with one for
    each branch a training program takes an eighth longer to compile.
    """
    if key is None or not any(rates):
        return [None] * len(rates)
    rate = np.array(rates, np.float32)[:, None, None]
    factors = _kept(key, rate, (len(rates), 2, batch))
    return [factors[i] if rate else None for i, rate in enumerate(rates)]


def drop_path(x: jax.Array, factors: jax.Array | None) -> jax.Array:
    """Multiplies each image of `x` (N, H, W, C) by its factor (N,), if there are any."""
    return x if factors is None else x * factors.astype(x.dtype)[:, None, None, None]


def _kept(key: jax.Array, rate: np.ndarray | float, shape: tuple[int, ...]) -> jax.Array:
    """Zeros at `rate`, and else what keeps the mean 1."""
    return jax.random.bernoulli(key, 1 - rate, shape).astype(jnp.float32) / (1 - rate)


def widened(x: jax.Array) -> jax.Array:
    """`x`, in float32 if it is in half precision."""
    return x.astype(at_least_float32(x.dtype))


def called(layer: Any, x: jax.Array) -> jax.Array:
    """What a layer of another kind makes of `x`, in the dtype of `x`."""
    with jax.numpy_dtype_promotion("standard"):  # its parameters need not be of that dtype
        return layer(x).astype(x.dtype)


def cast(x: jax.Array, layer: nnx.Linear | nnx.Conv | nnx.LayerNorm) -> jax.Array:
    """`x` in the dtype that the layer computes in; as it is where the layer says none."""
    return x if layer.dtype is None else x.astype(layer.dtype)


def kernel_and_bias(layer: nnx.Linear | nnx.Conv, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The parameters of a product as the operators take them beside `x`."""
    return layer.kernel[...].astype(x.dtype), bias_of(layer, x)


def bias_of(layer: nnx.Linear | nnx.Conv, x: jax.Array) -> jax.Array:
    """The bias as the operators take it beside `x`; zeros where there is none."""
    return jnp.zeros(layer.out_features, x.dtype) if layer.bias is None else operand(x, layer.bias)


def along_channels(vector: nnx.Param | None, x: jax.Array) -> jax.Array:
    """The parameter (C,) as (1, ..., 1, C), to be combined with `x` (..., C), and in its dtype."""
    assert vector is not None  # a bias that flax may leave out, and this model never does
    return vector[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def operand(x: jax.Array, parameter: nnx.Param | None) -> jax.Array:
    """The parameter as the operators take it beside `x`: in x's dtype, or in that of sums over `x`.

    One that is in neither is brought to the latter, float32 for half precision. Others stay as they
    are: the kernels widen what they read, and on a GPU each conversion would be a launch.
    """
    assert parameter is not None  # as above
    value, sums = parameter[...], at_least_float32(x.dtype)
    return value if value.dtype in (x.dtype, sums) else value.astype(sums)


def on_host(parameter: nnx.Param | None) -> jax.Array | np.ndarray:
    """The parameter's value; a NumPy array of the same memory where that is the default CPU's.

    What NumPy does with it is no program to compile. Values elsewhere stay where they are, and all
    do where the user has set another default device.
    """
    assert parameter is not None  # as above
    value = parameter[...]
    if not isinstance(value, jax.Array) or isinstance(value, Tracer):
        return value
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    where = {jax.local_devices()[0]} if default is None else set()
    at_hand = value.devices() == where and all(device.platform == "cpu" for device in where)
    return np.asarray(value) if at_hand else value


def on_device(value: jax.Array | np.ndarray) -> jax.Array:
    """`value`, not to be written from here on, as a JAX array.

    `jnp.asarray` would compile a program for each shape of NumPy's. `device_put` may leave the
    values where they are, so what is a view of another array's is copied first.
    """
    if isinstance(value, jax.Array):
        return value
    return jax.device_put(value if value.base is None else value.copy())


def split(key: jax.Array | None, count: int) -> list[Any]:
    """`count` keys from one; none from none."""
    return [None] * count if key is None else list(jax.random.split(key, count))
