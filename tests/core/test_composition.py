"""Beside, around and inside the other transformations of Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import samax

assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-7)

CURVATURE = jnp.array([1.0, 3.0, 10.0])


def loss_fn(params, shift=0.0):
    return 0.5 * jnp.sum(CURVATURE * (params["w"] - shift) ** 2) + jnp.cosh(params["b"])


def initial():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}


def train(tx, steps=3, transform=jax.jit, **extra):
    """Trains, jitted, and returns parameters and state."""

    @transform
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn, **extra)
        return optax.apply_updates(params, updates), state

    params = initial()
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def sam_sgd(rho=0.1, rate=0.05):
    return optax.chain(samax.sam(rho), optax.sgd(rate))


def test_inject_hyperparams():
    for recipe in (
        samax.sam,
        samax.usam,
        samax.asam,
        samax.vasso,
        samax.wsam,
        samax.gsam,
        samax.samar,
    ):
        injected = optax.inject_hyperparams(recipe)(rho=0.1)
        params, state = train(optax.chain(injected, optax.sgd(0.05)))
        plain = optax.chain(recipe(rho=0.1), optax.sgd(0.05))
        # Without jit, as it is only what to compare with: a program less to compile.
        assert_close(params, train(plain, transform=lambda f: f)[0])
        assert optax.tree.get(state, "rho") == pytest.approx(0.1)
    scheduled = optax.inject_hyperparams(samax.sam)(rho=optax.linear_schedule(0.1, 0.0, 2))
    plain = samax.sam(optax.linear_schedule(0.1, 0.0, 2))
    assert_close(
        train(optax.chain(scheduled, optax.sgd(0.05)))[0],
        train(optax.chain(plain, optax.sgd(0.05)))[0],
    )
    # Set from outside, as a search or a schedule of one's own does.
    tx = optax.inject_hyperparams(samax.sam)(rho=0.1)
    params = initial()
    state = optax.tree.set(tx.init(params), rho=0.0)
    grads = jax.grad(loss_fn)(params)
    updates, _ = jax.jit(functools.partial(tx.update, value_fn=loss_fn))(grads, state, params)
    chex.assert_trees_all_equal(updates, grads)


def test_clipping_before_and_after():
    """Before, it clips the ascent gradient alone, which SAM's norm undoes; after, the update's."""
    params, grads = initial(), jax.grad(loss_fn)(initial())
    clip, sam = optax.clip_by_global_norm(0.5), samax.sam(0.1)

    def first_update(*parts):
        tx = optax.chain(*parts)
        return tx.update(grads, tx.init(params), params, value_fn=loss_fn)[0]

    assert_close(first_update(clip, sam), first_update(sam))
    assert optax.tree.norm(first_update(sam)) > 1.0
    assert optax.tree.norm(first_update(sam, clip)) == pytest.approx(0.5)


def test_weight_decay_after_it_stays_out_of_the_ascent_and_in_the_loss_enters_it():
    decay = 0.5
    after = optax.chain(samax.sam(0.1), optax.add_decayed_weights(decay), optax.sgd(0.05))
    params, grads = initial(), jax.grad(loss_fn)(initial())
    updates, _ = after.update(grads, after.init(params), params, value_fn=loss_fn)
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads)
    expected = jax.tree.map(lambda g, w: -0.05 * (g + decay * w), jax.grad(loss_fn)(point), params)
    assert_close(updates, expected)

    decayed = lambda p: loss_fn(p) + 0.5 * decay * optax.tree.norm(p, squared=True)
    tx = sam_sgd()
    inside, _ = tx.update(jax.grad(decayed)(params), tx.init(params), params, value_fn=decayed)
    assert np.max(np.abs(inside["w"] - expected["w"])) > 1e-4


def test_partition_of_the_base_optimizer():
    """The LoRA case: some leaves are frozen, and SAM stands outside and perturbs the others."""
    labels = {"w": "train", "b": "freeze"}
    base = optax.partition({"train": optax.sgd(0.05), "freeze": optax.set_to_zero()}, labels)
    ascent = samax.scale_to_norm(0.1)
    sam = samax.sharpness_aware(samax.perturb_only(ascent, {"w": True, "b": False}))
    params, _ = train(optax.chain(sam, base), steps=1)
    w = initial()["w"]
    gradient = CURVATURE * w
    expected = w - 0.05 * CURVATURE * (w + 0.1 * gradient / jnp.linalg.norm(gradient))
    np.testing.assert_allclose(params["w"], expected, rtol=1e-5)
    assert params["b"] == initial()["b"]


def test_multi_transform_and_masked_refuse_from_outside():
    with pytest.raises(TypeError, match=r"MaskedNode.*optax.partition"):
        optax.multi_transform(
            {"sam": sam_sgd(), "none": optax.set_to_zero()}, {"w": "sam", "b": "none"}
        ).init(initial())


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_apply_if_finite(order):
    if order == "inside":
        tx = optax.chain(samax.sam(0.1), optax.apply_if_finite(optax.sgd(0.05), 3))
    else:
        tx = optax.apply_if_finite(sam_sgd(), 3)
    params, _ = train(tx)
    assert_close(params, train(sam_sgd())[0])
    # A gradient that overflowed is skipped, and the next step is as if it had not been.
    state, params = tx.init(initial()), initial()
    bad = {"w": jnp.array([jnp.nan, 0.0, 0.0]), "b": jnp.array(0.0)}
    nan_fn = lambda p: loss_fn(p) + jnp.nan * p["w"][0]
    updates, state = tx.update(bad, state, params, value_fn=nan_fn)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0.0), updates)
    assert optax.tree.get(state, "notfinite_count") == 1


def test_multi_steps_inside_is_sam_on_each_micro_batch():
    """`chain(sam, MultiSteps(base))`: the mean of the micro-batches' perturbed gradients."""
    tx = optax.chain(samax.sam(0.1), optax.MultiSteps(optax.sgd(0.05), 2).gradient_transformation())
    params, shifts = initial(), (0.0, 1.0)
    state, expected = tx.init(params), []
    for shift in shifts:
        fn = functools.partial(loss_fn, shift=shift)
        grads = jax.grad(fn)(params)
        updates, state = jax.jit(functools.partial(tx.update, value_fn=fn))(grads, state, params)
        norm = optax.tree.norm(grads)
        point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads)  # noqa: B023
        expected.append(jax.grad(fn)(point))
    mean = jax.tree.map(lambda a, b: -0.05 * (a + b) / 2, *expected)
    assert_close(updates, mean)


def test_multi_steps_outside_perturbs_the_mean_with_the_last_micro_batch():
    """`MultiSteps(chain(sam, base))` needs the whole batch's `value_fn` at the last micro-step."""
    tx = optax.MultiSteps(sam_sgd(), 2).gradient_transformation()
    params, shifts = initial(), (0.0, 1.0)
    whole = lambda p: 0.5 * (loss_fn(p, shifts[0]) + loss_fn(p, shifts[1]))
    state = tx.init(params)
    for shift in shifts:
        grads = jax.grad(functools.partial(loss_fn, shift=shift))(params)
        updates, state = jax.jit(functools.partial(tx.update, value_fn=whole))(grads, state, params)
    plain = sam_sgd()
    expected, _ = plain.update(jax.grad(whole)(params), plain.init(params), params, value_fn=whole)
    assert_close(updates, expected)


def test_reduce_on_plateau_and_others_that_take_extra_arguments():
    plateau = contrib.reduce_on_plateau(factor=0.5, patience=1)
    params, state = train(optax.chain(samax.sam(0.1), optax.sgd(0.05), plateau))
    assert_close(params, train(sam_sgd())[0])
    assert optax.tree.get(state, "best_value") < loss_fn(initial())
    params, _ = train(optax.chain(samax.sam(0.1), contrib.prodigy()))
    assert np.all(np.isfinite(params["w"]))
    # A backtracking line search along SAM's direction uses the same value and value_fn.
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
    tx = optax.chain(samax.sam(0.01), optax.scale(-1.0), search)
    params, grads = initial(), jax.grad(loss_fn)(initial())
    updates, _ = tx.update(
        grads, tx.init(params), params, value=loss_fn(params), grad=grads, value_fn=loss_fn
    )
    assert loss_fn(optax.apply_updates(params, updates)) < loss_fn(params)


def test_unknown_extra_arguments_are_ignored():
    params, _ = train(sam_sgd(), epoch=3, notes="anything")
    assert_close(params, train(sam_sgd())[0])


def test_a_clean_gradient_of_a_part_of_the_batch():
    """The cheaper SAM of the docs: no code, only another clean gradient."""
    part, whole = functools.partial(loss_fn, shift=1.0), loss_fn
    params, tx = initial(), sam_sgd()
    updates, _ = tx.update(jax.grad(part)(params), tx.init(params), params, value_fn=whole)
    grads = jax.grad(part)(params)
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads)
    assert_close(updates, jax.tree.map(lambda g: -0.05 * g, jax.grad(whole)(point)))


def test_micro_batched_gradients_give_one_perturbation_for_the_whole_batch():
    inputs = jax.random.normal(jax.random.key(0), (8, 3))
    loss = lambda p, x: jnp.mean((x @ p["w"] - p["b"]) ** 2)
    params, tx = initial(), sam_sgd()

    def grad_fn(p):
        per_part = jax.lax.map(lambda x: jax.grad(loss)(p, x), inputs.reshape(4, 2, 3))
        return jax.tree.map(lambda g: g.mean(axis=0), per_part)

    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    whole = functools.partial(loss, x=inputs)
    expected, _ = tx.update(jax.grad(whole)(params), tx.init(params), params, value_fn=whole)
    assert_close(updates, expected)


def test_the_state_maps_like_parameters():
    """`optax.tree_map_params` finds the leaves that mirror the parameters, to shard them."""
    tx = optax.chain(samax.vasso(0.1), optax.sgd(0.1, momentum=0.9))
    state = tx.init(initial())
    marked = optax.tree_map_params(tx, lambda _: "param", state, transform_non_params=lambda _: "")
    assert optax.tree.get(marked, "ema") == {"w": "param", "b": "param"}
    assert optax.tree.get(marked, "trace") == {"w": "param", "b": "param"}
