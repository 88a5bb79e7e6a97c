"""Training: gradients against the official model's, dropout, statistics, and README's loop."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.rules import rules
from internimage_jax import common
from internimage_jax.model import InternImage
from tests.support import (
    SMALLEST,
    TOLERANCE,
    golden_input,
    images,
    recipe_model,
    reference,
    reference_config,
)

README = Path(__file__).parent.parent / "README.md"
WITH_GRADIENTS = (
    "tiny_g_like",
    "tiny_h_like",
    "tiny_offset_scale2",
    "tiny_postnorm_layerscale",
    "tiny_prenorm",
    "tiny_remove_center",
)
# A constant added to all keys does not change the softmax: in exact arithmetic these gradients
# are 0, so they are held to the size of those of the values.
CANCELLING = {
    "clip_projector.norm1_k.0.bias": "clip_projector.norm1_v.0.bias",
    "clip_projector.cross_dcn.k_bias": "clip_projector.cross_dcn.v_bias",
}


def test_training_in_float64_stays_in_float64(x64):
    model = InternImage(SMALLEST, dtype="float64", param_dtype="float64", rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, x):
        return model(x, train=True)

    assert step(model, images(dtype=jnp.float64)).dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype(np.float64)}


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_match_the_official_model(name):
    golden = np.load(reference(f"goldens/{name}.npz"))
    wanted = np.load(reference(f"goldens/{name}.grads.npz"))
    config = reference_config(name)
    graphdef, state = nnx.split(recipe_model(config))
    weights = np.random.RandomState(4321).standard_normal(golden["logits"].shape)

    @jax.jit
    def gradients(state, x):
        def loss(state, x):
            return (nnx.merge(graphdef, state)(x) * weights.astype(np.float32)).sum()

        return jax.grad(loss, (0, 1), allow_int=True)(state, x)

    by_path, by_input = gradients(state, golden_input(golden))
    by_path = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(by_path)}
    found = {"input": np.asarray(by_input).transpose(0, 3, 1, 2).reshape(-1)}
    for rule in rules(config):
        gradient = np.asarray(by_path[rule.flax])
        if rule.axes is not None:
            gradient = gradient.transpose(np.argsort(rule.axes)).reshape(rule.torch_shape)
        found[rule.torch] = gradient.reshape(-1)
    for key in wanted:
        name, what = key.rsplit("/", 1)
        if what == "values":
            step = max(1, found[name].size // (256 if name == "input" else 64))
            difference = np.abs(found[name][::step] - wanted[key]).max()
            scale = wanted[f"{CANCELLING.get(name, name)}/rms"]
            assert difference <= TOLERANCE["gradient"] * scale, name
    assert {key.rsplit("/", 1)[0] for key in wanted} <= set(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"act_layer": "SiLU", "mlp_ratio": 2.5, "cls_scale": 0.75, "dw_kernel_size": 1},
        {"norm_layer": "BN", "center_feature_scale": True, "with_cp": True},
        {
            "remove_center": True,
            "offset_scale": 1.5,
            "res_post_norm": True,
            "level2_post_norm": True,
            "level2_post_norm_block_ids": (0,),
        },
    ],
    ids=str,
)
def test_every_option_builds_a_model_that_computes_and_trains(changes):
    model = InternImage(SMALLEST.replace(**changes), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @jax.jit
    def slopes(state, x):
        return jax.grad(lambda s: (nnx.merge(graphdef, s)(x) ** 2).sum())(state)

    leaves = jax.tree.leaves(slopes(state, images()))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_with_cp_recomputes_and_does_not_change_the_result():
    plain = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    recomputed = InternImage(SMALLEST.replace(with_cp=True), rngs=nnx.Rngs(0))

    @functools.partial(jax.jit, static_argnums=0)
    def slopes(graphdef, state, x):
        return jax.grad(lambda s: (nnx.merge(graphdef, s)(x) ** 2).sum())(state)

    x = images()
    both = [nnx.split(model) for model in (plain, recomputed)]
    compiled = [slopes.lower(graphdef, state, x).compile() for graphdef, state in both]
    got = [jax.tree.leaves(c(s, x)) for c, (_, s) in zip(compiled, both, strict=True)]
    for one, other in zip(*got, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    recomputations = [
        str(slopes.trace(g, s, x).jaxpr).count("differentiated=True") for g, s in both
    ]
    assert recomputations[1] > recomputations[0]


def test_training_updates_batch_statistics_and_evaluation_does_not():
    for config in (SMALLEST, SMALLEST.replace(norm_layer="BN", with_cp=True)):
        graphdef, state = nnx.split(InternImage(config, rngs=nnx.Rngs(0)))

        @functools.partial(jax.jit, static_argnums=(0, 3))
        def statistics(graphdef, state, x, train):
            model = nnx.merge(graphdef, state)
            model(x, train=train)
            return nnx.state(model, nnx.BatchStat)

        def changed(train, graphdef=graphdef, state=state, statistics=statistics):
            before = nnx.merge(graphdef, state)
            after = statistics(graphdef, state, images(), train)
            same = jax.tree.map(
                lambda a, b: (a == b).all(), nnx.state(before, nnx.BatchStat), after
            )
            return [not leaf for leaf in jax.tree.leaves(same)]

        assert not any(changed(train=False))
        assert all(changed(train=True))


def test_an_empty_batch_leaves_batch_statistics_as_they_are():
    model = InternImage(SMALLEST.replace(norm_layer="BN"), rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    assert model(images()[:0], train=True).shape == (0, SMALLEST.num_classes)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.BatchStat))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_where_types_are_not_to_be_promoted(dtype):
    model = InternImage(SMALLEST, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("strict"):
        logits = model(images().astype(dtype), train=True)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("devices", ["one device", "several devices"])
def test_the_training_loop_of_the_readme_lowers_the_loss(devices):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (loop,) = (block for block in blocks if "def step(" in block)
    if devices == "several devices":
        (spread,) = (block for block in blocks if "jax.make_mesh" in block)
        loop = loop.replace("\nfor images", spread + "\nfor images")
    config = SMALLEST.replace(drop_path_rate=0.1)
    labels, losses = jnp.asarray([0, 1, 2, 3]), []

    def batches():
        for i in range(4):
            yield images(4), labels, jax.random.key(i)
            losses.append(float(names["value"]))

    names = {"model": InternImage(config, rngs=nnx.Rngs(0)), "batches": batches()}
    before = jax.tree.map(np.asarray, nnx.split(names["model"], nnx.Param, ...)[2])
    exec(loop.replace("1e-3", "1e-2"), names)
    assert losses[-1] < losses[0]
    after = nnx.split(names["model"], nnx.Param, ...)[2]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved))


def test_the_other_examples_of_the_readme_do_what_they_say():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (inference,) = (block for block in blocks if ".fused()" in block)
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    names = {"model": model, "images": images()}
    exec(inference, names)
    np.testing.assert_allclose(names["logits"], model(images()), rtol=1e-4, atol=1e-5)

    (layer,) = (block for block in blocks if "class Deformable" in block)
    exec(layer, names)
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 8))
    around = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    deformable = names["Deformable"](8, 2, nnx.Rngs(0))
    np.testing.assert_allclose(deformable(x), around / 9, rtol=1e-5, atol=1e-5)


def test_dropout_and_stochastic_depth_act_in_training_alone():
    config = SMALLEST.replace(drop_rate=0.3, drop_path_rate=0.3, drop_path_type="uniform")
    model = InternImage(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="train")
    def logits(state, x, key, *, train):
        return nnx.merge(graphdef, state)(x, train=train, key=key)

    def run(seed, train):
        return np.asarray(logits(state, x, jax.random.key(seed), train=train))

    x = images()
    assert (run(0, False) == run(1, False)).all()
    assert (run(0, True) == run(0, True)).all()
    assert (run(0, True) != run(1, True)).any()
    with pytest.raises(ValueError, match=r"key: .* needs a PRNG key, got None"):
        model(x, train=True)


def test_each_draw_has_a_key_of_its_own(monkeypatch):
    drawn, kept = [], common._kept

    def recorded(key, rate, shape):
        data = jax.random.key_data(key)
        jax.debug.callback(lambda found: drawn.append(tuple(found.tolist())), data)
        return kept(key, rate, shape)

    monkeypatch.setattr(common, "_kept", recorded)
    rates = {"drop_rate": 0.37, "drop_path_rate": 0.37, "drop_path_type": "uniform"}
    config = SMALLEST.replace(depths=(1, 1, 4, 1), **rates)  # of no other test, so traced here
    graphdef, state = nnx.split(InternImage(config, rngs=nnx.Rngs(0)))
    train = jax.jit(lambda state, x, key: nnx.merge(graphdef, state)(x, train=True, key=key))
    jax.block_until_ready(train(state, images(), jax.random.key(0)))
    jax.effects_barrier()
    # The stem's, one of each level's branches, and of each of the 7 layers two of the MLP.
    assert len(drawn) == len(set(drawn)) == 1 + 4 + 7 * 2


def test_batch_statistics_move_by_a_tenth_and_of_large_means_too():
    norm = InternImage(SMALLEST.replace(norm_layer="BN"), rngs=nnx.Rngs(0)).patch_embed.norm1
    x = 1e4 + np.random.RandomState(0).standard_normal((8, 16, 16, 8)).astype(np.float32)
    norm(jnp.asarray(x), use_running_average=False)
    x = x.astype(np.float64)
    np.testing.assert_allclose(norm.mean.get_value(), 0.1 * x.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(norm.var.get_value(), 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-3)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    from internimage_jax.common import drop_path, dropout, path_factors

    x = jnp.ones((4000, 2, 2, 1))
    nothing, *layers = path_factors((0, 0.25, 0.5), len(x), jax.random.key(0))
    assert nothing is None and path_factors((0.25,), len(x), None) == [None]
    branches = [factors for layer in layers for factors in layer]
    for rate, factors in zip((0.25, 0.25, 0.5, 0.5), branches, strict=True):
        dropped = drop_path(x, factors)
        assert set(np.unique(dropped)) == {0.0, np.float32(1 / (1 - rate))}
        assert (dropped == dropped[:, :1, :1]).all()
        assert abs(dropped.mean() - 1) < 0.05
    # Each branch has draws of its own.
    assert (np.abs(np.corrcoef(np.stack(branches) > 0) - np.eye(4)) < 0.06).all()
    values = dropout(x, 0.25, jax.random.key(0))
    assert (values != values[:, :1, :1]).any()
    assert abs(values.mean() - 1) < 0.05


def test_stochastic_depth_grows_with_depth_unless_uniform():
    config = SMALLEST.replace(depths=(1, 2, 1, 1), drop_path_rate=0.4)
    assert sum(config.drop_path_rates, ()) == pytest.approx((0, 0.1, 0.2, 0.3, 0.4))
    uniform = config.replace(drop_path_type="uniform")
    assert sum(uniform.drop_path_rates, ()) == pytest.approx((0.4,) * 5)


@pytest.mark.parametrize(
    "changes", [{"post_norm": True, "layer_scale": 0.5}, {"res_post_norm": True}], ids=str
)
def test_a_branch_is_added_alike_with_and_without_drop_path(changes):
    block = InternImage(SMALLEST.replace(**changes), rngs=nnx.Rngs(0)).levels[0].blocks[0]
    names = ("norm1", "norm2", "res_post_norm1", "res_post_norm2")
    norms = [getattr(block, name) for name in names if hasattr(block, name)]
    vectors = [vector for norm in norms for vector in (norm.scale, norm.bias)]
    if "layer_scale" in changes:
        vectors += [block.gamma1, block.gamma2]
    for i, vector in enumerate(vectors):
        vector.set_value(1 + 0.5 * jnp.cos(jnp.arange(16.0) * (i + 1)))
    x = jnp.asarray(np.random.RandomState(0).standard_normal((2, 6, 5, 16)), "float32")
    one_pass, _ = block(x)
    apart, _ = block(x, factors=jnp.ones((2, 2)))  # which drops nothing
    half, _ = block(x, factors=jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose(one_pass, apart, rtol=0, atol=1e-5 * np.abs(apart).max())
    np.testing.assert_allclose(half[0], apart[0], rtol=0, atol=1e-5 * np.abs(apart).max())
    np.testing.assert_array_equal(half[1], x[1])  # an image that both branches drop
    for factors in ([[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]):  # or one of them
        one, _ = block(x, factors=jnp.array(factors))
        assert np.abs(one - apart).max() > 0.01 and np.abs(one - x).max() > 0.01
