"""When the ascent is made: policies, plain steps, and the two forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.marks import slow_unless
from tests.methods import METHODS, where

INPUTS = jax.random.normal(jax.random.key(0), (16, 4))
RATE = 0.05
FAST = ["sam", "gsam", "vasso"]


def loss_fn(params, batch=INPUTS):
    return jnp.mean((jnp.tanh(batch @ params["w"]) @ params["v"] - 1) ** 2)


def initial():
    first, second = jax.random.split(jax.random.key(1))
    return {"w": jax.random.normal(first, (4, 3)), "v": jax.random.normal(second, (3,))}


every_method = pytest.mark.parametrize(
    "name",
    slow_unless(FAST, [name for name in where(one_call=True) if "mask" not in name]),
)


def step(tx, params, state, **extra):
    value, grads = jax.value_and_grad(loss_fn)(params)
    extra = {"value": value, "value_fn": loss_fn} | extra
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def ascents(policy, steps=6, norms=None):
    """The policy's decisions, jitted."""
    state, decide, seen = policy.init(), jax.jit(policy.decide), []
    for i in range(steps):
        ascend, state = decide(state, jnp.asarray(1.0 if norms is None else norms[i]))
        seen.append(bool(ascend))
    return seen


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), left, right)


class TestPolicies:
    def test_of_the_step(self):
        assert ascents(samax.from_step(4)) == 4 * [False] + 2 * [True]
        assert ascents(samax.until_step(4)) == 4 * [True] + 2 * [False]
        assert ascents(samax.every(3)) == 2 * [True, False, False]
        assert ascents(samax.every(1)) == 6 * [True]

    def test_at_random(self):
        assert sum(ascents(samax.at_random(0.3, 0), 400)) == pytest.approx(120, abs=30)
        assert not any(ascents(samax.at_random(0.0, jax.random.key(0))))
        assert all(ascents(samax.at_random(1.0, jax.random.PRNGKey(0))))
        late = ascents(samax.at_random(lambda t: t >= 3, 0))
        assert late == 3 * [False] + 3 * [True]
        assert ascents(samax.at_random(0.5, 1), 50) != ascents(samax.at_random(0.5, 2), 50)

    def test_where_steep(self):
        """A long gradient among short ones ascends, and late in training most do."""
        norms = 40 * [1.0, 1.1] + [3.0, 1.0]
        early = ascents(samax.where_steep(10**6), 82, norms)
        assert early[80]
        assert not early[81]
        assert sum(ascents(samax.where_steep(1), 82, norms)) > sum(early)

    def test_errors(self):
        with pytest.raises(ValueError, match="k must be at least 1, got 0"):
            samax.every(0)
        with pytest.raises(TypeError, match="start must be a Python int"):
            samax.from_step(0.5)
        with pytest.raises(ValueError, match=r"p must be finite and lie in \[0, 1\]"):
            samax.at_random(1.5, 0)
        with pytest.raises(ValueError, match="decay"):
            samax.where_steep(10, decay=1.0)
        with pytest.raises(TypeError, match=r"policy must be a samax\.Policy"):
            samax.occasionally(samax.sam(0.1), samax.every)


@every_method
@pytest.mark.optimized
@pytest.mark.parametrize("static", [False, True])
def test_a_plain_step_is_the_base_optimizers_bit_for_bit(name, static):
    base = optax.with_extra_args_support(optax.sgd(RATE, momentum=0.9))
    occasional = samax.occasionally(METHODS[name].before(0.1), samax.until_step(0))
    tx = optax.chain(occasional, base)
    # In the static form no function is needed.
    extra = {"ascend": False, "value_fn": None} if static else {}
    plain = jax.jit(lambda params, state: step(tx, params, state, **extra))
    expected = jax.jit(lambda params, state: step(base, params, state))
    params, other = initial(), initial()
    state, other_state = tx.init(params), base.init(params)
    for _ in range(4):
        params, state = plain(params, state)
        other, other_state = expected(other, other_state)
        assert_same(params, other)


@every_method
def test_a_step_that_ascends_is_the_methods_own(name):
    tx = samax.occasionally(METHODS[name].before(0.1), samax.every(1))
    method, params = METHODS[name].before(0.1), initial()
    expected = step(method, params, method.init(params))
    for extra in ({}, {"ascend": True}):
        updated, state = step(tx, params, tx.init(params), **extra)
        assert_close((updated, state.transformation), expected)


@every_method
def test_both_forms_and_their_states_agree(name):
    """The policy on the host, from the same steps: two programs and no `cond`."""
    tx = optax.chain(
        samax.occasionally(METHODS[name].before(0.1, track=True), samax.every(2)), optax.sgd(RATE)
    )
    inside = jax.jit(lambda p, s: step(tx, p, s))
    outside = jax.jit(lambda p, s, ascend: step(tx, p, s, ascend=ascend), static_argnums=2)
    left = right = (initial(), tx.init(initial()))
    layout = jax.tree.map(lambda x: (x.shape, x.dtype), left)
    for i in range(5):
        left, right = inside(*left), outside(*right, i % 2 == 0)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), right) == layout
        assert_close(left, right)
    text = [
        str(jax.make_jaxpr(functools.partial(step, tx, ascend=ascend))(*left))
        for ascend in (True, False)
    ]
    assert not any("cond[" in program for program in text)


def test_averages_and_schedules_keep_counting():
    """VaSSO's average is that of all gradients, and a rho schedule counts all steps."""
    radius = optax.linear_schedule(0.1, 0.0, 10)
    tx = samax.occasionally(samax.vasso(radius, 0.3), samax.from_step(100))
    state, ema, params = tx.init(initial()), samax.gradient_ema(0.3), initial()
    ema_state = ema.init(params)
    for i in range(3):
        grads = jax.grad(loss_fn)(optax.tree.scale(1.0 + i, params))
        _, state = tx.update(grads, state, params, ascend=False)
        _, ema_state = ema.update(grads, ema_state)
    assert_same(optax.tree.get(state, "ema"), ema_state.ema)
    assert {int(c) for _, c in optax.tree.get_all_with_path(state, "count")} == {3}


def test_nothing_is_evaluated_on_a_plain_step():
    calls = []

    def counted(params):
        jax.debug.callback(lambda: calls.append(1))
        return loss_fn(params)

    tx = samax.occasionally(samax.sam(0.1), samax.every(3))
    run = jax.jit(lambda grads, s: tx.update(grads, s, initial(), value_fn=counted)[1])
    grads, state = jax.grad(loss_fn)(initial()), tx.init(initial())
    for _ in range(7):
        state = run(grads, state)
    jax.effects_barrier()
    assert len(calls) == 3


def test_what_is_tracked_says_what_was_not_evaluated():
    tx = samax.occasionally(samax.sam(0.1, track=True), samax.every(2))
    params, state = initial(), tx.init(initial())
    get = lambda name: float(optax.tree.get(state, name))
    value = float(loss_fn(params))
    for ascended in (True, False):
        _, state = step(tx, params, state)
        assert bool(optax.tree.get(state, "ascended")) == ascended
        assert get("clean_loss") == pytest.approx(value)
        assert np.isfinite(get("clean_grad_norm"))
        for name in ("perturbed_loss", "loss_gap", "perturbed_grad_norm", "grad_cosine"):
            assert np.isfinite(get(name)) == ascended
        assert get("perturbation_norm") == pytest.approx(0.1 * ascended, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("extra", [{}, {"ascend": True}, {"ascend": False}])
def test_a_bad_gradient_does_not_ascend_and_moves_no_state(bad, extra):
    tx = samax.occasionally(samax.vasso(0.1), samax.where_steep(10))
    params = initial()
    _, state = step(tx, params, tx.init(params))
    broken = jax.grad(loss_fn)(params)
    broken["w"] = broken["w"].at[0, 0].set(bad)
    direction, after = tx.update(broken, state, params, grad_fn=lambda _: broken, **extra)
    assert_same(direction, broken)
    assert_same(after, state._replace(ascended=jnp.array(False)))


@pytest.mark.slow
def test_under_vmap_each_seed_has_its_own_policy():
    def trained(key):
        tx = optax.chain(
            samax.occasionally(samax.sam(0.1), samax.at_random(0.5, key)), optax.sgd(RATE)
        )
        carry = (initial(), tx.init(initial()))
        for _ in range(3):
            carry = step(tx, *carry)
        return carry[0]

    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.vmap(trained)(keys)
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(trained, keys)))


def test_the_universal_class_needs_the_value_on_plain_steps():
    tx = samax.occasionally(samax.trace_sam(0.1), samax.every(2))
    params, state = initial(), tx.init(initial())
    value, grads = jax.value_and_grad(loss_fn)(params)
    direction, _ = tx.update(grads, state, params, value=value, ascend=False)
    assert_close(direction, grads)


def test_groups_decide_each_for_itself():
    tx = samax.m_sharpness(samax.occasionally(samax.sam(0.1), samax.at_random(0.5, 0)), 4)
    params = initial()
    direction, state = tx.update(params, tx.init(params), params, value_fn=loss_fn, batch=INPUTS)
    assert state.ascended.shape == (4,)
    assert np.all(np.isfinite(direction["w"]))


class TestLookSam:
    def test_the_kept_direction_is_orthogonal_and_reused(self):
        tx, params = samax.looksam(0.2, 3, 0.5), initial()
        grads = jax.grad(loss_fn)(params)
        direction, state = tx.update(grads, tx.init(params), params, value_fn=loss_fn)
        kept = optax.tree.get(state, "direction")
        assert optax.tree.norm(kept) == pytest.approx(1.0, rel=1e-5)
        assert optax.tree.vdot(kept, grads) == pytest.approx(0.0, abs=1e-5)
        assert optax.tree.vdot(kept, direction) > 0
        other = jax.tree.map(lambda g: 2 * g + 0.1, grads)
        plain, after = tx.update(other, state, params, value_fn=loss_fn)
        length = 0.5 * optax.tree.norm(other)
        assert_close(plain, jax.tree.map(lambda g, v: g + length * v, other, kept))
        assert_same(optax.tree.get(after, "direction"), kept)

    def test_one_copy_and_sam_where_k_is_1(self):
        params = initial()
        looksam, sam = samax.looksam(0.2, 1), samax.sam(0.2)
        size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        assert size(looksam.init(params)) < size(params) + 16
        assert_close(
            step(looksam, params, looksam.init(params))[0], step(sam, params, sam.init(params))[0]
        )


class TestAlternating:
    def test_a_plain_step_is_one_call(self):
        chain = optax.chain(
            samax.occasionally(samax.sam(0.1), samax.every(2)), optax.sgd(RATE, momentum=0.9)
        )
        tx, params = samax.alternating(chain), initial()
        state, expected, expected_state = tx.init(params), params, chain.init(params)

        @functools.partial(jax.jit, static_argnames="ascend")
        def call(params, state, ascend):
            updates, state = tx.update(jax.grad(loss_fn)(params), state, params, ascend=ascend)
            return optax.apply_updates(params, updates), state

        for i in range(4):
            expected, expected_state = step(chain, expected, expected_state)
            for _ in range(2 if i % 2 == 0 else 1):
                params, state = call(params, state, ascend=i % 2 == 0)
            assert not state.perturbed
            assert_close(params, expected)
        assert_close(state.chain, expected_state)

    def test_a_policy_within_the_program_is_one_clear_error(self):
        chain = optax.chain(samax.occasionally(samax.sam(0.1), samax.every(2)), optax.sgd(RATE))
        tx, params = samax.alternating(chain), initial()
        with pytest.raises(ValueError, match=r"alternating needs to know.*ascend=True"):
            tx.update(params, tx.init(params), params)


def test_ascend_must_be_static():
    tx, params = samax.occasionally(samax.sam(0.1), samax.every(2)), initial()
    with pytest.raises(TypeError, match=r"ascend must be a Python bool.*static_argnames"):
        jax.jit(lambda a: tx.update(params, tx.init(params), params, ascend=a))(True)
    with pytest.raises(ValueError, match="got none"):
        tx.update(params, tx.init(params), params, ascend=True)
