"""One training over several processes: who takes part, how arrays lie on the devices, who writes.

Every process runs the same program on the same arguments. The parameters are replicated over all
devices and each batch is split over them; under `jit` the loss, batch norm's statistics, gradients
and norms are then those of the whole batch, so that SAM's perturbation is the synchronized one and
the numbers are one device's up to the order of sums.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Cluster:
    """All devices of all processes, as a mesh with the one axis `data`.

    Attributes:
        replicated: The sharding of what every device holds whole.
        writes: Whether this process is the one that writes records and reports.
    """

    def __init__(self) -> None:
        """Looks at the devices: JAX is connected by now."""
        self._mesh = Mesh(np.array(jax.devices()), ("data",))
        self.replicated = NamedSharding(self._mesh, PartitionSpec())
        self.writes = jax.process_index() == 0

    def check_batch_size(self, batch_size: int) -> None:
        """Raises a `ValueError` unless the devices can share a batch evenly."""
        if batch_size % self._mesh.size:
            raise ValueError(
                f"--batch-size must be a multiple of the number of devices, got {batch_size} and "
                f"{self._mesh.size} devices."
            )

    def replicate(self, tree: Any) -> Any:
        """Puts the same arrays, which every process has, on all devices."""

        def put(leaf: Any) -> jax.Array:
            array = np.asarray(leaf)
            return jax.make_array_from_callback(array.shape, self.replicated, array.__getitem__)

        return jax.tree.map(put, tree)

    def batches(self, array: np.ndarray, order: np.ndarray) -> jax.Array:
        """Lays an epoch's batches out, each split over the devices.

        Args:
            array: What every process can read, of shape (n, ...).
            order: Which rows each batch has, of shape (steps, batch size).

        Returns:
            An array of shape (steps, batch size, ...), of which this process read its share alone.
        """

        def read(index: Any) -> np.ndarray:
            return array[order[index[:2]]]

        split = NamedSharding(self._mesh, PartitionSpec(None, "data"))
        return jax.make_array_from_callback((*order.shape, *array.shape[1:]), split, read)

    def spread(self, rows: jax.Array) -> jax.Array:
        """Splits the work on the rows of an array over the devices, inside `jit`."""
        return jax.lax.with_sharding_constraint(
            rows, NamedSharding(self._mesh, PartitionSpec("data"))
        )

    def check_agreement(self, what: Any, description: str) -> None:
        """Raises a `ValueError` unless JSON data are the same in every process."""
        own = zlib.crc32(json.dumps(what, sort_keys=True).encode())
        found = multihost_utils.process_allgather(np.uint32(own)).ravel().tolist()
        if len(set(found)) > 1:
            raise ValueError(
                f"The processes differ in {description}: all need the same arguments and data, and "
                "one --out on a file system that they share."
            )


@contextlib.contextmanager
def connected(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> Iterator[Cluster]:
    """Connects the processes for a block of work, in which only one of them prints.

    Args:
        coordinator: HOST:PORT at process 0; with the others None where JAX knows the cluster.
        processes: How many there are.
        process_id: Which of them this is.

    Raises:
        ValueError: The cluster cannot be told from the arguments and the environment.
    """
    # Without it SIGTERM ends a process, as it does elsewhere: every epoch is saved anyway.
    with contextlib.suppress(AttributeError):  # JAX 0.6 does not have it
        jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster ({error}) Pass --coordinator HOST:PORT, --processes N "
            "and --process-id I, I from 0 to N - 1."
        ) from None
    cluster = Cluster()
    with contextlib.ExitStack() as stack:
        if not cluster.writes:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield cluster
