"""Several devices: which gradients are averaged, and when."""

from typing import TypeAlias

import jax
import optax

from samax._core.compat import varying_axes

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
