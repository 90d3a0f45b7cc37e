"""Tensor completion: the problem, its measures, and a small run of the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tensorly

from benchmarks.tensor_completion import __main__ as command
from benchmarks.tensor_completion import experiment as completion

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def problem():
    return completion.load(split=0)


def test_the_problem_is_the_papers(problem):
    assert problem.tensor.shape == (438, 6, 11)
    assert problem.tensor.dtype == jnp.float64
    shapes = {name: core.shape for name, core in problem.cores.items()}
    assert shapes == {"core_0": (8, 6, 8), "core_1": (438, 8), "core_2": (6, 6), "core_3": (11, 8)}
    assert float(problem.observed.mean()) == pytest.approx(0.3, abs=0.01)
    assert not np.array_equal(problem.observed, completion.load(split=1).observed)


def test_reconstruction_and_measures_agree_with_tensorly(problem):
    cores = [np.asarray(problem.cores[f"core_{i}"]) for i in range(4)]
    dense = tensorly.tucker_to_tensor((cores[0], cores[1:]))
    np.testing.assert_allclose(completion.reconstruct(problem.cores), dense, rtol=1e-10)
    errors = (dense - np.asarray(problem.tensor))[np.asarray(problem.observed, bool)]
    assert float(completion.loss_fn(problem.cores, problem)) == pytest.approx(np.sum(errors**2))
    data = np.asarray(problem.tensor)[~np.asarray(problem.observed, bool)]
    held_out = (dense - np.asarray(problem.tensor))[~np.asarray(problem.observed, bool)]
    found = completion.measure(problem.cores, problem)
    expected = 1 - np.sum(held_out**2) / np.sum(data**2)
    assert float(found["r2_held_out"]) == pytest.approx(expected)
    squares = np.array([np.sum(core**2) for core in cores])
    assert float(found["norm_deviation"]) == pytest.approx(np.sum((squares - squares.mean()) ** 2))


def test_the_landscape_is_the_loss_along_unit_directions(problem):
    losses = completion.landscape(problem.cores, problem)
    assert losses.shape == (completion.DIRECTIONS, len(completion.DISTANCES))
    middle = losses[:, len(completion.DISTANCES) // 2]
    np.testing.assert_allclose(middle, completion.loss_fn(problem.cores, problem))


@pytest.mark.slow
def test_a_small_run_leaves_records_a_table_and_figures(tmp_path, capsys, monkeypatch):
    two = {name: tx for name, tx in completion.methods(100).items() if name in ("adam", "das")}
    monkeypatch.setattr(completion, "methods", lambda steps: two)
    argv = ["--steps", "100", "--splits", "1", "--rounds", "2", "--out", str(tmp_path)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert "| das  " in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"training.png", "sharpness.png"}
    record = json.loads((tmp_path / "runs" / "das_split0.json").read_text())
    assert record["curves"]["r2_observed"][-1] == pytest.approx(record["final"]["r2_observed"])
    assert record["config"]["dtype"] == "float64"
    # Finished runs are not repeated.
    before = (tmp_path / "runs" / "das_split0.json").stat().st_mtime_ns
    assert command.main(argv) == 0
    assert (tmp_path / "runs" / "das_split0.json").stat().st_mtime_ns == before
    # Another setting in the same folder is refused.
    argv[1] = "200"
    assert command.main(argv) == 2
    assert "steps=100 there but 200 now" in capsys.readouterr().err


def test_bad_arguments(capsys):
    assert command.main(["--steps", "150"]) == 2
    assert "--steps must be a multiple of 100, got 150" in capsys.readouterr().err
