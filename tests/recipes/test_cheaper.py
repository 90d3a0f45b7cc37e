"""The recipes of docs/methods/cheaper.md, as they stand there: the property that each must have."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.methods import points_of

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "methods" / "cheaper.md"


@pytest.fixture(scope="module")
def page():
    """The names that the page's Python blocks define."""
    names = {"__name__": "cheaper"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(code, names)
    return names


def close(left, right, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def distance(left, right):
    return float(optax.tree.norm(optax.tree.sub(left, right)) / optax.tree.norm(right))


def direction(method, page, params, state=None):
    x, y, loss = page["x"], page["y"], page["mean_loss"]
    value, grads = jax.value_and_grad(loss)(params, x, y)
    state = method.init(params) if state is None else state
    return method.update(grads, state, params, value=value, value_fn=loss, x=x, y=y)[0]


def clean(page, params):
    return jax.grad(page["mean_loss"])(params, page["x"], page["y"])


def test_gnp_is_between_the_two_gradients(page):
    params = page["params"]
    grads, sam = clean(page, params), direction(samax.sam(0.05), page, params)
    expected = jax.tree.map(lambda g, p: 0.2 * g + 0.8 * p, grads, sam)
    close(direction(page["gnp"], page, params), expected)


def test_gc_sam_centralizes_the_ascent_and_the_descent(page):
    params, points = page["params"], []
    grads = clean(page, params)

    def grad_fn(point):
        points.append(point)
        return clean(page, point)

    found, _ = page["gc_sam"].update(grads, page["gc_sam"].init(params), params, grad_fn=grad_fn)
    eps = optax.tree.sub(points[0], params)
    assert optax.tree.norm(eps) == pytest.approx(0.05, rel=1e-4)
    for step in (eps, found):  # Optax's mean is over all axes but the first
        np.testing.assert_allclose(step["dense"]["kernel"].mean(axis=1), 0.0, atol=1e-6)
    assert np.abs(grads["dense"]["kernel"].mean(axis=1)).max() > 1e-3


def test_sam_on_perturbs_the_scale_alone(page):
    params, tx = page["params"], page["sam_on"]
    points, _ = points_of(tx, clean(page, params), tx.init(params), params)
    moved = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b)), points[0], params)
    assert moved["norm"]["scale"] == pytest.approx(0.5, rel=1e-5)
    assert moved["dense"]["kernel"] == moved["head"] == 0.0
    assert np.any(direction(tx, page, params)["head"])


def test_no_ascent_before_the_warm_up_ends(page):
    params, tx = page["params"], page["after_warm_up"]
    state = tx.init(params)
    close(direction(tx, page, params, state), clean(page, params), rtol=0, atol=0)
    later = state._replace(policy=jax.tree.map(lambda count: count + 1_000, state.policy))
    close(direction(tx, page, params, later), direction(samax.sam(0.05), page, params))


def test_random_perturbations_are_in_proportion_to_the_filters(page):
    params, tx = page["params"], page["random"]
    points, _ = points_of(tx, params, tx.init(params), params)
    eps = optax.tree.sub(points[0], params)["dense"]["kernel"]
    sizes = np.linalg.norm(params["dense"]["kernel"], axis=0)
    z = np.asarray(eps) / (0.01 * sizes)
    assert 0.7 < z.std() < 1.3
    at_one = page["random_at_one"]
    updates, state = at_one.update(params, at_one.init(params), params)
    point = optax.apply_updates(params, updates)
    assert distance(point, samax.eval_params(state, point)) > 1e-3


def test_functional_sam_is_another_step_than_sam(page):
    params, args = page["params"], (page["x"], page["y"])
    tx = optax.chain(samax.sam(1.0), optax.sgd(0.1))
    found, _ = page["functional_step"](tx, params, tx.init(params), *args)
    sam = direction(tx, page, params)
    assert distance(optax.tree.sub(found, params), sam) > 0.01
    still = optax.chain(samax.sam(0.0), optax.sgd(0.1))
    found, _ = page["functional_step"](still, params, still.init(params), *args)
    close(found, optax.tree.add(params, optax.tree.scale(-0.1, clean(page, params))))


def test_k_sam_is_sam_on_the_hardest_examples(page):
    params, x, y = page["params"], page["x"], page["y"]
    tx = optax.chain(samax.sam(0.05), optax.sgd(0.1))
    step = jax.jit(lambda p, s, x, y, k: page["k_sam_step"](tx, p, s, x, y, k), static_argnums=4)
    state = tx.init(params)
    everything, _ = step(params, state, x, y, len(y))
    close(everything, optax.tree.add(params, direction(tx, page, params)))
    # Only the hardest count: the labels and inputs of the others may be anything easier.
    order = np.argsort(page["example_losses"](params, x, y))
    hardest = order[-4:]
    found, _ = step(params, state, x, y, 4)
    alone, _ = step(params, state, x[hardest], y[hardest], 4)
    close(found, alone)
    easiest, _ = step(params, state, x[order[:4]], y[order[:4]], 4)
    assert distance(found, easiest) > 1e-3


def test_rare_classes_alone_are_seen_by_sam(page):
    params, x, y = page["params"], page["x"], page["y"]

    def grads_of(rare, rho=0.5):
        return page["rare_classes_grads"](params, x, y, jnp.array(rare), samax.sam(rho))

    assert len(set(y.tolist())) == 3
    sam = direction(samax.sam(0.5), page, params)
    close(grads_of([7]), clean(page, params))  # none is rare: the base optimizer
    close(grads_of([0, 1, 2]), sam)
    some = grads_of([2])
    assert distance(some, sam) > 0.01
    assert distance(some, clean(page, params)) > 0.001
    close(grads_of([2], rho=0.0), clean(page, params))


def test_mesas_loss(page):
    loss, args = page["mesa_loss"], (page["x"], page["y"])
    params = page["params"]
    plain = page["mean_loss"](params, *args)
    # At the average itself the divergence and its gradient are 0.
    assert loss(params, params, *args) == pytest.approx(float(plain), rel=1e-5)
    close(jax.grad(loss)(params, params, *args), clean(page, params))
    # Elsewhere it is positive, and pulls the outputs towards the earlier ones.
    other = jax.tree.map(lambda w: 1.3 * w, params)
    assert loss(params, other, *args) > plain + 1e-3
    assert loss(params, other, *args, weight=0.0) == pytest.approx(float(plain), rel=1e-6)
    pull = optax.tree.sub(jax.grad(loss)(params, other, *args), clean(page, params))
    towards = optax.tree.add(params, optax.tree.scale(-0.01, pull))
    divergence = lambda p: loss(p, other, *args) - page["mean_loss"](p, *args)
    assert divergence(towards) < divergence(params)
    # The average is a target: nothing flows back into it.
    still = jax.grad(loss, argnums=1)(params, other, *args)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(still))


def test_bi_lora_climbs_with_one_pair_and_descends_with_the_other(page):
    loss, args, rho = page["adapted_loss"], (page["x"], page["y"]), 0.5
    tx = page["bi_lora"](optax.adam(1e-2), 0.5, rho)
    lora = page["lora"]
    state = tx.init(lora)

    @jax.jit
    def step(lora, state):
        updates, state = tx.update(jax.grad(loss)(lora, *args), state, lora)
        return optax.apply_updates(lora, updates), state

    start = loss(lora, *args)
    for _ in range(60):
        lora, state = step(lora, state)
        assert optax.tree.norm(lora["auxiliary"]) <= rho * (1 + 1e-5)
    without = lora | {"auxiliary": jax.tree.map(jnp.zeros_like, lora["auxiliary"])}
    # The auxiliary pair raises the loss, and what is kept has lowered it.
    assert loss(lora, *args) > loss(without, *args) + 1e-3
    assert loss(without, *args) < start - 0.01
    assert optax.tree.norm(lora["auxiliary"]) == pytest.approx(rho, rel=1e-3)
