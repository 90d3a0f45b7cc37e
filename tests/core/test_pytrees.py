"""Parameters of any shape: nested, empty, scalar leaves, None leaves, thousands of leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import samax
from tests.methods import METHODS, where

OF_VECTORS = {name: METHODS[name].before(0.1, track=True) for name in where(of_vector=True)}

leaves = st.one_of(
    st.none(),
    st.sampled_from([(), (1,), (3,), (2, 2), (0,), (2, 0)]).flatmap(
        lambda shape: st.integers(0, 2**16).map(
            lambda seed: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        )
    ),
)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
    ),
    max_leaves=8,
).filter(lambda tree: tree is not None)  # no parameters at all are an error


def loss_fn(params):
    return sum(jnp.sum(jnp.cosh(leaf)) for leaf in jax.tree.leaves(params)) + 0.0


@settings(max_examples=30)
@given(tree=trees, name=st.sampled_from(sorted(OF_VECTORS)))
def test_any_pytree_is_its_flat_vector(tree, name):
    """Every method here is a function of the vector of all parameters: the tree does not matter."""
    tx, params = OF_VECTORS[name], jax.tree.map(jnp.asarray, tree)
    state = tx.init(params)
    grads = jax.grad(loss_fn)(params)
    updates, new_state = tx.update(grads, state, params, value=loss_fn(params), value_fn=loss_fn)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)

    vector = ravel(params)
    expected, _ = tx.update(
        ravel(grads), tx.init(vector), vector, value_fn=lambda v: jnp.sum(jnp.cosh(v))
    )
    np.testing.assert_allclose(ravel(updates), expected, rtol=1e-5, atol=1e-6)


def ravel(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)] + [jnp.zeros(0)])


def test_an_empty_tree():
    for tx in OF_VECTORS.values():
        updates, state = tx.update({}, tx.init({}), {}, value_fn=lambda p: jnp.zeros(()))
        assert updates == {}
        assert all(jnp.all(~jnp.isinf(leaf)) for leaf in jax.tree.leaves(state))


def test_python_scalars_and_numpy_arrays_are_leaves():
    params = {"a": 1.0, "b": np.float32(2.0), "c": np.ones(2, np.float32)}
    tx = optax.chain(samax.sam(0.1), optax.sgd(0.1))
    grads = jax.grad(loss_fn)(params)
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss_fn)
    assert float(updates["a"]) < 0


def test_leaves_of_different_dtypes_share_one_norm():
    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(3)}
    grads = {"half": jnp.full(3, 3.0, jnp.bfloat16), "single": jnp.full(3, 4.0)}
    tx, points = samax.sam(5 * np.sqrt(3.0)), []
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda p: points.append(p) or p)
    np.testing.assert_allclose(points[0]["half"].astype(jnp.float32), 4.0)
    np.testing.assert_allclose(points[0]["single"], 5.0, rtol=1e-6)
    assert updates["half"].dtype == jnp.bfloat16
    assert updates["single"].dtype == jnp.float32


@pytest.mark.slow
def test_thousands_of_leaves():
    """Eagerly: what compiling such a program costs is a benchmark's business."""
    params = {f"layer{i}": jnp.full(2, 1e-3 * i) for i in range(2_000)}
    tx, grads = OF_VECTORS["samar"], {key: 2 * value for key, value in params.items()}
    squares = lambda p: {key: 2 * value for key, value in p.items()}
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=squares)
    norm = np.sqrt(2 * np.sum(np.square(2e-3 * np.arange(2_000))))
    np.testing.assert_allclose(
        updates["layer1999"], grads["layer1999"] * (1 + 0.2 / norm), rtol=1e-5
    )
