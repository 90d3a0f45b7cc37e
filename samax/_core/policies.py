"""Policies: which steps ascend, decided from scalars.

A policy is a pair of functions, `init() -> state` and `decide(state, squared_norm) -> (ascend,
state)`, with the squared norm of the clean gradient. It is asked once an update, and its state
counts on where its answer is overruled.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_count
from samax._core.hyperparameters import (
    Scalar,
    ScalarOrSchedule,
    at,
    check_scalar,
    probe_schedule,
)
from samax._core.keys import Key, check_key, next_key, start_key


class Policy(NamedTuple):
    """Which steps ascend.

    Attributes:
      init: `init() -> state`, a pytree of arrays.
      decide: `decide(state, squared_norm) -> (ascend, state)`: from the state and the squared norm
        of the clean gradient, a scalar in float32 or wider, whether this step ascends, a boolean
        scalar, and the next state.
    """

    init: Callable[[], Any]
    decide: Callable[[Any, jax.Array], tuple[jax.Array, Any]]


class CountState(NamedTuple):
    """The number of updates."""

    count: jax.Array  # type: ignore[assignment] # as in Optax's states


class RandomState(NamedTuple):
    """The number of updates, and the key of the next draw."""

    count: jax.Array  # type: ignore[assignment] # as in Optax's states
    rng_key: jax.Array


class SteepState(NamedTuple):
    """The number of updates, and the moving mean and variance of the squared norm."""

    count: jax.Array  # type: ignore[assignment] # as in Optax's states
    mean: jax.Array
    variance: jax.Array


def from_step(start: int) -> Policy:
    """Ascends from a step on: SAM late in training, or after the warm-up.

    Args:
      start: the first step that ascends, counted from 0.

    Returns:
      A policy for `samax.occasionally`.

    Raises:
      ValueError: if `start` is negative.
      TypeError: if it is not a Python int.

    References:
      Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training,
      2024, [arXiv 2410.10373](https://arxiv.org/abs/2410.10373): in the last 10 of 160 epochs
      (VGG-16), or 25 of 200 (a wide ResNet), SAM reaches what it reaches in all of them
    """
    check_count("start", start, low=0)
    return _counting(lambda count: count >= start)


def until_step(end: int) -> Policy:
    """Ascends before a step: SAM early in training.

    Args:
      end: the first step that does not ascend, counted from 0.

    Returns:
      A policy for `samax.occasionally`.

    Raises:
      ValueError: if `end` is negative.
      TypeError: if it is not a Python int.
    """
    check_count("end", end, low=0)
    return _counting(lambda count: count < end)


def every(k: int) -> Policy:
    """Ascends every k-th step, the first one included. It wants a larger rho than SAM.

    Args:
      k: the period, at least 1; 1 is all steps.

    Returns:
      A policy for `samax.occasionally`.

    Raises:
      ValueError: if `k` is below 1.
      TypeError: if it is not a Python int.
    """
    check_count("k", k)
    return _counting(lambda count: count % k == 0)


def at_random(p: ScalarOrSchedule, key: Key) -> Policy:
    """Ascends with a probability, independently at each step.

    Args:
      p: the probability, in [0, 1], or a schedule of it over the training steps.
      key: a JAX key, or a seed, for the draws; the state holds its successor.

    Returns:
      A policy for `samax.occasionally`.

    Raises:
      ValueError: if `p` is outside [0, 1]; in `init`, if a schedule is negative at some step.
      TypeError: if `key` is neither a seed nor one key.

    References:
      Zhao et al., SS-SAM: Stochastic Scheduled Sharpness-Aware Minimization for Efficiently
      Training Deep Neural Networks, 2022, [arXiv 2203.09962](https://arxiv.org/abs/2203.09962)
    """
    if not callable(p):
        check_scalar("p", p, high=1.0)
    check_key("key", key)

    def init() -> RandomState:
        probe_schedule("p", p)
        return RandomState(count=jnp.zeros((), jnp.int32), rng_key=start_key(key))

    def decide(state: RandomState, squared_norm: jax.Array) -> tuple[jax.Array, RandomState]:
        del squared_norm
        following, draw = next_key(state.rng_key)
        ascend = jax.random.uniform(draw) < at(p, state.count)
        return ascend, RandomState(optax.safe_increment(state.count), following)

    return Policy(init, decide)


def where_steep(
    total_steps: int,
    *,
    decay: Scalar = 0.9,
    lambda1: float = -1.0,
    lambda2: float = 1.0,
) -> Policy:
    r"""Ascends where the gradient is long for what it has been: AE-SAM.

    $$ \lVert g_t \rVert^2 \ge \mu_t + c_t \sigma_t, \qquad
       c_t = \tfrac{t}{T} \lambda_1 + \left(1 - \tfrac{t}{T}\right) \lambda_2 $$

    $$ \mu_t = \delta \mu_{t-1} + (1 - \delta) \lVert g_t \rVert^2, \qquad
       \sigma_t^2 = \delta \sigma_{t-1}^2 + (1 - \delta) (\lVert g_t \rVert^2 - \mu_t)^2 $$

    Both averages start at 0, without bias correction. The rule is taken from a secondary source;
    where the averages start, the order of their updates, and that t counts from 0 and stays at T
    beyond it, is this library's reading.

    Args:
      total_steps: T, the number of training steps, at least 1.
      decay: the decay $\delta$ of both averages, in [0, 1).
      lambda1: the factor c at the end of training; -1 makes most steps ascend then.
      lambda2: c at the start; 1 makes few do.

    Returns:
      A policy for `samax.occasionally`.

    Raises:
      ValueError: if `total_steps` is below 1, `decay` is outside [0, 1) or a factor not finite.

    References:
      Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, 2023,
      [arXiv 2304.14647](https://arxiv.org/abs/2304.14647)
    """
    check_count("total_steps", total_steps)
    check_scalar("decay", decay, high=1.0, include_high=False)
    check_scalar("lambda1", lambda1, low=-float("inf"))
    check_scalar("lambda2", lambda2, low=-float("inf"))

    def init() -> SteepState:
        zero = jnp.zeros((), jnp.result_type(float))
        return SteepState(count=jnp.zeros((), jnp.int32), mean=zero, variance=jnp.copy(zero))

    def decide(state: SteepState, squared_norm: jax.Array) -> tuple[jax.Array, SteepState]:
        norm = squared_norm.astype(state.mean.dtype)
        mean = jnp.asarray(decay * state.mean + (1.0 - decay) * norm, norm.dtype)
        variance = decay * state.variance + (1.0 - decay) * (norm - mean) ** 2
        variance = jnp.asarray(variance, norm.dtype)
        done = jnp.minimum(state.count / total_steps, 1.0)
        factor = done * lambda1 + (1.0 - done) * lambda2
        ascend = norm >= mean + factor * jnp.sqrt(variance)
        return ascend, SteepState(optax.safe_increment(state.count), mean, variance)

    return Policy(init, decide)


def _counting(ascends: Callable[[jax.Array], jax.Array]) -> Policy:
    def decide(state: CountState, squared_norm: jax.Array) -> tuple[jax.Array, CountState]:
        del squared_norm
        return ascends(state.count), CountState(optax.safe_increment(state.count))

    return Policy(lambda: CountState(jnp.zeros((), jnp.int32)), decide)
