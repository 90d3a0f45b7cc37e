"""SAM-ON: the mask of the normalization layers, and the ascent that it makes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samax

INPUTS = jax.random.normal(jax.random.key(0), (8, 6))


def marked(params):
    """The paths that the mask marks, as strings."""
    flat, _ = jax.tree_util.tree_flatten_with_path(samax.normalization_only(params))
    return {jax.tree_util.keystr(path) for path, mark in flat if mark}


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        x = nn.RMSNorm(name="before_the_head")(nn.LayerNorm(use_bias=False, name="ln_f")(x))
        return nn.Dense(1, name="head")(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 4, rngs=rngs)
        self.block = nnx.Sequential(nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs))
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.embedding = nnx.Embed(3, 4, rngs=rngs)


def test_linen():
    params = LinenModel().init(jax.random.key(0), INPUTS)["params"]
    assert marked(params) == {
        "['BatchNorm_0']['bias']",
        "['BatchNorm_0']['scale']",
        "['before_the_head']['scale']",
        "['ln_f']['scale']",
    }


@pytest.mark.parametrize("as_variables", [True, False])
def test_nnx_with_and_without_variables(as_variables):
    """Paths end in `.value` where the leaves are variables, as in `init` of `nnx.Optimizer`."""
    state = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    params = state if as_variables else nnx.to_pure_dict(state)
    found = {name.replace(".value", "").replace(".raw_value", "") for name in marked(params)}
    assert found == {
        "['bn1']['bias']",
        "['bn1']['scale']",
        "['block']['layers'][0]['bias']",
        "['block']['layers'][0]['scale']",
    }


def test_equinox():
    """In a `Sequential` layers have no names: their weights have one axis."""
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.Linear(4, 1, key=keys[1]),
            eqx.nn.LayerNorm(5, use_bias=False),
        ]
    )
    params = eqx.filter(model, eqx.is_inexact_array)
    assert marked(params) == {".layers[1].weight", ".layers[1].bias", ".layers[3].weight"}


def test_other_names_and_stacked_layers():
    params = {
        "batch_normalization": {"gamma": jnp.ones(3), "beta": jnp.ones(3)},
        "blocks": {"norm1": {"weight": jnp.ones((5, 3))}, "kernel": jnp.ones((5, 3, 3))},
        "gn": {"offset": jnp.ones(3)},
        "bnx": {"bias": jnp.ones(3), "weight": jnp.ones((3, 3))},
        "lnear": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
        "norm": jnp.ones(()),
    }
    assert marked(params) == {
        "['batch_normalization']['gamma']",
        "['batch_normalization']['beta']",
        "['blocks']['norm1']['weight']",
        "['gn']['offset']",
    }


def test_shapes_alone_are_enough():
    params = LinenModel().init(jax.random.key(0), INPUTS)["params"]
    abstract = jax.eval_shape(lambda: params)
    assert samax.normalization_only(abstract) == samax.normalization_only(params)
    state = samax.sam(0.5, mask=samax.normalization_only).init(abstract)
    assert jax.tree.structure(state) is not None


def test_no_normalization_layer_is_an_error():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"no scale or bias.*dense/bias, dense/kernel"):
        samax.sam(0.5, mask=samax.normalization_only).init(params)


def test_sam_on_is_sam_with_the_other_leaves_held_still():
    """The norm is over the perturbed leaves, all of them are trained."""
    model = LinenModel()
    variables = model.init(jax.random.key(0), INPUTS)

    def loss_fn(params):
        everything = {"params": params, "batch_stats": variables["batch_stats"]}
        outputs, _ = model.apply(everything, INPUTS, mutable=["batch_stats"])
        return jnp.mean((outputs - 1) ** 2)

    params, rho = variables["params"], 0.7
    points = []
    tx = samax.sam(rho, mask=samax.normalization_only)
    grads = jax.grad(loss_fn)(params)
    update, _ = tx.update(
        grads, tx.init(params), params, grad_fn=lambda p: points.append(p) or jax.grad(loss_fn)(p)
    )
    marks = samax.normalization_only(params)
    chosen = jax.tree.map(lambda g, mark: g if mark else jnp.zeros_like(g), grads, marks)
    scale = rho / np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(chosen)))
    point = jax.tree.map(lambda w, g: w + scale * g, params, chosen)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, points[0], point)
    jax.tree.map(close, update, jax.grad(loss_fn)(point))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(update["head"]))
    # The norm over all leaves, SAM's, would move these by less.
    (whole,) = [jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))]
    assert scale > 1.5 * rho / whole


def test_it_composes_with_every_ascent_that_takes_a_mask():
    params = {"ln": {"scale": jnp.ones(3)}, "kernel": jnp.ones((3, 3))}
    loss_fn = lambda p: jnp.sum(jnp.tanh(INPUTS[:, :3] @ p["kernel"] * p["ln"]["scale"]) ** 2)
    for tx in (
        samax.asam(0.5, scaled=samax.normalization_only),
        samax.vasso(0.5, mask=samax.normalization_only),
        samax.occasionally(samax.usam(0.5, mask=samax.normalization_only), samax.every(2)),
        samax.stale_sam(optax.sgd(0.1), 0.5, mask=samax.normalization_only),
    ):
        grads = jax.grad(loss_fn)(params)
        update = jax.jit(functools.partial(tx.update, value_fn=loss_fn))
        updates, _ = update(grads, tx.init(params), params)
        assert np.all(np.isfinite(updates["kernel"]))
