"""One update in two calls."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.marks import slow_unless
from tests.methods import METHODS, RADIUS, where

INPUTS = jax.random.normal(jax.random.key(0), (16, 5))
SAM = samax.sam(0.1)
FAST = ["sam", "gsam", "vasso"]


def loss_fn(params, x=INPUTS):
    return jnp.mean((jnp.tanh(x.astype(params["w"].dtype) @ params["w"]) * params["v"]).sum(1) ** 2)


def initial(dtype=jnp.float32):
    """Parameters that stay away from zero, where they come back to the last bit."""
    w = jax.random.uniform(jax.random.key(1), (5, 3), minval=0.5, maxval=1.5)
    return {"w": w.astype(dtype), "v": jnp.array([1.0, -1.5, 2.0], dtype)}


def optimizer():
    schedule = optax.linear_schedule(0.05, 0.0, 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(1e-2),
        optax.sgd(schedule, momentum=0.9),
    )


def one_call(transformation, params, steps, base=None):
    tx = optax.chain(transformation, optimizer() if base is None else base)

    @jax.jit
    def step(params, state):
        grad_fn = jax.grad(loss_fn)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def two_calls(transformation, params, calls, base=None):
    """All parameters, those from before the first call included, and the last state."""
    tx = samax.alternating(optax.chain(transformation, optimizer() if base is None else base))
    step = jax.jit(functools.partial(call, tx))
    state, seen = tx.init(params), [params]
    for _ in range(calls):
        params, state = step(params, state)
        seen.append(params)
    return seen, state


def call(tx, params, state):
    updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", slow_unless(FAST, [name for name in where(one_call=True) if "mask" not in name])
)
def test_two_calls_are_one_to_the_last_bit_in_float64(name, x64):
    params, method = initial(jnp.float64), METHODS[name].before
    expected, expected_state = one_call(method(), params, steps=4)
    seen, state = two_calls(method(), params, calls=8)
    chex.assert_trees_all_equal(seen[-1], expected)
    chex.assert_trees_all_equal(state.chain, expected_state)


def test_the_decoupled_method_holds_its_optimizer(x64):
    method = samax.decoupled_wsam(optax.adam(0.01), 0.01, rho=0.1)
    expected, _ = one_call(method, initial(jnp.float64), 2, optax.identity())
    seen, _ = two_calls(method, initial(jnp.float64), 4, optax.identity())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), seen[-1], expected)


def test_in_between_the_parameters_are_the_perturbed_ones():
    params = initial()
    seen, state = two_calls(SAM, params, calls=1)
    grads = jax.grad(loss_fn)(params)
    norm = optax.tree.norm(grads)
    jax.tree.map(
        lambda w, p, g: np.testing.assert_allclose(p, w + 0.1 * g / norm, rtol=1e-6),
        params,
        seen[1],
        grads,
    )
    chex.assert_trees_all_equal(samax.eval_params(state, seen[1]), params)
    seen, state = two_calls(SAM, params, calls=2)
    chex.assert_trees_all_equal(samax.eval_params(state, seen[2]), seen[2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_parameters_come_back(dtype):
    """Exactly, but for entries near zero, which are rounded as the perturbed ones are."""
    params = initial(dtype)
    params["w"] = params["w"].at[0].set(jnp.array([1e-3, 0.0, -2e-3], dtype))
    seen, state = two_calls(samax.sam(0.5), params, 2, optax.sgd(0.0))
    point, back = seen[1], seen[2]
    assert point["w"].dtype == dtype
    assert np.max(np.abs((point["w"] - params["w"]).astype(jnp.float32))) > 0.01
    chex.assert_trees_all_equal((back["w"][1:], back["v"]), (params["w"][1:], params["v"]))
    error = np.abs((back["w"][0] - params["w"][0]).astype(jnp.float32))
    half_a_unit = float(jnp.finfo(dtype).eps) / 2 * np.abs(point["w"][0].astype(jnp.float32))
    assert np.all(error <= half_a_unit)
    chex.assert_trees_all_equal(samax.eval_params(state, back), back)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_have_the_parameters_dtype(dtype):
    """So that any `lax.cond` around them compiles: `apply_if_finite` is one."""
    chain = optax.chain(samax.sam(0.1), optimizer())
    tx = optax.apply_if_finite(samax.alternating(chain), max_consecutive_errors=3)
    params = initial(dtype)
    state, step = tx.init(params), jax.jit(functools.partial(call, tx))
    updates, _ = tx.update(params, state, params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda w: w.dtype, params)
    start = params
    for _ in range(2):
        params, state = step(params, state)
    assert np.any(params["w"] != start["w"])
    broken = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params)
    updates, after = jax.jit(tx.update)(broken, state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_are_those_of_the_one_call_form(dtype):
    expected, _ = one_call(SAM, initial(dtype), steps=3)
    seen, _ = two_calls(SAM, initial(dtype), calls=6)
    chex.assert_trees_all_equal(seen[-1], expected)


def size(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("method", [samax.sam, samax.gsam, samax.samar])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_state_holds_the_parameters_and_the_gradient_once(method, dtype):
    params = initial(dtype)
    copies, others = 2 * size(params), 64
    state = samax.alternating(optax.chain(method(0.1), optax.sgd(0.1))).init(params)
    assert copies <= size(state) < copies + others


@pytest.mark.optimized
def test_a_call_costs_its_own_half():
    """The first call runs the ascent alone, the second the optimizer and no norm of the ascent."""
    chain = optax.chain(samax.sam(0.1), optimizer())
    tx, params = samax.alternating(chain), {"w": jnp.ones((64, 64))}

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    ascent = samax.scale_to_norm(0.1)
    first = lambda w, g: optax.tree.sub(
        optax.apply_updates(w, ascent.update(g, ascent.init(w), w)[0]), w
    )
    base = optimizer()
    second = lambda w, g: optax.apply_updates(w, base.update(g, base.init(w), w)[0])

    def half(perturbed, w, g):
        state = tx.init(params)._replace(perturbed=jnp.asarray(perturbed))
        return tx.update(g, state._replace(params=w, clean_grad=g), w)

    each = params["w"].size
    halves = [flops(functools.partial(half, p), params, params) / each for p in (False, True)]
    # Besides, whether the clean gradient is finite, and the way back.
    assert halves[0] <= flops(first, params, params) / each + 3
    assert halves[1] <= flops(second, params, params) / each + 5


def test_schedules_count_pairs_of_calls():
    _, state = two_calls(samax.sam(RADIUS), initial(), calls=5)
    counts = dict(optax.tree.get_all_with_path(state, "count"))
    assert {int(count) for count in counts.values()} == {2}  # two steps and half of a third
    _, state = two_calls(samax.sam(RADIUS), initial(), calls=6)
    counts = dict(optax.tree.get_all_with_path(state, "count"))
    assert {int(count) for count in counts.values()} == {3}


def test_a_checkpoint_in_between(tmp_path):
    """A run that is cut off after the first of two calls goes on as if it had not been."""
    import orbax.checkpoint as ocp

    tx = samax.alternating(optax.chain(samax.samar(0.1), optimizer()))
    step = jax.jit(functools.partial(call, tx))
    params, state = initial(), tx.init(initial())
    for _ in range(3):
        params, state = step(params, state)
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "between", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "between", abstract)
    chex.assert_trees_all_equal(
        samax.eval_params(restored["state"], restored["params"]), samax.eval_params(state, params)
    )
    chex.assert_trees_all_equal(step(restored["params"], restored["state"]), step(params, state))


def test_parameters_and_state_may_be_donated():
    tx = samax.alternating(optax.chain(SAM, optimizer()))
    step = jax.jit(functools.partial(call, tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, initial())
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    assert np.all(np.isfinite(params["w"]))


def test_an_unmodified_train_state():
    """Flax's, which hands no function on: two calls with each batch."""
    from flax.training.train_state import TrainState

    tx = samax.alternating(optax.chain(SAM, optimizer()))
    state = TrainState.create(apply_fn=loss_fn, params=initial(), tx=tx)

    @jax.jit
    def train_call(state, batch):
        grads = jax.grad(state.apply_fn)(state.params, batch)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        for _ in range(2):
            state = train_call(state, INPUTS)
    expected, _ = one_call(SAM, initial(), steps=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        samax.eval_params(state.opt_state, state.params),
        expected,
    )
    assert state.step == 6


def test_what_is_changed_from_outside_counts():
    """Parameters loaded or clipped after the second call are those that the next step starts at."""
    tx = samax.alternating(optax.chain(SAM, optax.sgd(0.1)))
    params, state = initial(), tx.init(initial())
    loaded = jax.tree.map(lambda w: 2 * w, params)
    expected, _ = one_call(SAM, loaded, 1, optax.sgd(0.1))
    for _ in range(2):
        loaded, state = call(tx, loaded, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), loaded, expected)


def test_losses_that_are_passed_are_tracked_as_in_one_call(x64):
    params = initial(jnp.float64)
    chain = optax.chain(samax.sam(0.1, track=True), optax.sgd(0.1))
    value, grads = jax.value_and_grad(loss_fn)(params)
    _, expected = chain.update(grads, chain.init(params), params, value=value, value_fn=loss_fn)
    tx = samax.alternating(chain)
    state, point = tx.init(params), params
    for _ in range(2):
        value, grads = jax.value_and_grad(loss_fn)(point)
        updates, state = tx.update(grads, state, point, value=value)
        point = optax.apply_updates(point, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), state.chain[0], expected[0]
    )


def test_hyperparameters_may_be_injected_inside():
    """And changed from outside between two steps."""
    inside = optax.chain(optax.inject_hyperparams(samax.sam)(rho=0.1), optax.sgd(0.1))
    tx, params = samax.alternating(inside), initial()
    state = optax.tree.set(tx.init(params), rho=jnp.array(0.3))
    point, _ = call(tx, params, state)
    assert float(optax.tree.norm(optax.tree.sub(point, params))) == pytest.approx(0.3, rel=1e-5)


def test_errors():
    step = lambda chain: samax.alternating(chain).update(
        initial(), samax.alternating(chain).init(initial()), initial()
    )
    with pytest.raises(TypeError, match="chain must be an Optax"):
        samax.alternating(samax.sam)
    with pytest.raises(ValueError, match="evaluates the gradient at no points"):
        step(optax.sgd(0.1))
    for steps in (2, 9):
        repeated = samax.sharpness_aware(samax.normalize(), steps=steps)
        with pytest.raises(ValueError, match=r"evaluates the gradient at \d points; it needs one"):
            step(optax.chain(repeated, optax.sgd(0.1)))
    with pytest.raises(ValueError, match="universal_sam needs the losses"):
        step(samax.trace_sam())
    tx = samax.alternating(optax.chain(SAM, optax.sgd(0.1)))
    with pytest.raises(ValueError, match="samax needs params"):
        tx.update(initial(), tx.init(initial()))
    with pytest.raises(ValueError, match="updates must be the same pytree"):
        tx.update({"w": initial()["w"]}, tx.init(initial()), initial())
    with pytest.raises(ValueError, match=r"samax.one_gradient, and found 0"):
        samax.eval_params(optax.sgd(0.1).init(initial()), initial())
