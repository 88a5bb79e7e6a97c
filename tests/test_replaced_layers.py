"""Layers that a user puts in the place of a model's own are called, whatever their kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internimage_jax import create_model
from tests.support import SMALLEST

KINDS: dict[str, dict[str, Any]] = {
    "as T": {},
    "as S": {"post_norm": True, "layer_scale": 0.5},
    "as H": {"res_post_norm": True, "center_feature_scale": True, "dw_kernel_size": 5},
    "with gammas": {"layer_scale": 0.5},
    "other norms and activations": {"norm_layer": "BN", "act_layer": "SiLU"},
}


class Linear(nnx.Linear):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + 0.25


class Conv(nnx.Conv):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + 0.25


class LayerNorm(nnx.LayerNorm):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + 0.25


def random_model(changes: dict[str, Any]) -> Any:
    """A model with random values in all vectors too."""
    model = create_model(SMALLEST.replace(**changes), image_size=64, seed=1)
    state, random = nnx.state(model, nnx.Param), np.random.default_rng(2)
    moved = jax.tree.map(lambda a: a + 0.05 * random.standard_normal(a.shape, np.float32), state)
    nnx.update(model, moved)
    return model


def images(side: int = 64, channels: int = 3) -> jax.Array:
    return jnp.asarray(np.random.default_rng(3).standard_normal((2, side, side, channels), "f"))


def assert_alike(got: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_layers_of_another_class_are_each_called(name: str, fused: bool) -> None:
    """Those that add to their results, in the place of all, against biases that have it added."""
    model, replaced = random_model(KINDS[name]), random_model(KINDS[name])
    count = 0
    for (_, own), (_, other) in zip(
        nnx.iter_modules(model), nnx.iter_modules(replaced), strict=True
    ):
        for kind in (Linear, Conv, LayerNorm):
            if type(other) is kind.__base__:
                other.__class__ = kind
                bias = jnp.zeros(own.out_features) if own.bias is None else own.bias[...]
                own.bias = nnx.Param(bias + 0.25)
                count += 1
    assert count > 40
    if fused:
        model, replaced = model.fused(), replaced.fused()
    assert_alike(replaced.outputs(images()), model.outputs(images()))


def test_lora_is_what_its_product_adds_to_the_kernel_and_trains() -> None:
    model, lora = random_model({}), random_model({})
    rngs = nnx.Rngs(5)
    for own, other in zip(model.levels, lora.levels, strict=True):
        mlp = other.blocks[0].mlp
        for name in ("fc1", "fc2"):
            layer = getattr(mlp, name)
            sizes = layer.in_features, layer.out_features
            new = nnx.LoRALinear(*sizes, lora_rank=2, lora_dtype=jnp.float32, rngs=rngs)
            new.kernel, new.bias = layer.kernel, layer.bias
            setattr(mlp, name, new)
            a, b = new.lora.lora_a, new.lora.lora_b
            b.set_value(jax.random.normal(rngs.params(), b.shape))
            kernel = getattr(own.blocks[0].mlp, name).kernel
            kernel.set_value(kernel[...] + a[...] @ b[...])
    assert_alike(lora(images()), model(images()))
    graphdef, params, rest = nnx.split(lora, nnx.LoRAParam, ...)
    gradients = jax.grad(lambda p: (nnx.merge(graphdef, p, rest)(images()) ** 2).sum())(params)
    assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(gradients))


@pytest.mark.parametrize("fused", [False, True])
def test_a_last_level_of_stride_16(fused: bool) -> None:
    model = random_model({})
    old = model.levels[2].downsample.conv
    new = nnx.Conv(64, 128, (3, 3), padding=1, use_bias=False, rngs=nnx.Rngs(0))
    new.kernel = old.kernel
    strided = model.features(images())
    model.levels[2].downsample.conv = new
    dense = (model.fused() if fused else model).features(images())
    assert [a.shape[1] for a in dense] == [16, 8, 4, 4]
    assert_alike(dense[:3], strided[:3])
    level = model.levels[2].downsample
    wanted = model.levels[3](level.norm(new(dense[2])))
    assert_alike(dense[3], wanted)


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels: int) -> None:
    model, x = random_model({}), images(channels=channels)
    with pytest.raises(ValueError, match=rf"\(N, H, W, 3\), got \(2, 64, 64, {channels}\)"):
        model(x)
    wanted = model(jnp.tile(x, (1, 1, 1, 3)) if channels == 1 else x[..., :3])
    old = model.patch_embed.conv1
    new = nnx.Conv(channels, 8, (3, 3), 2, padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0))
    if channels == 1:
        new.kernel[...] = old.kernel[...].sum(2, keepdims=True)
    else:
        new.kernel[...] = jnp.concatenate([old.kernel[...], jnp.zeros((3, 3, 1, 8))], 2)
    new.bias = old.bias
    model.patch_embed.conv1 = new
    for one in (model, model.fused()):
        assert_alike(one(x), wanted)
    with pytest.raises(ValueError, match=rf"\(N, H, W, {channels}\), got \(2, 64, 64, 3\)"):
        model(images())


@pytest.mark.parametrize("name", ["as T", "as S", "as H"])
def test_batch_norms_go_by_train_wherever_they_are(name: str) -> None:
    model = random_model(KINDS[name])
    block, x = model.levels[1].blocks[0], images()
    names = ["norm1", "norm2"] + ["res_post_norm1", "res_post_norm2"] * (name == "as H")
    for attribute in names:
        setattr(block, attribute, nnx.BatchNorm(32, rngs=nnx.Rngs(0)))
    norms = [getattr(block, attribute) for attribute in names]

    def means() -> list[np.ndarray]:
        return [np.asarray(norm.mean[...]) for norm in norms]

    before = means()
    alone = model(x[:1])
    assert_alike(model(x)[:1], alone)
    assert all(map(np.array_equal, means(), before))
    model(x, train=True)
    assert not any(map(np.array_equal, means(), before))
    assert_alike(model.fused()(x), model(x))


def test_dropout_in_a_replaced_layer_draws_anew() -> None:
    model = random_model({})
    mlp = model.levels[1].blocks[0].mlp
    mlp.fc2 = nnx.Sequential(mlp.fc2, nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    first, second = (model(images(), train=True) for _ in range(2))
    assert not np.array_equal(first, second)
    model.eval()
    assert np.array_equal(model(images()), model(images()))


def test_parts_of_ones_own() -> None:
    class Own(nnx.Module):
        def __call__(self, x: jax.Array, **settings: Any) -> jax.Array:
            return x / 2

    model = random_model({})
    model.levels[0].blocks[0].mlp = Own()
    model.levels[1].blocks[0].dcn = Own()
    model.levels[2].blocks[0].dcn.dw_conv = Own()
    assert_alike(model.fused()(images()), model(images()))


def test_flaxs_own_norms_and_layers_without_a_dtype_or_a_bias() -> None:
    """Layers as Flax makes them by default: no dtype, another variance, no bias."""
    model = create_model(SMALLEST, image_size=64, seed=1, dtype="bfloat16")
    rngs = nnx.Rngs(4)
    model.levels[0].norm = nnx.RMSNorm(16, rngs=rngs)
    model.levels[1].norm = nnx.GroupNorm(32, num_groups=4, rngs=rngs)
    model.levels[2].norm = nnx.LayerNorm(64, rngs=rngs)
    model.levels[3].blocks[0].mlp.fc1 = nnx.Linear(128, 64, use_bias=False, rngs=rngs)
    model.levels[3].blocks[0].mlp.fc2 = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
    model.levels[0].downsample.conv = nnx.Conv(16, 32, (3, 3), 2, padding=1, rngs=rngs)
    for one in (model, model.fused()):
        output = one.outputs(images())
        assert {a.dtype.name for a in output.hidden_states} == {"bfloat16"}
        assert np.isfinite(np.asarray(output.logits)).all()
    norm, x = model.levels[1].norm, model.features(images())[1]
    mean = np.asarray(x, np.float32).reshape(2, -1, 4, 8).mean((1, 3))
    assert np.abs(mean).max() < 0.05 and isinstance(norm, nnx.GroupNorm)
