"""The gradient line: a direction in place of the gradient, under any trainer."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-6)

X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.sin(X).sum(axis=1)
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}
STATELESS = {
    "sam": samax.sam(0.1),
    "usam": samax.usam(0.1),
    "asam": samax.asam(0.1),
    "wsam": samax.wsam(0.1),
    "gsam": samax.gsam(0.1),
    "masked": samax.sam(0.1, mask={"w": True, "b": False}),
    "several steps": samax.sharpness_aware(samax.scale_to_norm(0.05), steps=2),
}


def loss_fn(params, x, y, *, scale=1.0):
    return scale * jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


def with_aux(params, x, y, *, key):
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    loss = loss_fn(params, x * kept, y)
    return loss, {"kept": kept, "loss": loss}


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
@pytest.mark.parametrize("name", STATELESS)
def test_it_is_the_full_forms_direction(name, transform):
    method = STATELESS[name]
    evaluate = transform(samax.value_and_grad(loss_fn, method))
    value, direction = evaluate(PARAMS, X, y=Y, scale=2.0)
    fn = functools.partial(loss_fn, x=X, y=Y, scale=2.0)
    loss, grads = jax.value_and_grad(fn)(PARAMS)
    expected, _ = method.update(grads, method.init(PARAMS), PARAMS, value=loss, value_fn=fn)
    assert_close((value, direction), (loss, expected))
    assert any(
        np.any(np.abs(d - g) > 1e-4)
        for d, g in zip(*map(jax.tree.leaves, (direction, grads)), strict=True)
    )


def test_the_auxiliary_output_and_the_randomness_are_the_clean_pass():
    key = jax.random.key(3)
    evaluate = samax.value_and_grad(with_aux, samax.sam(0.1), has_aux=True)
    (value, aux), direction = evaluate(PARAMS, X, Y, key=key)
    (expected, expected_aux), grads = jax.value_and_grad(with_aux, has_aux=True)(
        PARAMS, X, Y, key=key
    )
    assert_close((value, aux), (expected, expected_aux))
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, PARAMS, grads)
    # The same mask in both passes.
    assert_close(direction, jax.grad(loss_fn)(point, X * aux["kept"], Y))


def test_the_parameters_may_be_any_argument_or_several():
    moved = lambda x, params, y: loss_fn(params, x, y)
    expected = samax.value_and_grad(loss_fn, samax.sam(0.1))(PARAMS, X, Y)
    assert_close(samax.value_and_grad(moved, samax.sam(0.1), argnums=1)(X, PARAMS, Y), expected)
    split = lambda w, x, y, b: loss_fn({"w": w, "b": b}, x, y)
    value, (w, b) = samax.value_and_grad(split, samax.sam(0.1), argnums=(0, 3))(
        PARAMS["w"], X, Y, PARAMS["b"]
    )
    # One perturbation, with the norm over both.
    assert_close((value, {"w": w, "b": b}), expected)


def test_under_accumulation_and_in_a_train_state():
    """Nothing else of the trainer changes: each micro-batch is perturbed on its own."""
    from flax.training.train_state import TrainState

    tx = optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    grad_fn = samax.value_and_grad(loss_fn, samax.sam(0.1))
    halves = list(zip(jnp.split(X, 2), jnp.split(Y, 2), strict=True))
    for x, y in halves:
        _, grads = grad_fn(state.params, x, y)
        state = state.apply_gradients(grads=grads)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(grad_fn(PARAMS, x, y)[1] for x, y in halves))
    assert_close(state.params, jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, mean))


@pytest.mark.parametrize(
    "method",
    [
        samax.vasso(0.1),
        samax.samar(0.1),
        samax.sam(optax.linear_schedule(0.1, 0.0, 10)),
        samax.sam(0.1, track=True),
        samax.trace_sam(0.1),
    ],
)
def test_a_method_with_a_state_is_refused(method):
    with pytest.raises(ValueError, match=r"keeps one between steps.*tx.update\(grads, state, par"):
        samax.value_and_grad(loss_fn, method)(PARAMS, X, Y)


def test_errors():
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        samax.value_and_grad(1.0, samax.sam(0.1))
    with pytest.raises(TypeError, match="method must be an Optax gradient transformation"):
        samax.value_and_grad(loss_fn, samax.sam)
