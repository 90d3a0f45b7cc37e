"""What `benchmarks.step_time` runs: kinds of step, each with every way to make it a SAM step.

In the training problems the step is all of training: both gradients of a network, the statistics of
the clean pass, the base optimizer. In the pytree problems it is the transformation alone: the loss
is ``||w||^2 / 2``, whose gradient at any point is the point itself, so that the second gradient
costs nothing and what remains is the transformation's overhead, to be held against AdamW's update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import samax
from benchmarks import models
from benchmarks.core.methods import BALANCING
from benchmarks.data.webnlg import Packed
from benchmarks.models import bert, llama
from benchmarks.models.lora import DecoderTask, SentenceTask, build_classifier, is_adapter
from benchmarks.step_time.methods import METHODS, PLAIN, Base

_FEATURES = 16
_CLASSES = 6


class Cycle(NamedTuple):
    """A method's programs `(carry, *inputs) -> (carry, output)`, called in an order."""

    programs: Mapping[bool | None, Callable]  # By what `ascend=` is
    order: tuple[bool | None, ...]
    carry: Any
    inputs: tuple[Any, ...]


class Problem(NamedTuple):
    """A problem to time the methods on."""

    title: str  # What is computed, for tables and figures
    methods: tuple[str, ...]  # The methods that it makes sense for
    default_methods: tuple[str, ...]  # Those measured unless others are asked for
    rounds: int  # With the default methods, how many rounds fit into minutes on two cores
    params: optax.Params  # The parameters
    # Makes the cycle of a method. Of training, a second argument sees the outputs of each pass.
    build: Callable[..., Cycle]
    # Whether the steps are programs; otherwise their operations are dispatched singly.
    compiled: bool = True
    batch_size: int | None = None  # Where gradients are counted too: of how many examples one is


def training(
    name: str, batch_size: int, rounds: int, default_methods: tuple[str, ...] = ()
) -> Problem:
    """A training step of a classifier on random 32x32x3 images, with SGD and weight decay."""
    model = models.build(name, num_classes=10, rngs=nnx.Rngs(0))
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = states
    image_key, label_key = jax.random.split(jax.random.key(1))
    images = jax.random.normal(image_key, (batch_size, 32, 32, 3))
    labels = jax.random.randint(label_key, (batch_size,), 0, 10)

    def outputs_fn(params: nnx.State, inputs: Any) -> tuple[jax.Array, nnx.State]:
        model_state, _, (images, _) = inputs
        model = nnx.merge(graph, params, model_state, copy=True)
        return model(images), nnx.state(model, nnx.Not(nnx.Param))

    def loss_of(logits: jax.Array, batch: Any) -> jax.Array:
        _, labels = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    rate = 0.01
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    base = Base(sgd, rate, models.CORE_GROUPS)
    build = _steps(base, outputs_fn, (params, model_state), ((), (images, labels)), loss_of)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    title = f"{name}, {count / 1e6:.2g} M parameters, batch {batch_size}, 32x32x3 (base: SGD)"
    tensorized = name in models.TENSORIZED
    methods = tuple(name for name in METHODS if tensorized or name not in BALANCING)
    return Problem(title, methods, default_methods or methods, rounds, params, build)


def costs(batch_size: int) -> Problem:
    """A training step of a small network with every method, its gradients counted."""
    problem = training("cnn", batch_size, rounds=200)
    title = f"cost of a method in gradients, FLOPs, memory and time; {problem.title}"
    return problem._replace(title=title, batch_size=batch_size)


def lora(batch_size: int, length: int, rank: int, rounds: int, encoder: bert.Bert) -> Problem:
    """A step of fine-tuning a frozen encoder's adapters and classifier with AdamW."""
    task = SentenceTask(lambda seed: build_classifier(encoder, _CLASSES, seed, rank=rank))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, encoder.config.vocab_size, (batch_size, length), dtype=np.int32)
    labels = rng.integers(0, _CLASSES, batch_size, dtype=np.int32)
    batch = jax.device_put((ids, np.ones(ids.shape, bool), labels))
    base = _adamw(5e-4, samax.lora_groups, is_adapter)
    title = f"{bert.NAME}, LoRA of rank {rank}, batch {batch_size}, {length} tokens (base: AdamW)"
    return _adapters(title, task, batch, lambda frozen, rows: (frozen, *rows), base, rounds)


def decoder(
    batch_size: int, length: int, rank: int, rounds: int, model: llama.Llama, name: str
) -> Problem:
    """A step of fine-tuning the adapters of all of a frozen decoder's blocks with AdamW."""
    task = DecoderTask(model, rank=rank, alpha=32.0)
    shape = batch_size, length
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    batch = Packed(*jax.device_put((ids, np.ones_like(ids), positions, np.ones(shape, bool))))
    base = _adamw(1e-3, functools.partial(samax.lora_groups, stacked=True))
    again = ", blocks computed again" if model.remat else ""
    title = f"{name}, LoRA of rank {rank}, {batch_size} x {length} tokens{again} (base: AdamW)"
    return _adapters(title, task, batch, lambda *data: task.batch(data, 0), base, rounds)


def _adamw(rate: float, *options: Any) -> Base:
    return Base(optax.adamw(rate, weight_decay=0.01), rate, *options)


def _adapters(
    title: str,
    task: SentenceTask | DecoderTask,
    batch: Any,
    joined: Callable[[Any, Any], Any],
    base: Base,
    rounds: int,
) -> Problem:
    """A step of fine-tuning; `joined` makes of what is frozen and the rows what the task takes."""
    params, model_state = task.init(0)

    def loss_fn(params: nnx.State, inputs: Any) -> tuple[jax.Array, Any]:
        model_state, frozen, rows = inputs
        loss, (model_state, _) = task.loss(params, (model_state, joined(frozen, rows)))
        return loss, model_state

    methods = ("base", "sam", *BALANCING)
    build = _steps(base, loss_fn, (params, model_state), (task.frozen, batch))
    return Problem(title, methods, methods, rounds, params, build)


def _steps(
    base: Base,
    outputs_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    start: tuple[Any, Any],
    inputs: tuple[Any, Any],
    loss_of: Callable[[jax.Array, Any], jax.Array] = lambda loss, _: loss,
) -> Callable[..., Cycle]:
    """Returns what makes the cycle of a method whose steps are all of training.

    Args:
        base: The base optimizer.
        outputs_fn: Maps parameters and `(model_state, frozen, batch)` to outputs and the new state.
        start: Parameters and model state.
        inputs: What is frozen, and the batch.
        loss_of: Maps outputs and the batch to the loss; by default the outputs are the loss.
    """

    def build(name: str, mark: Callable[[jax.Array], jax.Array] = lambda x: x) -> Cycle:
        method = METHODS[name]
        tx = optax.with_extra_args_support(method.make(base))
        clean_size = len(inputs[1][0]) // method.clean_share

        def step(ascend: bool | None, carry: Any, frozen: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, model_state, opt_state = carry

            def outputs_of(params: Any, batch: Any) -> tuple[jax.Array, Any]:
                outputs, new_model_state = outputs_fn(params, (model_state, frozen, batch))
                return mark(outputs), new_model_state

            def clean_pass(params: Any) -> tuple[jax.Array, Any]:
                clean = jax.tree.map(lambda rows: rows[:clean_size], batch)
                outputs, new_model_state = outputs_of(params, clean)
                return loss_of(outputs, clean), (outputs, new_model_state)

            def value_fn(params: Any) -> jax.Array:
                return loss_of(outputs_of(params, batch)[0], batch)

            (value, (outputs, model_state_after)), grads = jax.value_and_grad(
                clean_pass, has_aux=True
            )(params)
            extra: dict[str, Any] = {} if ascend is None else {"ascend": ascend}
            if method.evaluates == "loss" and ascend is not False:
                extra |= {"value": value, "value_fn": value_fn}
            elif method.evaluates == "gradient":
                extra["grad_fn"] = lambda point, *_: jax.grad(value_fn)(point)
            elif method.evaluates == "outputs":
                extra["grad_fn"] = samax.functional_grad_fn(
                    lambda params: outputs_of(params, batch)[0],
                    lambda outputs: loss_of(outputs, batch),
                    outputs,
                )
            updates, opt_state = tx.update(grads, opt_state, params, **extra)
            return (optax.apply_updates(params, updates), model_state_after, opt_state), value

        programs = {ascend: functools.partial(step, ascend) for ascend in set(method.cycle)}
        return Cycle(programs, method.cycle, _copied((*start, tx.init(start[0]))), inputs)

    return build


def pytree(leaves: int, rounds: int, *, compiled: bool) -> Problem:
    """The update alone on many small leaves, where a gradient evaluation costs nothing."""
    keys = jax.random.split(jax.random.key(0), 2)
    params, grads = (
        {f"w{index}": row for index, row in enumerate(jax.random.normal(key, (leaves, _FEATURES)))}
        for key in keys
    )

    def build(name: str) -> Cycle:
        method = METHODS[name]
        optimizer = optax.adamw(1e-3) if name == "base" else optax.identity()
        tx = optax.with_extra_args_support(method.make(Base(optimizer)))

        def step(state: Any, grads: Any, params: Any) -> tuple[Any, optax.Updates]:
            # The perturbed point comes out as the update: it is computed and written in full.
            updates, state = tx.update(grads, state, params, grad_fn=_identity)
            return state, updates

        def transparent_step(carry: Any, grads: Any) -> tuple[Any, tuple[()]]:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), ()

        state = tx.init(params)
        if name == "optax_transparent":  # its caller applies the perturbation to the parameters
            carry = _copied((params, state))
            return Cycle({None: transparent_step}, method.cycle, carry, (grads,))
        return Cycle({None: step}, method.cycle, _copied(state), (grads, params))

    methods = tuple(PLAIN)
    # Not compiled, an update takes seconds.
    default_methods = methods if compiled else ("base", "limit", "sam", "optax_opaque")
    how = "compiled" if compiled else "not compiled"
    title = f"{leaves:,} leaves of {_FEATURES}, {how}, the update alone (base: AdamW)"
    return Problem(title, methods, default_methods, rounds, params, build, compiled)


def _identity(params: optax.Params, *_: Any) -> optax.Updates:
    """The gradient of ``||params||^2 / 2``."""
    return params


def _copied(tree: Any) -> Any:
    """The same arrays in buffers of their own, since each step donates its carry."""
    return jax.tree.map(jnp.copy, tree)
