import csv
import json

import numpy as np
import pytest

from benchmarks.balance_toys import __main__ as balance_toys
from benchmarks.balance_toys import report as balance_toys_report
from benchmarks.core.precision import float64
from benchmarks.models.toys import (
    nop,
    op,
    optimizer,
    steps_to_half,
    toys,
    trajectories,
    tucker,
)


class TestProblems:
    @pytest.mark.parametrize("name", list(toys()))
    def test_the_start_is_what_the_papers_have(self, name):
        toy = toys()[name]
        squares = {core: np.sum(values**2) for core, values in toy.start.items()}
        wanted = {
            "nop": {"x": 0.14, "y": 9 * 0.14},
            "op": {"x": 0.14, "y": 9 * 0.14},
            "tucker_large_core": {"a": 1.2, "b": 0.4, "g": 2.4},
            "tucker_small_core": {"a": 2.4, "b": 1.2, "g": 0.4},
        }[name]
        assert squares == pytest.approx(wanted)
        assert np.shape(toy.product(toy.start)) == toy.target.shape
        with float64():
            for method in toy.methods:
                optimizer(toy, method).init(toy.start)

    def test_runs_share_their_noise_and_start(self):
        toy = nop()._replace(steps=200, levels=(0.0, 1.0))
        runs = {method: trajectories(toy, method, seeds=2) for method in ("SGD", "oBAR")}
        for run in runs.values():
            assert run.imbalance.shape == (2, 2, 3)
            assert run.imbalance.dtype == np.float64
            np.testing.assert_allclose(run.imbalance[..., 0], 0.56)
            np.testing.assert_array_equal(run.distance[0, 0], run.distance[0, 1])
            assert np.all(run.distance[1, 0, 1:] != run.distance[1, 1, 1:])
            assert np.isnan(run.covariance[..., 0]).all()
            assert np.isfinite(run.covariance[..., 1:]).all()
        # oBAR moves the norms and, this early, hardly the product: the noise is the same.
        effect = [run.distance[1, 0] - run.distance[1, 1] for run in runs.values()]
        np.testing.assert_allclose(effect[1][1:], effect[0][1:], rtol=0.1)

    def test_the_tucker_toy_is_as_documented(self):
        toy = tucker(g=1.0, a=1.0, b=1.0)
        assert np.sum(np.broadcast_to(toy.spread, toy.target.shape) ** 2) == pytest.approx(1)
        assert np.linalg.norm(toy.target) == pytest.approx(1)
        assert np.linalg.matrix_rank(toy.target) == 2

    def test_where_the_gradients_of_nop_are_equally_large(self):
        toy = nop()
        ratio = 3 * 1.0 / (1.0 + 0.64 + 0.25)
        x = np.sqrt(0.5) * ratio**-0.25 * np.eye(3)[0]
        y = np.sqrt(0.5) * ratio**0.25 * np.eye(3)[0]
        np.testing.assert_allclose(np.outer(x, y), toy.target, atol=1e-15)
        assert toy.rest == pytest.approx((y @ y - x @ x) / 2)
        noise = toy.spread * np.random.default_rng(0).standard_normal((200_000, 3, 3))
        along_y, along_x = np.sum((noise @ y) ** 2, -1), np.sum((x @ noise) ** 2, -1)
        assert along_y.mean() == pytest.approx(along_x.mean(), rel=0.02)

    @pytest.mark.slow
    def test_nbar_and_obar_are_the_same_on_op(self):
        toy = op()._replace(steps=2_000)
        runs = [trajectories(toy, method, seeds=1) for method in ("nBAR", "oBAR")]
        np.testing.assert_allclose(runs[0].imbalance, runs[1].imbalance, rtol=1e-9)

    @pytest.mark.slow
    def test_das_is_trapped_on_op_by_the_papers_start_and_alpha(self):
        """What the summary says about it; eta ten times the benchmark's."""
        toy = op()._replace(learning_rate=1e-3, steps=10_000, levels=(0.5, 1.0))
        x = toy.start["x"]
        distances = [
            trajectories(variant, "DAS", seeds=1).distance[:, 0, -1]
            for variant in (
                toy,
                toy._replace(start={"x": x, "y": 3 * x}),
                toy._replace(rho=toy.rho / 2),
            )
        ]
        np.testing.assert_allclose(distances[0], 0.25, rtol=0.01)  # x^T y = 0
        assert np.max(distances[1:]) < 0.02

    def test_steps_to_half(self):
        runs = np.array([[1.0, 0.8, 0.5, 0.6], [1.0, 0.9, 0.8, 0.7]])
        np.testing.assert_array_equal(steps_to_half(runs, 100), [200, np.nan])

    def test_records_divide_the_steps(self):
        with pytest.raises(ValueError, match="multiple of every=100, and are 250"):
            trajectories(nop()._replace(steps=250), "SGD", seeds=1)


class TestCommand:
    @pytest.mark.slow
    def test_writes_what_it_found(self, tmp_path, capsys, monkeypatch):
        # Little of each, for the time that compilation and figures take.
        chosen = {
            name: toys()[name]._replace(methods=("SAM",), levels=(0.5, 1.0))
            for name in ("nop", "tucker_small_core")
        }
        monkeypatch.setattr(balance_toys, "toys", lambda: chosen)
        command = ["--toys", "nop", "tucker_small_core", "--steps", "300", "--seeds", "2"]
        assert balance_toys.main([*command, "--out", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        results = json.loads((tmp_path / "results.json").read_text())
        assert len(results["results"]) == 2 * 2
        assert results["settings"] == {"seeds": 2, "every": 100, "bar_alpha": 0.5}
        assert {"jax", "optax", "samax"} <= results["versions"].keys()
        assert results["toys"]["nop"]["steps"] == 300
        with (tmp_path / "results.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert [row["end"] for row in rows] == [str(row["end"]) for row in results["results"]]
        with (tmp_path / "curves.csv").open() as stream:
            steps = {row["step"] for row in csv.DictReader(stream)}
        assert steps == {"0", "100", "200", "300"}
        for name in ("nop", "tucker_small_core"):
            assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        summary = (tmp_path / "summary.md").read_text()
        assert summary in captured.out
        assert "| SAM    | 0.5     | 0.55" in summary
        assert "| collapsed " not in summary
        # What full runs show is not said of shorter ones.
        assert "oBAR, which compares" not in summary
        assert "nop" in captured.err
        assert "tucker_small_core" in captured.err

    def test_every_toy_has_a_comment(self):
        assert balance_toys_report._COMMENTS.keys() == toys().keys()

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--steps", "250", "--steps must be a multiple of 100, got 250"),
            ("--steps", "0", "--steps must be 1 or more, got 0"),
            ("--seeds", "0", "--seeds must be 1 or more, got 0"),
        ],
    )
    def test_refuses_what_it_cannot_do(self, option, value, message, capsys):
        assert balance_toys.main([option, value]) == 2
        assert message in capsys.readouterr().err
