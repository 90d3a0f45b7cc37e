"""The mistakes of a first user get messages that name the fix."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import samax
import samax.flax

X, Y = jnp.ones((4, 2)), jnp.zeros((4, 1))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def with_aux(model, x, y):
    return loss_fn(model, x, y), model(x)


@pytest.fixture
def model():
    return nnx.Linear(2, 1, rngs=nnx.Rngs(0))


def test_a_missing_has_aux(model):
    with pytest.raises(TypeError, match=r"got a tuple.*has_aux=True"):
        samax.flax.value_and_grad(with_aux, samax.sam(0.1))(model, X, Y)
    value_fn = samax.flax.value_fn(model, with_aux, X, Y)
    with pytest.raises(TypeError, match=r"got a tuple.*has_aux=True"):
        value_fn(nnx.state(model, nnx.Param))
    with pytest.raises(TypeError, match=r"got a tuple.*has_aux=True"):
        samax.value_and_grad(lambda w: (w.sum(), w), samax.sam(0.1))(jnp.ones(2))


def test_a_has_aux_too_many(model):
    with pytest.raises(TypeError, match=r"must return a pair.*drop has_aux=True"):
        samax.flax.value_and_grad(loss_fn, samax.sam(0.1), has_aux=True)(model, X, Y)
    with pytest.raises(TypeError, match=r"must return a pair.*drop has_aux=True"):
        samax.value_and_grad(lambda w: w.sum(), samax.sam(0.1), has_aux=True)(jnp.ones(2))


def test_parameters_by_keyword_are_an_error_of_jax():
    with pytest.raises(TypeError, match="argnums=0 requires at least 1 positional"):
        samax.value_and_grad(lambda w: w.sum(), samax.sam(0.1))(w=jnp.ones(2))


@pytest.mark.parametrize(
    "value_fn",
    [lambda model: loss_fn(model, X, Y), loss_fn, functools.partial(loss_fn, x=X, y=Y)],
    ids=["a lambda", "by name", "a partial"],
)
def test_a_function_of_the_model(model, value_fn):
    optimizer = nnx.Optimizer(model, optax.chain(samax.sam(0.1), optax.sgd(0.1)), wrt=nnx.Param)
    grads = nnx.grad(loss_fn)(model, X, Y)
    with pytest.raises(TypeError, match=r"failed on the parameters.*samax.flax.value_fn\(model, l"):
        optimizer.update(model, grads, value_fn=value_fn, x=X, y=Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(2, 1, rngs=rngs),
        lambda rngs: nnx.BatchNorm(2, rngs=rngs),
        lambda rngs: nnx.Dropout(0.5, rngs=rngs),
    ],
    ids=["parameters", "statistics", "keys"],
)
def test_an_nnx_model_where_a_pytree_belongs(make):
    """JAX would take the model as a pytree, and perturb its batch statistics with the rest."""
    model = make(nnx.Rngs(0))
    with pytest.raises(TypeError, match=rf"NNX model {type(model).__name__}.*samax.flax.value_and"):
        samax.value_and_grad(loss_fn, samax.sam(0.1))(model, X, Y)
    moved = lambda x, model: loss_fn(model, x, Y)
    with pytest.raises(TypeError, match=r"NNX model .*samax.flax.value_and_grad"):
        samax.value_and_grad(moved, samax.sam(0.1), argnums=1)(X, model)


def test_the_state_of_an_nnx_model_is_a_pytree(model):
    """What `nnx.split` gives is not a model, and what is not differentiated may be one."""
    graph, params = nnx.split(model)
    loss = lambda params, _: loss_fn(nnx.merge(graph, params), X, Y)
    _, grads = samax.value_and_grad(loss, samax.sam(0.1))(params, model)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


def test_no_function_and_the_ways_around_it(model):
    optimizer = nnx.Optimizer(model, optax.chain(samax.sam(0.1), optax.sgd(0.1)), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"samax.value_and_grad.*samax.alternating"):
        optimizer.update(model, nnx.grad(loss_fn)(model, X, Y))


def test_a_method_with_a_state(model):
    with pytest.raises(ValueError, match="keeps one between steps"):
        samax.flax.value_and_grad(loss_fn, samax.vasso(0.1))(model, X, Y)


def test_an_adapted_models_other_variables_are_left_alone():
    """No `wrt`: the optimizer's own state says which variables it is."""
    model = nnx.LoRA(2, 1, 1, base_module=nnx.Linear(2, 1, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.chain(samax.sam(0.1), optax.sgd(0.1)), wrt=nnx.LoRAParam)
    value_fn = samax.flax.value_fn(model, loss_fn, X, Y)
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, X, Y)
    before = model.base_module.kernel[...]
    optimizer.update(model, grads, value_fn=value_fn)
    assert jnp.array_equal(before, model.base_module.kernel[...])
