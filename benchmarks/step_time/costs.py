"""What each method costs a training step: gradients, FLOPs, memory and time, at its defaults.

A method that ascends on some steps alone is a cycle of steps, with one program for those that
ascend and one for those that do not (the static `ascend=` of `update`); its numbers are means over
the cycle, and its memory is that of the larger program. Gradients are counted while the programs
are traced, in backward passes of the network, by the share of the batch that they see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx

import samax
from benchmarks.core.timing import Compiled, compile_program, interleave
from benchmarks.step_time import report
from benchmarks.step_time.experiment import classifier

Make = Callable[[optax.GradientTransformation], optax.GradientTransformation]

_EVERY = 5  # LookSAM's published period


class Method(NamedTuple):
    """A way to make a step, with its published defaults."""

    make: Make  # From the base optimizer to the whole one
    cycle: tuple[bool | None, ...] = (None,)  # What `ascend=` is, step by step; None is none
    clean_share: int = 1  # The clean gradient is of the batch's share of 1 / this
    # Which function `update` gets: the loss, Functional SAM's gradient, or none.
    evaluates: str | None = "loss"


class Cycle(NamedTuple):
    """The steps of a method: programs `(carry, *inputs) -> (carry, loss)`, run in an order."""

    programs: Mapping[bool | None, Callable]
    order: tuple[bool | None, ...]
    carry: Any
    inputs: tuple[Any, ...]


def _before(method: optax.GradientTransformation) -> Make:
    return lambda base: optax.chain(method, base)


def _noise() -> optax.GradientTransformation:
    noise = samax.random_perturbation(samax.scaled_by_filter(samax.gaussian), key=0)
    return optax.chain(noise, samax.scale_by_rho(0.01))


_IN_TURN = (True, *(_EVERY - 1) * (False,))
METHODS: dict[str, Method] = {
    "base": Method(lambda base: base, evaluates=None),
    "sam": Method(_before(samax.sam(0.05))),
    "usam": Method(_before(samax.usam(0.05))),
    "asam": Method(_before(samax.asam(0.5, t0=0.01))),
    "vasso": Method(_before(samax.vasso())),
    "friendly_sam": Method(_before(samax.friendly_sam())),
    "wsam": Method(_before(samax.wsam())),
    "gsam": Method(_before(samax.gsam())),
    "samar": Method(_before(samax.samar())),
    "stable_sam": Method(_before(samax.stable_sam())),
    "sagm": Method(_before(samax.sagm())),
    "functional_sam": Method(_before(samax.sam(0.05)), evaluates="outputs"),
    "trace_sam": Method(_before(samax.trace_sam())),
    "sam_quarter": Method(_before(samax.sam(0.05)), clean_share=4),
    "looksam": Method(_before(samax.looksam(k=_EVERY)), _IN_TURN),
    "sam_every_5": Method(
        _before(samax.occasionally(samax.sam(0.05), samax.every(_EVERY))), _IN_TURN
    ),
    "before_late_phase": Method(
        _before(samax.occasionally(samax.sam(0.05), samax.from_step(10_000))), (False,)
    ),
    "stale_sam": Method(lambda base: samax.stale_sam(base, 0.05), evaluates=None),
    "msam": Method(lambda base: samax.msam(base, 3.0), evaluates=None),
    "random": Method(lambda base: samax.one_gradient(base, _noise()), evaluates=None),
}


class Counter:
    """Counts backward passes, in batches, of what goes through `mark`."""

    def __init__(self, batch_size: int) -> None:
        """Counts passes of `batch_size` examples as one."""
        self.passes = 0.0

        @jax.custom_vjp
        def mark(outputs: jax.Array) -> jax.Array:
            return outputs

        def backward(_: None, cotangents: jax.Array) -> tuple[jax.Array]:
            self.passes += len(cotangents) / batch_size
            return (cotangents,)

        mark.defvjp(lambda outputs: (outputs, None), backward)
        self.mark = mark


def title(model: str, count: int, batch_size: int) -> str:
    """Says what is measured, for tables and figures."""
    return (
        "cost of a method in gradients, FLOPs, memory and time; "
        f"{model}, {count / 1e6:.2g} M parameters, batch {batch_size} (base: SGD)"
    )


def steps(
    model: str, batch_size: int, mark: Callable[[jax.Array], jax.Array] = lambda x: x
) -> tuple[optax.Params, Callable[[str], Cycle]]:
    """Returns a network's parameters, and what makes the steps of a method on random images.

    Args:
        model: The network's name.
        batch_size: The number of images.
        mark: Sees the network's outputs in each pass.
    """
    graph, params, model_state, images, labels, base = classifier(model, batch_size)

    def build(name: str) -> Cycle:
        method = METHODS[name]
        tx = optax.with_extra_args_support(method.make(base))

        def step(
            ascend: bool | None, carry: Any, images: jax.Array, labels: jax.Array
        ) -> tuple[Any, jax.Array]:
            params, model_state, opt_state = carry

            def outputs_fn(params: nnx.State, images: jax.Array = images) -> tuple[jax.Array, Any]:
                model = nnx.merge(graph, params, model_state, copy=True)
                logits = mark(model(images))
                return logits, nnx.state(model, nnx.Not(nnx.Param))

            def loss_of(logits: jax.Array) -> jax.Array:
                wanted = labels[: len(logits)]
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
                return losses.mean()

            def clean_pass(params: nnx.State) -> tuple[jax.Array, Any]:
                logits, state = outputs_fn(params, images[: batch_size // method.clean_share])
                return loss_of(logits), (logits, state)

            (value, (logits, new_model_state)), grads = jax.value_and_grad(
                clean_pass, has_aux=True
            )(params)
            extra: dict[str, Any] = {} if ascend is None else {"ascend": ascend}
            if method.evaluates == "outputs":
                extra["grad_fn"] = samax.functional_grad_fn(
                    lambda params: outputs_fn(params)[0], loss_of, logits
                )
            elif method.evaluates == "loss" and ascend is not False:
                value_fn = lambda params: loss_of(outputs_fn(params)[0])  # noqa: E731
                extra |= {"value": value, "value_fn": value_fn}
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return (optax.apply_updates(params, updates), new_model_state, opt_state), value

        programs = {ascend: functools.partial(step, ascend) for ascend in set(method.cycle)}
        carry = jax.tree.map(jnp.copy, (params, model_state, tx.init(params)))
        return Cycle(programs, method.cycle, carry, (images, labels))

    return params, build


def count_gradients(model: str, batch_size: int, name: str) -> float:
    """Counts the backward passes of a step, the mean over a method's cycle."""
    counter = Counter(batch_size)
    cycle = steps(model, batch_size, counter.mark)[1](name)
    for ascend in cycle.order:
        # A function of its own each time: JAX would not trace the same one twice.
        program = lambda *inputs, ascend=ascend: cycle.programs[ascend](*inputs)  # noqa: E731
        jax.eval_shape(program, cycle.carry, *cycle.inputs)
    return counter.passes / len(cycle.order)


def measure(
    model: str, batch_size: int, methods: Sequence[str], rounds: int | None
) -> dict[str, Any]:
    """Compiles, counts and times the methods, `base` always among them.

    Returns:
        The problem's part of the results, as JSON types.
    """
    rounds = rounds or 200
    names = [name for name in METHODS if name == "base" or not methods or name in methods]
    params, build = steps(model, batch_size)
    compiled: dict[str, Compiled] = {}
    runs = {}
    for name in tqdm.tqdm(names, "compile"):
        cycle = build(name)
        programs = {
            ascend: compile_program(program, cycle.carry, *cycle.inputs)
            for ascend, program in cycle.programs.items()
        }
        runs[name] = _in_turn(cycle, {ascend: p.run for ascend, p in programs.items()})
        compiled[name] = _together(programs, cycle.order)
    seconds = {
        name: values / len(METHODS[name].cycle)
        for name, values in interleave(runs, tqdm.trange(rounds, desc="time   ")).items()
    }
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return {
        "title": title(model, sum(sizes), batch_size),
        "rounds": rounds,
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "methods": {
            name: {
                **report.method_record(seconds, name, compiled[name]),
                "gradients": count_gradients(model, batch_size, name),
            }
            for name in names
        },
    }


def _in_turn(cycle: Cycle, programs: Mapping[bool | None, Callable]) -> Callable[[], Any]:
    """Returns what runs one cycle, from where the last one ended."""
    carry = cycle.carry

    def run() -> Any:
        nonlocal carry
        for ascend in cycle.order:
            carry, output = programs[ascend](carry, *cycle.inputs)
        return carry, output

    return run


def _together(programs: Mapping[Any, Compiled], order: Iterable[Any]) -> Compiled:
    """What the programs of a cycle take: FLOPs of the mean step, memory of the largest."""
    parts = list(programs.values())
    most = lambda sizes: None if None in sizes else max(sizes)  # noqa: E731
    flops = [programs[each].flops for each in order]
    return Compiled(
        parts[0].run,
        sum(part.lower_seconds for part in parts),
        sum(part.compile_seconds for part in parts),
        most([part.argument_bytes for part in parts]),
        most([part.temp_bytes for part in parts]),
        None if None in flops else float(np.mean(np.array(flops, float))),
    )
