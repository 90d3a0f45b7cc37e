"""The ways to make a training step that `benchmarks.step_time` compares, at published defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

import samax
from benchmarks.core.methods import BALANCING, parse_method
from samax._balance.groups import Groups

RHO = 0.05
_EVERY = 5  # LookSAM's published period
_IN_TURN = (True, *(_EVERY - 1) * (False,))


class Base(NamedTuple):
    """The base optimizer, and what else of a problem some methods must know."""

    optimizer: optax.GradientTransformation
    rate: float = 0.0  # Its learning rate
    groups: Groups | None = None  # The cores that are balanced
    perturbed: Callable[[Any], Any] | None = None  # A mask of what SAM perturbs; None is everything


Make = Callable[[Base], optax.GradientTransformation]


class Method(NamedTuple):
    """A way to make a step, which is one call of `update` or a cycle of several."""

    make: Make
    # What `update` gets to evaluate elsewhere: the loss, its gradient, Functional SAM's gradient by
    # way of the network's outputs, or nothing.
    evaluates: Literal["loss", "gradient", "outputs"] | None = "loss"
    clean_share: int = 1  # The clean gradient is of the batch's share of 1 / this
    # What the static `ascend=` is, call by call; None leaves it out. Calls that ascend and calls
    # that do not are programs of their own.
    cycle: tuple[bool | None, ...] = (None,)
    steps: int = 1  # The training steps that the cycle makes; numbers are means over these


def _by_hand(base: Base) -> optax.GradientTransformationExtraArgs:
    """What SAM cannot do without, and nothing else: no check, no guard against a zero norm."""

    def update(
        grads: optax.Updates,
        state: Any,
        params: optax.Params,
        *,
        grad_fn: Callable[[optax.Params], optax.Updates],
    ) -> tuple[optax.Updates, Any]:
        scale = RHO / optax.tree.norm(grads)
        point = jax.tree.map(lambda w, g: w + scale * g, params, grads)
        return base.optimizer.update(grad_fn(point), state, params)

    return optax.GradientTransformationExtraArgs(base.optimizer.init, update)


def _optax(*, opaque: bool) -> Make:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return lambda base: optax.contrib.sam(base.optimizer, ascent, opaque_mode=opaque)


def _select(text: str) -> Make:
    """A row of the core's table."""
    return lambda base: parse_method(text).optimizer(
        base.optimizer, learning_rate=base.rate, steps=20_000, groups=base.groups, track=False
    )


def _noise() -> optax.GradientTransformation:
    noise = samax.random_perturbation(samax.scaled_by_filter(samax.gaussian), key=0)
    return optax.chain(noise, samax.scale_by_rho(0.01))


_SAM = Method(lambda base: optax.chain(samax.sam(RHO, mask=base.perturbed), base.optimizer))
_TWO_GRADIENTS = ("usam", "asam", "vasso", "friendly_sam", "wsam", "gsam", "samar", "stable_sam")

PLAIN: dict[str, Method] = {
    "base": Method(lambda base: base.optimizer, None),
    "limit": Method(_by_hand, "gradient"),
    "sam": _SAM,
    **{name: Method(_select(name)) for name in _TWO_GRADIENTS},
    "sagm": Method(lambda base: optax.chain(samax.sagm(), base.optimizer)),
    "optax_opaque": Method(_optax(opaque=True), "gradient"),
    "optax_transparent": Method(_optax(opaque=False), "gradient", cycle=(None, None)),
}
"""Those that need no more than the gradient of the whole batch at another point."""

METHODS: dict[str, Method] = {
    **PLAIN,
    "functional_sam": Method(_select("sam"), "outputs"),
    "trace_sam": Method(_select("trace_sam")),
    "sam_quarter": _SAM._replace(clean_share=4),
    "looksam": Method(_select(f"looksam:k={_EVERY}"), cycle=_IN_TURN, steps=_EVERY),
    "sam_every_5": Method(_select(f"sam_every:k={_EVERY}"), cycle=_IN_TURN, steps=_EVERY),
    "before_late_phase": Method(_select("sam_late"), cycle=(False,)),
    "stale_sam": Method(_select("stale_sam"), None),
    "msam": Method(_select("msam"), None),
    "random": Method(lambda base: samax.one_gradient(base.optimizer, _noise()), None),
    **{name: Method(_select(name), None) for name in BALANCING},
}
