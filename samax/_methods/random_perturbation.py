"""Random weight perturbation: an ascent that looks nowhere in particular."""

from typing import Any, NamedTuple

import jax
import optax

from samax._core.checks import check_callable, check_same_tree
from samax._core.keys import Key, check_key, next_key, start_key
from samax.distributions import Distribution


class RandomPerturbationState(NamedTuple):
    """The key of the next draw: a typed key if one was passed, and raw key data otherwise."""

    rng_key: jax.Array


def random_perturbation(
    distribution: Distribution, key: Key = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Takes a random perturbation in place of the gradient, an ascent that needs none.

    $$ g \mapsto v \sim \mu $$

    With the filter-wise distribution and a rho of $\gamma = 0.01$ this is random weight
    perturbation (RWP), LPF-SGD with one draw. Nothing is made from the gradient, so with
    `samax.one_gradient` a step costs one; in `samax.sharpness_aware` the clean gradient is left to
    the descent. For the mean over several draws use `samax.trace_sam`.

    Args:
      distribution: mu, a function `(key, params) -> v`, such as
        `samax.scaled_by_filter(samax.gaussian)`.
      key: a JAX key, or a seed, for the draws; the state holds its successor.

    Returns:
      A transformation that needs `params`.

    Raises:
      TypeError: if `distribution` is not a function, or `key` neither a seed nor one key.

    References:
      [arXiv 2211.11489](https://arxiv.org/abs/2211.11489)

    Examples:
      >>> import optax, samax
      >>> noise = samax.random_perturbation(samax.scaled_by_filter(samax.gaussian), key=0)
      >>> ascent = optax.chain(noise, samax.scale_by_rho(0.01))
      >>> tx = samax.one_gradient(optax.sgd(0.1, momentum=0.9), ascent)
    """
    check_callable("distribution", distribution, "(key, params) -> sample")
    check_key("key", key)

    def init(params: optax.Params) -> RandomPerturbationState:
        del params
        return RandomPerturbationState(rng_key=start_key(key))

    def update(
        updates: optax.Updates,
        state: RandomPerturbationState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RandomPerturbationState]:
        del extra_args
        if params is None:
            raise ValueError("random_perturbation needs params: pass them to update.")
        following, draw = next_key(state.rng_key)
        sample = distribution(draw, params)
        check_same_tree("the distribution's sample", sample, updates)
        return sample, RandomPerturbationState(following)

    return optax.GradientTransformationExtraArgs(init, update)
