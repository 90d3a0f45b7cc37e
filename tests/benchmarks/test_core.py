"""The loop of all experiments, their commands, and their tables."""

import dataclasses
import json

import jax.numpy as jnp
import pandas as pd
import pytest

from benchmarks.core import command, frames
from benchmarks.core.command import Command, Counts, Names
from benchmarks.core.records import check_config, read_record
from benchmarks.core.runs import Experiment, complete_all


class Sum(Experiment):
    """Adds the number of each part to an array; a run is how many parts it has."""

    packages = ("pandas",)

    def __init__(self, folder, stop_at=None, offset=0):
        self.folder, self.stop_at, self.offset, self.advanced = folder, stop_at, offset, []

    def name(self, run):
        return f"sum:{run}"

    def config(self, run):
        return {"run": run, "offset": self.offset}

    def parts(self, run):
        return [1.0] * run

    def start(self, run):
        return jnp.zeros(2), {"resumed": [], "parts": []}

    def resume(self, history):
        history["resumed"].append(len(history["parts"]))

    def advance(self, run, part, state, history, tick):
        if part == self.stop_at:
            raise KeyboardInterrupt
        tick(0.5)
        self.advanced.append((run, part))
        history["parts"].append(part)
        return state + part

    def status(self, history):
        return f"at {history['parts'][-1]}"

    def final(self, run, state, history):
        return {**history, "sum": state.tolist(), "nothing": float("nan")}


def runs_of(experiment, *runs):
    return complete_all(((experiment, run) for run in runs), unit="part")


class TestLoop:
    def test_a_run_leaves_one_record_and_no_checkpoint(self, tmp_path, capsys):
        (record,) = runs_of(Sum(tmp_path), 3)
        assert record == read_record(tmp_path / "runs" / "sum_3.json")
        assert record["config"] == {"run": 3, "offset": 0}
        assert record["sum"] == [3.0, 3.0]
        assert record["nothing"] is None  # what JSON can hold
        assert {"jax", "pandas"} <= set(record["versions"])
        assert not list((tmp_path / "checkpoints").iterdir())
        lines = capsys.readouterr().out.splitlines()  # no terminal: a line a part
        assert len(lines) == 3
        assert lines[-1].startswith("sum:3 part 3/3 100%")
        assert "at 2" in lines[-1]

    def test_a_stopped_run_goes_on_and_a_finished_one_is_not_repeated(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            runs_of(Sum(tmp_path, stop_at=2), 1, 4)
        again = Sum(tmp_path)
        one, four = runs_of(again, 1, 4)
        assert again.advanced == [(4, 2), (4, 3)]
        assert (one["resumed"], four["resumed"]) == ([], [2])
        assert four["sum"] == [6.0, 6.0]
        assert runs_of(Sum(tmp_path, stop_at=0), 1, 4) == [one, four]

    def test_another_configuration_is_refused_before_anything_is_made(self, tmp_path):
        runs_of(Sum(tmp_path), 2)
        other = Sum(tmp_path, offset=1)
        with pytest.raises(ValueError, match=r"offset=0 there but 1 now\. Choose another --out"):
            runs_of(other, 1, 2)
        assert other.advanced == []

    def test_a_checkpoint_of_another_configuration_is_refused(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            runs_of(Sum(tmp_path, stop_at=1), 2)
        with pytest.raises(ValueError, match="offset=0 there but 1 now"):
            runs_of(Sum(tmp_path, offset=1), 2)


@dataclasses.dataclass(frozen=True)
class Configuration(Command):
    """A configuration of each kind."""

    names: Names = ("a", "b")  # Names, separated by commas.
    devices: Counts = (1, 2)
    batch_size: int | None = None  # Examples a step.
    fast: bool = False

    def check(self):
        self.at_least(1, "batch_size")


class TestCommand:
    def test_a_dataclass_is_the_command_line(self):
        argv = ["--names", "x:y=1,z", "--devices=4", "--batch-size", "8", "--fast"]
        found = command.parse(Configuration, "some.module", argv)
        assert found == Configuration(("x:y=1", "z"), (4,), 8, True)
        assert json.loads(json.dumps(dataclasses.asdict(found)))["devices"] == [4]

    def test_and_its_help(self, capsys):
        with pytest.raises(SystemExit):
            command.parse(Configuration, "some.module", ["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for part in ("python -m some.module", "The loop of all experiments", "Examples a step."):
            assert part in text

    def test_what_is_out_of_range_is_one_line(self, capsys):
        status = command.run(Configuration, print, "some.module", ["--batch-size", "0"])
        assert status == 2
        assert capsys.readouterr().err == "error: --batch-size must be 1 or more, got 0.\n"

    def test_a_stop_says_how_to_go_on(self, capsys):
        def stop(_):
            raise KeyboardInterrupt

        status = command.run(Configuration, stop, "some.module", ["--names", "a b"], "All")
        assert status == 130
        error = capsys.readouterr().err
        assert "All is saved; to continue, repeat\n  python -m some.module --names 'a b'" in error


class TestTables:
    def test_what_a_row_lacks(self):
        rows = [{"method": "sgd", "top": "1.20"}, {"method": "sam", "other": "2"}]
        assert frames.markdown(rows).splitlines() == [
            "| method | top  | other |",
            "| ------ | ---- | ----- |",
            "| sgd    | 1.20 | -     |",
            "| sam    | -    | 2     |",
        ]
        assert frames.csv(rows) == "method,top,other\nsgd,1.20,\nsam,,2\n"

    def test_spreads_with_missing_values(self):
        assert frames.spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "seeds": 2}
        assert frames.spread([1.0]) == {"mean": 1.0, "std": None, "seeds": 1}
        assert frames.spread([1.0, None]) == {"mean": None, "std": None, "seeds": 2}
        found = frames.paired(pd.Series({0: 1.0, 1: 4.0, 7: 9.0}), pd.Series({1: 2.0, 0: 1.0}))
        assert found == {"mean": 1.0, "standard_error": 1.0, "seeds": 2}
        nothing = frames.paired(pd.Series({0: 1.0}, dtype=float), pd.Series(dtype=float))
        assert nothing == {"mean": None, "standard_error": None, "seeds": 0}

    def test_how_they_are_shown(self):
        assert frames.percent({"mean": 0.5, "std": 0.0123}) == "50.00 ± 1.23"
        assert frames.difference({"mean": 0.01, "standard_error": None}) == "+1.00"
        assert frames.percent({"mean": None, "std": None}) == frames.difference(None) == "-"


def test_differences_of_configurations_are_named(tmp_path):
    with pytest.raises(ValueError, match="a=1 there but None now, b=2 there but 3 now"):
        check_config({"a": 1, "b": 2}, {"b": 3}, tmp_path)
