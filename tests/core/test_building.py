"""Building, starting and mapping: what Optax's own optimizers do, every method does."""

import functools
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import samax
from tests.marks import needs_explicit_sharding, slow_unless
from tests.methods import METHODS, SHAPES, batch_of, initial, loss_fn, train_step

ROOT = Path(__file__).parents[2]
every_method = pytest.mark.parametrize("name", METHODS)


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
from tests.methods import METHODS, SHAPES, batch_of, initial, loss_fn, train_step
for method in METHODS.values():
    method.optimizer()
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
    tx, params = METHODS[name].optimizer(track=True), initial()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    expected = layout(tx.init(params))
    assert layout(tx.init(abstract)) == expected
    assert layout(jax.eval_shape(tx.init, params)) == expected


@every_method
def test_the_state_maps_like_parameters(name):
    """`optax.tree.map_params`, with which states are sharded as their parameters are."""
    tx, params = METHODS[name].optimizer(track=True), initial()
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
        shapes = {"A": (4, 8), "B": (8, 4), "C": (4,)}
        pairs = zip(jax.tree.leaves(marked), jax.tree.leaves(_prefix(marked, state)), strict=True)
        for mark, leaf in pairs:
            if mark in shapes:
                assert leaf.shape == shapes[mark]
    kept = optax.tree.map_params(tx, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(kept, state)


def _prefix(marked, state):
    """The leaves of `state` where `marked` has one: rates of groups are one non-parameter."""
    return jax.tree.map(lambda mark, leaf: leaf if mark != "-" else 0, marked, state)


@pytest.mark.parametrize("name", slow_unless(SHAPES, METHODS))
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_types_are_constant_under_scan(name, dtype, request):
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    tx, params = METHODS[name].optimizer(track=True), initial(dtype)
    start = (params, tx.init(params))

    def body(carry, _):
        return train_step(tx, *carry, batch_of()), None

    end = jax.eval_shape(lambda carry: jax.lax.scan(body, carry, length=3)[0], start)
    chex.assert_trees_all_equal_structs(end, start)
    chex.assert_trees_all_equal_shapes_and_dtypes(end, start)


@pytest.mark.parametrize("name", slow_unless(SHAPES, METHODS))
@needs_explicit_sharding
def test_explicit_sharding_types_agree_between_init_update_and_jit(name):
    axes = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=axes)
    with jax.set_mesh(mesh):
        params = {
            key: jax.device_put(leaf, NamedSharding(mesh, P("data" if key == "lora_a" else None)))
            for key, leaf in initial().items()
        }
        tx = METHODS[name].optimizer(track=True)

        def loss(params, batch):
            whole = jax.sharding.reshard(params, P())
            return loss_fn(whole, batch)

        def update(params, state):
            return train_step(tx, params, state, batch_of(), loss)[1]

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
    _, state = jax.jit(functools.partial(train_step, tx))(params, tx.init(params), batch_of())
    assert float(state[0].hyperparams["rho"]) == pytest.approx(0.1)
    with pytest.raises(TypeError, match=r"mask must be a pytree of Python booleans.*static_args"):
        optax.inject_hyperparams(samax.sam)(0.1, mask=samax.weights_only).init(params)
