"""The main job from its command line: whole, killed, resumed, interrupted and misused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.cifar import __main__ as cifar
from benchmarks.core.classification.experiment import ImageComparison
from benchmarks.core.command import parse
from benchmarks.core.records import read_record, read_records, write_record
from benchmarks.core.training import Trainer

ROOT = Path(cifar.__file__).parents[2]
TINY = ["--train-images=64", "--test-images=40", "--width=0.25", "--batch-size=32", "--seeds=1"]
TIMES = ("wall_seconds", "compute_seconds")
DEADLINE = 400  # seconds; against a hang, however busy the machine


def arguments(out, *more):
    return [*TINY, "--out", str(out), *more]


def read(command):
    return parse(cifar.Configuration, "benchmarks.cifar", command)


def numbers(record):
    """A record's results without its times."""
    epochs = [
        {key: value for key, value in entry.items() if key not in TIMES}
        for entry in record["epochs"]
    ]
    return record["config"], epochs, record["final"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one method, two epochs."""
    out = tmp_path_factory.mktemp("finished")
    assert cifar.main(arguments(out, "--methods", "sgd", "--epochs", "2")) == 0
    return out


def test_a_run_leaves_records_tables_and_figures_and_no_checkpoints(finished):
    record = read_record(finished / "runs" / "sgd_seed0.json")
    assert [entry["epoch"] for entry in record["epochs"]] == [1, 2]
    assert record["epochs"][0]["lr"] == pytest.approx(0.1)
    assert record["epochs"][1]["lr"] == pytest.approx(0.05)
    assert record["steps_per_epoch"] == 2
    for name in (*TIMES, "train_loss", "train_top1", "test_loss", "test_top1", "test_top5"):
        assert record["epochs"][0][name] >= 0
    for name in ("summary.md", "summary.json", "runs.csv", "figures/learning_curves.png"):
        assert (finished / name).stat().st_size > 0
    assert not list((finished / "checkpoints").iterdir())


def test_a_record_tells_the_setting_but_not_the_place(finished):
    record = read_record(finished / "runs" / "sgd_seed0.json")
    assert record["config"]["dataset"] == "digits"
    assert {"python", "jax", "jaxlib", "flax", "optax", "samax"} <= set(record["versions"])
    assert record["hardware"]["backend"] == "cpu"
    text = json.dumps(record)
    assert os.uname().nodename not in text
    assert str(finished) not in text
    assert str(ROOT) not in text


def test_a_finished_run_is_not_repeated(finished, monkeypatch, capsys):
    before = read_records(finished)
    monkeypatch.setattr(Trainer, "train", None)
    assert cifar.main(arguments(finished, "--methods", "sgd", "--epochs", "2")) == 0
    assert read_records(finished) == before
    assert "| sgd" in capsys.readouterr().out


def test_another_configuration_in_the_same_folder_is_refused(finished, capsys):
    assert cifar.main(arguments(finished, "--methods", "sam", "--epochs", "3")) != 0
    assert "epochs=2 there but 3 now. Choose another --out" in capsys.readouterr().err


def test_the_models_of_finished_runs_are_measured_where_records_are_older(finished, capsys):
    path = finished / "runs" / "sgd_seed0.json"
    whole = read_record(path)
    added = [name for name in whole["final"] if "bits" in name or "noise" in name]
    assert len(added) == 6
    # Rounding to 8 bits moves few images, noise on the weights is not the same as none.
    assert whole["final"]["top1_8_bits"] == pytest.approx(whole["final"]["test_top1"], abs=0.02)
    final = {k: v for k, v in whole["final"].items() if k not in (*added, "test_ece")}
    write_record(path, {**whole, "final": final})
    given = ["--evaluate", str(finished), "--train-images", "7"]  # of the training, not of this
    assert cifar.main(given) == 0
    assert "| 3 bits" in capsys.readouterr().out
    found = read_record(path)["final"]
    assert found == pytest.approx(whole["final"], rel=1e-6)
    (finished / "models" / "sgd_seed0").rename(finished / "elsewhere")
    assert cifar.main(["--evaluate", str(finished)]) == 2
    assert "recorded without its trained model" in capsys.readouterr().err
    (finished / "elsewhere").rename(finished / "models" / "sgd_seed0")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_loses_no_epoch(tmp_path, monkeypatch, capsys):
    train = Trainer.train
    calls = []

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(Trainer, "train", interrupted)
    command = arguments(tmp_path, "--methods", "sgd@2", "--epochs", "1")
    assert cifar.main(command) == 130
    assert "to continue, repeat" in capsys.readouterr().err
    assert cifar.main([*command[:-1], "2"]) != 0
    assert "holds a run of another configuration: epochs=1" in capsys.readouterr().err
    assert cifar.main(command) == 0
    record = read_record(tmp_path / "runs" / "sgd@2_seed0.json")
    assert record["resumed_after_epochs"] == [1]
    assert len(record["epochs"]) == 2
    assert len(calls) == 3


def start(out):
    command = ["--methods", "samar", "--epochs", "12", "--label-noise", "0.4"]
    out.mkdir(exist_ok=True)
    with (out / "log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cifar", *arguments(out, *command)],
            cwd=ROOT,
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # compiled sooner
            stdout=log,
            stderr=log,
        )


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_numbers_bit_for_bit(tmp_path):
    whole = start(tmp_path / "whole")
    killed = start(tmp_path / "killed")
    try:
        checkpoints = tmp_path / "killed" / "checkpoints" / "samar_seed0"
        limit = time.monotonic() + DEADLINE
        while not any((checkpoints / str(epoch)).exists() for epoch in range(2, 13)):
            assert killed.poll() is None, (tmp_path / "killed" / "log").read_text()
            assert time.monotonic() < limit
            time.sleep(0.005)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(DEADLINE) == -signal.SIGKILL
        name = Path("runs", "samar_seed0.json")
        assert not (tmp_path / "killed" / name).exists()
        resumed = start(tmp_path / "killed")
        assert resumed.wait(DEADLINE) == 0
        assert whole.wait(DEADLINE) == 0
    finally:
        whole.kill()
        killed.kill()
    record = read_record(tmp_path / "killed" / name)
    assert record["resumed_after_epochs"]
    assert numbers(record) == numbers(read_record(tmp_path / "whole" / name))
    assert record["epochs"][-1]["adaptive_weight"] > 0


def test_label_noise_is_in_the_training_labels_alone(tmp_path, monkeypatch):
    seen = {}

    def train(self, state, data, *args):
        seen["train"] = data.labels
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Trainer, "compile", lambda *args: None)
    command = arguments(tmp_path, "--methods", "sgd", "--label-noise", "0.25")
    cifar.main(command)
    clean = read(command).dataset()
    assert (clean.train_labels != seen["train"]).sum() == 16


def test_seeds_change_the_training_but_not_the_images():
    dataset = read(TINY).dataset()
    assert len(dataset.train_labels) == 64
    assert len(dataset.test_labels) == 40
    again = read([*TINY, "--seed-start", "5"]).dataset()
    assert (again.train_images == dataset.train_images).all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "adam"], "Unknown method 'adam'; the methods are"),
        (["--methods", "sam:rho=-1"], "Method 'sam:rho=-1'"),
        (["--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["--lr", "-1"], "--lr must be in [0, inf), got -1"),
        (["--label-smoothing", "1"], "--label-smoothing must be in [0, 1), got 1"),
        (["--label-noise", "2"], "--label-noise must be in [0, 1), got 2.0"),
        (["--train-images", "9999"], "9999"),
        (["--width", "-1"], "width=-1"),
        (["--data", "no/such/place"], "no/such/place"),
        (["--human-labels", "worse_label"], "'digits' has none; they are those of the file"),
        (["--human-labels", "worse_label", "--label-noise", "0.4"], "leave out --label-noise 0.4"),
    ],
)
def test_misuse_is_one_line(tmp_path, capsys, more, message):
    assert cifar.main(arguments(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_run_trains_with_the_labels_by_people(tmp_path, monkeypatch):
    whole = data.load()
    wrong = (whole.train_labels + 1) % 10
    human = dataclasses.replace(whole, human_labels={"worse_label": wrong})
    monkeypatch.setattr("benchmarks.core.classification.experiment.load", lambda _: human)
    more = ["--methods", "sgd", "--epochs", "1", "--human-labels", "worse_label"]
    command = [*arguments(tmp_path, *more), "--train-images", "640", "--batch-size", "32"]
    assert cifar.main(command) == 0
    record = read_record(tmp_path / "runs" / "sgd_seed0.json")
    assert record["config"]["human_labels"] == "worse_label"
    assert "training labels by people (worse_label)" in (tmp_path / "summary.md").read_text()
    # What is learnt is the shift: right on the labels that it saw, and never on the true ones.
    last = record["epochs"][-1]
    assert last["train_eval_top1"] > 2 * last["test_top1"]


def test_an_unfinished_comparison_of_another_kind_is_found_before_training(finished):
    arguments = read([*TINY, "--lr", "0.2"])
    with pytest.raises(ValueError, match="another configuration"):
        ImageComparison(arguments, arguments.dataset(), finished)
