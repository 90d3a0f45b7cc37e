import csv
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.core.precision import float64
from benchmarks.core.runs import complete_all
from benchmarks.core.training import descend
from benchmarks.models.toys import nop, op, toys
from benchmarks.theory import __main__ as theory
from benchmarks.theory import experiment, figures, report
from benchmarks.theory.claims import (
    balancedness,
    deviation,
    neuron,
    sensing,
    thresholds,
    universal_problems,
)
from benchmarks.theory.common import Claim, findings, listed, near, slope, spread
from benchmarks.theory.experiment import TOPICS, Theory
from benchmarks.theory.runs import bisect, flow_rate, law_errors, sam_rate


class TestCommon:
    def test_descend_records_the_start_and_every_so_many_steps(self):
        with float64():
            last, path = descend(optax.sgd(0.1), lambda w: 0.5 * jnp.sum(w**2), np.ones(2), 6, 3)
            assert path.dtype == np.float64
        np.testing.assert_allclose(path[:, 0], [1, 0.9**3, 0.9**6])
        np.testing.assert_array_equal(last, path[-1])

    def test_records_divide_the_steps(self):
        with pytest.raises(ValueError, match="multiple of every=4, and are 6"):
            descend(optax.sgd(0.1), jnp.sum, jnp.ones(2), 6, 4)

    def test_bisect(self):
        found = bisect(lambda x: x < np.array([0.3, 0.7]), [0.0, 0.0], [1.0, 1.0], 20)
        np.testing.assert_allclose(found, [0.3, 0.7], atol=1e-6)

    def test_flow_rate_is_that_of_gradient_descent(self):
        loss = lambda w: 0.5 * jnp.sum(w**2)
        rate = flow_rate(optax.sgd(1.0), loss, jnp.array([3.0, 4.0]), loss)
        assert float(rate) == pytest.approx(-25.0)

    def test_slope_and_texts(self):
        assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
        assert spread([2.0, 1.0]) == "1 to 2"
        assert spread([1.0001, 1.0002]) == "1"
        assert listed([1.0, 2.5]) == "1, 2.5"
        assert findings([], a=[1 / 3, np.nan]).series["a"][0] == 0.333333
        assert near([1.0, 2.2], [1.0, 2.0], 0.05).tolist() == [True, False]


def test_the_predictions():
    """What the theory says, at points that can be worked out by hand."""
    np.testing.assert_allclose(thresholds.usam_threshold([0.0, 0.1]), [0.2, 0.1])
    assert thresholds.tail_radius(0.1, 0.1) == pytest.approx(0.1)
    assert neuron.usam_stop(0, 0.05) == pytest.approx(40)
    assert neuron.usam_stop(0.05, 0.05) == pytest.approx(20)
    assert neuron.usam_stop(0, 0.001) == neuron.GAP
    problem = sensing.problem(0)
    zero = sensing.loss(problem._replace(values=np.zeros(20)), jnp.zeros((10, 10)))
    assert float(zero) == 0
    toy = op()
    with float64():
        here = [form(toy, toy.start, 0.1) for form in (balancedness.law, balancedness.product_law)]
    assert float(here[0]) == pytest.approx(float(here[1]), rel=1e-12)  # -|f'| (x^2 - y^2) u


class TestLaws:
    """The acceptance figures of the longer topics that take little time."""

    def test_sam_is_stable_on_matrix_sensing_where_usam_is_not(self):
        with float64():
            problems = sensing.Sensing(*(np.stack([part]) for part in sensing.problem(0)))
            ends = {
                name: sensing.follow(problems, name, [0.3], 0.1, 2_000, 2_000, look=sensing.loss)[
                    0, 0, -1
                ]
                for name in ("SAM", "USAM")
            }
        assert ends["SAM"] < 0.02
        assert not np.isfinite(ends["USAM"])

    def test_the_errors_of_the_first_order_laws_are_of_second_order(self):
        rho = np.array([1e-3, 2e-3, 4e-3, 8e-3])
        large = toys()["tucker_large_core"]
        with float64():
            errors = (
                law_errors(nop(), sam_rate, balancedness.law, rho),
                law_errors(op(), sam_rate, balancedness.product_law, rho),
                law_errors(large, sam_rate, deviation.law, rho),
            )
            das = law_errors(large, deviation.das_rate, deviation.law, rho)
        for error in errors:
            assert 1.95 < slope(rho, error) < 2.05
        assert np.max(das) < 1e-12

    def test_det_sam_turns_round_at_a_lambda_of_two_over_h(self):
        with float64():
            slopes = universal_problems.det_slope([0.25, 0.75], 4.0, samples=20_000)
        np.testing.assert_allclose(slopes, [0.5, -0.5], atol=0.05)

    def test_the_determinant_is_zero_on_the_minima(self):
        with float64():
            on, off = universal_problems.on_and_off()
        assert np.max(np.abs(on)) < 1e-9
        assert np.min(np.abs(off)) > 1


SLOW = {"thresholds", "neuron", "sensing", "balancedness", "deviation", "universal"}


@pytest.mark.optimized  # long runs, which compute more than they compile
@pytest.mark.parametrize(
    "topic",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TOPICS],
)
def test_the_claims_hold_on_shortened_runs(topic, tmp_path):
    """The acceptance figures of the methods' reference, and the figure."""
    record = complete_all([(Theory(True, tmp_path), topic)])[0]
    report.write(tmp_path)
    failed = [claim for claim in record["claims"] if not claim["holds"]]
    assert not failed
    assert len(record["claims"]) >= 4
    assert any(claim["outside"] for claim in record["claims"]) or topic == "thresholds"
    assert (tmp_path / f"{topic}.png").read_bytes().startswith(b"\x89PNG")


class TestCommand:
    @pytest.fixture
    def runs(self, monkeypatch):
        """A topic that costs nothing; the returned list has an entry a measurement."""
        runs = []

        def measure(quick):
            runs.append(quick)
            claims = [
                Claim("|x| is 1", "here", "1 within 1 %", "1.001", True),
                Claim("y is 1", "there", "1", "2", False, outside=True),
            ]
            return findings(claims, y=[1.0, np.inf])

        def draw(series):
            figure, axes = figures.panels("A claim")
            axes[0].plot(series["y"])
            return figure

        topic = experiment.Topic("A topic", measure, draw)
        for name in (*TOPICS,):
            monkeypatch.delitem(TOPICS, name)
        for name in ("neuron", "sensing"):
            monkeypatch.setitem(TOPICS, name, topic)
        return runs

    def test_writes_what_it_found_whether_it_holds_or_not(self, tmp_path, runs, capsys):
        assert theory.main(["sensing", "--out", str(tmp_path)]) == 0
        assert runs == [False]
        record = json.loads((tmp_path / "sensing.json").read_text())
        assert record["series"] == {"y": [1.0, None]}
        assert {"jax", "optax", "samax"} <= record["versions"].keys()
        assert record["cpu_seconds"] >= 0
        with (tmp_path / "claims.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        assert [row["holds"] for row in rows] == ["True", "False"]
        summary = (tmp_path / "summary.md").read_text()
        captured = capsys.readouterr()
        assert summary in captured.out
        assert "1 of 2 claims hold" in summary
        assert r"\|x\| is 1" in summary
        assert "*Outside:* y is 1" in summary
        assert "**no**" in summary
        assert "1 of 2 claims hold, 0 s" in captured.out

    def test_continues_with_the_topics_that_are_missing(self, tmp_path, runs, capsys):
        assert theory.main(["neuron", "--quick", "--out", str(tmp_path)]) == 0
        assert theory.main(["all", "--quick", "--out", str(tmp_path)]) == 0
        assert runs == [True, True]  # the first is not measured again
        assert "2 of 4 claims hold; shortened runs" in (tmp_path / "summary.md").read_text()

    def test_does_not_mix_shortened_and_full_runs(self, tmp_path, runs, capsys):
        assert theory.main(["neuron", "--quick", "--out", str(tmp_path)]) == 0
        assert theory.main(["neuron", "--out", str(tmp_path)]) == 2
        assert "quick=True there but False now" in capsys.readouterr().err

    def test_an_interruption_keeps_what_is_finished(self, tmp_path, runs, capsys, monkeypatch):
        def stop(quick):
            raise KeyboardInterrupt

        second = TOPICS["sensing"]._replace(measure=stop)
        monkeypatch.setitem(TOPICS, "sensing", second)
        assert theory.main(["--out", str(tmp_path)]) == 130
        assert (tmp_path / "neuron.json").exists()
        assert (tmp_path / "summary.md").exists()
        assert "Every finished topic is saved" in capsys.readouterr().err
