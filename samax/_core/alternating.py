"""One update in two calls, for frameworks that only ever call `update(grads, state, params)`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_transformation
from samax._core.numerics import cast_like, widen
from samax._core.combinator import SharpnessAware, SharpnessAwareState, check_inputs


class AlternatingState(NamedTuple):
    """The state between two calls.

    Attributes:
      perturbed: whether the parameters outside are the perturbed ones: the next call is the second.
      params: the unperturbed parameters.
      clean_grad: the clean gradient, in float32 or wider; empty where the descent does not read it.
      transformation: the state of the sharpness-aware transformation.
      optimizer: the state of the base optimizer.
    """

    perturbed: jax.Array
    params: optax.Params
    clean_grad: optax.Updates | optax.EmptyState
    transformation: SharpnessAwareState
    optimizer: optax.OptState


def alternating(
    transformation: SharpnessAware, optimizer: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Spreads a sharpness-aware step over two calls of `update`, which need no function.

    $$ \text{first call:} \quad w \to w + \epsilon(g), \quad g = \nabla L(w) \qquad\quad
       \text{second call:} \quad w + \epsilon \to w + \mathrm{optimizer}(\tilde g), \quad
       \tilde g = \nabla L(w + \epsilon) $$

    For frameworks that hand over gradients alone, such as `flax.training.train_state.TrainState`:
    call it twice with each batch, and with the same random keys. Two calls are what one call of
    `chain(transformation, optimizer)` is. Schedules, of rho and of the learning rate, count pairs
    of calls; a counter of the framework's own counts calls. Keep the batch statistics of the first.

    Between the two calls the parameters outside are the perturbed ones: evaluate, and export, those
    of `samax.eval_params(state, params)`. A checkpoint may be written and restored there.

    A call costs its own half. The state holds, besides the states of the two parts, one copy of the
    parameters in their dtype, and for a transformation that reads the clean gradient in its descent
    (`wsam`, `decoupled_wsam`, `gsam`, `samar`, any with `track`) one copy of that; for `sam`,
    `usam`, `asam` and `vasso` it does not.

    The parameters come back exactly, and equal those of the one-call form to the last bit, wherever
    the perturbed entry and the new one are within a factor of two of each other, since their
    difference is then a number of their dtype. Where they are not (an entry close to zero) the
    framework's own sum of parameters and updates rounds it to within half a unit in the last place
    of the perturbed entry. For float16 and bfloat16 parameters the updates are float32, which
    `optax.apply_updates` adds before it rounds: they come back exactly unless they are
    thousands of times smaller than their perturbation.

    Args:
      transformation: `samax.sam(rho)` or another one made by `samax.sharpness_aware`, with one
        ascent step.
      optimizer: what follows it in the one-call form's chain: clipping, weight decay, the base
        optimizer. `optax.identity()` for `samax.decoupled_wsam`.

    Returns:
      An optimizer.

    Raises:
      TypeError: if `transformation` is not one of `samax.sharpness_aware`'s, alone.
      ValueError: if it has several ascent steps.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> tx = samax.alternating(samax.sam(rho=0.5), optax.sgd(0.1))
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     print(w, samax.eval_params(state, w))
      [3.3 4.4] [3. 4.]
      [2.34 3.12] [2.34 3.12]
    """
    check_transformation("transformation", transformation)
    if not isinstance(transformation, SharpnessAware):
        raise TypeError(
            "alternating needs samax.sam(rho) or another transformation made by "
            "samax.sharpness_aware, alone, to run its two halves; got another one. What follows it "
            "in a chain goes into optimizer, as in alternating(sam, optax.chain(clip, sgd))."
        )
    if transformation.steps > 1:
        raise ValueError(
            f"alternating has one ascent step, one call, got steps={transformation.steps}."
        )
    check_transformation("optimizer", optimizer)
    base = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> AlternatingState:
        inner = transformation.init(params)
        reads_clean_grad = transformation.reads_clean_grad(params)
        return AlternatingState(
            perturbed=jnp.zeros((), bool),
            # A copy: parameters and state may both be donated.
            params=jax.tree.map(jnp.copy, params),
            clean_grad=jax.tree.map(jnp.zeros_like, widen(params))
            if reads_clean_grad
            else optax.EmptyState(),
            transformation=inner,
            optimizer=base.init(params),
        )

    def update(
        updates: optax.Updates,
        state: AlternatingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AlternatingState]:
        check_inputs(updates, params, None)

        def perturb(
            grads: optax.Updates, state: AlternatingState, params: optax.Params
        ) -> tuple[optax.Updates, AlternatingState]:
            point, inner = transformation.ascend(grads, state.transformation, params, **extra_args)
            unread = isinstance(state.clean_grad, optax.EmptyState)
            return optax.tree.sub(widen(point), widen(params)), state._replace(
                perturbed=jnp.ones_like(state.perturbed),
                params=params,
                clean_grad=state.clean_grad if unread else widen(grads),
                transformation=inner,
            )

        def step(
            grads: optax.Updates, state: AlternatingState, point: optax.Params
        ) -> tuple[optax.Updates, AlternatingState]:
            unread = isinstance(state.clean_grad, optax.EmptyState)
            direction, inner = transformation.descend(
                grads,
                state.transformation,
                state.params,
                point=point,
                clean_grad=grads if unread else state.clean_grad,
                **extra_args,
            )
            direction = cast_like(direction, grads)
            change, optimizer_state = base.update(
                direction, state.optimizer, state.params, **extra_args
            )
            params = optax.apply_updates(state.params, change)
            return optax.tree.sub(widen(params), widen(point)), state._replace(
                perturbed=jnp.zeros_like(state.perturbed),
                params=params,
                transformation=inner,
                optimizer=optimizer_state,
            )

        return jax.lax.cond(state.perturbed, step, perturb, updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The unperturbed parameters, also between the two calls of `samax.alternating`.

    Args:
      state: the optimizer's state, with that of `samax.alternating` somewhere in it.
      params: the parameters outside.

    Returns:
      Those to evaluate the model with: `params` after the second call, those from before the first
      call in between.

    Raises:
      ValueError: if the state holds none of `samax.alternating`, or several.
    """
    is_ours = lambda node: isinstance(node, AlternatingState)  # noqa: E731
    found = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"eval_params needs the state of one samax.alternating, and found {len(found)} in it."
        )
    return jax.tree.map(
        lambda kept, w: jnp.where(found[0].perturbed, kept, w), found[0].params, params
    )
