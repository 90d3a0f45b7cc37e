"""Several groups of examples on one device: per-device SAM on fewer devices than groups."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_count, check_transformation
from samax._core.compat import vary_over, varying_axes
from samax._core.evaluation import FUNCTIONS, check_inputs, evaluator, named_arguments
from samax._core.loop import default_unroll, stream
from samax._core.numerics import cast_like, widen


def m_sharpness(
    transformation: optax.GradientTransformation, num_groups: int, *, unroll: int | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Applies a transformation to each group of the batch on its own, and averages the results.

    $$ \frac1M \sum_{j=1}^{M} T\big(\nabla L_j(w)\big), \qquad
       \text{for SAM } \frac1M \sum_j \nabla L_j\Big(w + \rho \,
       \frac{\nabla L_j(w)}{\lVert \nabla L_j(w) \rVert}\Big) $$

    $L_j$ is the loss of the j-th of M equal parts of the batch: what
    `chain(transformation, cross_replica_mean("data"))` computes on M devices, on one. With k groups
    on each of D devices, `chain(m_sharpness(transformation, k), cross_replica_mean("data"))`, it is
    M = k D.

    `update` takes `batch`, a pytree of arrays whose leading axis is split into M parts, in order,
    and a function that names it, such as `value_fn(params, batch)`; see `samax.sharpness_aware`.
    Other extra arguments, and a random key that is closed over, are the same in each group.

    Each group's clean gradient is computed here. So it costs two gradients of each example, as SAM
    does, and the incoming gradients count for nothing but their tree and dtypes: under `jit` XLA
    drops what computed them, and what stands before this part in a chain has no effect. The groups
    are streamed, the memory is that of one group's activations and one sum of gradients. Where the
    batch is sharded under `jit`, a group lies on few devices and the others wait: use `shard_map`.

    Args:
      transformation: `samax.sam` or any other; each group has a state of its own, as each device
        has: the state's leaves have a leading axis of size M. (VaSSO's averages are M copies of the
        parameters.)
      num_groups: M, at least 1; it divides the size of the batch.
      unroll: how many groups the body of the loop holds; None is all of them up to 8, without any
        loop, and 1 beyond. XLA on CPU runs convolutions in loops about 22 times slower than
        outside.

    Returns:
      A transformation from the gradient to the mean of the groups' directions.

    Raises:
      ValueError: if a number is below 1; in `update`, if there is no batch, its size is not a
        multiple of `num_groups`, or there is not exactly one function.
      TypeError: if `transformation` is none; in `update`, if the function does not name `batch`.

    References:
      Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021,
      section 4.1, [arXiv 2010.01412](https://arxiv.org/abs/2010.01412)

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
      >>> tx = optax.chain(samax.m_sharpness(samax.sam(rho=0.05), num_groups=4), optax.sgd(0.1))
      >>> w, batch = jnp.ones(3), jax.random.normal(jax.random.key(0), (8, 3))
      >>> value, grads = jax.value_and_grad(loss)(w, batch)
      >>> updates, state = tx.update(
      ...     grads, tx.init(w), w, value=value, value_fn=loss, batch=batch)
    """
    check_transformation("transformation", transformation)
    check_count("num_groups", num_groups)
    unroll = default_unroll(num_groups) if unroll is None else unroll
    check_count("unroll", unroll)
    inner = optax.with_extra_args_support(transformation)

    def init(params: optax.Params) -> optax.OptState:
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_groups, *jnp.shape(leaf))), inner.init(params)
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_inputs(updates, params, extra_args)
        groups = _split(extra_args.get("batch"), num_groups)
        _check_names_batch(extra_args)

        def visit(total: optax.Updates, group: Any) -> tuple[optax.Updates, optax.OptState]:
            group_state, examples = group
            arguments = {**extra_args, "batch": examples}
            loss, grads = evaluator(arguments)(params)
            if loss is None:
                arguments.pop("value", None)
            else:
                arguments["value"] = loss
            direction, group_state = inner.update(grads, group_state, params, **arguments)
            return optax.tree.add(total, widen(direction)), group_state

        total = optax.tree.zeros_like(widen(updates))
        total = vary_over(varying_axes(updates, params), total)
        total, state = stream(visit, total, (state, groups), unroll)
        return cast_like(optax.tree.scale(1 / num_groups, total), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_names_batch(extra_args: dict[str, Any]) -> None:
    for name in FUNCTIONS:
        fn = extra_args.get(name)
        if fn is not None and "batch" not in named_arguments(fn):
            raise TypeError(
                f"m_sharpness evaluates {name} on parts of the batch, so it must name it, as in "
                f"{name}(params, batch); a function that closes over the batch would see all of it."
            )


def _split(batch: Any, num_groups: int) -> Any:
    """The batch with a leading axis of groups."""
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(
            "m_sharpness needs the batch: call update(grads, state, params, value_fn=value_fn, "
            "batch=batch) with value_fn(params, batch) -> loss."
        )
    for leaf in leaves:
        if not jnp.shape(leaf) or jnp.shape(leaf)[0] % num_groups:
            raise ValueError(
                f"num_groups must divide the leading axis of the batch's arrays, got {num_groups} "
                f"groups and an array of shape {jnp.shape(leaf)}."
            )
    return jax.tree.map(
        lambda x: jnp.reshape(x, (num_groups, x.shape[0] // num_groups, *x.shape[1:])), batch
    )
