"""One step in two calls, for trainers that only ever call `update(grads, state, params)`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_transformation
from samax._core.evaluation import FUNCTIONS, check_inputs
from samax._core.numerics import cast_like, tree_wide_dtype


class AlternatingState(NamedTuple):
    """The state between two calls.

    Attributes:
      perturbed: whether the parameters outside are the perturbed ones: the next call is the second.
      params: the unperturbed parameters.
      clean_grad: the clean gradient.
      value: the clean loss, from `value=` of the first call; NaN where that was not passed.
      chain: the state of the chain.
    """

    perturbed: jax.Array
    params: optax.Params
    clean_grad: optax.Updates
    value: jax.Array
    chain: optax.OptState

    def unperturbed(self, params: optax.Params) -> optax.Params:
        """What `samax.eval_params` returns."""
        return optax.tree.where(self.perturbed, self.params, params)


def alternating(chain: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Spreads the step of a whole chain over two calls of `update`, which need no function.

    $$ \text{first call:} \quad w \to w + \epsilon(g), \quad g = \nabla L(w) \qquad\quad
       \text{second call:} \quad w + \epsilon \to w + \mathrm{chain}(g, \tilde g), \quad
       \tilde g = \nabla L(w + \epsilon) $$

    For frameworks that hand over gradients alone, such as `flax.training.train_state.TrainState`:
    call it twice with each batch, and with the same random keys. Two calls are one step of the
    chain: the first asks it where it evaluates the gradient, and goes there; the second replays the
    step with the clean gradient that was kept and the one that has arrived. So schedules, of rho
    and of the learning rate, count pairs of calls; a counter of the framework's own counts calls.
    Keep the batch statistics of the first. Under `jit` each call costs its own half.

    With `samax.occasionally` in the chain the host says which kind of step it is, by a Python bool:
    both calls of a step that ascends are `update(..., ascend=True)`, and a plain step is one call,
    `update(..., ascend=False)`. (Between two calls it is the second one all the same.)

    Between the two calls the parameters outside are the perturbed ones: evaluate, and export, those
    of `samax.eval_params(state, params)`. A checkpoint may be written and restored there.

    The state holds, besides the chain's, one copy of the parameters and one of the gradient, each
    in its own dtype.

    Updates have the parameters' dtype. The parameters come back exactly, and equal those of the
    one-call form to the last bit, wherever the perturbed entry and the new one are within a factor
    of two of each other, since their difference is then a number of their dtype. Where they are not
    (an entry close to zero) the framework's own sum of parameters and updates rounds it to within
    half a unit in the last place of the perturbed entry. With bfloat16 parameters that is 0.2 % of
    the perturbation.

    Args:
      chain: the one-call form's, such as `optax.chain(samax.sam(rho), optax.sgd(0.1))`, with one
        ascent step; clipping, weight decay and `optax.inject_hyperparams` inside it work.

    Returns:
      An optimizer.

    Raises:
      TypeError: if `chain` is not a transformation.
      ValueError: in `update`, if the chain evaluates no gradient, or several (`steps=2`), or needs
        `ascend=` and does not get it.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> tx = samax.alternating(optax.chain(samax.sam(rho=0.5), optax.sgd(0.1)))
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(lambda w: jnp.sum(w**2))(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      ...     print(w, samax.eval_params(state, w))
      [3.3 4.4] [3. 4.]
      [2.34 3.12] [2.34 3.12]
    """
    check_transformation("chain", chain)
    whole = optax.with_extra_args_support(chain)

    def init(params: optax.Params) -> AlternatingState:
        return AlternatingState(
            perturbed=jnp.zeros((), bool),
            params=optax.tree.zeros_like(params),
            clean_grad=optax.tree.zeros_like(params),
            value=jnp.full((), jnp.nan, tree_wide_dtype(params)),
            chain=whole.init(params),
        )

    def update(
        updates: optax.Updates,
        state: AlternatingState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AlternatingState]:
        check_inputs(updates, params, extra_args)
        others = {k: v for k, v in extra_args.items() if k not in (*FUNCTIONS, "value", "ascend")}
        ascend = extra_args.get("ascend")
        if ascend is not None:
            others["ascend"] = True
        elif optax.tree.get_all_with_path(state.chain, "ascended"):
            raise ValueError(
                "alternating needs to know how many calls a step has: pass ascend=True, of two, or "
                "ascend=False, of one, to update where the chain holds samax.occasionally."
            )
        value = extra_args.get("value")

        def perturb(
            grads: optax.Updates, state: AlternatingState, params: optax.Params
        ) -> tuple[optax.Updates, AlternatingState]:
            losses = {} if value is None else {"value": value}
            point = _where_evaluated(whole, grads, state.chain, params, **losses, **others)
            kept = state._replace(
                perturbed=jnp.ones_like(state.perturbed),
                params=params,
                clean_grad=cast_like(grads, params),
                value=jnp.asarray(jnp.nan if value is None else value, state.value.dtype),
            )
            return optax.tree.sub(point, params), kept

        def step(
            grads: optax.Updates, state: AlternatingState, point: optax.Params
        ) -> tuple[optax.Updates, AlternatingState]:
            arrived: dict[str, Any] = {"grad_fn": lambda _: grads}
            if value is not None:
                arrived = {"value_and_grad_fn": lambda _: (value, grads), "value": state.value}
            change, chain_state = whole.update(
                state.clean_grad, state.chain, state.params, **arrived, **others
            )
            params = optax.apply_updates(state.params, change)
            kept = state._replace(
                perturbed=jnp.zeros_like(state.perturbed), params=params, chain=chain_state
            )
            return optax.tree.sub(params, point), kept

        def plain(
            grads: optax.Updates, state: AlternatingState, params: optax.Params
        ) -> tuple[optax.Updates, AlternatingState]:
            losses = {} if value is None else {"value": value}
            arguments = {**losses, **others, "ascend": False}
            change, chain_state = whole.update(grads, state.chain, params, **arguments)
            return cast_like(change, params), state._replace(chain=chain_state)

        first = plain if ascend is False else perturb
        return jax.lax.cond(state.perturbed, step, first, updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _where_evaluated(
    chain: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: Any,
) -> optax.Params:
    """The one point at which the chain evaluates the gradient; XLA drops what comes after it."""
    points = []

    def note(point: optax.Params) -> optax.Updates:
        points.append(point)
        return grads

    chain.update(grads, state, params, grad_fn=note, **extra_args)
    if len(points) != 1:
        raise ValueError(
            "alternating steps in two calls, one at the parameters and one at a perturbed point, "
            f"and this chain evaluates the gradient at {len(points) or 'no'} points; it needs one "
            "samax.sam(rho), or another method of one ascent step, and the whole chain: "
            "samax.alternating(optax.chain(samax.sam(rho), optimizer))."
        )
    return points[0]
