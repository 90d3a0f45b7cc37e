"""What `benchmarks.step_time` runs: four kinds of step, each with every way to make it a SAM step.

A method is an `update` that takes the gradients, the state, the parameters and the means to
evaluate the gradient elsewhere; a problem puts it into a step. In the training problems the step is
all of training: both gradients of a network, the statistics of the clean pass, the base optimizer.
In the pytree problems it is the transformation alone: the loss is ``||w||^2 / 2``, whose gradient
at any point is the point itself, so that the second gradient costs nothing and what remains is the
transformation's overhead, to be held against AdamW's update.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import samax
from benchmarks import models
from benchmarks.core.methods import BALANCING, METHODS, parse_method
from benchmarks.data.webnlg import Packed
from benchmarks.models import bert, llama
from benchmarks.models.lora import DecoderTask, SentenceTask, build_classifier, is_adapter
from samax._balance.groups import Groups

RHO, RATE = 0.05, 0.01
# Those that sample need losses, which a pytree of gradients has none of, and as many as one likes.
SAMAX_METHODS = tuple(
    name
    for name, method in METHODS.items()
    if hasattr(samax, name) and method.gradients == 2 and "num_samples" not in method.defaults
)

DESCRIPTIONS = {
    "base": "the base optimizer alone",
    "limit": "two gradients and the base optimizer's update, written by hand",
    "sam": "samax.sam",
    "sam_quarter": "samax.sam, the clean gradient from a quarter of the batch",
    **{name: f"samax.{name}" for name in SAMAX_METHODS if name != "sam"},
    "optax_opaque": "optax.contrib.sam, the second gradient inside `update`",
    "optax_transparent": "optax.contrib.sam, two calls a step",
    **{
        name: f"samax.{name} around the base optimizer, on tensorized networks and LoRA"
        for name in BALANCING
    },
}

_BY_GRADIENT = ("limit", "optax_opaque", "optax_transparent")  # the others take losses
_CLEAN_SHARE = {"sam_quarter": 4}
_FEATURES = 16
_CLASSES = 6


class Step(NamedTuple):
    """A step as a function `(carry, *inputs) -> (carry, output)`, called `calls` times."""

    function: Callable
    carry: Any
    inputs: tuple[Any, ...]
    calls: int = 1


class Problem(NamedTuple):
    """A problem to time the methods on."""

    title: str  # What is computed, for tables and figures
    methods: tuple[str, ...]  # The methods that it makes sense for
    default_methods: tuple[str, ...]  # Those measured unless others are asked for
    rounds: int  # With the default methods, how many rounds fit into minutes on two cores
    params: optax.Params  # The parameters
    build: Callable[[str], Step]  # Makes the step of a method
    # Whether the step is one program; otherwise its operations are dispatched singly.
    compiled: bool = True


def optimizer(
    method: str,
    base: optax.GradientTransformation,
    rate: float = 0.0,
    groups: Groups | None = None,
    perturbed: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns a method before a base optimizer, or around it.

    Args:
        method: One of `DESCRIPTIONS`.
        base: The base optimizer.
        rate: Its learning rate.
        groups: The cores that are balanced.
        perturbed: A mask of what SAM perturbs; None for everything.
    """
    if method in BALANCING:
        return parse_method(method).optimizer(base, learning_rate=rate, steps=1000, groups=groups)
    if method == "sam":
        return optax.chain(samax.sam(RHO, mask=perturbed), base)
    if method in ("optax_opaque", "optax_transparent"):
        ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
        return optax.contrib.sam(base, ascent, opaque_mode=method == "optax_opaque")
    if method == "limit":
        return optax.GradientTransformationExtraArgs(base.init, functools.partial(_by_hand, base))
    if method == "base":
        return optax.with_extra_args_support(base)
    name = method.removesuffix("_quarter")
    return optax.chain(METHODS[name].factory(**METHODS[name].defaults), base)


def _by_hand(
    base: optax.GradientTransformation,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    *,
    grad_fn: Callable[[optax.Params], optax.Updates],
) -> tuple[optax.Updates, Any]:
    """What SAM cannot do without, and nothing else: no check, no guard against a zero norm."""
    scale = RHO / optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + scale * g, params, grads)
    return base.update(grad_fn(point), state, params)


class Classifier(NamedTuple):
    """A network and random images for it."""

    graph: nnx.GraphDef
    params: nnx.State
    model_state: nnx.State  # All that is not parameters
    images: jax.Array
    labels: jax.Array
    base: optax.GradientTransformation


def classifier(name: str, batch_size: int) -> Classifier:
    """Returns a network, a batch of random 32x32x3 images, and SGD with weight decay."""
    model = models.build(name, num_classes=10, rngs=nnx.Rngs(0))
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = states
    image_key, label_key = jax.random.split(jax.random.key(1))
    images = jax.random.normal(image_key, (batch_size, 32, 32, 3))
    labels = jax.random.randint(label_key, (batch_size,), 0, 10)
    base = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(RATE, momentum=0.9))
    return Classifier(graph, params, model_state, images, labels, base)


def training(
    name: str, batch_size: int, rounds: int, default_methods: tuple[str, ...] = tuple(DESCRIPTIONS)
) -> Problem:
    """A training step of a classifier on random 32x32x3 images, with SGD and weight decay."""
    graph, params, model_state, images, labels, base = classifier(name, batch_size)
    tensorized = name in models.TENSORIZED

    def loss_fn(params: nnx.State, inputs: Any) -> tuple[jax.Array, nnx.State]:
        model_state, _, (images, labels) = inputs
        model = nnx.merge(graph, params, model_state, copy=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean(), nnx.state(model, nnx.Not(nnx.Param))

    make = functools.partial(optimizer, base=base, rate=RATE, groups=models.CORE_GROUPS)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    title = f"{name}, {count / 1e6:.2g} M parameters, batch {batch_size}, 32x32x3 (base: SGD)"
    methods = tuple(name for name in DESCRIPTIONS if tensorized or name not in BALANCING)
    build = _steps(make, loss_fn, (params, model_state), ((), (images, labels)))
    return Problem(title, methods, default_methods, rounds, params, build)


def lora(batch_size: int, length: int, rank: int, rounds: int, encoder: bert.Bert) -> Problem:
    """A step of fine-tuning a frozen encoder's adapters and classifier with AdamW."""
    task = SentenceTask(lambda seed: build_classifier(encoder, _CLASSES, seed, rank=rank))
    params, model_state = task.init(0)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, encoder.config.vocab_size, (batch_size, length), dtype=np.int32)
    labels = rng.integers(0, _CLASSES, batch_size, dtype=np.int32)
    batch = jax.device_put((ids, np.ones(ids.shape, bool), labels))
    rate = 5e-4
    base = optax.adamw(rate, weight_decay=0.01)

    def loss_fn(params: nnx.State, inputs: Any) -> tuple[jax.Array, Any]:
        model_state, frozen, batch = inputs
        loss, (model_state, _) = task.loss(params, (model_state, (frozen, *batch)))
        return loss, model_state

    make = functools.partial(
        optimizer, base=base, rate=rate, groups=samax.lora_groups, perturbed=is_adapter
    )
    title = f"{bert.NAME}, LoRA of rank {rank}, batch {batch_size}, {length} tokens (base: AdamW)"
    methods = ("base", "sam", *BALANCING)
    build = _steps(make, loss_fn, (params, model_state), (task.frozen, batch))
    return Problem(title, methods, methods, rounds, params, build)


def decoder(
    batch_size: int, length: int, rank: int, rounds: int, model: llama.Llama, name: str
) -> Problem:
    """A step of fine-tuning the adapters of all of a frozen decoder's blocks with AdamW."""
    task = DecoderTask(model, rank=rank, alpha=32.0)
    params, model_state = task.init(0)
    shape = batch_size, length
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, shape, dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    batch = Packed(*jax.device_put((ids, np.ones_like(ids), positions, np.ones(shape, bool))))

    def loss_fn(params: nnx.State, inputs: Any) -> tuple[jax.Array, Any]:
        model_state, frozen, rows = inputs
        loss, (model_state, _) = task.loss(params, (model_state, task.batch((frozen, rows), 0)))
        return loss, model_state

    rate = 1e-3
    groups = functools.partial(samax.lora_groups, stacked=True)
    base = optax.adamw(rate, weight_decay=0.01)
    make = functools.partial(optimizer, base=base, rate=rate, groups=groups)
    again = ", blocks computed again" if model.remat else ""
    title = f"{name}, LoRA of rank {rank}, {batch_size} x {length} tokens{again} (base: AdamW)"
    methods = ("base", "sam", *BALANCING)
    build = _steps(make, loss_fn, (params, model_state), (task.frozen, batch))
    return Problem(title, methods, methods, rounds, params, build)


def _steps(
    make: Callable[[str], optax.GradientTransformationExtraArgs],
    loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]],
    start: tuple[Any, Any],
    inputs: tuple[Any, Any],
) -> Callable[[str], Step]:
    """Returns what makes a step of all of training, for a method.

    Args:
        make: Makes a method's optimizer.
        loss_fn: Maps parameters and `(model_state, frozen, batch)` to the loss and the new state.
        start: Parameters and model state.
        inputs: What is frozen, and the batch.
    """

    def build(method: str) -> Step:
        tx = make(method)
        clean_size = len(inputs[1][0]) // _CLEAN_SHARE.get(method, 1)

        def step(carry: Any, frozen: Any, batch: Any) -> tuple[Any, jax.Array]:
            params, model_state, opt_state = carry

            def value_fn(params: nnx.State) -> jax.Array:
                return loss_fn(params, (model_state, frozen, batch))[0]

            clean = jax.tree.map(lambda rows: rows[:clean_size], batch)
            (value, new_model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, (model_state, frozen, clean)
            )
            evaluation = (
                {"grad_fn": lambda point, *_: jax.grad(value_fn)(point)}
                if method in _BY_GRADIENT
                else {"value": value, "value_fn": value_fn}
            )
            updates, opt_state = tx.update(grads, opt_state, params, **evaluation)
            return (optax.apply_updates(params, updates), new_model_state, opt_state), value

        return Step(step, _copied((*start, tx.init(start[0]))), inputs, calls=_calls(method))

    return build


def pytree(leaves: int, rounds: int, *, compiled: bool) -> Problem:
    """The update alone on many small leaves, where a gradient evaluation costs nothing."""
    keys = jax.random.split(jax.random.key(0), 2)
    params, grads = (
        {f"w{index}": row for index, row in enumerate(jax.random.normal(key, (leaves, _FEATURES)))}
        for key in keys
    )

    def build(method: str) -> Step:
        tx = optimizer(method, optax.adamw(1e-3) if method == "base" else optax.identity())

        def step(state: Any, grads: Any, params: Any) -> tuple[Any, optax.Updates]:
            # The perturbed point comes out as the update: it is computed and written in full.
            updates, state = tx.update(grads, state, params, grad_fn=_identity)
            return state, updates

        def transparent_step(carry: Any, grads: Any) -> tuple[Any, tuple[()]]:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), ()

        state = tx.init(params)
        if method == "optax_transparent":  # its caller applies the perturbation to the parameters
            return Step(transparent_step, _copied((params, state)), (grads,), _calls(method))
        return Step(step, _copied(state), (grads, params))

    methods = tuple(name for name in DESCRIPTIONS if name not in (*_CLEAN_SHARE, *BALANCING))
    # Not compiled, an update takes seconds.
    default_methods = methods if compiled else ("base", "limit", "sam", "optax_opaque")
    how = "compiled" if compiled else "not compiled"
    title = f"{leaves:,} leaves of {_FEATURES}, {how}, the update alone (base: AdamW)"
    return Problem(title, methods, default_methods, rounds, params, build, compiled)


def _identity(params: optax.Params, *_: Any) -> optax.Updates:
    """The gradient of ``||params||^2 / 2``."""
    return params


def _calls(method: str) -> int:
    return 2 if method == "optax_transparent" else 1


def _copied(tree: Any) -> Any:
    """The same arrays in buffers of their own, since each step donates its carry."""
    return jax.tree.map(jnp.copy, tree)
