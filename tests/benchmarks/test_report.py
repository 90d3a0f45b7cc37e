"""The report: every number of its tables from known records, and files that appear whole."""

import csv
import json
import statistics

import pytest

from benchmarks.core import command
from benchmarks.core.classification import report
from benchmarks.core.classification.experiment import early_stopped, final_metrics
from benchmarks.core.records import FORMAT, by_method, read_record, write_record

SEEDS = (0, 1, 2)
EPOCHS = 12


def make_record(method, seed, accuracy, seconds, epochs=EPOCHS, **config):
    """A run whose test accuracy rises linearly to `accuracy` in epochs of `seconds`."""
    history = []
    for epoch in range(1, epochs + 1):
        entry = {
            "epoch": epoch,
            "lr": 0.1,
            "train_loss": 1.0,
            "train_top1": 0.8,
            "train_eval_loss": 0.5,
            "train_eval_top1": 0.9,
            "test_loss": 1.5 - accuracy * epoch / epochs,
            "test_top1": accuracy * epoch / epochs,
            "test_top5": 0.95,
            "test_ece": 0.1,
            "test_top1_halves": [accuracy * epoch / epochs] * 2,
            "wall_seconds": 2 * seconds,
            "compute_seconds": seconds,
        }
        if method == "samar":
            entry |= {"adaptive_weight": 1.0 + epoch / 50, "sharpness_ratio": 0.9 + seed / 10}
        history.append(entry)
    return {
        "format": FORMAT,
        "config": {
            "dataset": "digits",
            "model": "cnn",
            "width": 1.0,
            "train_images": 1000,
            "test_images": 300,
            "epochs": EPOCHS,
            "batch_size": 64,
            "label_noise": 0.4,
            "label_smoothing": 0.0,
            "method": method,
            "epoch_factor": epochs // EPOCHS,
            "hyperparameters": {} if method == "sgd" else {"rho": 0.05},
            "seed": seed,
            **config,
        },
        "versions": {"jax": "1", "flax": "2", "optax": "3"},
        "hardware": {"backend": "cpu", "device": "a processor", "count": 2},
        "parameters": 12345,
        "compile_seconds": 3.0,
        "epochs": history,
        "final": final_metrics(history),
    }


@pytest.fixture
def records():
    runs = []
    for seed in SEEDS:
        runs.append(make_record("samar", seed, 0.66, 2.0))
        runs.append(make_record("sgd", seed, 0.60 + seed / 100, 1.0 + seed / 1000))
        runs.append(make_record("sgd@2", seed, 0.63, 1.0, epochs=2 * EPOCHS))
        runs.append(make_record("sam", seed, 0.64 + 2 * seed / 100, 2.0))
    return runs


@pytest.fixture
def folder(tmp_path, records):
    for index, record in enumerate(records):
        write_record(tmp_path / "runs" / f"{index}.json", record)
    return tmp_path


def made_anew(folders):
    return command.report(report.write, "benchmarks.cifar.report", folders)


def rows_of(records):
    return {row["method"]: row for row in report.summarize(by_method(records))}


def test_final_metrics_are_of_the_last_epoch_and_the_last_ten():
    final = make_record("sgd", 0, 0.6, 1.0)["final"]
    last10 = statistics.mean(0.6 * epoch / 12 for epoch in range(3, 13))
    assert final["test_top1"] == pytest.approx(0.6)
    assert final["last10_test_top1"] == pytest.approx(last10)
    assert final["generalization_gap"] == pytest.approx(0.9 - last10)


def test_early_stopping_chooses_on_one_half_and_counts_on_the_other():
    halves = [(0.5, 0.1), (0.9, 0.3), (0.9, 0.2), (0.4, 0.8)]
    # Best on the first half after two epochs, the second is then at 0.3; the other way 0.4.
    assert early_stopped(halves) == pytest.approx((0.3 + 0.4) / 2)
    assert make_record("sgd", 0, 0.6, 1.0)["final"]["early_stopped_top1"] == pytest.approx(0.6)


def test_what_older_records_do_not_say_has_no_column(records):
    runs = by_method(records)
    text = report.to_markdown(records[0], report.summarize(runs), runs)
    assert "| early stopped |" in text
    assert "| NLL " in text
    assert "ECE %" in text
    for record in records:
        for name in ("early_stopped_top1", "test_ece"):
            del record["final"][name]
    text = report.to_markdown(records[0], report.summarize(runs), runs)
    assert not any(word in text for word in ("early stopped", "NLL", "ECE"))


def test_rows_come_in_the_methods_order_with_mean_and_deviation(records):
    rows = rows_of(records)
    assert list(rows) == ["sgd", "sgd@2", "sam", "samar"]
    assert rows["sgd"]["test_top1"] == pytest.approx({"mean": 0.61, "std": 0.01, "seeds": 3})
    assert rows["samar"]["test_top1"]["std"] == pytest.approx(0)


def test_differences_are_paired_by_seed(records):
    share = statistics.mean(epoch / 12 for epoch in range(3, 13))
    found = rows_of(records)["sam"]["last10_test_top1_minus_sgd"]
    # seeds differ by .04, .05, .06 of the final accuracy
    expected = {"mean": 0.05 * share, "standard_error": 0.01 * share / 3**0.5, "seeds": 3}
    assert found == pytest.approx(expected)
    unpaired = [record for record in records if record["config"]["seed"] != 1]
    unpaired.append(make_record("sam", 7, 0.9, 2.0))
    found = rows_of(unpaired)["sam"]["last10_test_top1_minus_sgd"]
    assert found["seeds"] == 2
    assert found["mean"] == pytest.approx(0.05 * share)


def test_equal_time_is_the_shortest_sgd_run_and_takes_whole_epochs(records):
    assert report.equal_time(by_method(records)) == pytest.approx(12.0)
    rows = rows_of(records)
    assert rows["sam"]["top1_at_equal_time"]["mean"] == pytest.approx(0.66 * 6 / 12)
    assert rows["sgd@2"]["top1_at_equal_time"]["mean"] == pytest.approx(0.63 * 12 / 24)
    # Seeds 1 and 2 of SGD are a little slower: their twelfth epoch had not ended.
    sgd = [0.60, 0.61 * 11 / 12, 0.62 * 11 / 12]
    assert rows["sgd"]["top1_at_equal_time"]["mean"] == pytest.approx(statistics.mean(sgd))
    sam = [accuracy * 6 / 12 for accuracy in (0.64, 0.66, 0.68)]
    gaps = [a - b for a, b in zip(sam, sgd, strict=True)]
    difference = rows["sam"]["top1_at_equal_time_minus_sgd"]
    assert difference["mean"] == pytest.approx(statistics.mean(gaps))
    assert difference["standard_error"] == pytest.approx(statistics.stdev(gaps) / 3**0.5)
    slow = make_record("sam", 0, 0.6, 100.0)
    assert report.accuracy_at(slow, 12.0) is None


def test_times_are_relative_to_sgd(records):
    rows = rows_of(records)
    assert rows["sam"]["relative_epoch_time"] == pytest.approx(2.0, rel=2e-3)
    assert rows["sgd@2"]["relative_epoch_time"] == pytest.approx(1.0, rel=2e-3)
    assert rows["sgd@2"]["relative_total_time"] == pytest.approx(2.0, rel=2e-3)


def test_one_seed_and_no_sgd_leave_the_rest_of_the_table():
    text_rows = rows_of([make_record("sam", 0, 0.6, 1.0)])
    assert text_rows["sam"]["test_top1"] == {"mean": 0.6, "std": None, "seeds": 1}
    assert text_rows["sam"]["top1_at_equal_time"]["mean"] is None
    assert "relative_epoch_time" not in text_rows["sam"]


def test_the_folder_gets_table_csv_json_and_figures(folder, records):
    assert made_anew([str(folder)]) == 0
    text = (folder / "summary.md").read_text(encoding="utf-8")
    assert "| sam    | 66.00 ± 2.00 |" in text
    assert "40 % wrong training labels" in text
    assert "CPU s an epoch" in text
    with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(records)
    assert float(lines[0]["training_seconds"]) == pytest.approx(24.0)
    assert json.loads((folder / "summary.json").read_text())[2]["method"] == "sam"
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("accuracy", "learning_curves", "accuracy_against_time", "samar")
    assert figures == {f"{name}.png" for name in names}
    assert not list(folder.rglob("*.tmp"))


def test_records_of_two_comparisons_are_refused(folder, capsys):
    write_record(folder / "runs" / "other.json", make_record("sgd", 9, 0.6, 1.0, batch_size=32))
    assert made_anew([str(folder)]) != 0
    assert "batch_size=32 there but 64 now" in capsys.readouterr().err


def test_missing_and_damaged_records_are_named(tmp_path, capsys):
    assert made_anew([str(tmp_path)]) != 0
    assert "holds no record" in capsys.readouterr().err
    damaged = tmp_path / "runs" / "sam.json"
    damaged.parent.mkdir()
    damaged.write_text("{", encoding="utf-8")
    assert made_anew([str(tmp_path)]) != 0
    assert "sam.json is not a run's record" in capsys.readouterr().err


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, {"format": FORMAT, "epochs": [{"train_loss": float("nan")}]})
    assert read_record(path)["epochs"] == [{"train_loss": None}]
