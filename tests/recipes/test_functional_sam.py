"""Functional SAM: the perturbed Jacobian with the clean derivative of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from tests.golden_problems import base_optimizer, golden_cases, largest_error
from tests.marks import first_fast

INPUTS = jax.random.normal(jax.random.key(0), (16, 5))
TARGETS = jnp.sin(INPUTS).sum(axis=1)


def functional(tx, outputs_fn, loss_fn):
    """`tx` with Functional SAM's `grad_fn` made at each step, whatever function it is given."""

    def update(updates, state, params, *, value=None, value_fn=None):
        del value_fn
        grad_fn = samax.functional_grad_fn(outputs_fn, loss_fn, outputs_fn(params))
        return tx.update(updates, state, params, value=value, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "problem"), first_fast(golden_cases("functionalsam"), 2))
def test_the_golden_trajectories(case, problem):
    x, labels = (jnp.asarray(problem["data"][name]) for name in ("x", "labels"))

    def logits(p):
        hidden = jnp.tanh(x @ p["fc1.weight"].T + p["fc1.bias"])
        return hidden @ p["fc2.weight"].T + p["fc2.bias"]

    def loss(logits):
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.size), labels])

    sam = samax.sam(case["hyper"]["rho"], eps=case["hyper"]["eps"])
    base = base_optimizer(case["base_optimizer"])
    assert largest_error(case, problem, optax.chain(functional(sam, logits, loss), base)) < 1e-9
    # SAM, the nearest wrong thing, is another method on every case.
    assert largest_error(case, problem, optax.chain(sam, base)) > 1e-6


def network(params, dtype=None):
    inputs = INPUTS if dtype is None else INPUTS.astype(dtype)
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def initial(dtype=jnp.float32):
    first, second = jax.random.split(jax.random.key(1))
    return {
        "w": jax.random.normal(first, (5, 3)).astype(dtype),
        "v": jax.random.normal(second, (3,)).astype(dtype),
    }


def squared(outputs):
    return jnp.mean((outputs - TARGETS.astype(outputs.dtype)) ** 2)


def weighted_sum(outputs):
    return jnp.vdot(outputs, TARGETS.astype(outputs.dtype))


def directions(outputs_fn, loss_fn, params, rho=0.5):
    """Of Functional SAM, of SAM, and of the base optimizer."""
    composed = lambda p: loss_fn(outputs_fn(p))
    grads, sam = jax.grad(composed)(params), samax.sam(rho)
    grad_fn = samax.functional_grad_fn(outputs_fn, loss_fn, outputs_fn(params))
    functional_sam, _ = sam.update(grads, sam.init(params), params, grad_fn=grad_fn)
    plain_sam, _ = sam.update(grads, sam.init(params), params, value_fn=composed)
    return functional_sam, plain_sam, grads


def distance(left, right):
    return float(optax.tree.norm(optax.tree.sub(left, right)) / optax.tree.norm(right))


@pytest.mark.usefixtures("x64")
def test_it_is_sam_where_the_loss_is_linear_in_the_outputs():
    found, sam, grads = directions(network, weighted_sum, initial(jnp.float64))
    assert distance(found, sam) < 1e-12
    assert distance(found, grads) > 0.01


@pytest.mark.usefixtures("x64")
def test_it_is_the_base_optimizer_where_the_model_is_linear():
    linear = lambda p: INPUTS @ p["w"] @ jnp.ones(3) + p["v"].sum()
    found, sam, grads = directions(linear, squared, initial(jnp.float64))
    assert distance(found, grads) < 1e-12
    assert distance(sam, grads) > 0.01


@pytest.mark.usefixtures("x64")
def test_it_is_neither_elsewhere_and_both_at_radius_0():
    found, sam, grads = directions(network, squared, initial(jnp.float64))
    assert distance(found, sam) > 0.01
    assert distance(found, grads) > 0.01
    found, sam, grads = directions(network, squared, initial(jnp.float64), rho=0.0)
    assert distance(found, grads) < 1e-14


@pytest.mark.usefixtures("x64")
def test_against_the_jacobian_written_out():
    params = initial(jnp.float64)
    grad_fn = samax.functional_grad_fn(network, squared, network(params))
    point = jax.tree.map(lambda w: w + 0.3, params)
    jacobian = jax.jacobian(network)(point)
    slope = 2 * (network(params) - TARGETS) / TARGETS.size
    expected = jax.tree.map(lambda j: jnp.tensordot(slope, j, 1), jacobian)
    assert distance(grad_fn(point), expected) < 1e-13


def test_outputs_may_be_a_pytree():
    outputs_fn = lambda p: {"logits": network(p), "penalty": p["v"] ** 2}
    loss_fn = lambda outputs: squared(outputs["logits"]) + outputs["penalty"].sum()
    found, _, grads = directions(outputs_fn, loss_fn, initial(), rho=0.0)
    assert distance(found, grads) < 1e-6


def train_step(tx, params, state):
    clean_pass = lambda p: (squared(outputs := network(p)), outputs)
    (value, outputs), grads = jax.value_and_grad(clean_pass, has_aux=True)(params)
    grad_fn = samax.functional_grad_fn(network, squared, outputs)
    updates, state = tx.update(grads, state, params, value=value, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state


@pytest.mark.slow
def test_under_jit_scan_and_vmap():
    tx, params = optax.chain(samax.sam(0.5), optax.sgd(0.05, momentum=0.9)), initial()
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    eager = jitted = (params, tx.init(params))
    for _ in range(3):
        eager = train_step(tx, *eager)
        jitted = jax.jit(lambda p, s: train_step(tx, p, s))(*jitted)
    jax.tree.map(close, jitted, eager)
    body = lambda carry, _: (train_step(tx, *carry), None)
    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), length=3)
    jax.tree.map(close, scanned, eager)
    starts = [params, jax.tree.map(lambda w: -2 * w, params)]
    one = lambda p: train_step(tx, p, tx.init(p))[0]
    together = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *starts))
    jax.tree.map(close, together, jax.tree.map(lambda *x: jnp.stack(x), *map(one, starts)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
    outputs_fn = lambda p: network(p, p["w"].dtype)
    found, _, _ = directions(outputs_fn, squared, initial(dtype))
    wide, _, _ = directions(outputs_fn, squared, jax.tree.map(jnp.float32, initial(dtype)))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    assert distance(jax.tree.map(jnp.float32, found), wide) < 0.1


@pytest.mark.optimized
def test_a_compiled_step_costs_what_sams_costs():
    """The derivative by the outputs needs no pass of its own."""
    tx, params = optax.chain(samax.sam(0.5), optax.sgd(0.05)), initial()

    def sam_step(params, state):
        loss_fn = lambda p: squared(network(p))
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    def flops(step):
        compiled = jax.jit(step).lower(params, tx.init(params)).compile()
        return dict(compiled.cost_analysis())["flops"]

    assert flops(lambda p, s: train_step(tx, p, s)) <= 1.01 * flops(sam_step)


def test_it_fits_other_combinators():
    params = initial()
    tx = samax.occasionally(samax.sam(0.5), samax.every(2))
    functional_tx = functional(tx, network, squared)
    grads, state = jax.grad(lambda p: squared(network(p)))(params), tx.init(params)
    first, state = functional_tx.update(grads, state, params)
    second, _ = functional_tx.update(grads, state, params)
    assert distance(first, grads) > 0.01
    assert distance(second, grads) < 1e-6


def test_what_is_refused():
    params = initial()
    outputs = network(params)
    with pytest.raises(TypeError, match="outputs_fn must be a function of the parameters"):
        samax.functional_grad_fn(outputs, squared, outputs)
    with pytest.raises(TypeError, match="loss_fn must be a function of the outputs"):
        samax.functional_grad_fn(network, 0.0, outputs)
    with pytest.raises(TypeError, match=r"loss_fn\(outputs\) must be a scalar loss"):
        samax.functional_grad_fn(network, lambda outputs: outputs**2, outputs)
    grad_fn = samax.functional_grad_fn(lambda p: network(p)[:4], weighted_sum, outputs)
    with pytest.raises(TypeError, match=r"outputs must be those of outputs_fn in the clean pass"):
        grad_fn(params)
