"""Curvature as linear operators over pytrees, and means over a data set that is streamed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samax._core.checks import check_callable, check_parameters, check_scalar_loss
from samax._core.hyperparameters import Scalar, check_scalar
from samax._core.numerics import widen

Batches: TypeAlias = Iterable[Any]
Operator: TypeAlias = Callable[[Any], Any]


def mean_over(batches: Batches | None, fn: Callable[..., Any]) -> Any:
    """The mean of `fn(batch)` over the examples of a data set; without one it is `fn()`.

    Each batch counts by its number of examples, the length of its leaves. The sums stay on the
    device, and each batch is done before the next is sent there.

    Args:
      batches: an iterable of batches, pytrees of arrays with a leading axis of examples, that can
        be gone through again; or None.
      fn: a function of a batch, to a pytree of means over it.

    Returns:
      The mean, a pytree like the results of `fn`.

    Raises:
      TypeError: if `batches` is an iterator, which is exhausted after one pass.
      ValueError: if there are no batches, or one has no leaves with a leading axis.
    """
    if batches is None:
        return fn()
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable):
        raise TypeError(
            "batches must be an iterable that can be gone through again, such as a list or a data "
            f"loader, got {batches!r} of type {type(batches).__name__}."
        )
    total, examples = None, 0
    for batch in batches:
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(
                "batches must hold pytrees of arrays with one common leading axis of examples, got "
                f"the shapes {jax.tree.map(jnp.shape, batch)}."
            )
        (size,) = lengths.pop()
        part = jax.tree.map(lambda x, size=size: size * x, widen(fn(batch)))
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        jax.block_until_ready(total)
        examples += size
    if total is None:
        raise ValueError("batches must hold at least one batch, got none.")
    return jax.tree.map(lambda x: x / examples, total)


def mean_loss(
    loss_fn: Callable[..., jax.Array], batches: Batches | None = None
) -> Callable[[optax.Params], jax.Array]:
    """`params -> loss`, the mean over the batches, compiled for one batch."""
    compiled = jax.jit(_scalar(loss_fn))
    return lambda params: mean_over(batches, lambda *batch: compiled(params, *batch))


def mean_loss_and_grad(
    loss_fn: Callable[..., jax.Array], batches: Batches | None = None
) -> Callable[[optax.Params], tuple[jax.Array, optax.Updates]]:
    """`params -> (loss, grads)`, the means over the batches, compiled for one batch."""
    compiled = jax.jit(jax.value_and_grad(_scalar(loss_fn)))
    return lambda params: mean_over(batches, lambda *batch: compiled(params, *batch))


def hessian_operator(
    loss_fn: Callable[..., jax.Array], params: optax.Params, batches: Batches | None = None
) -> Operator:
    r"""The Hessian of a loss at some parameters, as a function that multiplies by it.

    $$ v \mapsto H v = \frac{d}{ds} \, \nabla L(w + s v) \Big|_{s = 0} $$

    Forward over reverse mode: a product costs about two gradients, and no more memory than one
    gradient does. Only the program for one batch is compiled, and the host iterates over the data
    set, so it need not fit on the device (and no convolution is put into a loop).

    Args:
      loss_fn: `loss_fn(params, batch) -> loss`, the mean over the batch; or `loss_fn(params)`
        without `batches`. Batch statistics and dropout keys are fixed in it.
      params: where; half-precision leaves are taken as float32.
      batches: the data set, an iterable of pytrees of arrays with a leading axis of examples; it
        is gone through at each product.

    Returns:
      A function from a pytree like the parameters to another, in float32 or wider.

    Raises:
      TypeError: if a leaf is not a real floating-point array, or the loss not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from samax import flatness
      >>> product = flatness.hessian_operator(lambda w: w[0] ** 2 * w[1], jnp.array([1.0, 2.0]))
      >>> print(product(jnp.array([1.0, 0.0])))
      [4. 2.]
    """
    check_parameters("params", params)
    loss = _scalar(loss_fn)

    @jax.jit
    def product(point: optax.Params, vector: Any, *batch: Any) -> Any:
        return jax.jvp(lambda p: jax.grad(loss)(p, *batch), (point,), (vector,))[1]

    point = widen(params)
    return lambda vector: mean_over(batches, lambda *batch: product(point, vector, *batch))


def gauss_newton_operator(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., jax.Array],
    params: optax.Params,
    batches: Batches | None = None,
) -> Operator:
    r"""The generalized Gauss-Newton matrix, the Hessian's positive part, as an operator.

    $$ v \mapsto J^\top \, \nabla^2 \ell \; J v, \qquad L(w) = \ell(f(w)), \quad
       J = \frac{\partial f}{\partial w} $$

    For a loss that is convex in the outputs it is positive semidefinite, and equal to the Hessian
    where the outputs are linear in w or fit perfectly. For cross-entropy it is the Fisher matrix.

    Args:
      model_fn: f, `model_fn(params, batch) -> outputs` (`model_fn(params)` without `batches`).
      loss_fn: `loss_fn(outputs, batch) -> loss`, the mean over the batch (`loss_fn(outputs)`).
      params: where; half-precision leaves are taken as float32.
      batches: the data set; see `samax.flatness.hessian_operator`.

    Returns:
      A function from a pytree like the parameters to another, in float32 or wider.

    Raises:
      TypeError: if a leaf is not a real floating-point array, or the loss not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from samax import flatness
      >>> product = flatness.gauss_newton_operator(
      ...     lambda w: w**2, lambda y: jnp.sum(y**2) / 2, jnp.array([1.0, 2.0]))
      >>> print(product(jnp.ones(2)))
      [ 4. 16.]
    """
    check_parameters("params", params)
    check_callable("model_fn", model_fn, "of the parameters and a batch")
    loss = _scalar(loss_fn)

    @jax.jit
    def product(point: optax.Params, vector: Any, *batch: Any) -> Any:
        outputs, tangents = jax.jvp(lambda p: model_fn(p, *batch), (point,), (vector,))
        curved = jax.jvp(lambda y: jax.grad(loss)(y, *batch), (outputs,), (tangents,))[1]
        return jax.vjp(lambda p: model_fn(p, *batch), point)[1](curved)[0]

    point = widen(params)
    return lambda vector: mean_over(batches, lambda *batch: product(point, vector, *batch))


def scaled_operator(operator: Operator, params: optax.Params, t0: Scalar = 0.0) -> Operator:
    r"""The adaptive form of a curvature: $v \mapsto T H T v$, $T = |w| + t_0$ elementwise.

    With $t_0 = 0$ its eigenvalues, trace and norms are invariant under rescaling of the parameters
    that does not change the loss; those of H are not.

    Args:
      operator: H.
      params: w.
      t0: added to `|w|`, at least 0.

    Returns:
      The operator T H T.

    Raises:
      ValueError: if `t0` is negative or not finite.
    """
    check_scalar("t0", t0)
    sizes = jax.tree.map(lambda w: jnp.abs(w) + t0, widen(params))
    scale = functools.partial(jax.tree.map, jnp.multiply, sizes)
    return lambda vector: scale(operator(scale(vector)))


def _scalar(loss_fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The loss, in float32 or wider, checked to be a scalar."""
    check_callable("loss_fn", loss_fn, "of the parameters and a batch")

    def loss(*args: Any) -> jax.Array:
        value = loss_fn(*args)
        check_scalar_loss("loss_fn(params, batch)", value)
        return widen(value)

    return loss
