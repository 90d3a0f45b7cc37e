"""One gradient a step: the parameters outside are the perturbed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import samax

INPUTS = jax.random.normal(jax.random.key(0), (16, 5))
RATE = optax.linear_schedule(0.05, 0.0, 20)


def loss_fn(params, x=INPUTS):
    return jnp.mean((jnp.tanh(x.astype(params["w"].dtype) @ params["w"]) * params["v"]).sum(1) ** 2)


def initial(dtype=jnp.float32):
    w = jax.random.uniform(jax.random.key(1), (5, 3), minval=0.5, maxval=1.5)
    return {"w": w.astype(dtype), "v": jnp.array([1.0, -1.5, 2.0], dtype)}


def base():
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(1e-2),
        optax.sgd(RATE, momentum=0.9),
    )


RECIPES = {
    "stale_sam": lambda rho=0.1, **options: samax.stale_sam(base(), rho, **options),
    "msam": lambda rho=0.1, **options: samax.msam(base(), rho, **options),
}
every_recipe = pytest.mark.parametrize("name", RECIPES)


def call(tx, params, state, loss=loss_fn):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def train(tx, params, steps=4):
    state, step = tx.init(params), jax.jit(functools.partial(call, tx))
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def written_out(source, sign, params, steps, rho=0.1, decay_perturbed=False):
    """The unperturbed and the perturbed parameters after some steps, one operation at a time."""
    tx, w, point = base(), params, params
    state = tx.init(w)
    for _ in range(steps):
        grads = jax.grad(loss_fn)(point)
        step, state = tx.update(grads, state, point if decay_perturbed else w)
        w = optax.apply_updates(w, step)
        along = {
            "gradient": grads,
            "update": step,
            "momentum": optax.tree.get(state, "trace"),
        }[source]
        eps = optax.tree.scale(sign * rho / optax.tree.norm(along), along)
        point = optax.apply_updates(w, eps)
    return w, point


def assert_close(left, right, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), left, right)


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("decay_perturbed", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("source", ["gradient", "update", "momentum"])
@pytest.mark.usefixtures("x64")
def test_every_source_and_sign_against_the_step_written_out(source, sign, decay_perturbed):
    params = initial(jnp.float64)
    ascent = optax.chain(samax.scale_to_norm(0.1), optax.scale(sign))
    tx = samax.one_gradient(base(), ascent, source=source, decay_perturbed=decay_perturbed)
    point, state = train(tx, params)
    w, expected = written_out(source, sign, params, 4, decay_perturbed=decay_perturbed)
    assert_close(samax.eval_params(state, point), w, rtol=1e-12)
    assert_close(point, expected, rtol=1e-12)


def test_the_first_step_is_unperturbed_and_the_recipes_are_their_compositions():
    params = initial()
    _, state = call(RECIPES["stale_sam"](), params, RECIPES["stale_sam"]().init(params))
    assert_close(state.params, optax.apply_updates(params, _base_step(params)))
    against = optax.chain(samax.scale_to_norm(0.1), optax.scale(-1.0))
    msam = samax.one_gradient(base(), against, source="momentum")
    assert_same(train(RECIPES["msam"](), params), train(msam, params))
    stale = samax.one_gradient(base(), samax.scale_to_norm(0.1))
    assert_same(train(RECIPES["stale_sam"](), params), train(stale, params))


def _base_step(params):
    return base().update(jax.grad(loss_fn)(params), base().init(params), params)[0]


def test_stale_sam_goes_uphill_and_msam_downhill():
    params = initial()
    for name, sign in (("stale_sam", 1), ("msam", -1)):
        point, state = train(RECIPES[name](), params, 3)
        clean = samax.eval_params(state, point)
        eps = optax.tree.sub(point, clean)
        assert optax.tree.norm(eps) == pytest.approx(0.1, rel=1e-5)
        assert sign * (loss_fn(point) - loss_fn(clean)) > 0
    # With plain SGD the two are one another's mirror image.
    stale = samax.stale_sam(optax.sgd(0.1), 0.1)
    msam = samax.msam(optax.sgd(0.1, momentum=0.0), 0.1)
    for tx, sign in ((stale, 1), (msam, -1)):
        point, state = call(tx, params, tx.init(params))
        eps = optax.tree.sub(point, samax.eval_params(state, point))
        unit = optax.tree.scale(1 / optax.tree.norm(eps), eps)
        grads = jax.grad(loss_fn)(params)
        assert optax.tree.vdot(unit, grads) == pytest.approx(
            sign * float(optax.tree.norm(grads)), rel=1e-5
        )


@every_recipe
def test_zero_rho_is_the_base_optimizer(name):
    point, state = train(RECIPES[name](0.0), initial())
    assert_close(point, train(base(), initial())[0], rtol=1e-6)
    assert_same(samax.eval_params(state, point), state.params)


@every_recipe
def test_a_zero_gradient_gives_no_perturbation(name):
    tx, params = RECIPES[name](), jax.tree.map(jnp.zeros_like, initial())
    updates, state = tx.update(params, tx.init(params), params)
    assert_same(updates, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@every_recipe
def test_an_unmodified_train_state(name):
    """One changed line: the optimizer."""
    state = TrainState.create(apply_fn=loss_fn, params=initial(), tx=RECIPES[name]())

    @jax.jit
    def train_step(state, batch):
        grads = jax.grad(state.apply_fn)(state.params, batch)
        return state.apply_gradients(grads=grads)

    for _ in range(4):
        state = train_step(state, INPUTS)
    point, expected = train(RECIPES[name](), initial())
    assert_close(state.params, point)
    clean = samax.eval_params(state.opt_state, state.params)
    assert_close(clean, samax.eval_params(expected, point))
    assert np.any(clean["w"] != state.params["w"])


@every_recipe
def test_an_unmodified_nnx_optimizer(name):
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    loss = lambda model, x: jnp.mean(model(x) ** 2)
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, RECIPES[name](), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x):
        optimizer.update(model, nnx.grad(loss)(model, x))

    for _ in range(3):
        train_step(model, optimizer, INPUTS)
    bare = lambda params: jnp.mean((INPUTS @ params["kernel"] + params["bias"]) ** 2)
    tx = RECIPES[name]()
    state = tx.init(pure)
    for _ in range(3):
        pure, state = call(tx, pure, state, bare)
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), pure)
    clean = samax.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    nnx.update(model, clean)  # to evaluate
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), samax.eval_params(state, pure))


@every_recipe
def test_the_evaluation_parameters_are_found_anywhere(name):
    params = initial()
    inner = RECIPES[name]()
    for tx in (
        optax.chain(optax.clip_by_global_norm(10.0), inner),
        optax.MultiSteps(inner, 2).gradient_transformation(),
        optax.apply_if_finite(inner, 3),
    ):
        point, state = train(tx, params, 2)
        clean = samax.eval_params(state, point)
        assert optax.tree.norm(optax.tree.sub(point, clean)) == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(ValueError, match=r"or samax.one_gradient, and found 0"):
        samax.eval_params(base().init(params), params)
    with pytest.raises(ValueError, match="found 2"):
        samax.eval_params((state, state), params)


def test_clipping_before_it_changes_the_source_too():
    """And clipping inside it the optimizer's step alone; here both leave the direction as it is."""
    params = initial()
    clip = optax.clip_by_global_norm(0.01)
    before = optax.chain(clip, samax.stale_sam(optax.sgd(0.1), 0.1))
    inside = samax.stale_sam(optax.chain(clip, optax.sgd(0.1)), 0.1)
    assert_close(train(before, params)[0], train(inside, params)[0])
    unnormalized = samax.scale_by_rho(0.1)
    before = optax.chain(clip, samax.one_gradient(optax.sgd(0.1), unnormalized))
    inside = samax.one_gradient(optax.chain(clip, optax.sgd(0.1)), unnormalized)
    for tx, clipped in ((before, True), (inside, False)):
        point, state = train(tx, params, 1)
        eps = optax.tree.norm(optax.tree.sub(point, samax.eval_params(state, point)))
        assert (eps < 0.00101) == clipped


@every_recipe
def test_accumulated_gradients(name):
    """`MultiSteps` around it: all micro-batches at one point, and one step of their mean."""
    micro = jnp.split(INPUTS, 4)
    tx = optax.MultiSteps(RECIPES[name](), 4)
    params = initial()
    state = tx.init(params)
    for _ in range(3):
        for part in micro:
            grads = jax.grad(loss_fn)(params, part)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    expected, expected_state = train(RECIPES[name](), initial(), 3)
    assert_close(params, expected, rtol=1e-4)
    assert_close(samax.eval_params(state, params), expected_state.params, rtol=1e-4)


@every_recipe
def test_a_checkpoint_between_two_steps(name, tmp_path):
    import orbax.checkpoint as ocp

    tx = RECIPES[name]()
    params, state = train(tx, initial(), 3)
    saved = {"params": params, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "between", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "between", abstract)
    step = jax.jit(functools.partial(call, tx))
    assert_same(step(restored["params"], restored["state"]), step(params, state))
    assert_same(samax.eval_params(restored["state"], restored["params"]), state.params)


@every_recipe
def test_parameters_and_state_may_be_donated(name):
    tx = RECIPES[name]()
    step = jax.jit(functools.partial(call, tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, initial())
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert_close(params, train(tx, initial(), 3)[0])


def size(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@every_recipe
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_state_holds_the_parameters_once(name, dtype):
    params = initial(dtype)
    assert size(RECIPES[name]().init(params)) == size(base().init(params)) + size(params)


@every_recipe
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_parameters_are_never_rounded_to_the_point_and_back(name, dtype):
    """A learning rate of 0 moves them nowhere, however long they are perturbed."""
    make = {"stale_sam": samax.stale_sam, "msam": samax.msam}[name]
    params = initial(dtype)
    params["w"] = params["w"].at[0].set(jnp.array([1e-3, 0.0, -2e-3], dtype))
    tx = make(optax.sgd(0.0, momentum=0.9), 0.5)
    state, step, point = tx.init(params), jax.jit(functools.partial(call, tx)), params
    for _ in range(10):
        point, state = step(point, state)
        assert_same(samax.eval_params(state, point), params)
        assert jax.tree.map(lambda x: x.dtype, point) == jax.tree.map(lambda x: x.dtype, params)
        moved = jax.tree.map(lambda a, b: (a - b).astype(jnp.float32), point, params)
        assert optax.tree.norm(moved) == pytest.approx(0.5, rel=0.05)


def test_a_perturbation_that_bfloat16_swallows_is_rounded_stochastically():
    params = {"w": jnp.ones(4_096, jnp.bfloat16)}
    grads = {"w": jnp.ones(4_096, jnp.bfloat16)}
    plain = samax.stale_sam(optax.sgd(0.0), 0.05)
    updates, _ = plain.update(grads, plain.init(params), params)
    assert not np.any(updates["w"])
    rounded = samax.one_gradient(
        optax.sgd(0.0), optax.chain(samax.scale_to_norm(0.05), samax.stochastic_rounding(0))
    )
    updates, state = rounded.update(grads, rounded.init(params), params)
    assert np.mean(updates["w"].astype(np.float32)) == pytest.approx(0.05 / 64, rel=0.3)
    assert_same(samax.eval_params(state, params), params)


@every_recipe
def test_a_subset_is_perturbed_and_everything_is_trained(name):
    params = initial()
    point, state = train(RECIPES[name](mask={"w": True, "v": False}), params)
    clean = samax.eval_params(state, point)
    assert_close(point["v"], clean["v"], rtol=1e-6)
    assert np.any(clean["v"] != params["v"])
    assert np.linalg.norm(point["w"] - clean["w"]) == pytest.approx(0.1, rel=1e-4)


@every_recipe
def test_under_scan_and_vmap(name):
    tx, params = RECIPES[name](), initial()
    body = lambda carry, _: (call(tx, *carry), None)
    scanned, _ = jax.lax.scan(body, (params, tx.init(params)), length=4)
    assert_close(scanned, train(tx, params))
    radii = jnp.array([0.05, 0.2])

    def trained(rho):
        tx = RECIPES[name](rho)
        return jax.lax.fori_loop(0, 3, lambda _, c: call(tx, *c), (params, tx.init(params)))[0]

    together = jax.vmap(trained)(radii)
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(trained, radii)))


@every_recipe
def test_schedules_count_steps(name):
    tx = RECIPES[name](optax.linear_schedule(0.1, 0.0, 4))
    params, state = initial(), None
    state = tx.init(params)
    for rho in (0.1, 0.075, 0.05):
        params, state = call(tx, params, state)
        eps = optax.tree.sub(params, samax.eval_params(state, params))
        assert optax.tree.norm(eps) == pytest.approx(rho, rel=1e-4)
    counts = dict(optax.tree.get_all_with_path(state, "count"))
    assert {int(count) for count in counts.values()} == {3}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_gradient_is_not_perturbed_along(bad):
    ascent = optax.chain(samax.gradient_ema(0.5), samax.scale_to_norm(0.1))
    tx = samax.one_gradient(optax.sgd(0.1), ascent)
    params, state = train(tx, initial(), 2)
    grads = jax.grad(loss_fn)(params)
    broken = grads | {"w": grads["w"].at[0, 0].set(bad)}
    updates, after = tx.update(broken, state, params)
    assert_same(after.ascent, state.ascent)
    # The optimizer saw it as it is, and the others are unperturbed.
    assert np.sum(~np.isfinite(updates["w"])) == 1
    assert_close(optax.apply_updates(params, updates)["v"], after.params["v"], rtol=1e-6)
    assert not np.any(np.isnan(updates["w"])) or np.isnan(bad)
    skipping = optax.apply_if_finite(tx, 5)
    updates, after = skipping.update(broken, skipping.init(initial()), initial())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert_same(after.inner_state, tx.init(initial()))


def test_an_ascent_that_makes_a_nan_shows():
    faulty = optax.stateless(lambda updates, _: optax.tree.scale(jnp.nan, updates))
    tx = samax.one_gradient(optax.sgd(0.1), faulty)
    updates, state = tx.update(initial(), tx.init(initial()), initial())
    assert np.all(np.isnan(updates["w"]))
    assert np.all(np.isfinite(state.params["w"]))


def test_dp_sat():
    """DP-SAT: perturbed along the last privatized gradient, at no further privacy cost."""
    params = initial()

    def private(key=0):
        return optax.contrib.differentially_private_aggregate(1.0, 0.3, key)

    tx = optax.chain(private(), samax.stale_sam(optax.sgd(0.1), 0.05))
    per_example = jax.jit(jax.vmap(jax.grad(lambda p, x: loss_fn(p, x[None])), (None, 0)))
    state, noise = tx.init(params), private()
    noise_state, w, point = noise.init(params), params, params
    for _ in range(3):
        updates, state = tx.update(per_example(params, INPUTS), state, params)
        params = optax.apply_updates(params, updates)
        released, noise_state = noise.update(per_example(point, INPUTS), noise_state)
        w = optax.apply_updates(w, optax.tree.scale(-0.1, released))
        eps = optax.tree.scale(0.05 / optax.tree.norm(released), released)
        point = optax.apply_updates(w, eps)
    assert_close(params, point)
    assert_close(samax.eval_params(state, params), w)


def test_sharded_parameters():
    mesh = jax.make_mesh((4,), ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 3))}
    loss = lambda p: jnp.mean(jnp.cosh(p["w"]))
    tx = RECIPES["msam"]()
    expected, expected_state = params, tx.init(params)
    sharded = jax.device_put(params, spec)
    state = tx.init(sharded)
    assert state.params["w"].sharding.is_equivalent_to(spec, 2)
    step = jax.jit(functools.partial(call, tx, loss=loss))
    for _ in range(3):
        sharded, state = step(sharded, state)
        expected, expected_state = step(expected, expected_state)
    assert_close(sharded, expected)
    assert_close(samax.eval_params(state, sharded), expected_state.params)


class TestErrors:
    def test_parts(self):
        with pytest.raises(TypeError, match="optimizer must be an Optax"):
            samax.stale_sam(0.05)
        with pytest.raises(TypeError, match="ascent must be an Optax"):
            samax.one_gradient(optax.sgd(0.1), 0.05)
        with pytest.raises(ValueError, match=r"source must be one of 'gradient'.*got 'grad'"):
            samax.one_gradient(optax.sgd(0.1), samax.normalize(), source="grad")
        with pytest.raises(ValueError, match="rho must be finite"):
            samax.msam(optax.sgd(0.1), -1.0)

    def test_momentum(self):
        with pytest.raises(ValueError, match=r"needs one first moment.*found 0"):
            samax.msam(optax.sgd(0.1), 0.1).init(initial())
        two = optax.chain(optax.trace(0.9), optax.adam(0.1))
        with pytest.raises(ValueError, match="found 2"):
            samax.msam(two, 0.1).init(initial())
        parts = optax.masked(optax.trace(0.9), {"w": True, "v": False})
        with pytest.raises(ValueError, match="found 0"):
            samax.msam(parts, 0.1).init(initial())

    def test_update(self):
        tx = RECIPES["stale_sam"]()
        with pytest.raises(ValueError, match="samax needs params"):
            tx.update(initial(), tx.init(initial()))
        with pytest.raises(ValueError, match="updates must be the same pytree"):
            tx.update({"w": initial()["w"]}, tx.init(initial()), initial())
