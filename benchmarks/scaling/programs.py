"""One training step of a small model of factor pairs, laid out over devices in four ways."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import samax
from benchmarks.core import methods as core_methods

LAYOUTS = {
    "jit": "data parallel under jit: parameters replicated, the batch split",
    "shard_map": "data parallel under shard_map: each device's own gradient, averaged in the chain",
    "fsdp": "fully sharded under jit: each factor split along its longer axis, the batch split",
    "tensor": "tensor parallel under jit: layers split by column and by row, the batch on all",
}
METHODS = ("sgd", "sam", "sam_per_device", "trace_sam", "nbar", "obar", "das")

_AXIS = "devices"
_RATE = 0.01


class Size(NamedTuple):
    """The size of the model and of its batches."""

    layers: int = 4
    width: int = 256
    rank: int = 8
    batch: int = 64  # on each device; a small one tempts XLA to send activations, not weights

    @property
    def parameters(self) -> int:
        """How many there are."""
        return 2 * self.layers * self.width * self.rank


class Program(NamedTuple):
    """A compiled step, `(params, state, batch) -> (params, state)`, and arguments on the devices.

    It returns no loss: what a mean of that sends, 4 bytes, is every method's alike.
    """

    run: jax.stages.Compiled
    params: Any
    state: Any
    batch: Any


def methods(layout: str) -> tuple[str, ...]:
    """Returns the methods that are a thing of their own in a layout."""
    same = {"jit": ["sam_per_device"], "shard_map": ["trace_sam"]}
    others = same.get(layout, ["sam_per_device", "trace_sam"])
    return tuple(name for name in METHODS if name not in others)


def build(layout: str, method: str, devices: int, size: Size) -> Program:
    """Compiles a method's step."""
    mesh = Mesh(np.array(jax.devices()[:devices]), (_AXIS,))
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(_AXIS))
    params = _params(size)
    places = _shardings(layout, params, mesh)
    rows = size.batch * devices
    inputs = np.random.default_rng(1).normal(size=(2, rows, size.width)).astype(np.float32)
    tx = _optimizer(layout, method)
    params = jax.device_put(params, places)
    state = jax.device_put(tx.init(params), replicated)
    batch = jax.device_put(tuple(inputs), replicated if layout == "tensor" else split)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        value_fn = lambda params: _loss(params, batch)  # noqa: E731
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    if layout == "shard_map":
        step = _per_device(step, mesh)
    jitted = jax.jit(step, out_shardings=(places, replicated), donate_argnums=(0, 1))
    return Program(jitted.lower(params, state, batch).compile(), params, state, batch)


def _params(size: Size) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {"lora_a": (size.width, size.rank), "lora_b": (size.rank, size.width)}
    return {
        f"layer{i}": {
            name: rng.normal(scale=shape[0] ** -0.5, size=shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        for i in range(size.layers)
    }


def _loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    for layer in params.values():
        x = jnp.tanh(x @ layer["lora_a"] @ layer["lora_b"])
    return jnp.mean((x - y) ** 2)


def _shardings(layout: str, params: Any, mesh: Mesh) -> Any:
    rows, columns = PartitionSpec(_AXIS, None), PartitionSpec(None, _AXIS)

    def place(path: Any, leaf: np.ndarray) -> NamedSharding:
        layer, factor = (key.key for key in path)
        spec = PartitionSpec()
        if layout == "fsdp":
            spec = rows if leaf.shape[0] > leaf.shape[1] else columns
        elif layout == "tensor":  # even layers make split activations, odd ones sum them up
            wanted = {"lora_a": rows} if int(layer[-1]) % 2 else {"lora_b": columns}
            spec = wanted.get(factor, spec)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, params)


def _optimizer(layout: str, method: str) -> optax.GradientTransformationExtraArgs:
    base = optax.sgd(_RATE)
    if method in core_methods.BALANCING:
        groups = samax.lora_groups
        factory = core_methods.METHODS[method].factory
        base = factory(base, learning_rate=_RATE, alpha=1.0, groups=groups)
    mean = [samax.cross_replica_mean(_AXIS)] if layout == "shard_map" else []
    parts = {
        "sam": [*mean, samax.sam(), *mean],
        "sam_per_device": [samax.sam(), *mean],
        "trace_sam": [samax.trace_sam(rho=0.01, lam=1.0)],
    }
    return optax.chain(*parts.get(method, mean), base)


def _per_device(step: Callable, mesh: Mesh) -> Callable:
    whole, split = PartitionSpec(), PartitionSpec(_AXIS)
    specs: dict[str, Any] = {"in_specs": (whole, whole, split), "out_specs": (whole, whole)}
    # Untyped: a gradient is each device's own until the chain averages it.
    if hasattr(jax.lax, "pcast"):
        return jax.shard_map(step, mesh=mesh, check_vma=False, **specs)
    from jax.experimental.shard_map import shard_map  # JAX 0.6

    return shard_map(step, mesh=mesh, check_rep=False, **specs)
