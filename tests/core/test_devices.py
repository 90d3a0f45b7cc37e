"""Named axes of devices, and groups of examples on one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import samax

assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-7)

INPUTS = jax.random.normal(jax.random.key(0), (8, 3))
TARGETS = jnp.sin(INPUTS).sum(axis=1)
BATCH = (INPUTS, TARGETS)
RHO, RATE = 0.1, 0.05
MEAN = samax.cross_replica_mean("data")
SYNCHRONIZED = optax.chain(MEAN, samax.sam(RHO), MEAN, optax.sgd(RATE))
PER_DEVICE = optax.chain(samax.sam(RHO), MEAN, optax.sgd(RATE))


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - y) ** 2)


def initial():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}


def groups(number):
    """The batch in equal parts."""
    inputs, targets = (x.reshape(number, -1, *x.shape[1:]) for x in BATCH)
    return list(zip(inputs, targets, strict=True))


def perturbed_gradient(params, batch):
    """SAM's formula, written out."""
    grads = jax.grad(loss_fn)(params, batch)
    norm = optax.tree.norm(grads)
    return jax.grad(loss_fn)(jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads), batch)


def mean_over(number, gradient):
    each = [gradient(initial(), group) for group in groups(number)]
    return jax.tree.map(lambda *g: sum(g) / number, *each)


def as_each_devices_own(params):
    """What the documentation asks for in `shard_map`; without types there is nothing to do."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(params, "data", to="varying")
    return params


def shard_map(fn, devices, in_specs, out_specs, typed=True):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    if hasattr(jax.lax, "pcast"):
        return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=typed)
    if typed:
        pytest.skip("this version of JAX does not type what varies over devices")
    from jax.experimental.shard_map import shard_map

    return shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False)


def device_step(tx, params, batch, state=None):
    """One device's step on its own part of the batch."""
    local = as_each_devices_own(params)
    value_fn = functools.partial(loss_fn, batch=batch)
    value, grads = jax.value_and_grad(value_fn)(local)
    state = tx.init(params) if state is None else state
    updates, state = tx.update(grads, state, local, value=value, value_fn=value_fn)
    return optax.apply_updates(params, updates)


def on_devices(tx, how, devices=4):
    """The parameters after one step, and how many all-reduces the compiled program has."""
    step = functools.partial(device_step, tx)
    if how == "pmap":
        parts = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), BATCH)
        results = jax.pmap(step, axis_name="data", in_axes=(None, 0))(initial(), parts)
        for leaf in jax.tree.leaves(results):
            np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * devices))
        return jax.tree.map(lambda leaf: leaf[0], results), None
    sharded = shard_map(step, devices, (P(), P("data")), P(), typed=how == "shard_map")
    compiled = jax.jit(sharded).lower(initial(), BATCH).compile()
    return compiled(initial(), BATCH), compiled.as_text().count(" all-reduce(")


HOWS = ["shard_map", "untyped", "pmap"]


@pytest.mark.parametrize("how", HOWS)
def test_the_mean_before_and_after_is_one_devices_sam_on_the_whole_batch(how):
    params, _ = on_devices(SYNCHRONIZED, how)
    expected = jax.tree.map(
        lambda w, g: w - RATE * g, initial(), perturbed_gradient(initial(), BATCH)
    )
    assert_close(params, expected)


@pytest.mark.parametrize("how", HOWS)
def test_the_mean_after_alone_is_sam_on_each_devices_part(how):
    params, _ = on_devices(PER_DEVICE, how)
    gradient = mean_over(4, perturbed_gradient)
    assert_close(params, jax.tree.map(lambda w, g: w - RATE * g, initial(), gradient))
    assert np.max(np.abs(gradient["w"] - perturbed_gradient(initial(), BATCH)["w"])) > 1e-3


def test_per_device_sam_all_reduces_what_sgd_does_and_synchronized_sam_twice_that():
    plain = on_devices(optax.chain(MEAN, optax.sgd(RATE)), "untyped")[1]
    assert plain > 0
    assert on_devices(PER_DEVICE, "untyped")[1] == plain
    assert on_devices(SYNCHRONIZED, "untyped")[1] == 2 * plain


def test_a_mean_loss_at_replicated_parameters_needs_no_part():
    """The other way in typed `shard_map`: the gradient of a mean is summed by JAX itself."""

    def step(params, batch):
        value_fn = lambda p: jax.lax.pmean(loss_fn(p, batch), "data")
        tx = optax.chain(samax.sam(RHO), optax.sgd(RATE))
        updates, _ = tx.update(
            jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn
        )
        return optax.apply_updates(params, updates)

    params = jax.jit(shard_map(step, 4, (P(), P("data")), P()))(initial(), BATCH)
    expected = perturbed_gradient(initial(), BATCH)
    assert_close(params, jax.tree.map(lambda w, g: w - RATE * g, initial(), expected))


@pytest.mark.parametrize("tx", [SYNCHRONIZED, optax.chain(MEAN, optax.sgd(RATE))])
def test_a_gradient_that_was_summed_is_refused(tx):
    def step(params, batch):
        value_fn = functools.partial(loss_fn, batch=batch)
        updates, _ = tx.update(
            jax.grad(value_fn)(params), tx.init(params), params, value_fn=value_fn
        )
        return updates

    sharded = shard_map(step, 4, (P(), P("data")), P())
    with pytest.raises(ValueError, match=r"the same on all devices.*pcast\(params, 'data'"):
        jax.eval_shape(sharded, initial(), BATCH)


def test_without_the_axis_the_mean_says_so():
    with pytest.raises(NameError, match=r"cross_replica_mean\('data'\) found no such axis.*jit"):
        MEAN.update(initial(), optax.EmptyState())


def group_step(tx, params, batch, state):
    updates, state = tx.update(
        jax.grad(loss_fn)(params, batch), state, params, value_fn=loss_fn, batch=batch
    )
    return updates, state


def test_groups_on_one_device_follow_the_formula():
    for unroll in (None, 1):
        tx = samax.m_sharpness(samax.sam(RHO), 4, unroll=unroll)
        updates, _ = jax.jit(functools.partial(group_step, tx))(
            initial(), BATCH, tx.init(initial())
        )
        assert_close(updates, mean_over(4, perturbed_gradient))
    whole = samax.m_sharpness(samax.sam(RHO), 1)
    updates, _ = group_step(whole, initial(), BATCH, whole.init(initial()))
    assert_close(updates, perturbed_gradient(initial(), BATCH))


def test_four_groups_agree_on_one_two_and_four_devices():
    """VaSSO, whose averages are the groups': the state's leading axis is sharded over devices."""
    start = samax.m_sharpness(samax.vasso(RHO, 0.5), 4).init(initial())

    def train(devices):
        tx = samax.m_sharpness(samax.vasso(RHO, 0.5), 4 // devices, unroll=1)

        def step(params, batch, state):
            updates, state = group_step(tx, as_each_devices_own(params), batch, state)
            updates = MEAN.update(updates, optax.EmptyState())[0]
            return optax.apply_updates(params, optax.tree.scale(-RATE, updates)), state

        typed = hasattr(jax.lax, "pcast")
        specs = (P(), P("data"), P("data"))
        sharded = jax.jit(shard_map(step, devices, specs, (P(), P("data")), typed=typed))
        params, state = initial(), start
        for _ in range(2):
            params, state = sharded(params, BATCH, state)
        return jax.device_get((params, state))

    one = train(1)
    assert one[1].ascent[0].ema["w"].shape == (4, 3)
    for devices in (2, 4):
        assert_close(train(devices), one, rtol=1e-6)


def test_three_ways_to_evaluate_groups():
    tx = samax.m_sharpness(samax.sam(RHO, track=True), 2)
    expected = mean_over(2, perturbed_gradient)
    grads, state = jax.grad(loss_fn)(initial(), BATCH), tx.init(initial())
    for extra in (
        {"value_fn": loss_fn},
        {"grad_fn": jax.grad(loss_fn)},
        {"value_and_grad_fn": jax.value_and_grad(loss_fn)},
    ):
        updates, new_state = tx.update(grads, state, initial(), batch=BATCH, lesson=5, **extra)
        assert_close(updates, expected)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        # Each group's own clean loss is known where a loss is.
        losses = [loss_fn(initial(), group) for group in groups(2)]
        known = "grad_fn" not in extra
        np.testing.assert_allclose(
            new_state.metrics.clean_loss, losses if known else [np.nan] * 2, rtol=1e-6
        )


@pytest.mark.optimized
def test_groups_cost_what_sam_costs():
    """Two gradients of each example: XLA drops the clean gradient of the whole batch."""
    inputs = jnp.ones((64, 16))
    loss = lambda w, batch: jnp.mean(jnp.tanh(batch @ w) ** 2)

    def flops(tx, **extra):
        def step(w, x):
            fn = loss if extra else functools.partial(loss, batch=x)
            batch = {"batch": x} if extra else {}
            return tx.update(jax.grad(loss)(w, x), tx.init(w), w, value_fn=fn, **batch)[0]

        compiled = jax.jit(step).lower(jnp.ones((16, 16)), inputs).compile()
        analysis = compiled.cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    sam = samax.sam(RHO)
    assert flops(samax.m_sharpness(sam, 4), groups=True) == pytest.approx(flops(sam), rel=0.1)


@pytest.mark.slow
@pytest.mark.optimized
def test_groups_are_streamed():
    """Memory does not grow with their number, though no loop keeps them apart."""

    def memory(num_groups, unroll):
        tx = samax.m_sharpness(samax.sam(RHO), num_groups, unroll=unroll)
        relu = lambda x: jnp.maximum(x, 0.0)  # compiles in less than tanh
        loss = lambda w, batch: jnp.mean(relu(relu(batch @ w) @ w) ** 2)
        step = lambda w, x: tx.update(w, tx.init(w), w, value_fn=loss, batch=x)[0]
        shapes = jnp.ones((32, 32)), jnp.ones((256 * num_groups, 32))
        return jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert memory(4, None) < 1.2 * memory(2, None)


@pytest.mark.parametrize(
    "streaming",
    [
        samax.trace_sam(0.1, sampling=samax.Sampling(samax.gaussian, 2)),
        samax.trace_sam(0.1, sampling=samax.Sampling(samax.gaussian, 2, unroll=1)),
        samax.det_sam(0.1, sampling=samax.Sampling(samax.cube(0.01), 2, unroll=1)),
    ],
)
@pytest.mark.parametrize("first", [MEAN, optax.identity()])
def test_the_universal_class_type_checks_on_each_device(streaming, first):
    tx = optax.chain(first, streaming, MEAN, optax.sgd(RATE))
    step = shard_map(functools.partial(device_step, tx), 4, (P(), P("data")), P())
    jax.eval_shape(step, initial(), BATCH)


@pytest.mark.parametrize("unroll", [None, 1])
def test_groups_in_a_loop_type_check_on_each_device(unroll):
    tx = optax.chain(samax.m_sharpness(samax.gsam(RHO), 2, unroll=unroll), MEAN)

    def step(params, batch, state):
        return group_step(tx, as_each_devices_own(params), batch, state)[0]

    state = optax.chain(samax.m_sharpness(samax.gsam(RHO), 8), MEAN).init(initial())
    sharded = shard_map(step, 4, (P(), P("data"), P("data")), P())
    jax.eval_shape(sharded, initial(), BATCH, state)


def test_the_groups_state_maps_like_parameters():
    tx = samax.m_sharpness(samax.vasso(RHO), 2)
    marked = optax.tree_map_params(
        tx, lambda _: "param", tx.init(initial()), transform_non_params=lambda _: ""
    )
    assert optax.tree.get(marked, "ema") == {"w": "param", "b": "param"}


def test_errors():
    tx = samax.m_sharpness(samax.sam(RHO), 3)
    grads, state = jax.grad(loss_fn)(initial(), BATCH), tx.init(initial())
    with pytest.raises(ValueError, match=r"num_groups must divide.*got 3 groups.*\(8, 3\)"):
        tx.update(grads, state, initial(), value_fn=loss_fn, batch=BATCH)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        tx.update(grads, state, initial(), value_fn=loss_fn, batch=jnp.ones(()))
    closed, two = lambda params: loss_fn(params, BATCH), samax.m_sharpness(samax.sam(RHO), 2)
    with pytest.raises(TypeError, match="so it must name it, as in value_fn"):
        two.update(grads, state, initial(), value_fn=closed, batch=BATCH)
    with pytest.raises(ValueError, match="m_sharpness needs the batch"):
        tx.update(grads, state, initial(), value_fn=loss_fn)
    with pytest.raises(ValueError, match="exactly one of value_fn, grad_fn"):
        tx.update(grads, state, initial(), batch=INPUTS[:6])
    with pytest.raises(ValueError, match="num_groups must be at least 1, got 0"):
        samax.m_sharpness(samax.sam(RHO), 0)
    with pytest.raises(TypeError, match="transformation must be an Optax"):
        samax.m_sharpness(samax.sam, 2)
