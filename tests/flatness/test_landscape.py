"""Loss landscapes: the numbers, the filters' normalization, and the figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import samax
from samax import flatness

PARAMS = {"kernel": jnp.arange(1.0, 13.0).reshape(2, 3, 2), "bias": jnp.ones(2)}


def loss_fn(params, batch):
    return jnp.mean(batch) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


BATCHES = [np.ones(3, np.float32), 3 * np.ones(1, np.float32)]  # of mean 1.5


def test_filters_get_the_norms_of_the_parameters():
    direction = flatness.random_direction(0, PARAMS)
    for j in range(2):
        own, wanted = (jnp.linalg.norm(tree["kernel"][..., j]) for tree in (direction, PARAMS))
        assert own == pytest.approx(float(wanted), rel=1e-5)
    np.testing.assert_array_equal(direction["bias"], 0.0)
    assert np.any(flatness.random_direction(1, PARAMS)["kernel"] != direction["kernel"])
    still = flatness.filter_normalized(jax.tree.map(jnp.zeros_like, PARAMS), PARAMS)
    np.testing.assert_array_equal(still["kernel"], 0.0)


def test_a_line_and_a_plane_are_the_losses_there():
    first, second = flatness.random_direction(0, PARAMS), flatness.random_direction(1, PARAMS)
    x, y = np.linspace(-1, 1, 5), np.linspace(-0.5, 0.5, 3)
    told = []
    line = flatness.loss_line(
        loss_fn, PARAMS, first, x, BATCHES, progress=lambda *done: told.append(done)
    )
    surface = flatness.loss_surface(loss_fn, PARAMS, (first, second), x, y, BATCHES)
    assert line.shape == (5,)
    assert surface.shape == (3, 5)
    assert told == 2 * [(i, 5) for i in range(1, 6)]
    np.testing.assert_allclose(surface[1], line, rtol=1e-6)
    for i, j in ((0, 0), (2, 1), (1, 4)):
        along, across = float(x[j]), float(y[i])
        point = {
            name: w + along * first[name] + across * second[name] for name, w in PARAMS.items()
        }
        assert surface[i, j] == pytest.approx(float(loss_fn(point, 1.5)), rel=1e-5)
    assert line[2] == pytest.approx(float(loss_fn(PARAMS, 1.5)), rel=1e-6)


def test_rescaled_layers_have_the_same_landscape():
    """Filter normalization's purpose: (c W1, W2 / c) looks as (W1, W2) does."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (16, 4))
    params = {"a": jax.random.normal(keys[1], (4, 5)), "b": jax.random.normal(keys[2], (5, 2))}
    loss = lambda p: jnp.mean((jnp.maximum(x @ p["a"], 0.0) @ p["b"] - 1.0) ** 2)
    rescaled = {"a": 4 * params["a"], "b": params["b"] / 4}
    raw, distances = samax.gaussian(jax.random.key(3), params), [-0.5, 0.5, 1.0]
    lines = [
        flatness.loss_line(loss, p, flatness.filter_normalized(raw, p), distances)
        for p in (params, rescaled)
    ]
    np.testing.assert_allclose(lines[0], lines[1], rtol=1e-4)
    plain = [flatness.loss_line(loss, p, raw, distances) for p in (params, rescaled)]
    assert not np.allclose(plain[0], plain[1], rtol=0.1)


def test_what_is_refused():
    with pytest.raises(ValueError, match="direction must be the same pytree as params"):
        flatness.loss_line(loss_fn, PARAMS, {"kernel": PARAMS["kernel"]}, [0.0], BATCHES)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        flatness.loss_line(1.0, PARAMS, PARAMS, [0.0], BATCHES)


def test_figures():
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs samax[plots]")
    from samax.flatness import plots

    x, y = np.linspace(-1, 1, 11), np.linspace(-1, 1, 7)
    losses = 1 + x**2 + y[:, None] ** 2
    figure, (left, middle, right) = pyplot.subplots(1, 3)
    plots.plot_line(left, x, 1 + x**2, label="sam")
    np.testing.assert_array_equal(left.lines[0].get_ydata(), 1 + x**2)
    plots.plot_surface(middle, x, y, losses)
    plots.plot_surface(middle, x, y, losses - 2)
    plots.plot_spectrum(right, x, np.exp(-(x**2)), label="sam")
    assert right.get_yscale() == "log"
    for axes in (left, middle, right):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    figure.canvas.draw()
    pyplot.close(figure)
