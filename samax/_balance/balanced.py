"""Norm balancing: an optimizer that also scales the cores of scale-invariant groups."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samax._balance.groups import Groups, find_groups
from samax._core.checks import (
    check_callable,
    check_parameters,
    check_same_tree,
    check_transformation,
)
from samax._core.hyperparameters import (
    Scalar,
    ScalarOrSchedule,
    at,
    check_scalar,
    check_schedule,
    probe_schedule,
)
from samax._core.numerics import cast_like, displace

BalanceRule: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


class BalancedState(NamedTuple):
    """The wrapped optimizer's state.

    Attributes:
      optimizer: the state of the wrapped optimizer.
      count: the number of updates so far, for the schedules.
      rates: the last `eta alpha c_k` by group, for logging; empty unless tracked.
    """

    optimizer: optax.OptState
    count: jax.Array  # type: ignore[assignment] # as in Optax's states
    rates: dict[str, jax.Array]


def balanced(
    optimizer: optax.GradientTransformation,
    rule: BalanceRule,
    *,
    learning_rate: ScalarOrSchedule,
    alpha: ScalarOrSchedule,
    groups: Groups,
    bound: Scalar | None = 0.5,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the cores of each group by a rule, and steps with an optimizer at the scaled cores.

    $$ G'_k = (1 + \eta_t \alpha_t c_k) \, G_k, \qquad
       G_k \leftarrow G'_k + \mathrm{optimizer}(g; \, G')_k $$

    The rule sees the gradients as they come in, so nothing that changes their ratio (clipping by
    leaf, a preconditioner) should stand before it. The optimizer sees the same gradients and the
    scaled cores, which matters where it uses the parameters, as weight decay does. Leaves outside
    the groups get the optimizer's update as it is.

    Args:
      optimizer: the base optimizer, learning rate included.
      rule: `rule(params_sq, grads_sq) -> c`, from the squared Frobenius norms of a group's K cores
        and of their gradients, both of shape (K,) or (K, layers), to the rates, of the same shape.
        Rates of a core of norm zero, and of a group whose gradients are all zero or have a
        non-finite entry, count as 0.
      learning_rate: the learning rate eta of `optimizer`, a number or a schedule.
      alpha: the strength, at least 0, a number or a schedule.
      groups: a pytree of labels like the parameters (None for leaves outside the groups), or a
        function that makes one from them: `samax.lora_groups`, `samax.groups_by_path(pattern)`.
      bound: the largest `|eta alpha c_k|`, in (0, 1), or None. Without it a rule with the norms in
        its denominator can multiply a small core by a large or a negative number in one step.
      track: whether the state keeps the last rates, for logging.

    Returns:
      An optimizer.

    Raises:
      ValueError: if a number is negative or not finite, or `bound` is outside (0, 1); in `init`, if
        a schedule is at some step.

    Examples:
      A rule of your own, in three lines: pull the norms together by their ratio to the mean.

      >>> import jax.numpy as jnp, optax, samax
      >>> def towards_the_mean(params_sq, grads_sq):
      ...     mean = params_sq.mean(axis=0)
      ...     return (mean - params_sq) / mean
      >>> tx = samax.balanced(optax.adam(1e-3), towards_the_mean, learning_rate=1e-3, alpha=1.0,
      ...                     groups=samax.lora_groups)
    """
    check_transformation("optimizer", optimizer)
    check_callable("rule", rule, "(params_sq, grads_sq) -> rates")
    check_schedule("learning_rate", learning_rate)
    check_schedule("alpha", alpha)
    if bound is not None:
        check_scalar("bound", bound, high=1.0, include_low=False, include_high=False)
    base = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> BalancedState:
        probe_schedule("learning_rate", learning_rate)
        probe_schedule("alpha", alpha)
        leaves = jax.tree.leaves(params)
        # The placeholder of `optax.tree.map_params` has no leaves: an array stands for the rates.
        rates: Any = {} if leaves or not track else jnp.zeros(())
        for group in find_groups(groups, params) if leaves else []:
            cores = group.members(leaves)
            check_parameters(f"group {group.name!r}", cores)
            layers = jnp.shape(cores[0])[:1] if group.stacked else ()
            if track:
                rates[group.name] = jnp.zeros((len(cores), *layers))
        return BalancedState(base.init(params), jnp.zeros((), jnp.int32), rates)

    def update(
        updates: optax.Updates,
        state: BalancedState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BalancedState]:
        if params is None:
            raise ValueError("balanced needs params: pass them to update.")
        check_same_tree("updates", updates, params)
        strength = at(learning_rate, state.count) * at(alpha, state.count)
        structure: Any = jax.tree.structure(params)
        grads, leaves = jax.tree.leaves(updates), jax.tree.leaves(params)
        scaled, growth, rates = list(leaves), {}, {}
        for group in find_groups(groups, params):
            params_sq, grads_sq = group.squared_norms(leaves), group.squared_norms(grads)
            rate = strength * rule(params_sq, grads_sq)
            if bound is not None:
                rate = jnp.clip(rate, -jnp.asarray(bound), bound)
            # Gradients that are zero or not finite tell nothing; a core of norm zero needs no rate.
            total = grads_sq.sum(axis=0)
            usable = (total > 0) & jnp.isfinite(total) & (params_sq > 0)
            rates[group.name] = rate = jnp.where(usable, rate, 0.0)
            changes = group.scaled(leaves, rate)
            for place, change in zip(group.places, changes, strict=True):
                growth[place] = change
                scaled[place] = displace(leaves[place], change)
        step, base_state = base.update(
            updates, state.optimizer, structure.unflatten(scaled), **extra_args
        )
        steps = jax.tree.leaves(step)
        for place, change in growth.items():
            steps[place] = (change + steps[place]).astype(steps[place].dtype)
        return structure.unflatten(steps), BalancedState(
            optimizer=base_state,
            count=optax.safe_increment(state.count),
            rates=cast_like(rates, state.rates) if track else state.rates,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def nbar(
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule,
    alpha: ScalarOrSchedule,
    groups: Groups,
    bound: Scalar | None = 0.5,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Balancedness-aware regularization for non-overparametrized problems.

    $$ c_k = \begin{cases} +1 & \text{the core with the larger gradient norm} \\
       -1 & \text{the other} \end{cases} $$

    For K > 2 cores $c_k = \mathrm{sign}(\gamma_k - \bar\gamma)$, $\gamma_k = \lVert g_k
    \rVert^2$. With two equal gradient norms the first core gets +1; a group of zero gradients is
    left alone.

    Args:
      optimizer: the base optimizer, learning rate included.
      learning_rate: its learning rate, a number or a schedule.
      alpha: the strength, at least 0; the paper has schedules that start at 0.5, 1 or 2 and decay
        to 0, and a constant one does not let the balancedness settle.
      groups: the cores; see `samax.balanced`.
      bound: the largest `|eta alpha c_k|`; see `samax.balanced`.
      track: whether the state keeps the last rates.

    Returns:
      An optimizer.

    Raises:
      ValueError: if a number is negative or not finite; in `init`, if a schedule is at some step.

    References:
      Li, Zhang and He, Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant
      Problems, 2024, Algorithm 2, [arXiv 2410.14802](https://arxiv.org/abs/2410.14802)

    Examples:
      >>> import optax, samax
      >>> rate = 1e-4
      >>> tx = samax.nbar(optax.adamw(rate), learning_rate=rate,
      ...                 alpha=optax.linear_schedule(1.0, 0.0, 1000), groups=samax.lora_groups)
    """
    return balanced(
        optimizer,
        lambda params_sq, grads_sq: _larger(grads_sq),
        learning_rate=learning_rate,
        alpha=alpha,
        groups=groups,
        bound=bound,
        track=track,
    )


def obar(
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule,
    alpha: ScalarOrSchedule,
    groups: Groups,
    bound: Scalar | None = 0.5,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Balancedness-aware regularization for overparametrized problems, such as LoRA.

    $$ c_k = \begin{cases} -1 & \text{the core with the larger norm} \\
       +1 & \text{the other} \end{cases} $$

    For K > 2 cores $c_k = -\mathrm{sign}(\lVert G_k \rVert^2 - \text{mean})$. With two equal norms
    the first core gets -1.

    Args:
      optimizer: the base optimizer, learning rate included.
      learning_rate: its learning rate, a number or a schedule.
      alpha: the strength, at least 0; the paper has schedules that start at 0.5, 1 or 2 and decay
        to 0.
      groups: the cores; see `samax.balanced`.
      bound: the largest `|eta alpha c_k|`; see `samax.balanced`.
      track: whether the state keeps the last rates.

    Returns:
      An optimizer.

    Raises:
      ValueError: if a number is negative or not finite; in `init`, if a schedule is at some step.

    References:
      Li, Zhang and He, Implicit Regularization of Sharpness-Aware Minimization for Scale-Invariant
      Problems, 2024, Algorithm 3, [arXiv 2410.14802](https://arxiv.org/abs/2410.14802)

    Examples:
      >>> import optax, samax
      >>> tx = samax.obar(optax.adamw(1e-4), learning_rate=1e-4, alpha=0.5,
      ...                 groups=samax.lora_groups)
    """
    return balanced(
        optimizer,
        lambda params_sq, grads_sq: -_larger(params_sq),
        learning_rate=learning_rate,
        alpha=alpha,
        groups=groups,
        bound=bound,
        track=track,
    )


def das(
    optimizer: optax.GradientTransformation,
    *,
    learning_rate: ScalarOrSchedule,
    alpha: ScalarOrSchedule,
    groups: Groups,
    norm_power: Scalar = 2,
    eps: Scalar = 0.0,
    bound: Scalar | None = 0.5,
    track: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Deviation-aware scaling: what SAM does to the norms of the cores, without its gradient.

    $$ c_k = \frac{u \, (\gamma_k - \bar\gamma)}{\lVert G_k \rVert^2}, \qquad
       \gamma_k = \lVert g_k \rVert^2, \quad u = \Big(\sum_k \gamma_k\Big)^{-1/2} $$

    With `alpha = rho` it moves the norm deviation $Q = \sum_k (\lVert G_k \rVert^2 -
    \text{mean})^2$ as SAM does, to first order in rho.

    Args:
      optimizer: the base optimizer, learning rate included.
      learning_rate: its learning rate, a number or a schedule.
      alpha: the strength, at least 0, a number or a schedule; it plays the part of SAM's rho.
      groups: the cores; see `samax.balanced`.
      norm_power: the power of `||G_k||`: 2 as published; the authors' neural-network code has 1.
      eps: added to the denominator `||G_k||^p sqrt(sum gamma)`; the authors' code has 1e-8.
      bound: the largest `|eta alpha c_k|`; see `samax.balanced`. Without it tensor completion from
        a small start becomes NaN.
      track: whether the state keeps the last rates.

    Returns:
      An optimizer.

    Raises:
      ValueError: if a number is negative or not finite; in `init`, if a schedule is at some step.

    References:
      Cao, Atarashi and Kashima, 2025, Algorithm 2,
      [arXiv 2508.10435](https://arxiv.org/abs/2508.10435)

    Examples:
      >>> import optax, samax
      >>> tx = samax.das(optax.adam(1e-3), learning_rate=1e-3,
      ...                alpha=optax.linear_schedule(0.001, 0.0, 50_000),
      ...                groups=samax.groups_by_path(r"(?P<group>tucker)/"))
    """
    check_scalar("norm_power", norm_power)
    check_scalar("eps", eps)

    def rule(params_sq: jax.Array, grads_sq: jax.Array) -> jax.Array:
        total = grads_sq.sum(axis=0)
        deviation = grads_sq - grads_sq.mean(axis=0)
        return deviation / (params_sq ** (norm_power / 2) * jnp.sqrt(total) + eps)

    return balanced(
        optimizer,
        rule,
        learning_rate=learning_rate,
        alpha=alpha,
        groups=groups,
        bound=bound,
        track=track,
    )


def _larger(squares: jax.Array) -> jax.Array:
    """+1 for what is above the mean and -1 below; of two equal ones the first has +1."""
    if len(squares) == 2:
        first = jnp.where(squares[0] >= squares[1], 1.0, -1.0)
        return jnp.stack([first, -first])
    return jnp.sign(squares - squares.mean(axis=0))
