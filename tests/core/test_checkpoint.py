"""Orbax saves and restores the state; resumed training is the uninterrupted one, bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

import samax
from tests.marks import slow_unless
from tests.methods import METHODS, SHAPES, Method, batch_of, initial, train_step


def frob_sam(key):
    sampling = samax.Sampling(samax.rademacher, num_samples=2, key=key)
    return Method(samax.frob_sam, {"lam": 0.1, "sampling": sampling})


ROWS = METHODS | {"a raw key": frob_sam(3), "a typed key": frob_sam(jax.random.key(3))}


def without_keys(tree):
    """Typed keys as the numbers behind them."""
    typed = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if typed(x) else x, tree)


@pytest.mark.parametrize("name", slow_unless([*SHAPES, "a typed key"], ROWS))
def test_resumed_training_equals_the_uninterrupted_run(name, tmp_path):
    # Where rounding is at random its numbers have to be restored too.
    chex.clear_trace_counter()
    start = initial(jnp.bfloat16 if name == "stochastic_rounding" else jnp.float32)

    @jax.jit
    @chex.assert_max_traces(n=1)  # neither a step nor a checkpoint compiles anew
    def step(params, state, batch):
        return train_step(tx, params, state, batch)

    def train(carry, steps):
        for number in steps:
            carry = step(*carry, batch_of(number))
        return carry

    tx = ROWS[name].optimizer(track=True)
    halfway = train((start, tx.init(start)), range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", halfway)
    # Another process would build everything anew.
    layout = jax.eval_shape(lambda: (start, ROWS[name].optimizer(track=True).init(start)))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", layout)
    chex.assert_trees_all_equal_structs(restored, halfway)
    chex.assert_trees_all_equal_dtypes(restored, halfway)
    chex.assert_trees_all_equal(without_keys(restored), without_keys(halfway))
    resumed, expected = train(restored, range(3, 5)), train(halfway, range(3, 5))
    chex.assert_trees_all_equal(without_keys(resumed), without_keys(expected))


def test_a_schedule_goes_on_counting(tmp_path):
    """A radius that is frozen at its first value is what others' checkpoints gave."""
    rho = optax.linear_schedule(0.2, 0.0, 4)
    tx, params = samax.sam(rho, track=True), initial()
    step, state = functools.partial(train_step, tx), tx.init(params)
    for number in range(2):
        params, state = step(params, state, batch_of(number))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    layout = jax.eval_shape(tx.init, params)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "checkpoint", layout)
    _, state = step(params, state, batch_of(2))
    assert float(state.metrics.perturbation_norm) == pytest.approx(0.1, rel=1e-5)
