"""Several devices, or several groups of examples on one: which gradients are averaged, and when."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_count, check_transformation
from samax._core.numerics import cast_like, vary_over, varying_axes, widen
from samax._core.loop import stream
from samax._core.combinator import UNROLLED_STEPS, check_inputs, evaluator

AxisNames: TypeAlias = str | tuple[str, ...]


def cross_replica_mean(axis_name: AxisNames) -> optax.GradientTransformation:
    r"""Averages the updates over the devices along a named axis of `shard_map` or `pmap`.

    $$ g \mapsto \frac1D \sum_{d=1}^{D} g_d $$

    Each device has its own gradient $g_d$, of its own part of the batch, and passes its own loss as
    `value_fn`. With `mean = cross_replica_mean("data")` the order of the chain says what happens:

    - `chain(mean, sam(rho), mean, optimizer)`, synchronized SAM: one perturbation, along the
      gradient of the whole batch, and two all-reduces a step. What one device computes.
    - `chain(sam(rho), mean, optimizer)`, per-device m-sharpness: each device perturbs along its own
      gradient, and one all-reduce a step, that of the optimizer alone. `samax.m_sharpness` has the
      same meaning on fewer devices.

    Under `jit` with sharded arrays there is no such axis, gradients and norms are those of the
    whole batch already, and this part has no place.

    In `jax.shard_map` (with `check_vma`, the default) a gradient at REPLICATED parameters is the
    SUM over devices: JAX sees that they are the same everywhere. So take gradients, and call
    `update`, at parameters that count as each device's own,

        local = jax.lax.pcast(params, "data", to="varying")  # jax.lax.pvary before JAX 0.9

    and apply the updates to `params`. A gradient that was summed raises an error here. `pmap`, and
    `shard_map` with `check_vma=False`, need no cast.

    Args:
      axis_name: the name of the axis, or a tuple of names.

    Returns:
      A stateless transformation.

    Raises:
      NameError: in `update`, outside of a `shard_map` or `pmap` that has the axis.
      ValueError: in `update`, if the updates are the same on all devices by their type, and so have
        been summed.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, samax
      >>> mean = samax.cross_replica_mean("data")
      >>> tx = optax.chain(mean, samax.sam(rho=0.5), mean, optax.sgd(0.1))
      >>> def step(w, batch):  # one device's part of the batch
      ...     loss = lambda w: jnp.sum((w * batch) ** 2)
      ...     value, grads = jax.value_and_grad(loss)(w)
      ...     updates, _ = tx.update(grads, tx.init(w), w, value=value, value_fn=loss)
      ...     return optax.apply_updates(w, updates)
      >>> print(jax.vmap(step, in_axes=(None, 0), axis_name="data")(1.0, jnp.ones((2, 1))))
      [0.7 0.7]
    """

    def mean(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        try:
            axes = varying_axes(jax.lax.axis_index(axis_name))
        except NameError:
            raise NameError(
                f"cross_replica_mean({axis_name!r}) found no such axis: call update inside "
                "jax.shard_map or jax.pmap over it. Under jit with sharded arrays gradients are of "
                "the whole batch already; leave it out of the chain there."
            ) from None
        for leaf in jax.tree.leaves(updates):
            if axes - varying_axes(leaf):
                raise ValueError(
                    f"cross_replica_mean({axis_name!r}) got updates that are the same on all "
                    "devices: gradients at replicated parameters, which shard_map has summed. Take "
                    "them, and call update, at parameters made each device's own by "
                    f"jax.lax.pcast(params, {axis_name!r}, to='varying')."
                )
        return jax.lax.pmean(updates, axis_name)

    return optax.stateless(mean)


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
    and one of `value_fn(params, batch)`, `grad_fn(params, batch)` and
    `value_and_grad_fn(params, batch)`; Optax's line searches call `value_fn` in the same way. A
    random key that is closed over is the same in each group.

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
      ValueError: if a number is below 1; in `update`, if there is no batch, its size is no multiple
        of `num_groups`, or not exactly one function.
      TypeError: if `transformation` is none.

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
    unroll = (num_groups if num_groups <= UNROLLED_STEPS else 1) if unroll is None else unroll
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
        *,
        batch: Any = None,
        value: jax.typing.ArrayLike | None = None,
        value_fn: Callable[..., jax.Array] | None = None,
        grad_fn: Callable[..., optax.Updates] | None = None,
        value_and_grad_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        check_inputs(updates, params, value)
        functions = {
            "value_fn": value_fn,
            "grad_fn": grad_fn,
            "value_and_grad_fn": value_and_grad_fn,
        }
        groups = _split(batch, num_groups)

        def visit(total: optax.Updates, group: Any) -> tuple[optax.Updates, optax.OptState]:
            group_state, examples = group
            passed = {name: _bind(fn, examples) for name, fn in functions.items() if fn is not None}
            loss, grads = evaluator(passed)(params)
            losses = {} if loss is None else {"value": loss}
            direction, group_state = inner.update(
                grads, group_state, params, **losses, **passed, **extra_args
            )
            return optax.tree.add(total, widen(direction)), group_state

        total = jax.tree.map(jnp.zeros_like, widen(updates))
        total = vary_over(varying_axes(updates, params), total)
        total, state = stream(visit, total, (state, groups), unroll)
        return cast_like(optax.tree.scale(1 / num_groups, total), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _bind(fn: Callable[..., Any], batch: Any) -> Callable[[optax.Params], Any]:
    return lambda params: fn(params, batch)


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
