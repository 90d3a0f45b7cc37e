"""Flax NNX, Flax Linen, Equinox and bare pytrees."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import samax
import samax.flax

INPUTS = jax.random.normal(jax.random.key(1), (16, 4))
TARGETS = jnp.sin(INPUTS).sum(axis=1, keepdims=True)


class Network(nnx.Module):
    """Batch norm and dropout, whose calls change the model."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def sam_sgd(rho=0.1):
    return optax.chain(samax.sam(rho, track=True), optax.sgd(0.05, momentum=0.9))


@nnx.jit
def nnx_step(model, optimizer, x, y):
    value_fn = samax.flax.value_fn(model, nnx_loss, x, y)
    value, grads = nnx.value_and_grad(nnx_loss)(model, x, y)
    optimizer.update(model, grads, value=value, value_fn=value_fn)
    return value


def pure(model, *filters):
    return nnx.to_pure_dict(nnx.state(model, *filters))


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), left, right)


def test_nnx_against_the_same_step_written_out():
    model, reference = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, sam_sgd(), wrt=nnx.Param)
    nnx_step(model, optimizer, INPUTS, TARGETS)

    # Two models with the same statistics and keys: one for each pass.
    perturbed = nnx.clone(reference)
    grads = nnx.grad(nnx_loss)(reference, INPUTS, TARGETS)
    norm = optax.tree.norm(nnx.to_pure_dict(grads))
    params = nnx.state(reference, nnx.Param)
    nnx.update(perturbed, jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads))
    ascended = nnx.grad(nnx_loss)(perturbed, INPUTS, TARGETS)
    nnx.update(reference, jax.tree.map(lambda w, g: w - 0.05 * g, params, ascended))

    assert_close(pure(model, nnx.Param), pure(reference, nnx.Param))
    # The statistics and the keys have moved once, with the clean pass.
    assert_close(pure(model, nnx.BatchStat), pure(reference, nnx.BatchStat))
    assert model.dropout.rngs.count[...] == reference.dropout.rngs.count[...] == 1


def test_both_passes_draw_the_same_dropout_mask_and_the_next_step_another():
    masks = []

    class Masked(nnx.Module):
        def __init__(self, rngs):
            self.weight = nnx.Param(jnp.ones(64))
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self):
            dropped = self.dropout(self.weight[...])
            jax.debug.callback(lambda x: masks.append(np.asarray(x) > 0), dropped)
            return jnp.sum(dropped**2)

    model = Masked(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, samax.sam(0.1), wrt=nnx.Param)
    for _ in range(2):
        value_fn = samax.flax.value_fn(model, Masked.__call__)
        _, grads = nnx.value_and_grad(Masked.__call__)(model)
        optimizer.update(model, grads, value_fn=value_fn)
    jax.effects_barrier()
    clean, perturbed, next_clean, next_perturbed = masks
    np.testing.assert_array_equal(clean, perturbed)
    np.testing.assert_array_equal(next_clean, next_perturbed)
    assert not np.array_equal(clean, next_clean)


def test_what_the_perturbed_pass_writes_is_dropped():
    model = Network(nnx.Rngs(0))
    before = pure(model, nnx.Not(nnx.RngKey))
    value_fn = samax.flax.value_fn(model, nnx_loss, INPUTS, TARGETS)
    value_fn(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before, pure(model, nnx.Not(nnx.RngKey)))
    # A snapshot: the clean pass that follows does not move what value_fn sees.
    first = value_fn(nnx.state(model, nnx.Param))
    nnx_loss(model, INPUTS, TARGETS)
    assert value_fn(nnx.state(model, nnx.Param)) == first


def test_nnx_auxiliary_output_and_filters():
    def with_logits(model, x, y):
        prediction = model(x)
        return jnp.mean((prediction - y) ** 2), prediction

    model = Network(nnx.Rngs(0))
    last_layer = nnx.All(nnx.Param, nnx.PathContains("last"))
    optimizer = nnx.Optimizer(model, sam_sgd(), wrt=last_layer)
    before = pure(model, nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value_fn = samax.flax.value_fn(model, with_logits, x, y, has_aux=True)
        (value, logits), grads = nnx.value_and_grad(
            with_logits, has_aux=True, argnums=nnx.DiffState(0, last_layer)
        )(model, x, y)
        optimizer.update(model, grads, value=value, value_fn=value_fn)
        return logits

    assert step(model, optimizer, INPUTS, TARGETS).shape == (16, 1)
    after = pure(model, nnx.Param)
    np.testing.assert_array_equal(before["first"]["kernel"], after["first"]["kernel"])
    assert np.any(before["last"]["kernel"] != after["last"]["kernel"])


def test_a_nnx_model_without_state_equals_the_bare_pytree():
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    params = pure(model, nnx.Param)
    optimizer = nnx.Optimizer(model, sam_sgd(), wrt=nnx.Param)

    def loss(p):
        return jnp.mean((INPUTS @ p["kernel"] + p["bias"] - TARGETS) ** 2)

    tx = sam_sgd()
    state = tx.init(params)
    for _ in range(3):
        nnx_step(model, optimizer, INPUTS, TARGETS)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        params = optax.apply_updates(params, updates)
    assert_close(pure(model, nnx.Param), params)


@pytest.mark.slow
@pytest.mark.parametrize("key", [0, "typed"])
def test_the_universal_class_in_nnx(key):
    """Equal to the bare pytree, its key moves on, and the samples' passes leave no statistics."""
    key = jax.random.key(0) if key == "typed" else key
    sampling = samax.Sampling(samax.rademacher, num_samples=2, key=key)
    universal = lambda: optax.chain(
        samax.frob_sam(0.1, lam=0.1, sampling=sampling), optax.sgd(0.05)
    )
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
    params = pure(model, nnx.Param)
    optimizer = nnx.Optimizer(model, universal(), wrt=nnx.Param)
    loss = lambda p: jnp.mean((INPUTS @ p["kernel"] + p["bias"] - TARGETS) ** 2)
    tx = universal()
    state = tx.init(params)
    for _ in range(2):
        nnx_step(model, optimizer, INPUTS, TARGETS)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        params = optax.apply_updates(params, updates)
    assert_close(pure(model, nnx.Param), params)

    model, reference = Network(nnx.Rngs(0)), Network(nnx.Rngs(0))
    nnx_step(model, nnx.Optimizer(model, universal(), wrt=nnx.Param), INPUTS, TARGETS)
    nnx_loss(reference, INPUTS, TARGETS)
    assert_close(pure(model, nnx.BatchStat), pure(reference, nnx.BatchStat))
    assert model.dropout.rngs.count[...] == reference.dropout.rngs.count[...] == 1


def test_linen_with_batch_norm_and_dropout():
    class LinenNetwork(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Dense(8)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
            x = linen.Dropout(0.5, deterministic=not train)(x)
            return linen.Dense(1)(x)

    model = LinenNetwork()
    variables = model.init(jax.random.key(0), INPUTS, train=False)
    params, stats, tx = variables["params"], variables["batch_stats"], sam_sgd()
    state = tx.init(params)

    def loss_fn(params, key):
        prediction, changed = model.apply(
            {"params": params, "batch_stats": stats},
            INPUTS,
            train=True,
            mutable="batch_stats",
            rngs={"dropout": key},
        )
        return jnp.mean((prediction - TARGETS) ** 2), changed["batch_stats"]

    @jax.jit
    def step(params, state, key):
        (value, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, key)
        updates, state = tx.update(
            grads, state, params, value=value, value_fn=lambda p: loss_fn(p, key)[0]
        )
        return optax.apply_updates(params, updates), new_stats, state

    key = jax.random.key(5)
    new_params, new_stats, state = step(params, state, key)
    grads, clean_stats = jax.grad(loss_fn, has_aux=True)(params, key)
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads)
    perturbed, perturbed_stats = jax.grad(loss_fn, has_aux=True)(point, key)
    assert_close(new_params, jax.tree.map(lambda w, g: w - 0.05 * g, params, perturbed))
    assert_close(new_stats, clean_stats)
    assert np.any(clean_stats["BatchNorm_0"]["mean"] != perturbed_stats["BatchNorm_0"]["mean"])


def test_equinox():
    model = eqx.nn.MLP(4, 1, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = sam_sgd()
    state = tx.init(params)

    @eqx.filter_jit
    def step(params, state):
        def loss_fn(params):
            model = eqx.combine(params, static)
            return jnp.mean((jax.vmap(model)(INPUTS) - TARGETS) ** 2)

        value, grads = eqx.filter_value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn)
        return eqx.apply_updates(params, updates), state, value

    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    with pytest.raises(TypeError, match="is_inexact_array"):
        tx.init({"weight": jnp.ones(2), "steps": jnp.array(1)})


def test_a_wrapper_that_drops_the_function_says_so():
    from flax.training.train_state import TrainState

    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=samax.sam(0.1))
    with pytest.raises(ValueError, match="TrainState"):
        state.apply_gradients(grads={"w": jnp.ones(2)})
