"""The model against the official one's recorded outputs, and each of its options."""

from __future__ import annotations

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import xla_ops
from internimage_jax.config import RELEASED
from internimage_jax.model import InternImage
from tests.support import (
    SMALLEST,
    TINY,
    assert_close,
    error,
    golden_input,
    images,
    recipe_model,
    reference,
    reference_config,
)

# Models whose golden was recorded in float32: it is itself 1e-5 of its rms away from exact.
FLOAT32_GOLDENS = [n for n in RELEASED if "22k_384" in n or n[12] in "hg"]
# What conftest sets otherwise, to make compiling faster.
AS_USERS_COMPILE = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    **({"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}),
}


def outputs(model: InternImage, x, **options):
    graphdef, state = nnx.split(model)
    function = jax.jit(lambda state, x: nnx.merge(graphdef, state).outputs(x))
    return function.lower(state, x).compile(options)(state, x)


def assert_matches_golden(name: str, *, fused: bool, **options) -> None:
    golden = np.load(reference(f"goldens/{name}.npz"))
    model = recipe_model(reference_config(name))
    got = outputs(model.fused() if fused else model, golden_input(golden), **options)
    tolerance = f"model, golden in {'float32' if name in FLOAT32_GOLDENS else 'float64'}"
    assert_close(got.logits, golden["logits"], tolerance)
    assert_close(got.pooler_output, golden["pooler_output"], tolerance)
    assert (
        got.last_hidden_state is got.hidden_states[3]
        or (got.last_hidden_state == got.hidden_states[3]).all()
    )
    for i, feature_map in enumerate(got.hidden_states, start=1):
        nchw = np.asarray(feature_map).transpose(0, 3, 1, 2)
        assert nchw.shape == tuple(golden[f"stage{i}.shape"])
        if golden[f"stage{i}"].shape != nchw.shape:  # of the large models only a part is kept
            nchw = nchw[:, ::5, ::3, ::3]
        assert_close(nchw, golden[f"stage{i}"], tolerance)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_match_the_official_model(name):
    assert_matches_golden(name, fused=True)  # unfused: those with gradients, below


@pytest.mark.parametrize("name", ["tiny_h_like", "tiny_bn_relu"])
def test_a_model_in_float64_matches_far_closer(name, x64):
    golden = np.load(reference(f"goldens/{name}.npz"))
    got = outputs(
        recipe_model(reference_config(name), np.float64), golden_input(golden).astype(np.float64)
    )
    # The golden was computed in float64 and kept in float32.
    np.testing.assert_allclose(np.float32(got.logits), golden["logits"], rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in RELEASED if n[12] in "tsb"])
def test_released_models_match_the_official_model(name):
    assert_matches_golden(name, fused=False, **AS_USERS_COMPILE)


@pytest.mark.large
@pytest.mark.parametrize("name", [n for n in RELEASED if n[12] not in "tsb"])
def test_large_released_models_match_the_official_model(name):
    assert_matches_golden(name, fused=False, **AS_USERS_COMPILE)


def test_activations_are_the_ones_named():
    from internimage_jax.common import activate

    x = jnp.asarray([-1.0, 0.5, 2.0])
    values = {n: activate(n, x) for n in ("GELU", "SiLU", "ReLU")}
    np.testing.assert_allclose(values["GELU"], [-0.15865526, 0.34573123, 1.95449974], rtol=1e-5)
    np.testing.assert_allclose(values["SiLU"], x / (1 + np.exp(-x)), rtol=1e-5)
    np.testing.assert_allclose(values["ReLU"], [0, 0.5, 2])


@pytest.mark.parametrize("act_layer", ["GELU", "SiLU"])
def test_the_gather_form_has_no_custom_call(act_layer):
    config = SMALLEST.replace(act_layer=act_layer)
    model = InternImage(config, rngs=nnx.Rngs(0), implementation="gather")
    graphdef, state = nnx.split(model)
    lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, images())
    assert "@internimage_" not in lowered.as_text()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"with_cp": True},
        {"layer_scale": 0.5},
        {"post_norm": True, "center_feature_scale": True},
        # After a layer that is not the last of its level, and after one that is.
        {"level2_post_norm": True, "level2_post_norm_block_ids": (0, 2), "res_post_norm": True},
    ],
    ids=str,
)
def test_sums_and_norms_in_one_pass_are_those_apart(changes):
    config = SMALLEST.replace(depths=(2, 1, 3, 1), **changes)
    model = InternImage(config, rngs=nnx.Rngs(0), implementation="gather")

    def apart(level, x):
        for i, block in enumerate(level.blocks):
            x, normalized = block(x)
            assert normalized is None
            if i in level.post_norm_block_ids:
                x = level.post_norms[level.post_norm_block_ids.index(i)](x)
        return level.norm(x) if level.has_norm else x

    @nnx.jit
    def both(model, x):
        x = model.patch_embed(x)
        pairs = []
        for i, level in enumerate(model.levels):
            pairs.append((level(x), apart(level, x)))
            x = level.downsample(pairs[-1][0]) if i < 3 else x
        return pairs

    for got, wanted in both(model, images()):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_layer_norm_is_exact_where_the_mean_is_large():
    norm = InternImage(SMALLEST, rngs=nnx.Rngs(0)).levels[0].blocks[0].norm1
    x = np.random.RandomState(0).standard_normal((1, 1, 1, 16)) * 1e-2 + 300
    wanted = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
    # What is left is the rounding of the input: 300 has steps of 3e-5.
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), wanted, atol=1e-2)


def test_a_model_without_classes_gives_features():
    model = InternImage(SMALLEST.replace(num_classes=0), rngs=nnx.Rngs(0))
    got = outputs(model, images())
    assert got.logits is None
    assert got.pooler_output is None
    assert [m.shape for m in got.hidden_states] == [
        (2, 8, 8, 16),
        (2, 4, 4, 32),
        (2, 2, 2, 64),
        (2, 1, 1, 128),
    ]
    assert nnx.eval_shape(lambda m: m(images()), model).shape == (2, 1, 1, 128)
    assert not any("head" in str(path) for path, _ in nnx.to_flat_state(nnx.state(model)))


@pytest.mark.parametrize(("h", "w"), [(1, 1), (33, 100)])
def test_any_side_will_do_without_the_clip_head(h, w):
    logits = outputs(InternImage(SMALLEST, rngs=nnx.Rngs(0)), images(1, h, w)).logits
    assert logits.shape == (1, 5)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_close_and_returns_float32_logits(dtype):
    golden = np.load(reference("goldens/tiny_h_like.npz"))
    model = recipe_model(reference_config("tiny_h_like"), dtype)
    with jax.numpy_dtype_promotion("standard"):  # flax's LayerNorm promotes its statistics
        got = outputs(model, golden_input(golden))
    assert got.logits.dtype == jnp.float32
    assert got.hidden_states[0].dtype == dtype
    assert error(got.logits, golden["logits"]) < 0.1


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[[[0.0] * 3] * 32] * 32], "images: expected an array, got list"),
        (np.zeros((1, 3, 32, 32), np.float32), r"images: expected shape \(N, H, W, 3\), got"),
        (np.zeros((33, 32, 3), np.float32), r"images: expected shape \(N, H, W, 3\), got"),
        (np.zeros((1, 32, 32, 3), np.uint8), "images: expected normalised floats, got uint8"),
        (np.zeros((1, 0, 32, 3), np.float32), "images: expected sides of at least 1"),
    ],
)
def test_images_that_do_not_fit_are_named(x, message):
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    for call in (model, model.features):
        with pytest.raises(ValueError, match=message):
            call(x)


def test_names_of_classes_are_as_many_as_there_are() -> None:
    with pytest.raises(ValueError, match="classes: "):
        InternImage(SMALLEST, rngs=nnx.Rngs(0), classes=["cat", "dog"])


@pytest.mark.parametrize("key", [0, nnx.Rngs(0)])
def test_what_is_no_key_is_named(key):
    with pytest.raises(ValueError, match=f"key: expected a JAX PRNG key.*{type(key).__name__}"):
        InternImage(SMALLEST, rngs=nnx.Rngs(0))(images(), train=True, key=key)


def test_a_model_without_values_says_so():
    with pytest.raises(ValueError, match="model: has no values; give it `rngs`"):
        InternImage(SMALLEST)(images())


def test_a_model_can_be_tabulated():
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    assert "conv_head" in nnx.tabulate(model, images(1), depth=1)


def test_forward_mode_of_a_model_names_the_form_that_has_it():
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    served = xla_ops.status()["cpu"].implementation == "kernel"
    expected = pytest.raises(ValueError, match=r"no forward mode .* use 'gather'")
    with expected if served else contextlib.nullcontext():
        jax.jvp(model, (images(),), (images(),))
    plain = InternImage(SMALLEST, rngs=nnx.Rngs(0), implementation="gather")
    jax.eval_shape(lambda x: jax.jvp(plain, (x,), (x,)), images())


def test_on_a_cpu_fusing_compiles_nothing():
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    xla_ops.status()  # tries the kernels, if nothing has
    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    model.fused()
    assert compilations == []


def test_a_model_with_numpy_parameters_can_be_fused():
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    wanted = model.fused().levels[0].blocks[0].dcn.record.kernel[...]
    nnx.update(model, jax.tree.map(np.asarray, nnx.state(model)))
    assert (model.fused().levels[0].blocks[0].dcn.record.kernel[...] == wanted).all()


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
def test_a_dtype_that_a_model_cannot_have_is_named(argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got int8, expected one of float32, "):
        InternImage(SMALLEST, **{argument: "int8"})
    for wrong in ("fp16", None):
        with pytest.raises(ValueError, match=rf"^{argument}: got {wrong}, expected one of float32"):
            InternImage(SMALLEST, **{argument: wrong})


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"implementation: expected .*, got 'jnp'"):
        InternImage(SMALLEST, implementation="jnp")


def test_the_clip_head_names_the_sides_it_needs():
    model = InternImage(SMALLEST.replace(use_clip_projector=True), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"multiples of 32, got \(1, 48, 64, 3\)"):
        model(images(1, 48, 64))
    maps = nnx.eval_shape(lambda m: m.features(images(1, 48, 64)), model)
    assert [m.shape[1:3] for m in maps] == [(12, 16), (6, 8), (3, 4), (2, 2)]


@pytest.mark.parametrize("panels", [False, True])
def test_a_fused_model_shares_all_parameters_but_those_it_changes(panels, monkeypatch):
    monkeypatch.setattr(xla_ops, "reads_panels", lambda platform: panels and platform == "cpu")
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    once, twice = (
        {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(m))}
        for m in (model.fused(), model.fused().fused())
    )
    assert list(once) == list(twice)
    mine = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(model))}
    assert {path.split(".dcn.")[1] for path in once.keys() - mine.keys()} == {
        "record.kernel",
        "record.bias",
    }
    shared = {path for path in once.keys() & mine.keys() if once[path] is mine[path]}
    products = r"(conv1|conv2|(downsample|conv_head)\.conv|input_proj|output_proj|fc1|fc2)\.kernel"
    in_panels = {path for path in once.keys() & mine.keys() if re.search(products, path)}
    assert (once.keys() & mine.keys()) - shared == (in_panels if panels else set())
    for path in in_panels:
        wanted = xla_ops.in_panels(mine[path]) if panels else mine[path]
        np.testing.assert_array_equal(once[path], wanted)


def test_a_fused_model_is_not_trained():
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0))
    before = np.asarray(model.conv_head.norm.mean[...])
    with pytest.raises(ValueError, match="model: is fused, which is not for training"):
        model.fused()(jnp.ones((1, 32, 32, 3)), train=True)
    np.testing.assert_array_equal(model.conv_head.norm.mean[...], before)


def test_a_fused_model_has_gammas_in_its_norms():
    config = SMALLEST.replace(post_norm=True, layer_scale=0.5)
    model = InternImage(config, rngs=nnx.Rngs(0), dtype="bfloat16", param_dtype="bfloat16")
    block = model.levels[1].blocks[0]
    channels = np.arange(block.gamma2[...].size)
    block.norm2.scale.set_value(jnp.asarray(1 + channels / 64, "bfloat16"))
    block.norm2.bias.set_value(jnp.asarray(channels / 128, "bfloat16"))
    block.gamma2.set_value(jnp.asarray(1.5 - channels / 128, "bfloat16"))
    fused = model.fused()
    for m in (fused, fused.fused()):
        norm = m.levels[1].blocks[0].norm2
        assert norm.scale.dtype == "float32"  # no factor is rounded to half precision
        np.testing.assert_array_equal(norm.scale, (1 + channels / 64) * (1.5 - channels / 128))
        np.testing.assert_array_equal(norm.bias, channels / 128 * (1.5 - channels / 128))
        paths = nnx.to_flat_state(nnx.state(m)).paths
        assert not any("gamma" in str(part) for path in paths for part in path)
    np.testing.assert_array_equal(block.norm2.scale[...].astype("float32"), 1 + channels / 64)


def test_what_is_not_used_is_not_computed():
    # XLA does not see into the kernels.
    model = InternImage(SMALLEST, rngs=nnx.Rngs(0), implementation="gather")
    graphdef, state = nnx.split(model)

    def flops(pick):
        run = jax.jit(lambda s, x: pick(nnx.merge(graphdef, s).outputs(x)))
        return run.lower(state, images()).compile().cost_analysis()["flops"]

    first, last = flops(lambda o: o.hidden_states[0]), flops(lambda o: o.last_hidden_state)
    assert first < last < flops(lambda o: o.logits)


@pytest.mark.parametrize("argument", ["dtype", "param_dtype"])
def test_float64_where_jax_has_it_off_is_an_error(argument):
    with pytest.raises(ValueError, match=f"^{argument}: float64 wants .*jax_enable_x64"):
        InternImage(SMALLEST, **{argument: "float64"})


def test_a_model_is_exported_for_any_batch_and_image_size_on_any_platform():
    graphdef, state = nnx.split(recipe_model(SMALLEST).fused())
    function = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    sizes = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, h, w, 3"), jnp.float32)
    export = functools.partial(jax.export.export, disabled_checks=xla_ops.export_checks())
    exported = export(function, platforms=["cpu", "cuda", "tpu"])(state, sizes)
    for size in ((2, 32, 32), (1, 37, 70)):
        x = images(*size)
        assert error(exported.call(state, x), function(state, x)) < 1e-6
