"""A training step over several devices, by jit and the types of a sharded batch."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from internimage_jax.model import InternImage
from internimage_jax.normalize import normalize
from internimage_jax.preprocess import Preprocessing
from tests.layers import mesh
from tests.support import SMALLEST

IMAGES = np.random.RandomState(0).standard_normal((4, 64, 64, 3)).astype(np.float32)
LABELS = np.eye(5, dtype=np.float32)[[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("implementation", "changes"),
    [
        ("gather", {"post_norm": True, "layer_scale": 0.5, "drop_path_rate": 0.2}),
        (None, {"norm_layer": "BN", "act_layer": "SiLU", "with_cp": True}),
        (
            None,
            {
                "use_clip_projector": True,
                "dw_kernel_size": 5,
                "res_post_norm": True,
                "center_feature_scale": True,
                "level2_post_norm": True,
                "level2_post_norm_block_ids": (0,),
            },
        ),
    ],
    ids=["like B", "BN", "like H"],
)
def test_gradients_over_a_mesh_of_explicit_axes_are_those_of_one_device(
    implementation: Any, changes: dict[str, Any]
) -> None:
    model = InternImage(
        SMALLEST.replace(**changes), rngs=nnx.Rngs(0), implementation=implementation
    )
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params: Any, statistics: Any, images: jax.Array, labels: jax.Array, key: jax.Array):
        def loss(params: Any) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(graphdef, params, statistics, copy=True)
            logits = model(images, train=True, key=key)
            value = -(jax.nn.log_softmax(logits) * labels).sum(-1).mean()
            return value, nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def leaves(*arguments: Any) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(step(*arguments, jax.random.key(0)))]

    wanted = leaves(params, statistics, IMAGES, LABELS)
    largest = max(np.abs(leaf).max() for leaf in wanted)
    # As `jax.make_mesh` makes them.
    devices = mesh(AxisType.Explicit)
    everywhere, split = NamedSharding(devices, P()), NamedSharding(devices, P("data"))
    state = jax.device_put((params, statistics), everywhere)
    batch = jax.device_put((IMAGES, LABELS), split)
    for one, other in zip(leaves(*state, *batch), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)
    with jax.set_mesh(devices):  # which was known from the arrays alone: shardings are types too
        step.trace(*state, *batch, jax.random.key(0))

    # Parameters that are divided are gathered where they are used, and their gradients are divided.
    def divide(parameter: jax.Array) -> jax.Array:
        axes = [axis for axis, size in enumerate(parameter.shape) if size % devices.size == 0]
        spec = ["data" if axis in axes[-1:] else None for axis in range(parameter.ndim)]
        return jax.device_put(parameter, NamedSharding(devices, P(*spec)))

    divided = jax.tree.map(divide, params)
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(divided))
    for one, other in zip(leaves(divided, state[1], *batch), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * largest)
    _, gradients = jax.eval_shape(step, divided, state[1], *batch, jax.random.key(0))
    for leaf, gradient in zip(*map(jax.tree.leaves, (divided, gradients)), strict=True):
        assert gradient.sharding.spec == leaf.sharding.spec
    wanted = nnx.merge(graphdef, params, statistics)(IMAGES)
    model = nnx.merge(graphdef, divided, state[1]).fused()
    found = jax.jit(lambda images: model(images))(batch[0])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_pixels_of_a_sharded_batch_are_normalised_where_they_are(kind: AxisType) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (4, 5, 6, 3), np.uint8)
    sharding = NamedSharding(mesh(kind), P("data"))
    sharded = jax.device_put(pixels, sharding)
    step = jax.jit(lambda pixels: normalize(pixels, Preprocessing(8)))
    for context in (contextlib.nullcontext(), jax.set_mesh(sharding.mesh)):
        with context:
            found = step(sharded)
            assert found.sharding.is_equivalent_to(sharding, 4)
            np.testing.assert_array_equal(found, normalize(pixels, Preprocessing(8)))
            assert "all-" not in step.lower(sharded).compile().as_text()  # -gather, -to-all
