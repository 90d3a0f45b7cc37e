"""Every method under `jit` with sharded arrays: what one device computes, and laid out alike."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import samax
from tests.marks import needs_explicit_sharding, slow_unless
from tests.methods import METHODS, SHAPES, batch_of, initial, sgd, train_step

INPUTS, TARGETS = batch_of()


def loss_fn(params, x, y, layout=None):
    """`layout` names where intermediates are, which explicit sharding wants to be told."""
    if layout == "fully sharded":
        params = jax.sharding.reshard(params, P())
    if layout == "both":  # each device gathers its part of the model, as where both are in use
        gathered = {"lora_a": P(None, "model"), "lora_b": P("model"), "bias": P()}
        params = jax.sharding.reshard(params, gathered)
    where = {"out_sharding": P("data")} if layout in ("tensor parallel", "both") else {}
    hidden = jnp.tanh(x @ params["lora_a"])
    return jnp.mean(
        ((jnp.dot(hidden, params["lora_b"], **where) + params["bias"]).mean(1) - y) ** 2
    )


# The batch is on "data"; where the parameters are:
LAYOUTS = {
    "data parallel": {"lora_a": P(), "lora_b": P(), "bias": P()},
    "fully sharded": {"lora_a": P("data"), "lora_b": P("data"), "bias": P("data")},
    "tensor parallel": {"lora_a": P(None, "model"), "lora_b": P("model"), "bias": P()},
    "both": {"lora_a": P("data", "model"), "lora_b": P("model", "data"), "bias": P()},
}


# Batches that the first axis of the mesh shares are not cut in two groups once more.
OPTIMIZERS = {name: method.optimizer(track=True) for name, method in METHODS.items()} | {
    "m_sharpness": optax.chain(samax.m_sharpness(samax.sam(0.1), 1), sgd())
}
# The others are like these, and slow tests.
every_method = pytest.mark.parametrize("method", slow_unless(SHAPES, METHODS))


def step(method, params, state, x, y, layout=None):
    loss = lambda params, batch: loss_fn(params, *batch, layout=layout)
    return train_step(OPTIMIZERS[method], params, state, (x, y), loss)


def mesh_of(axis_type=None):
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    kinds = {} if axis_type is None else {"axis_types": (axis_type,) * 2}
    return Mesh(devices, ("data", "model"), **kinds)


def placed(mesh, layout):
    """Parameters and batch, each where its layout says."""
    put = lambda x, where: jax.device_put(x, NamedSharding(mesh, where))
    params = {name: put(leaf, LAYOUTS[layout][name]) for name, leaf in initial().items()}
    return params, put(INPUTS, P("data")), put(TARGETS, P("data"))


def spec(leaf):
    """Over which axis of the mesh each dimension is, for arrays and for their types."""
    axes = tuple(getattr(leaf.sharding, "spec", ("one device",)))
    return axes + (None,) * (leaf.ndim - len(axes))


def misplaced(tree, params):
    """Leaves named and shaped like a parameter that are elsewhere than it."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shown = jax.tree_util.keystr(path)
        for name, param in params.items():
            alike = name in shown and leaf.shape == param.shape
            if alike and spec(leaf) != spec(param):
                found.append((shown, leaf.sharding))
    return found


@functools.cache
def on_one_device(method):
    params = initial()
    return jax.device_get(step(method, params, OPTIMIZERS[method].init(params), INPUTS, TARGETS))


def assert_computed_on_one_device(method, result):
    """Parameters, states and metrics, norms among them; in float64, where rounding is no excuse."""
    expected = on_one_device(method)
    chex.assert_trees_all_close(jax.device_get(result), expected, rtol=1e-9, atol=1e-12)


def check_one_step(method, layout):
    params, x, y = placed(mesh_of(), layout)
    state = OPTIMIZERS[method].init(params)
    assert misplaced(state, params) == []
    result = jax.jit(functools.partial(step, method))(params, state, x, y)
    assert_computed_on_one_device(method, result)
    assert misplaced(result, params) == []


@pytest.mark.parametrize("method", slow_unless(["sam", "nbar"], METHODS))
def test_sharded_over_both_axes(method, x64):
    """Data parallel, fully sharded and tensor parallel at once."""
    check_one_step(method, "both")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data parallel", "fully sharded", "tensor parallel"])
@pytest.mark.parametrize("method", METHODS)
def test_sharded_in_one_way(method, layout, x64):
    check_one_step(method, layout)


@needs_explicit_sharding
@pytest.mark.parametrize("layout", LAYOUTS)
@every_method
def test_explicit_sharding_type_checks(method, layout):
    """And types say that states, from `init` under `jit` too, are where their parameters are."""
    mesh = mesh_of(jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, x, y = placed(mesh, layout)
        state = jax.eval_shape(OPTIMIZERS[method].init, params)
        new_params, new_state = jax.eval_shape(
            functools.partial(step, method, layout=layout),
            params,
            OPTIMIZERS[method].init(params),
            x,
            y,
        )
    assert misplaced((state, new_state, new_params), params) == []
    assert jax.tree.structure(state) == jax.tree.structure(new_state)


@needs_explicit_sharding
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_explicit_sharding_computes_what_one_device_does(method, x64):
    mesh = mesh_of(jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, x, y = placed(mesh, "both")
        state = jax.jit(OPTIMIZERS[method].init)(params)
        result = jax.jit(functools.partial(step, method, layout="both"))(params, state, x, y)
    assert_computed_on_one_device(method, result)


def samples_on(sharding, place):
    """The direction of Frob-SAM from 8 samples, 4 at once, and the operations of one device."""
    sampling = samax.Sampling(samax.gaussian, 8, batch_size=4, sharding=sharding)
    tx = samax.frob_sam(0.1, lam=1.0, sampling=sampling)
    weights = place(jax.random.normal(jax.random.key(2), (32, 32)) / 6)
    inputs = place(jax.random.normal(jax.random.key(3), (64, 32)))

    def direction(weights, inputs, state):
        loss = lambda w: jnp.mean(jnp.tanh(jnp.tanh(inputs @ w) @ w) ** 2)
        value, grads = jax.value_and_grad(loss)(weights)
        return tx.update(grads, state, weights, value=value, value_fn=loss)[0]

    compiled = jax.jit(direction).lower(weights, inputs, tx.init(weights)).compile()
    analysis = compiled.cost_analysis()
    flops = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    return jax.device_get(compiled(weights, inputs, tx.init(weights))), flops


@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=needs_explicit_sharding)])
def test_samples_spread_over_devices(kind):
    """8 samples on 4 devices are 2 evaluations on each, besides the clean one; same result."""
    axis_types = {"axis_types": (getattr(jax.sharding.AxisType, kind),)}
    mesh = Mesh(np.array(jax.devices()[:4]), ("samples",), **axis_types)
    everywhere = lambda x: jax.device_put(x, NamedSharding(mesh, P()))
    spread, share = samples_on(NamedSharding(mesh, P("samples")), everywhere)
    alone, whole = samples_on(None, lambda x: x)
    np.testing.assert_allclose(spread, alone, rtol=1e-4, atol=1e-5 * np.max(np.abs(alone)))
    assert share / whole == pytest.approx(3 / 9, rel=0.1)


def test_samples_that_devices_do_not_divide():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("samples",)), P("samples"))
    with pytest.raises(ValueError, match=r"sharding must divide the 2 samples.*batch_size"):
        samax.Sampling(samax.gaussian, 4, batch_size=2, sharding=sharding)
    with pytest.raises(ValueError, match="sharding must divide the 1 samples"):
        samax.Sampling(samax.gaussian, 4, sharding=sharding)
