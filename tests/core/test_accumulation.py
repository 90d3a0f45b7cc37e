"""Gradients accumulated over micro-batches: what each order of the chain means."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import samax

assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)

RHO, RATE = 0.1, 0.05
INPUTS = jax.random.normal(jax.random.key(0), (8, 4))
TARGETS = jnp.sin(INPUTS).sum(axis=1)
BATCH = (INPUTS, TARGETS)
MICRO_BATCHES = [(INPUTS[:4], TARGETS[:4]), (INPUTS[4:], TARGETS[4:])]


def initial():
    """LoRA factors, both away from zero."""
    a, b = jax.random.split(jax.random.key(1))
    lora_a, lora_b = 0.5 * jax.random.normal(a, (4, 8)), 0.5 * jax.random.normal(b, (8, 2))
    return {"lora_a": lora_a, "lora_b": lora_b}


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean(((jnp.tanh(x @ params["lora_a"]) @ params["lora_b"]).sum(1) - y) ** 2)


def perturbed_gradient(params, ascent_batch, batch):
    """SAM's formula, the perturbation from one batch and the gradient there from another."""
    grads = jax.grad(loss_fn)(params, ascent_batch)
    norm = optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads)
    return jax.grad(loss_fn)(point, batch)


def stepped(params, gradient):
    return jax.tree.map(lambda w, g: w - RATE * g, params, gradient)


@pytest.mark.skipif(
    not hasattr(optax, "microbatching"), reason="this version of Optax has no microbatching"
)
def test_one_perturbation_over_the_whole_batch_with_optax_microbatching():
    micro_batched = optax.microbatching.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=1,
        microbatch_size=2,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    value_and_grad_fn = lambda params: micro_batched(params, BATCH)
    tx = optax.chain(samax.sam(RHO, track=True), optax.sgd(RATE))

    @jax.jit
    def step(params, state):
        value, grads = value_and_grad_fn(params)
        updates, state = tx.update(
            grads, state, params, value=value, value_and_grad_fn=value_and_grad_fn
        )
        return optax.apply_updates(params, updates), state

    params, state = step(initial(), tx.init(initial()))
    assert_close(params, stepped(initial(), perturbed_gradient(initial(), BATCH, BATCH)))
    assert float(optax.tree.get(state, "clean_loss")) == pytest.approx(
        float(loss_fn(initial(), BATCH)), rel=1e-5
    )


def accumulated(tx, function_of):
    """The parameters after one pass over the micro-batches, each with the function it is given."""
    tx = optax.MultiSteps(tx, len(MICRO_BATCHES))

    @jax.jit
    def micro_step(params, state, batch):
        value_fn = functools.partial(loss_fn, batch=function_of(batch))
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    params, state = initial(), tx.init(initial())
    for batch in MICRO_BATCHES:
        params, state = micro_step(params, state, batch)
    return params


def test_around_sam_the_last_micro_batch_alone_is_evaluated():
    """The combination that runs and is wrong, as the docstring of `sam` says it."""
    sam_sgd = optax.chain(samax.sam(RHO), optax.sgd(RATE))
    wrong = stepped(initial(), perturbed_gradient(initial(), BATCH, MICRO_BATCHES[-1]))
    assert_close(accumulated(sam_sgd, lambda batch: batch), wrong)
    right = stepped(initial(), perturbed_gradient(initial(), BATCH, BATCH))
    assert_close(accumulated(sam_sgd, lambda _: BATCH), right)
    assert np.max(np.abs(wrong["lora_a"] - right["lora_a"])) > 1e-3
    assert "MultiSteps" in samax.sam.__doc__


def test_around_two_calls_every_micro_batch_is_seen_twice():
    """`MultiSteps(alternating(chain(sam, base)), k)` needs no function: SAM on all of them."""
    tx = optax.MultiSteps(
        samax.alternating(optax.chain(samax.sam(RHO), optax.sgd(RATE))), len(MICRO_BATCHES)
    )

    @jax.jit
    def micro_call(params, state, batch):
        updates, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params, state = initial(), tx.init(initial())
    for batch in 2 * MICRO_BATCHES:
        params, state = micro_call(params, state, batch)
    expected = stepped(initial(), perturbed_gradient(initial(), BATCH, BATCH))
    assert_close(samax.eval_params(state, params), expected)
    assert_close(params, expected)


@pytest.mark.parametrize("method", [samax.nbar, samax.das])
def test_balanced_lora_factors_sharded_and_accumulated(method):
    """Once for the accumulated gradient, with norms over all devices: one device, one batch."""
    tx = method(
        optax.sgd(RATE, momentum=0.9), learning_rate=RATE, alpha=0.5, groups=samax.lora_groups
    )
    params = initial()
    grads = jax.grad(loss_fn)(params, BATCH)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    expected = optax.apply_updates(params, updates)
    plain = stepped(params, grads)
    assert np.max(np.abs(expected["lora_a"] - plain["lora_a"])) > 1e-3

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "model"))
    place = lambda x, where: jax.device_put(x, NamedSharding(mesh, where))
    wheres = {"lora_a": P("data", "model"), "lora_b": P("model")}
    sharded = {name: place(leaf, wheres[name]) for name, leaf in params.items()}
    accumulating = optax.MultiSteps(tx, len(MICRO_BATCHES))

    @jax.jit
    def micro_step(params, state, batch):
        updates, state = accumulating.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    state = accumulating.init(sharded)
    for batch in MICRO_BATCHES:
        part = jax.tree.map(lambda x: place(x, P("data")), batch)
        sharded, state = micro_step(sharded, state, part)
    assert_close(jax.device_get(sharded), expected)
    for name, leaf in sharded.items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, wheres[name]), leaf.ndim)
