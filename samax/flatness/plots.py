"""Figures of landscapes and spectra, on your Matplotlib axes.

They need `pip install samax[plots]` and an import of their own: `from samax.flatness import plots`.
"""

from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike


def plot_line(
    axes: Axes, distances: jax.typing.ArrayLike, losses: jax.typing.ArrayLike, **line: Any
) -> None:
    """Draws the loss along a line, as `samax.flatness.loss_line` returns it.

    Args:
      axes: where.
      distances: of shape (n,).
      losses: of shape (n,).
      **line: options of `Axes.plot`, such as `label` and `color`.
    """
    axes.plot(np.asarray(distances), np.asarray(losses), **line)
    axes.set_xlabel("distance along the direction (norms of the filters)")
    axes.set_ylabel("loss")


def plot_surface(
    axes: Axes,
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    losses: jax.typing.ArrayLike,
    *,
    levels: int | ArrayLike = 15,
) -> None:
    """Draws contours of the loss over a plane, as `samax.flatness.loss_surface` returns it.

    A number of levels is spaced logarithmically where all losses are positive.

    Args:
      axes: where.
      x: of shape (n,).
      y: of shape (m,).
      losses: of shape (m, n).
      levels: the number of contours, or their values, the same for surfaces to be compared.
    """
    values = np.asarray(losses)
    if isinstance(levels, int):
        low, high = values.min(), values.max()
        levels = np.geomspace(low, high, levels) if low > 0 else np.linspace(low, high, levels)
    contours = axes.contour(
        np.asarray(x), np.asarray(y), values, levels=np.asarray(levels), cmap="viridis"
    )
    axes.clabel(contours, np.asarray(contours.levels)[::3], fontsize=7, fmt="%.3g")
    axes.plot([0.0], [0.0], marker="x", color="black")
    axes.set_xlabel("distance along the first direction")
    axes.set_ylabel("distance along the second direction")
    axes.set_aspect("equal")


def plot_spectrum(
    axes: Axes,
    grid: jax.typing.ArrayLike,
    density: jax.typing.ArrayLike,
    *,
    floor: float = 1e-6,
    **line: Any,
) -> None:
    """Draws a spectral density on a logarithmic scale, as `samax.flatness.spectral_density` has it.

    Args:
      axes: where.
      grid: eigenvalues, of shape (n,).
      density: the density there, of shape (n,).
      floor: the smallest density shown.
      **line: options of `Axes.plot`, such as `label` and `color`.
    """
    axes.semilogy(np.asarray(grid), np.maximum(np.asarray(density), floor), **line)
    axes.set_ylim(bottom=floor)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
