"""A step of a decoder's adapters whose gradients are made of micro-batches, compiled and not run.

Each gradient, the clean one and SAM's perturbed one, is that of the whole batch. It is summed over
micro-batches, one after another, so that the activations of one at a time are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import samax
from benchmarks.core import hlo
from benchmarks.core.timing import compile_program
from benchmarks.data.webnlg import Packed
from benchmarks.models import llama
from benchmarks.models.lora import DecoderTask

RHO, RATE, ALPHA = 0.05, 1e-3, 32.0
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "adamw": lambda: optax.with_extra_args_support(optax.adamw(RATE)),
    "sam": lambda: optax.chain(samax.sam(RHO), optax.adamw(RATE)),
}


def random_rows(size: int, length: int, vocabulary: int) -> Packed:
    """Returns rows of random tokens, of which all are learned."""
    shape = size, length
    ids = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return Packed(ids, np.ones_like(ids), positions, np.ones(shape, bool))


def value_and_grad_of_parts(
    task: DecoderTask, frozen: Any, rows: Packed, parts: int
) -> Callable[[Any], tuple[jax.Array, Any]]:
    """Returns what maps the adapters to the mean loss of all learned tokens, and its gradient.

    Args:
        task: The decoder's.
        frozen: Its frozen weights.
        rows: The whole batch.
        parts: How many micro-batches it is evaluated in, one after another.
    """
    total = rows.learned[:, 1:].sum()

    def loss_fn(params: Any, part: Packed) -> jax.Array:
        # A micro-batch counts by its tokens: a mean of means would be another loss.
        share = part.learned[:, 1:].sum() / total
        return share * task.loss(params, ((), task.batch((frozen, part), 0)))[0]

    micro_batched = optax.microbatching.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=1,
        microbatch_size=len(rows.ids) // parts if parts > 1 else None,
        accumulator=optax.microbatching.AccumulationType.SUM,
    )
    return lambda params: micro_batched(params, rows)


def make_step(task: DecoderTask, tx: optax.GradientTransformationExtraArgs, parts: int) -> Any:
    """Returns the step `((params, state), frozen, rows) -> ((params, state), loss)`."""

    def step(carry: Any, frozen: Any, rows: Packed) -> tuple[Any, jax.Array]:
        params, state = carry
        value_and_grad_fn = value_and_grad_of_parts(task, frozen, rows, parts)
        value, grads = value_and_grad_fn(params)
        updates, state = tx.update(
            grads, state, params, value=value, value_and_grad_fn=value_and_grad_fn
        )
        return (optax.apply_updates(params, updates), state), value

    return step


def measure(method: str, model: llama.Llama, rows: Packed, parts: int, rank: int) -> dict[str, Any]:
    """Compiles a step with adapters in all of a decoder's blocks, and says what it needs."""
    task, tx = DecoderTask(model, rank=rank, alpha=ALPHA), OPTIMIZERS[method]()
    params, _ = task.init(0)
    step = make_step(task, tx, parts)
    carry = jax.eval_shape(lambda params: (params, tx.init(params)), params)
    program = compile_program(step, carry, task.frozen, rows)
    compiled: Any = program.run
    return {
        "method": method,
        "checkpoint": model.remat,
        "parts": parts,
        "temp_bytes": program.temp_bytes,
        "argument_bytes": program.argument_bytes,
        "flops": hlo.flops(hlo.read(compiled.as_text())),
    }
