import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import models
from benchmarks.core.methods import BALANCING
from benchmarks.core.timing import compile_program, interleave, spread
from benchmarks.step_time import __main__ as step_time
from benchmarks.step_time import report as step_time_report
from benchmarks.step_time.experiment import costs, lora, pytree, training
from benchmarks.step_time.measuring import (
    Counter,
    compile_cycle,
    count_gradients,
    in_turn,
    measure,
)
from benchmarks.step_time.methods import METHODS, PLAIN, RHO
from tests.benchmarks.tiny_bert import encoder


def _ratio(median, low=None, high=None):
    low, high = median if low is None else low, median if high is None else high
    return {
        "median": median,
        "lower_quartile": low,
        "upper_quartile": high,
        "low": low,
        "high": high,
    }


def _row(ratios, temp_bytes=None):
    return {"ratio": ratios, "temp_bytes": temp_bytes}


class TestTiming:
    def test_runs_take_turns_in_a_changing_order(self):
        calls = []
        runs = {name: lambda name=name: calls.append(name) for name in "abc"}
        seconds = interleave(runs, range(20), warmup=1)
        rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
        assert len(rounds) == 21
        assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
        assert len(set(rounds[1:])) > 3
        assert {name: times.shape for name, times in seconds.items()} == dict.fromkeys("abc", (20,))
        assert all((times > 0).all() for times in seconds.values())

    def test_the_interval_of_the_median(self):
        found = spread(np.arange(101.0))
        assert found[:3] == (50, 25, 75)
        assert (found.low, found.high) == (40, 60)  # 50 -+ 1.96 sqrt(101) / 2

    def test_the_interval_of_few_samples_is_their_range(self):
        assert spread(np.array([3.0, 1.0, 2.0]))[3:] == (1, 3)

    def test_the_interval_covers_as_often_as_it_says(self):
        rng = np.random.default_rng(0)
        intervals = [spread(rng.exponential(size=41)) for _ in range(1000)]
        covered = np.mean([found.low <= np.log(2) <= found.high for found in intervals])
        assert 0.94 < covered < 0.99

    def test_a_program_tells_its_memory(self):
        x = jnp.ones((64, 64))
        program = compile_program(lambda x, y: (x @ y) @ x, x, jnp.ones((64, 64)))
        assert program.argument_bytes == 2 * x.nbytes
        assert program.temp_bytes >= x.nbytes
        assert program.flops == pytest.approx(2 * 2 * 64**3, rel=0.01)
        assert program.lower_seconds > 0
        assert program.compile_seconds > 0


class _Tiny(nnx.Module):
    """Compiles in a fraction of a second and still has batch statistics."""

    def __init__(self, *, num_classes, rngs, **_):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.linear = nnx.Linear(3, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.linear(jnp.tanh(self.norm(images)).mean((1, 2)))


def _run(cycle):
    programs = {ascend: jax.jit(program) for ascend, program in cycle.programs.items()}
    return in_turn(programs, cycle.order)(cycle.carry, *cycle.inputs)


class TestProblems:
    @pytest.mark.slow
    def test_every_sam_step_is_the_same_step(self, monkeypatch):
        """What is timed against one another computes the same, up to rounding."""
        monkeypatch.setitem(models.MODELS, "cnn", _Tiny)
        problem = training("cnn", batch_size=8, rounds=1)
        parameters, statistics = {}, {}
        for method in ("base", "limit", "sam", "sam_quarter", "optax_opaque", "optax_transparent"):
            carry, value = _run(problem.build(method))
            assert np.isfinite(value)
            parameters[method], statistics[method] = (
                np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
                for tree in carry[:2]
            )
        away = {
            method: np.linalg.norm(found - parameters["limit"])
            for method, found in parameters.items()
        }
        assert away["base"] > 1e-6
        for method in ("sam", "optax_opaque", "optax_transparent"):
            assert away[method] < 0.01 * away["base"], method
        assert away["sam_quarter"] > 0.1 * away["base"]
        # The clean pass's statistics, except where the caller makes two steps of one.
        for method in ("limit", "sam", "optax_opaque"):
            np.testing.assert_allclose(statistics[method], statistics["base"], rtol=1e-5)
        assert not np.allclose(statistics["optax_transparent"], statistics["base"], rtol=1e-3)

    def test_a_step_of_lora_trains_adapters_and_classifier_alone(self):
        problem = lora(4, 8, 2, 1, encoder(layers=1))
        assert problem.methods == ("base", "sam", *BALANCING)
        for method in problem.methods:
            cycle = problem.build(method)
            before = jax.tree.map(np.array, cycle.carry[0])
            (params, _, _), loss = _run(cycle)
            assert np.isfinite(loss)
            changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, params)
            assert all(jax.tree.leaves(changed)), method

    @pytest.mark.parametrize("compiled", [True, False])
    def test_the_pytree_update_is_the_perturbed_point(self, compiled):
        problem = pytree(5, rounds=1, compiled=compiled)
        for method in ("limit", "sam", "optax_opaque"):
            cycle = problem.build(method)
            _, updates = cycle.programs[None](cycle.carry, *cycle.inputs)
            moved = jax.tree.map(lambda u, w: u - w, updates, problem.params)
            norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(moved)))
            assert norm == pytest.approx(RHO, rel=1e-4), method

    def test_every_method_builds(self):
        problem = pytree(3, rounds=1, compiled=True)
        assert problem.methods == tuple(PLAIN)
        for method in problem.methods:
            cycle = problem.build(method)
            program = compile_cycle(cycle, METHODS[method].steps)
            assert jax.tree.leaves(program.run(cycle.carry, *cycle.inputs)), method


class TestCosts:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setitem(models.MODELS, "cnn", _Tiny)

    @pytest.mark.parametrize("name", [name for name in METHODS if name not in BALANCING])
    def test_gradients_are_counted(self, name):
        expected = {
            **dict.fromkeys(("base", "before_late_phase", "stale_sam", "msam", "random"), 1.0),
            **dict.fromkeys(("looksam", "sam_every_5"), 1.2),
            "sam_quarter": 1.25,
        }
        assert count_gradients(costs(8), name, 8) == pytest.approx(expected.get(name, 2.0))

    def test_a_pass_counts_once_whatever_reads_it(self):
        counter = Counter(4)
        loss = lambda w: jnp.sum(counter.mark(jnp.ones((4, 2)) * w) ** 2)
        jax.grad(loss)(2.0)
        assert counter.passes == 1
        loss(2.0)  # no gradient
        assert counter.passes == 1
        jax.grad(lambda w: loss(w) + jnp.sum(counter.mark(jnp.ones((1, 2)) * w)))(2.0)
        assert counter.passes == 2.25

    def test_a_cycle_is_the_method_with_its_policy(self):
        """Two programs, chosen outside, make the steps that the policy makes inside."""
        problem = costs(8)
        cycle = problem.build("sam_every_5")
        assert cycle.order == (True, False, False, False, False)
        first, _ = _run(problem.build("sam"))
        plain = problem.build("base")
        carry = (*first[:2], first[2][1])  # the base optimizer's state
        for _ in range(4):
            carry, _ = _run(plain._replace(carry=carry))
        again, _ = _run(cycle)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            again[0],
            carry[0],
        )

    @pytest.mark.slow
    def test_what_is_measured(self):
        found = measure(costs(8), ("functional_sam", "sam_every_5", "stale_sam"), 2)
        rows = found["methods"]
        assert list(rows) == ["base", "functional_sam", "sam_every_5", "stale_sam"]
        more = rows["stale_sam"]["argument_bytes"] - rows["base"]["argument_bytes"]
        assert more == found["parameter_bytes"]
        flops = {name: row["flops"] / rows["base"]["flops"] for name, row in rows.items()}
        assert 1 < flops["sam_every_5"] < flops["functional_sam"]
        assert "cost of a method in gradients, FLOPs, memory and time" in found["title"]
        assert all(row["seconds"] > 0 for row in rows.values())

    def test_targets(self):
        def row(gradients, time, arguments):
            return {
                "gradients": gradients,
                "ratio": {"base": _ratio(time)},
                "argument_bytes": arguments,
                "temp_bytes": 0,
            }

        methods = {
            "base": row(1.0, 1.0, 1000),
            "stale_sam": row(1.0, 1.02, 1100),
            "msam": row(2.0, 1.05, 1210),
            "sam_every_5": row(1.2, 1.19, 1008),
        }
        problem = {"methods": methods, "parameter_bytes": 100}
        found = step_time_report.targets({"costs": problem})
        verdicts = {target["claim"]: target["verdict"] for target in found}
        assert verdicts == {
            "stale_sam at most 1.03x the base optimizer": "met",
            "msam at most 1.03x the base optimizer": "not met",
            "sam_every_5 at most 1.2x the base optimizer, 1 + share": "met",
            "stale_sam: 1.00 gradients a step": "met",
            "stale_sam: state at most one parameter copy above base's": "met",
            "msam: 1.00 gradients a step": "not met",
            "msam: state at most one parameter copy above base's": "not met",
            "sam_every_5: 1.20 gradients a step": "met",
        }


class TestTargets:
    def test_verdicts(self):
        def verdict(ratio):
            methods = {"base": _row({}), "sam": _row({"base": ratio})}
            (target,) = step_time_report.targets({"pytree": {"methods": methods}})
            return target["verdict"]

        assert verdict(_ratio(2.9, 2.0, 3.5)) == "met"
        assert verdict(_ratio(3.1, 2.9, 3.5)) == "within noise"
        assert verdict(_ratio(3.1, 3.05, 3.5)) == "not met"

    def test_training_targets_compare_with_the_right_method(self):
        methods = {
            "base": _row({}),
            "limit": _row({}, 1000),
            "optax_opaque": _row({}),
            "optax_transparent": _row({}),
            "sam": _row(
                {
                    "base": _ratio(2.0),
                    "limit": _ratio(1.03),
                    "optax_opaque": _ratio(0.99),
                    "optax_transparent": _ratio(1.01),
                },
                1101,
            ),
            "sam_quarter": _row({"base": _ratio(1.25)}),
        }
        found = step_time_report.targets({"cnn": {"methods": methods, "parameter_bytes": 100}})
        verdicts = [target["verdict"] for target in found]
        assert verdicts == ["not met", "met", "not met", "met", "not met"]
        assert found[-1]["found"] == "+1.010 copies"

    def test_what_was_not_measured_has_no_target(self):
        assert step_time_report.targets({"cnn": {"methods": {"base": _row({})}}}) == []


class TestCommand:
    @pytest.mark.slow
    def test_writes_what_it_found(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(models.MODELS, "cnn", _Tiny)
        command = ["--smoke", "--rounds", "2", "--methods", "limit,sam", "--out", str(tmp_path)]
        assert step_time.main(command) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert set(results["problems"]) == {"costs", "cnn", "pytree", "pytree_eager"}
        assert len(results["load_average"]) == 2
        assert results["settings"]["rounds"] == 2
        assert {"backend", "device", "count"} <= results["hardware"].keys()
        for problem in results["problems"].values():
            names = [name for name in problem["methods"] if name != "limit"]
            assert names == ["base", "sam"]
            assert problem["methods"]["base"]["ratio"]["base"]["median"] == 1
        assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 4 * 3
        assert (tmp_path / "step_time.png").read_bytes().startswith(b"\x89PNG")
        summary = (tmp_path / "summary.md").read_text()
        assert "sam within 2 % of the hand-written step" in summary
        assert summary in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--problems", "cnn,mlp", "choose, separated by commas, from costs, cnn, resnet18"),
            ("--methods", "adam", "choose, separated by commas, from base, limit"),
            ("--rounds", "0", "--rounds must be 1 or more, got 0"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, option, value, message, capsys):
        assert step_time.main([option, value]) == 2
        assert message in capsys.readouterr().err
