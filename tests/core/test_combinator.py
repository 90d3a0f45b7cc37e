"""The combinator and its evaluation contract."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax

CURVATURE = jnp.array([1.0, 3.0, 10.0])


def loss_fn(params):
    return 0.5 * jnp.sum(CURVATURE * params["w"] ** 2) + jnp.cosh(params["b"])


@pytest.fixture
def params():
    return {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}


def run_once(tx, params, **extra):
    grads = jax.grad(loss_fn)(params)
    return tx.update(grads, tx.init(params), params, **(extra or {"value_fn": loss_fn}))


def sam_ascent(rho=0.1):
    return samax.scale_to_norm(rho)


def reference_gradient(params, rho, steps=1):
    """The gradient after normalized ascent steps, written out in NumPy."""
    curvature, w, b = (np.asarray(x, np.float64) for x in (CURVATURE, params["w"], params["b"]))
    for _ in range(steps):
        gradient = np.append(curvature * w, np.sinh(b))
        eps = rho * gradient / np.linalg.norm(gradient)
        w, b = w + eps[:3], b + eps[3]
    return {"w": curvature * w, "b": np.sinh(b)}


def test_three_ways_to_evaluate_agree(params):
    tx = samax.sharpness_aware(sam_ascent())
    expected = reference_gradient(params, 0.1)
    for extra in (
        {"value_fn": loss_fn},
        {"grad_fn": jax.grad(loss_fn)},
        {"value_and_grad_fn": jax.value_and_grad(loss_fn)},
    ):
        updates, _ = run_once(tx, params, **extra)
        for name, value in expected.items():
            np.testing.assert_allclose(updates[name], value, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 12])
def test_steps_repeat_the_ascent_from_the_perturbed_point(params, steps):
    tx = samax.sharpness_aware(sam_ascent(0.03), steps=steps)
    expected = reference_gradient(params, 0.03, steps)
    eager, _ = run_once(tx, params)
    jitted, _ = jax.jit(lambda p: run_once(tx, p))(params)
    for name, value in expected.items():
        np.testing.assert_allclose(eager[name], value, rtol=1e-5)
        np.testing.assert_allclose(jitted[name], value, rtol=1e-5)


def test_the_program_stops_growing_with_the_steps(params):
    def size(steps):
        tx = samax.sharpness_aware(sam_ascent(), steps=steps)
        return len(jax.jit(lambda p: run_once(tx, p)).lower(params).as_text())

    assert size(8) > 2 * size(2)
    assert size(100) == pytest.approx(size(9), rel=0.01)


def test_the_ascents_state_moves_once_an_update(params):
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = samax.sharpness_aware(sam_ascent(schedule), steps=3)
    _, state = run_once(tx, params)
    assert optax.tree.get(state, "count") == 1
    grads = jax.grad(loss_fn)(params)
    updates, _ = tx.update(grads, state, params, value_fn=loss_fn)
    expected = reference_gradient(params, 0.09, 3)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


def test_any_transformation_is_an_ascent_and_a_descent(params):
    tx = samax.sharpness_aware(
        optax.chain(optax.scale_by_adam(), optax.scale(0.01)), optax.clip_by_global_norm(1.0)
    )
    updates, state = run_once(tx, params)
    assert optax.tree.norm(updates) == pytest.approx(1.0)
    # The first step of Adam is the sign of the gradient.
    moved = jax.tree.map(lambda w, g: w + 0.01 * jnp.sign(g), params, jax.grad(loss_fn)(params))
    perturbed = jax.grad(loss_fn)(moved)
    np.testing.assert_allclose(updates["w"], perturbed["w"] / optax.tree.norm(perturbed), rtol=1e-5)
    assert optax.tree.get(state, "count") == 1


def test_the_descent_receives_both_gradients(params):
    seen = {}

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, **extra):
        seen.update(extra, perturbed=updates, params=params)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(init, update)
    tx = samax.sharpness_aware(sam_ascent(), spy)
    run_once(tx, params, value_fn=loss_fn, value=loss_fn(params), lesson=5)
    np.testing.assert_array_equal(seen["clean_grad"]["w"], jax.grad(loss_fn)(params)["w"])
    np.testing.assert_allclose(
        seen["perturbed"]["w"], reference_gradient(params, 0.1)["w"], rtol=1e-6
    )
    assert seen["value"] == loss_fn(params)
    assert seen["value_fn"] is loss_fn
    point = jax.tree.map(jnp.add, params, seen["perturbation"])
    assert seen["perturbed_value"] == pytest.approx(float(loss_fn(point)), rel=1e-6)
    assert optax.tree.norm(seen["perturbation"]) == pytest.approx(0.1, rel=1e-5)
    assert seen["lesson"] == 5
    assert seen["params"] is params


def test_tracked_scalars(params):
    tx = optax.chain(samax.sharpness_aware(sam_ascent(), track=True), optax.sgd(0.1))
    value, grads = jax.value_and_grad(loss_fn)(params)
    _, state = tx.update(grads, tx.init(params), params, value=value, value_fn=loss_fn)
    get = lambda name: float(optax.tree.get(state, name))
    norm = float(optax.tree.norm(grads))
    point = jax.tree.map(lambda w, g: w + 0.1 * g / norm, params, grads)
    perturbed_value, perturbed = jax.value_and_grad(loss_fn)(point)
    perturbed_norm = float(optax.tree.norm(perturbed))
    assert get("clean_loss") == pytest.approx(float(value))
    assert get("perturbed_loss") == pytest.approx(float(perturbed_value))
    assert get("loss_gap") == pytest.approx(float(perturbed_value - value), rel=1e-5)
    assert get("clean_grad_norm") == pytest.approx(norm)
    assert get("perturbed_grad_norm") == pytest.approx(perturbed_norm)
    cosine = float(optax.tree.vdot(grads, perturbed)) / norm / perturbed_norm
    assert get("grad_cosine") == pytest.approx(cosine)
    assert get("perturbation_norm") == pytest.approx(0.1, rel=1e-5)


def test_what_is_not_known_is_tracked_as_nan(params):
    tx = samax.sharpness_aware(sam_ascent(), track=True)
    _, state = run_once(tx, params, grad_fn=jax.grad(loss_fn))
    assert np.isnan(state.metrics.clean_loss)
    assert np.isnan(state.metrics.perturbed_loss)
    assert np.isfinite(state.metrics.perturbed_grad_norm)
    assert jax.tree.leaves(samax.sharpness_aware(sam_ascent()).init(params).metrics) == []


def test_the_state_can_be_donated(params):
    tx = samax.samar(0.1, track=True)
    step = jax.jit(lambda state, p: run_once_more(tx, state, p), donate_argnums=0)
    _, state = step(tx.init(params), params)
    _, state = step(state, params)
    assert np.all(np.isfinite(state.metrics.perturbed_loss))


def run_once_more(tx, state, params):
    value, grads = jax.value_and_grad(loss_fn)(params)
    return tx.update(grads, state, params, value=value, value_fn=loss_fn)


def test_tracking_does_not_change_the_update_nor_add_an_evaluation(params):
    calls = []

    def counted(p):
        calls.append(1)
        return loss_fn(p)

    plain, _ = run_once(samax.sharpness_aware(sam_ascent()), params)
    tracked, _ = run_once(samax.sharpness_aware(sam_ascent(), track=True), params, value_fn=counted)
    assert len(calls) == 1
    jax.tree.map(np.testing.assert_array_equal, plain, tracked)


class TestRule:
    def test_a_function_of_the_two_gradients(self, params):
        penalty = samax.rule(
            lambda clean, perturbed: jax.tree.map(lambda g, p: 0.2 * g + 0.8 * p, clean, perturbed)
        )
        updates, state = run_once(samax.sharpness_aware(sam_ascent(), penalty), params)
        weighted, _ = run_once(samax.sharpness_aware(sam_ascent(), samax.weighted(0.8)), params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, weighted)
        assert jax.tree.leaves(state) == []

    def test_a_step_length_of_the_polyak_kind(self, params):
        """`gamma = L(w + eps) / ||g~||^2`, whose step finds the root of the linearized loss."""
        polyak = samax.rule(
            lambda clean, perturbed, perturbed_value: optax.tree.scale(
                perturbed_value / optax.tree.norm(perturbed, squared=True), perturbed
            )
        )
        tx = optax.chain(samax.sharpness_aware(sam_ascent(), polyak), optax.scale(-1.0))
        updates, _ = run_once(tx, params)
        eps = run_once(samax.sharpness_aware(sam_ascent()), params)[0]
        grads = jax.grad(loss_fn)(params)
        point = jax.tree.map(lambda w, g: w + 0.1 * g / optax.tree.norm(grads), params, grads)
        value, gradient = jax.value_and_grad(loss_fn)(point)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eps, gradient)
        linearized = value + optax.tree.vdot(gradient, updates)
        assert float(linearized) == pytest.approx(0.0, abs=1e-5)

    def test_what_it_names_it_gets(self, params):
        seen = {}

        def spy(clean, perturbed, perturbation, params, value, lesson=3):
            seen.update(perturbation=perturbation, params=params, value=value, lesson=lesson)
            return perturbed

        tx = samax.sharpness_aware(sam_ascent(), samax.rule(spy))
        run_once(tx, params, value_fn=loss_fn, value=loss_fn(params), lesson=5)
        assert seen["params"] is params
        assert seen["lesson"] == 5
        with pytest.raises(ValueError, match=r"names value, which is not known.*value=\.\.\."):
            run_once(tx, params)

    def test_arithmetic_on_whole_pytrees_names_the_fix(self, params):
        tx = samax.sharpness_aware(sam_ascent(), samax.rule(lambda clean, perturbed: 2 * clean))
        with pytest.raises(TypeError, match=r"failed on whole gradients.*jax.tree.map"):
            run_once(tx, params)
        part = samax.sharpness_aware(sam_ascent(), samax.rule(lambda clean, perturbed: clean["w"]))
        with pytest.raises(ValueError, match="the rule's direction must be the same pytree"):
            run_once(part, params)


@pytest.mark.parametrize(
    "method",
    [samax.sam, samax.usam, samax.asam, samax.vasso, samax.wsam, samax.gsam, samax.samar],
)
def test_every_method_perturbs_a_subset_in_one_argument(method, params):
    """The norm is over the subset; the perturbed gradient is whole."""
    points = []
    note = lambda point: points.append(point) or jax.grad(loss_fn)(point)
    for mask in ({"w": True, "b": False}, lambda tree: {name: name == "w" for name in tree}):
        run_once(method(0.1, mask=mask, track=True), params, grad_fn=note)
    for point in points:
        assert point["b"] == params["b"]
        assert np.all(point["w"] != params["w"])
    np.testing.assert_array_equal(points[0]["w"], points[1]["w"])
    subset = {"w": params["w"]}
    tx = method(0.1)
    tx.update(
        {"w": jax.grad(loss_fn)(params)["w"]},
        tx.init(subset),
        subset,
        grad_fn=lambda point: points.append(point) or point,
    )
    np.testing.assert_allclose(points[0]["w"], points[-1]["w"], rtol=1e-6)


class TestErrors:
    """Every misuse is one clear error."""

    tx = samax.sam(0.1)

    def update(self, params, **extra):
        return self.tx.update(jax.grad(loss_fn)(params), self.tx.init(params), params, **extra)

    def test_no_function(self, params):
        with pytest.raises(ValueError, match=r"exactly one of value_fn, grad_fn.*got none"):
            self.update(params)

    def test_two_functions(self, params):
        with pytest.raises(ValueError, match="got value_fn and grad_fn"):
            self.update(params, value_fn=loss_fn, grad_fn=jax.grad(loss_fn))

    def test_no_function_at_all(self, params):
        with pytest.raises(TypeError, match="value_fn must be a function"):
            self.update(params, value_fn=loss_fn(params))

    def test_no_params(self, params):
        with pytest.raises(ValueError, match="samax needs params"):
            self.tx.update(params, self.tx.init(params), value_fn=loss_fn)

    def test_auxiliary_output(self, params):
        with pytest.raises(TypeError, match=r"value_fn\(params\) must be a scalar loss, got a tup"):
            self.update(params, value_fn=lambda p: (loss_fn(p), {"accuracy": 1.0}))
        with pytest.raises(TypeError, match=r"first part of value_and_grad_fn.*got a tuple"):
            self.update(
                params,
                value_and_grad_fn=jax.value_and_grad(lambda p: (loss_fn(p), 1.0), has_aux=True),
            )
        with pytest.raises(ValueError, match="gradient that grad_fn returns must be the same"):
            self.update(params, grad_fn=jax.value_and_grad(loss_fn))
        with pytest.raises(TypeError, match=r"value must be a scalar loss, got a tuple"):
            self.update(params, value=(loss_fn(params), 1.0), value_fn=loss_fn)

    def test_no_scalar(self, params):
        with pytest.raises(TypeError, match=r"got shape \(3,\)"):
            self.update(params, value_fn=lambda p: p["w"])
        with pytest.raises(TypeError, match="got a dict"):
            self.update(params, value_fn=lambda p: p)

    def test_no_pair(self, params):
        with pytest.raises(TypeError, match=r"must be a pair \(loss, grads\)"):
            self.update(params, value_and_grad_fn=jax.grad(loss_fn))

    def test_another_tree(self, params):
        with pytest.raises(ValueError, match=r"updates must be the same pytree.*\['b'\]"):
            self.tx.update({"w": params["w"]}, self.tx.init(params), params, value_fn=loss_fn)
        with pytest.raises(ValueError, match=r"grad_fn returns.*\['b'\]"):
            self.update(params, grad_fn=lambda p: {"w": p["w"]})
        with pytest.raises(ValueError, match=r"shape \(2,\) at \['w'\]"):
            self.update(params, grad_fn=lambda p: {"w": p["w"][:2], "b": p["b"]})

    def test_masked_from_outside(self, params):
        hint = "MaskedNode at .*samax.perturb_only"
        with pytest.raises(TypeError, match=hint):
            optax.masked(self.tx, {"w": True, "b": False}).init(params)
        labels = {"w": "sam", "b": "none"}
        with pytest.raises(TypeError, match=hint):
            optax.partition({"sam": self.tx, "none": optax.set_to_zero()}, labels).init(params)

    def test_integer_and_complex_leaves(self, params):
        with pytest.raises(TypeError, match=r"leaf of dtype int32 at \['steps'\]"):
            self.tx.init(params | {"steps": jnp.array(0)})
        with pytest.raises(TypeError, match="complex64"):
            self.tx.init(params | {"z": jnp.array(1j)})

    @pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "method",
        [samax.sam, samax.usam, samax.asam, samax.vasso, samax.wsam, samax.gsam, samax.samar],
    )
    def test_rho(self, method, rho):
        with pytest.raises(ValueError, match="rho must be finite and lie in"):
            method(rho)

    def test_rho_of_another_type(self):
        with pytest.raises(TypeError, match="rho must be a number"):
            samax.sam("0.05")
        with pytest.raises(
            TypeError, match=r"rho must be one number, got an array of shape \(2,\)"
        ):
            samax.sam(jnp.array([0.1, 0.2]))

    def test_schedules(self):
        rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, 1000, 0.01)
        tied = lambda step: 0.02 + 0.03 * (rate(step) - 0.01) / 0.05
        look = lambda rho: samax.sam(rho).init(jnp.zeros(1))
        look(lambda step: jnp.maximum(0.0, tied(step)))
        with pytest.raises(ValueError, match=r"schedule rho must stay.*at step 500;"):
            look(lambda step: jnp.where(step < 500, 0.1, -0.1))
        negative = lambda step: tied(step) - 0.03
        with pytest.raises(ValueError, match=r"schedule rho must stay.*got -0.0.* at step 0; clip"):
            look(negative)
        with pytest.raises(ValueError, match="schedule rho must stay"):
            look(lambda step: 1.0 / step)
        with pytest.raises(TypeError, match=r"must map a step to one number.*\(2,\)"):
            look(lambda step: jnp.stack([step, step]))

    def test_a_negative_value_where_the_schedule_was_not_looked_at_counts_as_zero(self, params):
        unseen = 2_003
        tx = samax.sam(lambda step: jnp.where(step == unseen, -1.0, 0.1))
        grads = jax.grad(loss_fn)(params)
        state = optax.tree.set(tx.init(params), count=jnp.array(unseen))
        updates, _ = tx.update(grads, state, params, value_fn=loss_fn)
        jax.tree.map(np.testing.assert_array_equal, updates, grads)

    @pytest.mark.parametrize("theta", [0.0, -0.1, 1.1, float("nan")])
    def test_theta(self, theta):
        with pytest.raises(ValueError, match=r"theta must be finite and lie in \(0, 1\]"):
            samax.vasso(0.1, theta)

    def test_other_hyperparameters(self):
        with pytest.raises(ValueError, match=r"gamma must be finite and lie in \[0, 1\)"):
            samax.wsam(gamma=1.0)
        with pytest.raises(ValueError, match="t0"):
            samax.asam(t0=-1.0)
        with pytest.raises(ValueError, match="alpha"):
            samax.gsam(alpha=-1.0)
        with pytest.raises(ValueError, match="chi"):
            samax.samar(chi=0.9)
        with pytest.raises(ValueError, match="delta"):
            samax.samar(delta=1.5)
        with pytest.raises(ValueError, match=r"smoothing must be finite and lie in \[0, 1\)"):
            samax.samar(smoothing=1.0)
        with pytest.raises(ValueError, match=r"initial_weight must be finite and lie in \[2, 3\]"):
            samax.samar(bounds=(2.0, 3.0))
        with pytest.raises(ValueError, match=r"bounds\[0\] must be"):
            samax.samar(bounds=(3.0, 0.5))
        with pytest.raises(TypeError, match="rule must be a function"):
            samax.adaptive_weight(rule=1.1)
        with pytest.raises(ValueError, match="weight"):
            samax.weighted(-1.0)
        with pytest.raises(ValueError, match="eps"):
            samax.normalize(-1.0)

    def test_parts_that_are_no_transformations(self):
        with pytest.raises(TypeError, match="ascent must be an Optax gradient transformation"):
            samax.sharpness_aware(samax.normalize)
        with pytest.raises(TypeError, match="descent must be"):
            samax.sharpness_aware(samax.normalize(), optax.sgd)
        with pytest.raises(TypeError, match="ascent must be"):
            samax.perturb_only(0.05, None)

    @pytest.mark.parametrize("steps", [1.0, True, jnp.array(2)])
    def test_steps_of_another_type(self, steps):
        with pytest.raises(TypeError, match="steps must be a Python int"):
            samax.sharpness_aware(samax.normalize(), steps=steps)

    def test_no_steps(self):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            samax.sharpness_aware(samax.normalize(), steps=0)

    def test_a_descent_outside_the_combinator(self, params):
        for rule in (samax.weighted(1.0), samax.surrogate_gap(0.1), samax.adaptive_weight()):
            with pytest.raises(ValueError, match="needs the clean gradient"):
                rule.update(params, rule.init(params), params)

    def test_parts_that_need_params(self, params):
        for part in (samax.scale_by_abs_params(), samax.stochastic_rounding(0)):
            with pytest.raises(ValueError, match="needs params"):
                part.update(params, part.init(params))
