"""One training step of a model by each method, compiled for the chips of a topology."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import samax
from benchmarks.core.methods import BALANCING, parse_method
from benchmarks.core.timing import compute_clock
from benchmarks.scaling import topologies
from benchmarks.scaling.workloads import DATA, LORA, WORKLOADS, Workload, mesh_shape

BASE, BASE_PER_DEVICE = "adamw", "adamw_per_device"
_RATE = 1e-3
_SAMPLES = 8
_GROUPS = 4


class Method(NamedTuple):
    """A way to make a step."""

    make: Callable[[optax.GradientTransformation, Mesh], optax.GradientTransformation]
    gradients: float  # Of the whole batch, a step
    copies: int = 0  # Of the parameters in its state, beside the base optimizer's
    evaluates: bool = True  # Whether `update` gets the loss
    ascend: bool | None = None  # The static `ascend=` of `update`
    per_device: bool = False  # Under `shard_map`: each chip has its own gradient
    balances: bool = False


def _select(name: str, copies: int = 0, *, ascend: bool | None = None) -> Method:
    """A row of the core's table, or one of its steps that do not ascend."""
    spec = parse_method(name)
    own = spec.method
    settings: dict[str, Any] = {
        "learning_rate": _RATE,
        "groups": functools.partial(samax.lora_groups, stacked=True),
        "steps": 10_000,
        "track": False,
    }
    return Method(
        lambda base, mesh: spec.optimizer(base, **settings),
        1 if ascend is False else own.gradients,
        copies,
        evaluates=own.gradients > 1,
        ascend=ascend,
        balances=own.balances,
    )


def _averaged(
    gradients: float, method: Callable[[], optax.GradientTransformation] = optax.identity
) -> Method:
    mean = samax.cross_replica_mean(DATA)
    return Method(
        lambda base, mesh: optax.chain(method(), mean, base),
        gradients,
        evaluates=gradients > 1,
        per_device=True,
    )


def _over_devices(base: optax.GradientTransformation, mesh: Mesh) -> Any:
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names[-1]))
    options: dict[str, Any] = {"num_samples": _SAMPLES, "batch_size": _SAMPLES, "sharding": where}
    return optax.chain(samax.trace_sam(sampling=samax.Sampling(samax.gaussian, **options)), base)


METHODS: dict[str, Method] = {
    BASE: _select("sgd"),  # The base optimizer alone, which is AdamW here
    "sam": _select("sam"),
    BASE_PER_DEVICE: _averaged(1),
    "sam_per_device": _averaged(2, samax.sam),
    "m_sharpness": _averaged(2, lambda: samax.m_sharpness(samax.sam(), _GROUPS)),
    "samar": _select("samar"),
    "vasso": _select("vasso", copies=1),
    "gsam": _select("gsam"),
    "looksam": _select("looksam", copies=1, ascend=False),  # Between two ascents
    "late_sam": _select("sam_late", ascend=False),  # Before the late phase
    "stale_sam": _select("stale_sam", copies=1),
    "msam": _select("msam", copies=1),
    "trace_sam": Method(_over_devices, 1 + _SAMPLES),
    **{name: _select(name) for name in BALANCING},
}


def apart(model: str, layout: str, method: str) -> bool:
    """Returns whether a method is a thing of its own for a model and a layout."""
    own = METHODS[method]
    if own.balances:
        return model in LORA
    if own.per_device or method == "trace_sam":
        return layout == "data"
    return True


class Lowered(NamedTuple):
    """A step that is traced, and what it is traced for."""

    step: jax.stages.Lowered  # (params, rest, state, batch) -> (params, rest, state, loss)
    arguments: tuple[Any, ...]  # As shapes, with their places
    seconds: float  # Tracing and lowering, in Python

    @property
    def parameters(self) -> int:
        """How many train."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.arguments[0]))

    @property
    def parameter_bytes(self) -> int:
        """Of one copy of those, on each chip."""
        return sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(self.arguments[0])
        )


def lower(topology: str, model: str, layout: str, method: str, rows: int) -> Lowered:
    """Traces and lowers a step.

    Args:
        topology: The chips.
        model: A name of `WORKLOADS`.
        layout: A name of `LAYOUTS`.
        method: A name of `METHODS`.
        rows: Of the batch, for each chip.
    """
    own = METHODS[method]
    chips = len(topologies.devices(topology))
    shape, names = mesh_shape(layout, chips), ("data", "model")
    if method == "trace_sam":
        ways = math.gcd(chips, _SAMPLES)  # each has its share of the samples
        shape, names = (chips // ways, ways), ("data", "samples")
    mesh = topologies.mesh(topology, shape, names)
    tx = optax.with_extra_args_support(own.make(optax.adamw(_RATE), mesh))
    place = functools.partial(_placed, mesh)
    split = PartitionSpec(DATA if layout in ("tensor", "mixed") else names)
    keep = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, split))
    workload = WORKLOADS[model]((lambda x: x) if own.per_device else keep)
    specs = workload.place(layout, workload.params)
    params = jax.tree.map(place, workload.params, specs)
    rest = jax.tree.map(place, workload.rest, workload.place(layout, workload.rest))
    state = placed_state(tx, params)
    batch = jax.tree.map(lambda leaf: place(leaf, split), workload.batch(rows * chips))
    step = _step(workload, tx, own)
    if own.per_device:
        step = _per_device(step, mesh)
    where = jax.tree.map(lambda leaf: leaf.sharding, (params, rest, state))
    jitted = jax.jit(step, out_shardings=(*where, None), donate_argnums=(0, 1, 2))
    arguments = params, rest, state, batch
    start = compute_clock()
    lowered = jitted.lower(*arguments)
    return Lowered(lowered, arguments, compute_clock() - start)


def placed_state(tx: optax.GradientTransformation, params: optax.Params) -> optax.OptState:
    """Returns the state as shapes: what is like a parameter lies where that does.

    The rest, such as counts, lies on every chip.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh

    def place(leaf: Any, like: Any = None) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, PartitionSpec()) if like is None else like.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    shapes = jax.eval_shape(tx.init, params)
    return optax.tree.map_params(tx, place, shapes, params, transform_non_params=place)


def _placed(mesh: Mesh, leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def _step(
    workload: Workload, tx: optax.GradientTransformationExtraArgs, method: Method
) -> Callable[..., Any]:
    def step(params: Any, rest: Any, state: Any, batch: Any) -> Any:
        def value_fn(params: Any, batch: Any) -> jax.Array:
            return workload.loss(params, rest, batch)[0]

        (value, new_rest), grads = jax.value_and_grad(workload.loss, has_aux=True)(
            params, rest, batch
        )
        extra: dict[str, Any] = {} if method.ascend is None else {"ascend": method.ascend}
        if method.evaluates:
            extra |= {"value": value, "value_fn": value_fn, "batch": batch}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), new_rest, state, value

    return step


def _per_device(step: Callable, mesh: Mesh) -> Callable:
    whole, split = PartitionSpec(), PartitionSpec(DATA)

    def own(params: Any, rest: Any, state: Any, batch: Any) -> Any:
        params, rest, state, value = step(params, rest, state, batch)
        mean = lambda tree: jax.lax.pmean(tree, DATA)  # noqa: E731
        return params, mean(rest), state, mean(value)

    specs: dict[str, Any] = {"in_specs": (whole, whole, whole, split), "out_specs": whole}
    # Untyped: a gradient is each device's own until the chain averages it.
    if hasattr(jax.lax, "pcast"):
        return jax.shard_map(own, mesh=mesh, check_vma=False, **specs)
    from jax.experimental.shard_map import shard_map  # JAX 0.6

    return shard_map(own, mesh=mesh, check_rep=False, **specs)
