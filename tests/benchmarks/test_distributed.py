"""Training over several processes: shares of the data, lost and missing processes, the restart."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import optax
import pytest

import samax
from benchmarks.cifar import __main__ as cifar
from benchmarks.core import distributed
from benchmarks.core.classification.experiment import ImageComparison
from benchmarks.core.classification.task import Classification
from benchmarks.core.distributed import Cluster
from benchmarks.core.records import read_record
from tests.benchmarks.test_cifar import DEADLINE, ROOT, numbers, read

# One step an epoch: float32 and ReLU let runs that differ in the order of sums part soon after.
SETTING = ["--train-images=64", "--test-images=40", "--width=0.25", "--batch-size=64", "--seeds=1"]
RUN = [*SETTING, "--methods=sam", "--epochs=12"]
RECORD = Path("runs", "sam_seed0.json")


@pytest.fixture
def processes():
    """Processes to be ended, whatever happens."""
    started = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(processes, out, ids=(0, 1), *more):
    """Starts the command in as many processes, which log to OUT/log0 and so on."""
    out.mkdir(exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    cluster = ["--distributed", "--coordinator", address, "--processes", "2"]
    for i in ids:
        with (out / f"log{i}").open("w") as log:
            command = [*RUN, "--out", str(out), *cluster, "--process-id", str(i), *more]
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.cifar", *command],
                cwd=ROOT,
                env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiled sooner
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        processes.append(process)
    return processes[-len(ids) :]


def log(out, i):
    return (out / f"log{i}").read_text()


@pytest.mark.slow
def test_two_processes_of_which_one_is_lost_end_as_if_it_was_not(tmp_path, processes):
    whole, faulted = tmp_path / "whole", tmp_path / "faulted"
    first = start(processes, whole)
    survivor, lost = start(processes, faulted)
    limit = time.monotonic() + DEADLINE
    checkpoints = faulted / "checkpoints" / "sam_seed0"
    while not any((checkpoints / str(epoch)).exists() for epoch in range(2, 13)):
        assert lost.poll() is None, log(faulted, 1)
        assert time.monotonic() < limit
        time.sleep(0.005)
    lost.send_signal(signal.SIGKILL)
    # It may sit in a sum over devices, which only JAX's heartbeat ends, after minutes.
    survivor.kill()
    survivor.wait()
    assert not (faulted / RECORD).exists()
    for process in (*start(processes, faulted), *first):
        assert process.wait(DEADLINE) == 0, log(faulted, 0) + log(whole, 0)

    record = read_record(faulted / RECORD)
    expected = read_record(whole / RECORD)
    assert record["resumed_after_epochs"]
    assert numbers(record) == numbers(expected)
    # One process reports.
    assert "| sam" in log(whole, 0)
    assert "| sam" not in log(whole, 1)
    assert (whole / "summary.md").exists()

    one = tmp_path / "one"
    assert cifar.main([*RUN, "--out", str(one)]) == 0
    alone = read_record(one / RECORD)
    assert alone["config"] == expected["config"]
    for name in ("clean_loss", "clean_grad_norm", "perturbed_loss", "perturbed_grad_norm"):
        assert expected["epochs"][0][name] == pytest.approx(alone["epochs"][0][name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_a_step_over_devices_is_one_devices_step(scan):
    dataset = read(SETTING).dataset()
    config = {"model": "cnn", "width": 0.25, "bfloat16": False, "batch_size": 64}
    config |= {"flip": False, "label_smoothing": 0.0}
    data, key = (dataset.train_images, dataset.train_labels), jax.random.key(1)
    images, labels = dataset.test_images, dataset.test_labels
    found = []
    for cluster in (None, Cluster()):
        task = Classification.of(config, dataset, cluster)
        trainer = task.trainer(optax.chain(samax.sam(0.05, track=True), optax.sgd(0.1)), scan)
        arrays = data if cluster else map(jax.numpy.asarray, data)
        epoch = task.epoch(*arrays, key)
        state, metrics = trainer.train(trainer.init(0), epoch, len(data[0]) // 64)
        found.append(
            (state, metrics, task.evaluate(state, *map(jax.numpy.asarray, (images, labels))))
        )
    (state, metrics, scores), (spread_state, spread_metrics, spread_scores) = found
    chex.assert_trees_all_close(spread_metrics, metrics, rtol=1e-4)
    chex.assert_trees_all_close(spread_state, state, rtol=1e-3, atol=1e-5)
    for leaf in jax.tree.leaves(spread_state):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == len(jax.devices())
    chex.assert_trees_all_close(spread_scores, scores, rtol=1e-4)


def test_each_device_reads_its_share_of_each_batch():
    cluster = Cluster()
    order = np.random.default_rng(0).permutation(40)[:24].reshape(3, 8)
    read = []

    class Rows(np.ndarray):
        def __getitem__(self, index):
            read.append(np.asarray(index))
            return np.asarray(super().__getitem__(index))

    rows = np.arange(40 * 5).reshape(40, 5)
    batches = cluster.batches(rows.view(Rows), order)
    np.testing.assert_array_equal(batches, rows[order])
    assert [index.shape for index in read] == [(3, 2)] * 4
    assert sorted(np.concatenate(read, axis=None)) == sorted(order.ravel())


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    arguments = read([*SETTING[:-2], "--batch-size=30"])
    with pytest.raises(ValueError, match="multiple of the number of devices, got 30 and 4"):
        ImageComparison(arguments, arguments.dataset(), tmp_path, cluster=Cluster())


def test_processes_that_do_not_agree_are_told(monkeypatch):
    cluster = Cluster()
    cluster.check_agreement({"lr": 0.1}, "what is to be trained")
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda own: np.array([own, own + 1])
    )
    with pytest.raises(ValueError, match="differ in what is to be trained: all need the same"):
        cluster.check_agreement({"lr": 0.1}, "what is to be trained")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--processes", "2"], "--coordinator, --processes and --process-id need --distributed"),
        (["--distributed"], "--distributed found no cluster (no address.) Pass --coordinator"),
    ],
)
def test_misuse_is_one_line(tmp_path, monkeypatch, capsys, more, message):
    def initialize(*args, **kwargs):
        raise ValueError("no address.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert cifar.main([*RUN, "--out", str(tmp_path), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
