"""The evaluation contract: one function, called with the extra arguments that it names."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
import samax.flax

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5])}
BATCH = jax.random.normal(jax.random.key(0), (8, 3))


def loss_fn(params, batch, scale=1.0):
    return scale * jnp.mean(jnp.tanh(batch @ params["w"]) ** 2)


EVALUATING = {
    "sam": samax.sam(0.1),
    "gsam": samax.gsam(0.1),
    "vasso": samax.vasso(0.1),
    "samar": samax.samar(0.1),
    "asam": samax.asam(0.1),
    "wsam": samax.wsam(0.1),
    "decoupled_wsam": samax.decoupled_wsam(optax.sgd(0.1), 0.1),
    "trace_sam": samax.trace_sam(0.1),
    "m_sharpness": samax.m_sharpness(samax.sam(0.1), 2),
}


def update(tx, **extra):
    grads = jax.grad(loss_fn)(PARAMS, BATCH)
    return tx.update(grads, tx.init(PARAMS), PARAMS, **extra)[0]


def mean_of_two_groups():
    """The mean over two groups, each of its own half of the batch."""
    halves = [
        samax.value_and_grad(loss_fn, samax.sam(0.1))(PARAMS, half)[1]
        for half in jnp.split(BATCH, 2)
    ]
    return jax.tree.map(lambda a, b: 0.5 * (a + b), *halves)


@pytest.mark.parametrize("name", EVALUATING)
def test_a_loss_of_the_batch_is_called_with_it(name):
    tx, value = EVALUATING[name], loss_fn(PARAMS, BATCH)
    bound = update(tx, value=value, value_fn=loss_fn, batch=BATCH)
    if name == "m_sharpness":  # which hands each group its part
        chex.assert_trees_all_equal(bound, mean_of_two_groups())
    else:
        chex.assert_trees_all_equal(
            bound, update(tx, value=value, value_fn=lambda p: loss_fn(p, BATCH))
        )
    scaled = update(tx, value=3 * value, value_fn=loss_fn, batch=BATCH, scale=3.0)
    assert np.any(np.abs(scaled["w"] - bound["w"]) > 1e-4)


def defaults(params, batch=BATCH):
    return loss_fn(params, batch)


def keyword_only(params, *, batch):
    return loss_fn(params, batch)


def with_kwargs(params, batch, **kwargs):
    assert not kwargs  # only what is named is passed
    return loss_fn(params, batch)


def positional_only(params, batch, /):
    return loss_fn(params, batch)


class Loss:
    def __call__(self, params, batch):
        return loss_fn(params, batch)

    def method(self, params, batch):
        return loss_fn(params, batch)


@pytest.mark.parametrize(
    "fn",
    [
        loss_fn,
        defaults,
        keyword_only,
        with_kwargs,
        positional_only,
        Loss(),
        Loss().method,
        jax.jit(loss_fn),
        jax.jit(keyword_only),
        jax.checkpoint(loss_fn),
        functools.partial(loss_fn, scale=1.0),
        functools.partial(lambda scale, params, batch: loss_fn(params, batch, scale), 1.0),
        jax.tree_util.Partial(loss_fn, scale=1.0),
    ],
)
def test_every_kind_of_function_gets_what_it_names(fn):
    extra = {"batch": BATCH, "notes": "ignored"}
    expected = update(samax.sam(0.1), value_fn=lambda params: loss_fn(params, BATCH))
    got = update(samax.sam(0.1), value_fn=fn, **extra)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)
    got = update(samax.sam(0.1), grad_fn=jax.grad(fn), **extra)
    np.testing.assert_allclose(got["w"], expected["w"], rtol=1e-6)


def test_a_default_gives_way_to_what_is_passed_and_stands_otherwise():
    tx, other = samax.sam(0.1), BATCH[:4]
    expected = update(tx, value_fn=lambda params: loss_fn(params, other))
    chex.assert_trees_all_equal(update(tx, value_fn=defaults, batch=other), expected)
    chex.assert_trees_all_equal(
        update(tx, value_fn=defaults), update(tx, value_fn=lambda params: loss_fn(params, BATCH))
    )


def test_the_contracts_own_words_are_not_the_functions():
    """A function that happens to name its parameters `value` is not handed the clean loss."""
    tx = samax.sam(0.1)
    named = lambda params, value=1.0: loss_fn(params, BATCH, value)
    chex.assert_trees_all_equal(
        update(tx, value=jnp.array(7.0), value_fn=named),
        update(tx, value_fn=lambda params: loss_fn(params, BATCH)),
    )


def test_a_line_search_shares_the_arguments():
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=3)
    tx = optax.chain(samax.sam(0.01), optax.scale(-1.0), search)
    value, grads = jax.value_and_grad(loss_fn)(PARAMS, BATCH)
    updates, _ = tx.update(
        grads,
        tx.init(PARAMS),
        PARAMS,
        value=value,
        grad=grads,
        value_fn=loss_fn,
        batch=BATCH,
    )
    assert loss_fn(optax.apply_updates(PARAMS, updates), BATCH) < value


def test_unnamed_arguments_pass_on_to_the_parts_and_the_chain():
    seen = []

    def spy(updates, state, params=None, **extra):
        seen.append(sorted(extra))
        return updates, state

    part = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spy)
    tx = optax.chain(samax.sharpness_aware(part, part), part)
    update(tx, value_fn=loss_fn, batch=BATCH, lesson=5)
    ascent, descent, after = seen
    assert ascent == after == ["batch", "lesson", "value_fn"]
    known = ["clean_grad", "perturbation", "perturbed_value"]
    assert descent == sorted([*ascent, *known])


def test_under_jit_with_traced_arguments():
    @jax.jit
    def step(grads, batch):
        tx = samax.sam(0.1)
        return tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=loss_fn, batch=batch)[0]

    grads = jax.grad(loss_fn)(PARAMS, BATCH)
    expected = update(samax.sam(0.1), value_fn=loss_fn, batch=BATCH)
    np.testing.assert_allclose(step(grads, BATCH)["w"], expected["w"], rtol=1e-5)


class TestErrors:
    def test_an_argument_that_is_missing(self):
        with pytest.raises(TypeError, match=r"value_fn needs batch besides.*batch=batch.*or close"):
            update(samax.sam(0.1), value_fn=loss_fn)
        with pytest.raises(TypeError, match="grad_fn needs batch and key"):
            update(samax.sam(0.1), grad_fn=lambda params, batch, *, key: params)

    def test_no_function_names_the_ways_in(self):
        hint = r"got none.*value_fn=loss_fn, batch=batch.*samax.value_and_grad.*samax.alternating"
        with pytest.raises(ValueError, match=hint):
            update(samax.sam(0.1))
        with pytest.raises(ValueError, match="got none"):
            update(samax.sam(0.1), value_fn=None)

    def test_a_groups_function_that_does_not_name_the_batch(self):
        tx = samax.m_sharpness(samax.sam(0.1), 2)
        with pytest.raises(TypeError, match=r"value_fn on parts of the batch.*value_fn\(params, b"):
            update(tx, value_fn=lambda params: loss_fn(params, BATCH), batch=BATCH)
