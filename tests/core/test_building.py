"""Building, starting and mapping: what Optax's own optimizers do, every method does."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import samax
from tests.marks import needs_explicit_sharding
from tests.methods import METHODS

ROOT = Path(__file__).parents[2]
INPUTS = jax.random.normal(jax.random.key(0), (8, 4))

every_method = pytest.mark.parametrize("name", METHODS)


def initial(dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(1))
    return {
        "lora_a": (0.5 * jax.random.normal(a, (4, 2))).astype(dtype),
        "lora_b": (0.5 * jax.random.normal(b, (2, 4))).astype(dtype),
        "bias": jnp.zeros(4, dtype),
    }


def loss_fn(params, batch):
    hidden = batch.astype(params["bias"].dtype) @ params["lora_a"] @ params["lora_b"]
    return jnp.mean((hidden + params["bias"] - 1) ** 2)


def step(tx, params, state, batch=INPUTS):
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn, batch=batch)
    return optax.apply_updates(params, updates), state


def layout(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def test_building_runs_no_jax():
    """In a fresh process: what starts JAX's backends makes `jax.distributed.initialize` raise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"""
import jax, optax
import samax, samax.flax, samax.flatness
from tests.methods import METHODS
for build in METHODS.values():
    build()
samax.scale_to_norm(optax.cosine_decay_schedule(0.1, 10))
samax.adaptive_weight(); samax.surrogate_gap(0.1); samax.rule(lambda clean, perturbed: perturbed)
samax.cube(0.01); samax.scaled_by_params(samax.gaussian); samax.groups_by_path(r"(?P<group>.)/")
samax.cross_replica_mean("data"); samax.value_and_grad(lambda w: w, samax.sam(0.1))
samax.flax.value_and_grad(lambda model: 0.0, samax.sam(0.1))
optax.inject_hyperparams(samax.sam)(rho=optax.constant_schedule(0.1))
jax.distributed.initialize("127.0.0.1:{port}", num_processes=1, process_id=0)
assert jax.process_count() == 1
print("initialized")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "initialized", done.stderr


@every_method
def test_init_takes_abstract_parameters(name):
    tx, params = METHODS[name](), initial()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    expected = layout(tx.init(params))
    assert layout(tx.init(abstract)) == expected
    assert layout(jax.eval_shape(tx.init, params)) == expected


@every_method
def test_the_state_maps_like_parameters(name):
    """`optax.tree.map_params`, with which states are sharded as their parameters are."""
    tx, params = METHODS[name](), initial()
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx,
        lambda leaf, mark: mark,
        state,
        {"lora_a": "A", "lora_b": "B", "bias": "C"},
        transform_non_params=lambda _: "-",
        # What a mask hides.
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    assert optax.tree.get_all_with_path(marked, "trace")[0][1] == {
        "lora_a": "A",
        "lora_b": "B",
        "bias": "C",
    }
    # Whatever looks like a parameter is known to be one, but for the groups' own axis.
    if name != "m_sharpness":
        shapes = {"A": (4, 2), "B": (2, 4), "C": (4,)}
        pairs = zip(jax.tree.leaves(marked), jax.tree.leaves(_prefix(marked, state)), strict=True)
        for mark, leaf in pairs:
            if mark in shapes:
                assert leaf.shape == shapes[mark]
    kept = optax.tree.map_params(tx, lambda leaf: leaf, state)
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def _prefix(marked, state):
    """The leaves of `state` where `marked` has one: rates of groups are one non-parameter."""
    return jax.tree.map(lambda mark, leaf: leaf if mark != "-" else 0, marked, state)


@every_method
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types_are_constant_under_scan(name, dtype):
    tx, params = METHODS[name](), initial(dtype)
    start = (params, tx.init(params))

    def body(carry, _):
        return step(tx, *carry), None

    end = jax.eval_shape(lambda carry: jax.lax.scan(body, carry, length=3)[0], start)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(end) == shapes(start)


@every_method
@needs_explicit_sharding
def test_explicit_sharding_types_agree_between_init_update_and_jit(name):
    axes = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=axes)
    with jax.set_mesh(mesh):
        params = {
            key: jax.device_put(leaf, NamedSharding(mesh, P("data" if key == "lora_a" else None)))
            for key, leaf in initial().items()
        }
        tx = METHODS[name]()

        def loss(params, batch):
            whole = jax.sharding.reshard(params, P())
            return loss_fn(whole, batch)

        def update(params, state):
            grads = jax.grad(loss)(params, INPUTS)
            value = loss(params, INPUTS)
            return tx.update(grads, state, params, value=value, value_fn=loss, batch=INPUTS)[1]

        types = lambda tree: jax.tree.map(lambda leaf: str(jax.typeof(leaf)), tree)
        state = tx.init(params)
        assert types(jax.eval_shape(tx.init, params)) == types(state)
        assert types(jax.eval_shape(update, params, state)) == types(state)


@pytest.mark.parametrize(
    "recipe", [samax.sam, samax.usam, samax.asam, samax.vasso, samax.wsam, samax.gsam, samax.samar]
)
def test_other_libraries_signature_is_one_clear_error(recipe):
    with pytest.raises(TypeError, match=rf"{recipe.__name__} takes no optimizer.*optax.chain\("):
        recipe(optax.sgd(0.1), rho=0.05)


def test_injected_hyperparameters():
    radius = optax.linear_schedule(0.1, 0.0, 10)
    tx = optax.chain(optax.inject_hyperparams(samax.sam)(rho=radius), optax.sgd(0.1))
    params = initial()
    _, state = jax.jit(lambda params, state: step(tx, params, state))(params, tx.init(params))
    assert float(state[0].hyperparams["rho"]) == pytest.approx(0.1)
    with pytest.raises(TypeError, match=r"mask must be a pytree of Python booleans.*static_args"):
        optax.inject_hyperparams(samax.sam)(0.1, mask=samax.weights_only).init(params)
