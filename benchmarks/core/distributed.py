"""One training over several processes: who takes part, how arrays lie on the devices, who writes.

Every process runs the same program on the same arguments. The parameters are replicated over all
devices and each batch is split over them; under `jit` the loss, batch norm's statistics, gradients
and norms are then those of the whole batch, so that SAM's perturbation is the synchronized one and
the numbers are one device's up to the order of sums.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.core.training import EpochData, Recipe, Trainer


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
        """Raises a `ValueError` unless JSON data are the same in every process.

        Args:
            what: The data.
            description: What they are, for the message.
        """
        own = zlib.crc32(json.dumps(what, sort_keys=True).encode())
        found = multihost_utils.process_allgather(np.uint32(own)).ravel().tolist()
        if len(set(found)) > 1:
            raise ValueError(
                f"The processes differ in {description}: all need the same arguments and data, and "
                "one --out on a file system that they share."
            )


class DistributedTrainer(Trainer):
    """A trainer whose batches are split over all devices of a cluster."""

    def __init__(
        self,
        build_model: Callable[[int], nnx.Module],
        tx: optax.GradientTransformation,
        recipe: Recipe,
        cluster: Cluster,
        scan: bool | None = None,
    ):
        """Builds as `Trainer` does, for all devices of `cluster`."""
        self._cluster = cluster
        super().__init__(build_model, tx, recipe, scan, out_shardings=cluster.replicated)

    def init(self, seed: int) -> Any:
        """Returns what `Trainer.init` does, on every device."""
        return self._cluster.replicate(super().init(seed))

    def _epoch_data(self, images: Any, labels: Any, order: jax.Array, key: jax.Array) -> EpochData:
        size = self._recipe.batch_size
        steps = len(order) // size
        batches = np.asarray(order)[: steps * size].reshape(steps, size)
        return EpochData(
            self._cluster.batches(images, batches),
            self._cluster.batches(labels, batches),
            self._cluster.replicate(batches),
            key,
        )

    def _batch(self, data: EpochData, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return data.images[index], data.labels[index]

    def _spread(self, rows: jax.Array) -> jax.Array:
        return self._cluster.spread(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `session` to a command line."""
    add = parser.add_argument_group("several processes").add_argument
    add(
        "--distributed",
        action="store_true",
        help="train over all devices of all processes that run this same command; JAX finds them "
        "where it knows the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU)",
    )
    add("--coordinator", metavar="HOST:PORT", help="elsewhere: an address at process 0")
    add("--processes", type=int, help="elsewhere: how many processes there are")
    add("--process-id", type=int, help="elsewhere: which of them this is, from 0")
    add("--connect-timeout", type=int, default=300, help="seconds to wait for all processes")
    add("--heartbeat-timeout", type=int, default=100, help="seconds until a silent one is lost")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises a `ValueError` that names an argument which is out of its range."""
    given = {name: getattr(arguments, name) for name in ("coordinator", "processes", "process_id")}
    if not arguments.distributed and any(value is not None for value in given.values()):
        raise ValueError("--coordinator, --processes and --process-id need --distributed.")
    for name in ("connect_timeout", "heartbeat_timeout"):
        if getattr(arguments, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be 1 or more, got {getattr(arguments, name)}."
            )


@contextlib.contextmanager
def session(arguments: argparse.Namespace) -> Iterator[Cluster | None]:
    """Connects the processes for a block of work; yields None without `--distributed`.

    Only one process prints in the block.

    Raises:
        ValueError: The cluster cannot be told from the arguments and the environment.
        ConnectionError: In the block, another process was lost.
    """
    if not arguments.distributed:
        yield None
        return
    _connect(arguments)
    cluster = Cluster()
    with contextlib.ExitStack() as stack:
        if not cluster.writes:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield cluster
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # Gloo's errors, those of collectives between CPUs, are of the type ValueError.
            if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
                reason = str(error).splitlines()[0]
                raise ConnectionError(
                    f"the work over {jax.process_count()} processes failed ({reason}). If one was "
                    "lost, repeat the command on all of them: it continues after the last whole "
                    "epoch."
                ) from error
            raise


def leave(status: int) -> int:
    """Returns the exit status; ends the process here if it failed and others may be waiting.

    On its normal way out JAX waits for the other processes, which wait for this one's part of a
    sum. Ended at once, it is seen as lost.
    """
    if status and jax.distributed.is_initialized():
        _exit(status)
    return status


def _connect(arguments: argparse.Namespace) -> None:
    """Initializes `jax.distributed`, or ends the process when the others do not come in time."""
    # Without it SIGTERM ends a process, as it does elsewhere: every epoch is saved anyway.
    with contextlib.suppress(AttributeError):  # JAX 0.6 does not have it
        jax.config.update("jax_enable_preemption_service", False)
    known = inspect.signature(jax.distributed.initialize).parameters
    # JAX 0.6 has 100 s and no argument.
    heartbeat = (
        {"heartbeat_timeout_seconds": arguments.heartbeat_timeout}
        if "heartbeat_timeout_seconds" in known
        else {}
    )
    # JAX ends the process by a signal and a stack trace once its own time is over: be there before.
    alarm = threading.Timer(arguments.connect_timeout, _give_up, [arguments])
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.processes,
            arguments.process_id,
            initialization_timeout=arguments.connect_timeout + 60,
            **heartbeat,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed found no cluster ({error}) Pass --coordinator HOST:PORT, --processes N "
            "and --process-id I, I from 0 to N - 1."
        ) from None
    finally:
        alarm.cancel()


def _give_up(arguments: argparse.Namespace) -> NoReturn:
    where = f" at {arguments.coordinator}" if arguments.coordinator else ""
    wanted = f"all {arguments.processes}" if arguments.processes else "all"
    print(
        f"error: not {wanted} processes met{where} within {arguments.connect_timeout} seconds. "
        "Start each with the same command but its own --process-id, or raise --connect-timeout.",
        file=sys.stderr,
    )
    _exit(1)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
