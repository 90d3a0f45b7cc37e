"""Worst-case, average-case and m-sharpness, and the invariance of their adaptive forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import samax
from samax import flatness

CURVATURE = jnp.array([1.0, 3.0, 10.0])
BATCHES = [np.ones(4, np.float32), 4 * np.ones(2, np.float32)]  # of mean 2


def loss_fn(params, batch):
    vector = jnp.append(params["w"], params["b"])
    return jnp.mean(batch) * 0.5 * jnp.sum(CURVATURE * vector**2)


def start(size=0.0):
    return {"w": size * jnp.array([1.0, 1.0]), "b": jnp.array(size)}


class TestWorstCase:
    def test_at_a_minimum_it_is_the_top_eigenvalues(self):
        value = flatness.worst_case_sharpness(loss_fn, start(), BATCHES, rho=0.3, steps=30, key=0)
        assert value == pytest.approx(0.5 * 20.0 * 0.3**2, rel=0.01)
        # Without a start off the minimum there is no way up.
        assert flatness.worst_case_sharpness(loss_fn, start(), BATCHES, rho=0.3) == 0.0

    def test_one_step_is_sams_perturbation(self):
        params, rho = start(0.5), 0.2
        grads = jax.grad(loss_fn)(params, 2.0)
        scale = rho / optax.tree.norm(grads)
        point = jax.tree.map(lambda w, g: w + scale * g, params, grads)
        expected = loss_fn(point, 2.0) - loss_fn(params, 2.0)
        value = flatness.worst_case_sharpness(loss_fn, params, BATCHES, rho=rho, steps=1)
        assert value == pytest.approx(float(expected), rel=1e-5)
        more = flatness.worst_case_sharpness(loss_fn, params, BATCHES, rho=rho, steps=20)
        assert more >= value

    def test_the_ball_is_kept(self):
        slope = lambda w: jnp.sum(w * jnp.array([3.0, 4.0]))
        for steps in (1, 2, 7):
            value = flatness.worst_case_sharpness(slope, jnp.zeros(2), rho=0.5, steps=steps)
            assert value == pytest.approx(2.5, rel=1e-6)

    def test_the_adaptive_ball_is_asams(self):
        """max <g, eps> over ||eps / T|| <= rho is rho ||T g||."""
        gradient, params = jnp.array([3.0, 4.0]), jnp.array([2.0, -0.5])
        slope = lambda w: jnp.sum(w * gradient)
        value = flatness.worst_case_sharpness(
            slope, params, rho=0.5, steps=3, adaptive=True, t0=0.1
        )
        expected = 0.5 * jnp.linalg.norm((jnp.abs(params) + 0.1) * gradient)
        assert value == pytest.approx(float(expected), rel=1e-5)

    def test_no_rise_is_zero_and_so_is_no_radius(self):
        assert flatness.worst_case_sharpness(lambda w: -jnp.sum(w**2), jnp.zeros(2), rho=1.0) == 0.0
        assert flatness.worst_case_sharpness(loss_fn, start(1.0), BATCHES, rho=0.0) == 0.0


class TestAverageCase:
    def test_it_is_half_the_trace(self):
        result = flatness.average_case_sharpness(
            loss_fn, start(), BATCHES, rho=0.1, num_samples=200
        )
        expected = 0.1**2 * 2 * float(CURVATURE.sum()) / 2
        assert abs(result.value - expected) < 4 * result.standard_error
        # The variance of v^T H v / 2 is ||H||_F^2 / 2.
        error = 0.1**2 * np.sqrt(np.sum(np.square(2 * CURVATURE)) / 2 / 200)
        assert result.standard_error == pytest.approx(error, rel=0.25)

    def test_it_is_a_function_of_the_key(self):
        run = lambda key: flatness.average_case_sharpness(
            loss_fn, start(1.0), BATCHES, rho=0.1, num_samples=3, key=key
        )
        assert run(0).value == run(jax.random.key(0)).value
        assert run(0).value != run(1).value
        alone = flatness.average_case_sharpness(
            lambda w: w @ w, jnp.ones(2), rho=0.1, num_samples=1
        )
        assert np.isnan(alone.standard_error)


def test_worst_case_m_sharpness_is_the_mean_over_the_batches():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(24, 3)).astype(np.float32)
    loss = lambda w, batch: jnp.mean(jnp.cos(batch @ w))
    params = jnp.array([0.3, -0.2, 0.5])
    values = []
    for m in (3, 8, 24):
        batches = np.split(data, 24 // m)
        value = flatness.worst_case_m_sharpness(loss, params, batches, rho=0.1)
        each = [flatness.worst_case_sharpness(loss, params, [b], rho=0.1, steps=1) for b in batches]
        assert value == pytest.approx(float(np.mean(each)), rel=1e-4)
        values.append(float(value))
    assert values[0] > values[1] > values[2]


def network(params, x):
    return jnp.maximum(x @ params["first"], 0.0) @ params["second"]


class TestLayerRescaling:
    """(c W1, W2 / c) is the same ReLU network."""

    def setup_method(self):
        keys = jax.random.split(jax.random.key(0), 4)
        self.batch = jax.random.normal(keys[0], (32, 4)), jax.random.normal(keys[1], (32, 2))
        self.params = {
            "first": jax.random.normal(keys[2], (4, 8)),
            "second": jax.random.normal(keys[3], (8, 2)),
        }
        self.rescaled = {"first": 5.0 * self.params["first"], "second": self.params["second"] / 5.0}
        self.loss = lambda p: jnp.mean((network(p, self.batch[0]) - self.batch[1]) ** 2)

    def both(self, measure):
        return [float(measure(p)) for p in (self.params, self.rescaled)]

    @pytest.mark.parametrize("adaptive", [True, False])
    def test_worst_case(self, adaptive):
        here, there = self.both(
            lambda p: flatness.worst_case_sharpness(
                self.loss, p, rho=0.05, steps=3, adaptive=adaptive
            )
        )
        assert (there == pytest.approx(here, rel=1e-3)) == adaptive
        assert adaptive or there > 2 * here

    @pytest.mark.parametrize("wrap", [samax.scaled_by_params, samax.scaled_by_layer, None])
    def test_average_case(self, wrap):
        distribution = samax.gaussian if wrap is None else wrap(samax.gaussian)
        here, there = self.both(
            lambda p: (
                flatness.average_case_sharpness(
                    self.loss, p, rho=0.05, distribution=distribution, num_samples=8
                ).value
            )
        )
        assert (there == pytest.approx(here, rel=1e-3)) == (wrap is not None)
        assert wrap is not None or there > 2 * here


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_data_are_streamed_and_progress_is_told(dtype):
    passes, told = [], []

    class Loader:
        def __iter__(self):
            passes.append(None)
            return iter(BATCHES)

    params = jax.tree.map(lambda x: x.astype(dtype), start(0.5))
    value = flatness.worst_case_sharpness(
        loss_fn, params, Loader(), rho=0.1, steps=4, progress=lambda *done: told.append(done)
    )
    assert value.dtype == jnp.float32
    assert len(passes) == 5
    assert told == [(i, 5) for i in range(1, 6)]
    told.clear()
    flatness.average_case_sharpness(
        loss_fn, params, Loader(), rho=0.1, num_samples=3, progress=lambda *done: told.append(done)
    )
    assert told == [(2, 4), (3, 4), (4, 4)]


def test_what_is_refused():
    params = start(1.0)
    with pytest.raises(TypeError, match="batches must be an iterable that can be gone through"):
        flatness.worst_case_sharpness(loss_fn, params, iter(BATCHES), rho=0.1)
    with pytest.raises(ValueError, match="at least one batch"):
        flatness.worst_case_sharpness(loss_fn, params, [], rho=0.1)
    with pytest.raises(ValueError, match="one common leading axis"):
        flatness.worst_case_sharpness(loss_fn, params, [(np.ones(3), np.ones(2))], rho=0.1)
    with pytest.raises(TypeError, match="must be a scalar loss"):
        flatness.worst_case_sharpness(lambda p, b: p["w"], params, BATCHES, rho=0.1)
    with pytest.raises(ValueError, match="rho must be finite"):
        flatness.worst_case_m_sharpness(loss_fn, params, BATCHES, rho=-1.0)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        flatness.average_case_sharpness(loss_fn, params, BATCHES, rho=0.1, num_samples=0)
