"""The machines that programs are compiled for: chips of a named topology, or JAX's own devices."""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh


class Chip(NamedTuple):
    """What a chip can do at most, as its maker publishes it."""

    flops: float  # bfloat16 operations a second
    memory: float  # bytes
    memory_rate: float  # bytes a second
    send_rate: float  # bytes a second that it sends to other chips, over all its links


# Google's pages on each generation (cloud.google.com/tpu/docs). The links' rates there are gigabits
# a second in one direction, over all links of a chip.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.228e12, 300e9),
    "v5e": Chip(197e12, 16 * 2**30, 0.819e12, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2.765e12, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1.64e12, 400e9),
}
LOCAL = "local"
# There is no cloud machine to ask, and no chip that two processes could not share.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def check(topology: str) -> None:
    """Raises a `ValueError` unless a topology is a generation, or `local`, with its shape."""
    generation, _, shape = topology.partition(":")
    sizes = shape.split("x")
    known = generation in CHIPS or (generation == LOCAL and len(sizes) == 1)
    if not known or not all(size.isdigit() and int(size) for size in sizes):
        raise ValueError(
            f"--topology {topology!r}: write a generation and a shape, as in v5e:16x16 or "
            f"v4:2x2x4, or {LOCAL}:8; the generations are {', '.join(CHIPS)}."
        )


def chip(topology: str) -> Chip | None:
    """Returns what a topology's chips can do; None for JAX's own devices."""
    return CHIPS.get(topology.partition(":")[0])


def devices(topology: str) -> Sequence[Any]:
    """Returns a topology's chips, for which programs can be compiled, or JAX's own devices.

    Raises:
        ModuleNotFoundError: `libtpu`, whose compiler it is, is not installed.
        ValueError: The compiler does not know the topology, or JAX has fewer devices.
    """
    generation, _, shape = topology.partition(":")
    return _local(int(shape)) if generation == LOCAL else _compiled_for(topology)


def _local(count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has started already
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) < count:
        raise ValueError(
            f"--topology {LOCAL}:{count} needs as many devices, and JAX has {len(found)} of the "
            f"kind {jax.default_backend()}; JAX_PLATFORMS=cpu simulates them."
        )
    return found[:count]


def _compiled_for(topology: str) -> Sequence[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("No module named 'libtpu'; pip install -e '.[bench,tpu]'")
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")  # not the chips, which are not there
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {topology!r}: {error}") from error


def mesh(topology: str, shape: Sequence[int], names: Sequence[str]) -> Mesh:
    """Returns a mesh over all of a topology's chips, neighbours along the later axes."""
    return Mesh(np.array(devices(topology)).reshape(shape), names)
