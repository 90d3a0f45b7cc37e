"""Orbax saves and restores the state; resumed training is the uninterrupted one, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import samax

RATE = optax.linear_schedule(0.1, 0.0, 8)
OPTIMIZERS = {
    "sam": lambda: samax.sam(optax.linear_schedule(0.2, 0.0, 8), track=True),
    "vasso": lambda: samax.vasso(0.1, theta=0.3, track=True),
    "samar": lambda: samax.samar(0.1, gamma=0.01, track=True),
    "gsam": lambda: samax.gsam(0.1, optax.linear_schedule(0.5, 0.0, 8)),
    "masked": lambda: samax.sharpness_aware(
        samax.perturb_only(samax.gradient_ema(0.3), {"w": True, "b": False})
    ),
    "rounded": lambda: samax.sharpness_aware(
        optax.chain(samax.normalize(), samax.stochastic_rounding(0))
    ),
    "frob, raw key": lambda: frob_sam(key=3),
    "frob, typed key": lambda: frob_sam(key=jax.random.key(3)),
}


def frob_sam(key):
    rho = optax.linear_schedule(0.2, 0.1, 8)
    sampling = samax.Sampling(samax.rademacher, num_samples=2, key=key)
    return samax.frob_sam(rho, lam=0.1, sampling=sampling, track=True)


def loss_fn(params, step):
    inputs = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 3))
    prediction = jnp.tanh(inputs @ params["w"].astype(jnp.float32)) + params["b"]
    return jnp.mean((prediction - inputs[:, :2]) ** 2)


def make_step(tx):
    @jax.jit
    def step(params, state, number):
        fn = functools.partial(loss_fn, step=number)
        value, grads = jax.value_and_grad(fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=fn)
        return optax.apply_updates(params, updates), state

    return step


def assert_identical(left, right):
    assert left.dtype == right.dtype
    if jnp.issubdtype(left.dtype, jax.dtypes.prng_key):
        assert jax.random.key_impl(left) == jax.random.key_impl(right)
        left, right = jax.random.key_data(left), jax.random.key_data(right)
    np.testing.assert_array_equal(left, right)


@pytest.mark.optimized
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_training_equals_the_uninterrupted_run(name, tmp_path):
    dtype = jnp.bfloat16 if name == "rounded" else jnp.float32
    initial = {"w": jnp.full((3, 2), 0.3, dtype), "b": jnp.zeros(2, dtype)}
    tx = optax.chain(OPTIMIZERS[name](), optax.sgd(RATE, momentum=0.9))
    step = make_step(tx)
    params, state = initial, tx.init(initial)
    for number in range(3):
        params, state = step(params, state, number)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", (params, state))
    for number in range(3, 6):
        params, state = step(params, state, number)

    # Another process would build everything anew.
    tx = optax.chain(OPTIMIZERS[name](), optax.sgd(RATE, momentum=0.9))
    step = make_step(tx)
    layout = jax.eval_shape(lambda: (initial, tx.init(initial)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored, restored_state = checkpointer.restore(tmp_path / "checkpoint", layout)
    for number in range(3, 6):
        restored, restored_state = step(restored, restored_state, number)
    assert jax.tree.structure(restored_state) == jax.tree.structure(state)
    jax.tree.map(assert_identical, (restored, restored_state), (params, state))
    assert optax.tree.get_all_with_path(state, "count")[0][1] == 6 or name == "rounded"
