"""Custom calls that JAX's transforms pass through; every operator with a kernel goes this way.

From the outside in, each layer gives the call one transform:

    custom_vjp            grad: the backward is by custom calls too, or the definition's
    platform_dependent    the platform that the program is compiled for picks kernel or jnp form
    custom_vmap           vmap: the mapped axis becomes one more axis of batch
    custom_partitioning   jit over a sharded batch: each device computes its part, nothing moves
    ffi_call              the kernel
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from xla_ops import _ffi
from xla_ops.explicit_axes import (
    Arrays,
    Function,
    automatic,
    explicit_mesh,
    over_batch,
    shardings_of,
)
from xla_ops.operands import Shapes, varying_alike


class Target(NamedTuple):
    """A custom call: its name, what it takes and gives, and its settings.

    The axes of operands and results begin with the batch: one axis, and one more for each `vmap`.
    A shared operand has no batch axis of its own; `vmap` over it adds an axis to all operands. Of
    a summed target the results are sums over the batch, and have the axes of `vmap` alone.
    """

    name: str
    operands: tuple[int, ...]  # axes of each besides those of the batch; the first is not shared
    results: tuple[int, ...]
    shapes: Callable[..., Shapes]  # of the results, from operands with any number of batch axes
    attributes: tuple[tuple[str, Any], ...]  # hashable; integers in a tuple stand for an array
    shared: tuple[int, ...] = ()  # positions of the shared operands
    unread: int = 0  # so many of the results, the last, are memory to work in
    summed: bool = False


class Forward(Protocol):
    """An operator's forward, and its definition.

    Equal ones share what was traced. They are frozen dataclasses: as named tuples, those of two
    classes would be equal.
    """

    plain: ClassVar[str] = "jnp"  # what `implementation` calls the definition

    @property
    def forward(self) -> Target:
        """From the operands to the results, which have the batch and the dtype of the first."""
        ...

    def definition(self, *operands: jax.Array) -> Any:
        """The operator in jnp: the result, or a tuple where the forward has several."""
        ...


class Operator(Forward, Protocol):
    """An operator with kernels for its gradients too."""

    def backward(self, platform: str) -> Target:
        """What the gradients need besides the forward.

        A platform that lacks it differentiates the definition.
        """
        ...

    def kept(self, operands: Arrays, results: Arrays) -> Arrays:
        """What the results can be computed from, to be differentiated by."""
        del results
        return operands

    def gradients(self, platform: str, kept: Arrays, dys: Arrays) -> Arrays:
        """Those of what was kept from those of the results, by the kernels of a platform."""
        ...

    def gradients_by_definition(self, kept: Arrays, dys: Arrays) -> Arrays:
        """The same in jnp."""
        _, pullback = jax.vjp(self.definition, *kept)
        return pullback(dys[0] if len(dys) == 1 else dys)

    def of_operands(self, gradients: Arrays) -> Arrays:
        """The operands' gradients from those of what was kept."""
        return gradients


def run(target: Target, *operands: jax.Array) -> Arrays:
    """The results of a custom call, for operators to compute gradients by."""
    return _custom_call(target)(*operands)


def call(
    operator: Forward,
    implementation: str | None,
    *operands: jax.Array,
    platforms: tuple[str, ...] | None = None,
    refusal: str = "",
    gradients: bool = True,
) -> Any:
    """Computes `operator` of checked operands by the implementation that is asked for.

    That is "kernel", the definition's name, or None: the kernel of the platform that the program is
    compiled for where there is one, and the definition elsewhere.

    `platforms` are those whose kernel serves and takes the operands, None all that serve; `refusal`
    says why others do not, "" that there are none. With `gradients` the operator is an `Operator`;
    without, under differentiation, it is the definition everywhere.

    Raises:
        ValueError: No such implementation, no kernel where one is asked for, or forward mode, which
            a kernel does not have.
    """
    plain = operator.plain
    if implementation not in ("kernel", plain, None):
        raise ValueError(
            f"implementation: expected 'kernel', {plain!r} or None, got {implementation!r}"
        )
    if platforms is None:
        platforms = _ffi.serving(operator.forward.name)
    if implementation == "kernel" and not platforms:
        raise ValueError(
            f"implementation: no 'kernel' to serve here ({refusal or _ffi.reasons()}); "
            f"use {plain!r} or None"
        )
    if implementation == plain or not platforms:
        return _by_definition(operator, *operands)
    form = _Form(operator, platforms, fallback=implementation is None)
    with forward_mode_named(plain):
        if gradients:
            return _differentiable(form, *varying_alike(*operands))
        return _differentiable_by_definition(form, *operands)


class NoForwardMode(ValueError):
    """A kernel has no forward mode."""


@contextlib.contextmanager
def forward_mode_named(plain: str) -> Iterator[None]:
    """Says of forward mode that a kernel has none, and that `plain` has it.

    Of two around one another the outer one has the word: a model's form has a name of its own.
    """
    try:
        yield
    except (TypeError, NoForwardMode) as error:
        # What JAX has for `jvp` of any `custom_vjp` does not help.
        if isinstance(error, TypeError) and "forward-mode" not in str(error):
            raise
        raise NoForwardMode(
            f"implementation: the kernel has no forward mode (jvp, jacfwd, hessian); use {plain!r}"
        ) from None


class _Form(NamedTuple):
    """What is static about a call: the operator, the platforms whose kernel serves, and whether
    the definition serves on others."""

    operator: Any  # `Forward`, or `Operator` where it is differentiated
    platforms: tuple[str, ...]
    fallback: bool

    def differentiated(self) -> _Form:
        """With the platforms whose kernels have gradients too, and the definition elsewhere."""
        platforms = tuple(
            platform
            for platform in self.platforms
            if platform in _ffi.serving(self.operator.backward(platform).name)
        )
        return self._replace(
            platforms=platforms, fallback=self.fallback or platforms != self.platforms
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(form: _Form, *operands: jax.Array) -> Any:
    return _forward(form, *operands)


def _differentiable_forward(form: _Form, *operands: jax.Array) -> tuple[Any, Arrays]:
    form = form.differentiated()
    results = _differentiable(form, *operands)  # to be differentiated once more
    return results, form.operator.kept(operands, _as_tuple(results))


def _differentiable_backward(form: _Form, kept: Arrays, dy: Any) -> Arrays:
    dys = _as_tuple(dy)
    gradients = _gradients(form.differentiated(), len(dys), *varying_alike(*kept, *dys))
    return form.operator.of_operands(gradients)


_differentiable.defvjp(_differentiable_forward, _differentiable_backward)


def _as_tuple(results: Any) -> Arrays:
    return results if isinstance(results, tuple) else (results,)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _gradients(form: _Form, count: int, *operands: jax.Array) -> Arrays:
    return _backward(form, count, *operands)


@_gradients.defjvp
def _(form: _Form, count: int, operands: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
    # Second derivatives are those of the definition.
    form = form._replace(platforms=(), fallback=True)
    return jax.jvp(functools.partial(_backward, form, count), operands, tangents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_by_definition(form: _Form, *operands: jax.Array) -> Any:
    return _forward(form, *varying_alike(*operands))


_differentiable_by_definition.defvjp(
    lambda form, *operands: jax.vjp(functools.partial(_by_definition, form.operator), *operands),
    lambda form, pullback, dy: pullback(dy),
)


# jit keeps what it traced: the branches are not traced anew for each layer of a model.
@functools.partial(jax.jit, static_argnums=0)
def _forward(form: _Form, *operands: jax.Array) -> Any:
    target = form.operator.forward
    kernel, count = _custom_call(target), len(target.results) - target.unread
    branch = lambda *a: kernel(*a)[:count] if count > 1 else kernel(*a)[0]  # noqa: E731
    branches = dict.fromkeys(form.platforms, branch)
    default = form.operator.definition if form.fallback else None
    return _dispatch(branches, default, operands, _result_shardings(form.operator, operands))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(form: _Form, count: int, *operands: jax.Array) -> Arrays:
    """The gradients of what was kept, which the first operands are; the `count` others are dys."""
    operator = form.operator

    def by_kernel(platform: str) -> Function:
        return lambda *a: operator.gradients(platform, a[:-count], a[-count:])

    def by_definition(*a: jax.Array) -> Arrays:
        return operator.gradients_by_definition(a[:-count], a[-count:])

    branches = {platform: by_kernel(platform) for platform in form.platforms}
    gradients = shardings_of(operands[:-count], explicit_mesh(operands))
    return _dispatch(branches, by_definition if form.fallback else None, operands, gradients)


def _dispatch(
    branches: dict[str, Function], default: Function | None, operands: Arrays, sharding: Any
) -> Any:
    """Runs the branch of the platform; `sharding` is the results' where it is part of types.

    Without a default, compiling for a platform that has no branch is an error.
    """

    def dispatched(*operands: jax.Array) -> Any:
        if not branches and default is not None:
            return default(*operands)
        return lax.platform_dependent(*operands, **branches, default=default)

    return automatic(dispatched, operands, sharding)


def _by_definition(operator: Forward, *operands: jax.Array) -> Any:
    return automatic(operator.definition, operands, _result_shardings(operator, operands))


def _result_shardings(operator: Forward, operands: Arrays) -> Any:
    """Those of the forward's results, which are sharded over the batch as the first operand is."""
    count = len(operator.forward.results) - operator.forward.unread
    y = over_batch(operands[0], explicit_mesh(operands))
    return (y,) * count if count > 1 else y


@functools.cache
def _custom_call(target: Target, leading: int = 1, shared_leading: int = 0) -> Function:
    """The call of a target, from operands to a tuple of results.

    All have `leading` axes of batch, shared operands the first `shared_leading` of them. `vmap`
    puts one more before them, and the handlers take any number. Folding them into one would move
    data between devices where one of them is sharded.
    """

    of_results = leading - target.summed  # axes of batch

    def call(*operands: jax.Array) -> Arrays:
        return with_results(target.shapes(*operands), *operands)

    def with_results(shapes: Shapes, *operands: jax.Array) -> Arrays:
        t = jax.typeof(operands[0])  # in a shard_map it has the mesh axes that results vary over
        results = [
            jax.ShapeDtypeStruct(
                *(shape, dtype),
                sharding=t.sharding.update(spec=PartitionSpec(*[None] * len(shape))),
                manual_axis_type=t.manual_axis_type,
            )
            for shape, dtype in shapes
        ]
        attributes = {
            name: np.array(value, np.int64) if isinstance(value, tuple) else value
            for name, value in target.attributes
        }
        return tuple(jax.ffi.ffi_call(target.name, results)(*operands, **attributes))

    def batch_axes(i: int) -> int:
        return shared_leading if i in target.shared else leading

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        sharding = arguments[0].sharding
        # In a shard_map over some of the axes it has no spec, and is divided no further.
        spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
        of = lambda count: NamedSharding(mesh, PartitionSpec(*spec[:count]))  # noqa: E731
        operands = tuple(of(batch_axes(i)) for i in range(len(arguments)))

        def part(*operands: jax.Array) -> Arrays:
            # What a result has besides the batch may depend on the size of the whole batch.
            shapes = [
                ((*shape[:of_results], *result.shape[of_results:]), dtype)
                for (shape, dtype), result in zip(target.shapes(*operands), results, strict=True)
            ]
            parts = with_results(shapes, *operands)
            spread = spec[of_results:leading]  # axes of the mesh that sums are spread over
            return lax.psum(parts, spread[0]) if spread and spread[0] else parts

        return mesh, part, (of(of_results),) * len(results), operands

    partitioned = custom_partitioning(call)
    counts = [batch_axes(i) for i in range(len(target.operands))]
    counts += [of_results] * len(target.results)
    own = target.operands + target.results
    others = [[f"a{i}_{j}" for j in range(count)] for i, count in enumerate(own)]  # each its own
    axes = [
        " ".join([f"n{j}" for j in range(count)] + other)
        for count, other in zip(counts, others, strict=True)
    ]
    operands = len(target.operands)
    partitioned.def_partition(
        partition,
        sharding_rule=f"{', '.join(axes[:operands])} -> {', '.join(axes[operands:])}",
        need_replication_factors=tuple(itertools.chain(*others)),
    )
    mapped = custom_vmap(partitioned)

    @mapped.def_vmap
    def _(
        size: int, is_mapped: list[bool], *operands: jax.Array
    ) -> tuple[Arrays, tuple[bool, ...]]:
        # The new axis comes before all others, so shared operands that have any need it too.
        split = shared_leading > 0 or any(is_mapped[i] for i in target.shared)
        whole = [
            a if has_axis or (i in target.shared and not split) else _repeat(a, size)
            for i, (a, has_axis) in enumerate(zip(operands, is_mapped, strict=True))
        ]
        results = _custom_call(target, leading + 1, shared_leading + split)(*whole)
        return results, (True,) * len(results)

    return mapped


def _repeat(a: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(a, (size, *a.shape))
