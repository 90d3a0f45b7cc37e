"""Training as one pure step, of whatever loss: the state, the data and the step's index decide it.

On accelerators a part of the training is one compiled `lax.scan`, which never waits for Python. On
CPU, where XLA runs convolutions inside loops about 22 times slower, the same step is dispatched
once a batch.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import samax

TRACKED = (
    "ascended",
    "clean_loss",
    "perturbed_loss",
    "loss_gap",
    "clean_grad_norm",
    "perturbed_grad_norm",
    "grad_cosine",
    "perturbation_norm",
    "adaptive_weight",
    "sharpness_ratio",
    "sharpness",
    "sharpness_grad_norm",
)
"""Scalars that sharpness-aware transformations keep in their state."""

_PERTURBATION_STREAM = 0x7065_7274  # keeps their keys apart from those of the data

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], tuple[jax.Array, tuple[Any, Metrics]]]


class TrainState(NamedTuple):
    """What a step changes."""

    params: Any
    model_state: Any  # batch statistics, and whatever else the clean pass changes
    opt_state: optax.OptState

    def evaluated(self) -> Any:
        """Returns the parameters to evaluate, where the optimizer perturbs those outside."""
        nodes = jax.tree.leaves(self.opt_state, is_leaf=_perturbs)
        if not any(map(_perturbs, nodes)):
            return self.params
        return samax.eval_params(self.opt_state, self.params)


def _perturbs(node: Any) -> bool:
    return isinstance(node, samax.OneGradientState)


def first_rows(batch: Any, share: float) -> Any:
    """Returns a share of a batch, at least one row, from the leading axis of all its arrays."""
    return jax.tree.map(lambda rows: rows[: max(1, round(share * len(rows)))], batch)


class Trainer:
    """Compiled training and evaluation with one loss and one optimizer, for every seed."""

    def __init__(
        self,
        init: Callable[[int], tuple[Any, Any]],
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        *,
        batch: Callable[[Any, jax.Array], Any] = lambda data, index: data,
        ascent_share: float = 1.0,
        part_of: Callable[[Any, float], Any] = first_rows,
        scan: bool | None = None,
        out_shardings: Any = None,
        place: Callable[[Any], Any] = lambda state: state,
    ):
        """Takes the parts; programs are compiled when first needed.

        Args:
            init: Maps a seed to fresh parameters and model state.
            loss_fn: Maps parameters and `(model_state, batch)` to the loss, and to the new model
                state and the metrics beside it.
            tx: The optimizer; its `update` receives `value` and `value_fn`.
            batch: Maps the data and a step's index to the step's batch.
            ascent_share: The share of a batch that the first gradient is of and the value beside
                it, unless the step is known not to ascend; the optimizer's `value_fn` is of the
                whole batch.
            part_of: Maps a batch and a share to that part of it.
            scan: Whether several steps are one program; by default everywhere but on CPU.
            out_shardings: Where what the programs return lies; None leaves it to JAX.
            place: Puts the state at the start there.
        """
        self._init, self._loss_fn, self._batch = init, loss_fn, batch
        self._ascent_share, self._part_of = ascent_share, part_of
        self._tx = optax.with_extra_args_support(tx)
        self._scan = jax.default_backend() != "cpu" if scan is None else scan
        self._out_shardings, self._place = out_shardings, place
        self._programs: dict[Any, Callable] = {}
        self.compile_seconds = 0.0

    def init(self, seed: int) -> TrainState:
        """Returns fresh parameters, model state and optimizer state."""
        params, model_state = self._init(seed)
        # Under jit no two leaves share a buffer, as equal constants may: steps donate each once.
        opt_state = jax.jit(self._tx.init)(params)
        if optax.tree.get(opt_state, "rng_key") is not None:  # random perturbations differ by seed
            key = jax.random.fold_in(jax.random.key(seed), _PERTURBATION_STREAM)
            opt_state = optax.tree.set(opt_state, rng_key=jax.random.key_data(key))
        return self._place(TrainState(params, model_state, opt_state))

    def train(
        self,
        state: TrainState,
        data: Any,
        steps: int = 1,
        tick: Callable[[float], None] = lambda share: None,
        ascend: Sequence[bool] | None = None,
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Takes steps on the batches of the data.

        Args:
            state: Its buffers are donated: use the returned one from here on.
            data: What `batch` takes.
            steps: How many steps.
            tick: Called with the share that is done.
            ascend: Which of the steps ascend, where the method's policy says so beforehand. Steps
                that are dispatched one at a time are then one of two programs without a branch, in
                which convolutions would be slow; a scan leaves it to the policy.

        Returns:
            The new state, and each step's metrics as arrays of shape (steps,).
        """
        programs = self.compile(state, data, steps, ascend)
        if self._scan:
            state, metrics = programs[None](state, data)
            return state, jax.device_get(metrics)
        history = []
        for index in range(steps):
            kind = None if ascend is None else ascend[index]
            state, values = programs[kind](state, data, np.int32(index))
            history.append(jax.device_get(values))
            tick((index + 1) / steps)
        return state, {name: np.stack([step[name] for step in history]) for name in history[0]}

    def compile(
        self, state: TrainState, data: Any, steps: int = 1, ascend: Sequence[bool] | None = None
    ) -> dict[bool | None, Callable]:
        """Returns the programs for such steps by kind, made at the first call and timed.

        Calling it ahead of the first step keeps compilation out of that step's time;
        `compile_seconds` has the time of all programs.
        """
        kinds = [None] if self._scan or ascend is None else sorted(set(ascend))
        return {kind: self._compiled(state, data, steps, kind) for kind in kinds}

    def _compiled(self, state: TrainState, data: Any, steps: int, ascend: bool | None) -> Callable:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(data))
        key = (shapes, steps if self._scan else 1, ascend)
        if key not in self._programs:
            start = time.perf_counter()
            index = () if self._scan else (np.int32(0),)
            step = functools.partial(self.step, ascend=ascend)
            function = self._steps(steps) if self._scan else step
            program = jax.jit(function, donate_argnums=0, out_shardings=self._out_shardings)
            self._programs[key] = program.lower(state, data, *index).compile()
            self.compile_seconds += time.perf_counter() - start
        return self._programs[key]

    def _steps(self, steps: int) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
        def run(state: TrainState, data: Any) -> tuple[TrainState, Metrics]:
            return jax.lax.scan(lambda s, i: self.step(s, data, i), state, jnp.arange(steps))

        return run

    def step(
        self, state: TrainState, data: Any, index: Any = 0, ascend: bool | None = None
    ) -> tuple[TrainState, Metrics]:
        """The step as a pure function, for compiling; None leaves it to the policy to ascend."""
        inputs = first = state.model_state, self._batch(data, index)
        if self._ascent_share < 1 and ascend is not False:
            first = state.model_state, self._part_of(inputs[1], self._ascent_share)
        # Only the clean pass keeps its batch statistics; the perturbed one starts from the same.
        (loss, (model_state, metrics)), grads = jax.value_and_grad(self._loss_fn, has_aux=True)(
            state.params, first
        )
        updates, opt_state = self._tx.update(
            grads,
            state.opt_state,
            state.params,
            value=loss,
            value_fn=lambda params: self._loss_fn(params, inputs)[0],
            **({} if ascend is None else {"ascend": ascend}),
        )
        tracked = {name: optax.tree.get(opt_state, name) for name in TRACKED}
        metrics = {
            "train_loss": loss,
            **metrics,
            **{name: value for name, value in tracked.items() if value is not None},
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, model_state, opt_state), metrics


def descend(
    tx: optax.GradientTransformation,
    loss: Callable[[Any], jax.Array],
    start: Any,
    steps: int,
    every: int,
    measure: Callable[[Any], Any] = lambda params: params,
) -> tuple[Any, Any]:
    """Runs an optimizer on a loss without noise as one scan, for compiling.

    Returns:
        The last parameters, and the records: what `measure` returns at the start and after every
        `every` steps, with a leading axis of `1 + steps / every`.

    Raises:
        ValueError: `every` does not divide `steps`.
    """
    if steps % every:
        raise ValueError(f"steps must be a multiple of every={every}, and are {steps}.")
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    def record(carry: Any, _: None) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, length=every)
        return carry, measure(carry[0])

    start = jax.tree.map(jnp.asarray, start)
    (last, _), later = jax.lax.scan(record, (start, tx.init(start)), length=steps // every)
    return last, jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), measure(start), later)


def mean_scores(
    scores: Callable[[Any], dict[str, jax.Array]], batches: Iterable[tuple[Any, int]]
) -> dict[str, Any]:
    """Returns the means of scores over all examples.

    Args:
        scores: Maps a batch to one number, or row of numbers, for each of its examples, by name.
        batches: Each with the number of its examples that count, which are its first: the others
            fill it up, so that all batches are one program's.
    """
    sums: dict[str, Any] = {}
    total = 0
    for batch, count in batches:
        total += count
        for name, values in scores(batch).items():
            found = np.asarray(values, np.float64)[:count]
            sums[name] = sums.get(name, 0.0) + found.sum(0)
    return {name: (value / total).tolist() for name, value in sums.items()}
