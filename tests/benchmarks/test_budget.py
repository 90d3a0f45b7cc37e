"""Equal budgets: what methods cost, what they are given, and what the map says of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data
from benchmarks.budget import __main__ as command
from benchmarks.budget import map as budget_map
from benchmarks.budget import report
from benchmarks.budget.experiment import BudgetedImages, Training
from benchmarks.budget.methods import BASE, table
from benchmarks.budget.tasks import TASKS, split
from benchmarks.core.methods import parse_method
from benchmarks.core.records import read_record

COSTS = {
    BASE: 1,
    "sam": 2,
    "early_25": 1.25,
    "early_50": 1.5,
    "late_25": 1.25,
    "late_50": 1.5,
    "every_4": 1.25,
    "every_2": 1.5,
    "random_25": 1.25,
    "random_50": 1.5,
    "looksam": 1.2,
    "quarter": 1.25,
    "late_25_quarter": 1.0625,
    "stale_plus": 1,
    "stale_minus": 1,
    "momentum_minus": 1,
    "momentum_plus": 1,
    "friendly_sam": 2,
    "samar": 2,
}


@pytest.fixture(scope="module")
def digits():
    return data.load()


def test_what_a_step_costs():
    rows = table("clean")
    assert set(rows) == set(COSTS)
    for name, cost in COSTS.items():
        # Of 10,000 random steps a share is met within a few standard deviations.
        tolerance = 0.02 if "random" in name else 1e-3
        assert parse_method(name, rows).gradients == pytest.approx(cost, abs=tolerance), name
    assert set(table("vit")) == {*COSTS, "after_warm_up"}
    assert parse_method("after_warm_up", table("vit")).gradients == pytest.approx(1.95)


def test_every_method_spends_the_budget_over_its_own_schedule(digits, tmp_path):
    comparison = BudgetedImages(
        Training(task="clean", budget=40, batch_size=64, width=0.25),
        data.take(digits, 128, 40, 0),
        tmp_path,
    )
    for name, cost in COSTS.items():
        spec = parse_method(name, table("clean"))
        epochs = comparison.epochs(spec)
        assert abs(epochs * cost - 40) < 0.5 * cost + 0.5
        assert comparison.parts((spec, 0)) == [spec.gradients] * epochs
        schedule = comparison.schedule(spec)
        assert float(schedule(0)) == pytest.approx(0.1)
        assert float(schedule(2 * epochs)) == pytest.approx(0, abs=1e-7)


def test_the_search_has_the_same_train_images_and_others_with_labels_as_wrong(digits):
    for task in ("clean", "symmetric"):
        final, search = split(digits, TASKS[task], 600, 300, 200)
        np.testing.assert_array_equal(final.train_images, search.train_images)
        np.testing.assert_array_equal(final.train_labels, search.train_labels)
        assert (len(final.train_labels), len(final.test_labels)) == (600, 200)
        assert len(search.test_labels) == 300
        train = {image.tobytes() for image in final.train_images}
        held = {image.tobytes() for image in search.test_images}
        test = {image.tobytes() for image in final.test_images}
        assert not train & held
        assert not held & test
        true = {
            image.tobytes(): label
            for image, label in zip(digits.train_images, digits.train_labels, strict=True)
        }
        pairs = zip(search.test_images, search.test_labels, strict=True)
        wrong = np.mean([true[image.tobytes()] != label for image, label in pairs])
        assert wrong == pytest.approx(TASKS[task].label_noise, abs=0.08)
    with pytest.raises(ValueError, match="needs the labels by people 'worse_label', and 'digits'"):
        split(digits, TASKS["human"], 600, 300, 200)


def test_people_label_the_held_out_images_too(digits):
    human = (digits.train_labels + 3) % 10
    whole = dataclasses.replace(digits, human_labels={"worse_label": human})
    final, search = split(whole, TASKS["human"], 600, 300, 200)
    np.testing.assert_array_equal(final.human_labels["worse_label"], (final.train_labels + 3) % 10)
    _, clean = split(whole, TASKS["clean"], 600, 300, 200)
    np.testing.assert_array_equal(search.test_labels, (clean.test_labels + 3) % 10)


def test_the_command_searches_then_compares(tmp_path, capsys):
    sizes = ["--train-images", "128", "--validation-images", "50", "--test-images", "40"]
    argv = [
        *("--methods", "base,late_25_quarter", "--trials", "2", "--seeds", "1", "--budget", "4"),
        *(*sizes, "--width", "0.25", "--out", str(tmp_path)),
    ]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert "| late_25_quarter |" in printed
    assert "of 2 tried" in " ".join(printed.split())
    tried = [
        read_record(path) for path in (tmp_path / "tuning" / "runs").glob("late_25_quarter*.json")
    ]
    assert len(tried) == 2
    best = max(tried, key=lambda record: record["final"]["test_top1"])
    record = read_record(tmp_path / "runs" / "late_25_quarter_seed0.json")
    assert record["config"]["hyperparameters"] == best["config"]["hyperparameters"]
    assert record["final"]["gradients"] == pytest.approx(1.0625, abs=1e-3)
    assert len(record["epochs"]) == record["final"]["epochs"] == 4
    # The last quarter ascends, and no other step.
    norms = [entry["perturbation_norm"] for entry in record["epochs"]]
    assert norms[:3] == [0, 0, 0]
    assert norms[3] > 0
    # Repeated, nothing is trained again; nor where the search has its records alone.
    (tmp_path / "tuning" / "tuning.db").unlink()
    path = tmp_path / "runs" / "base_seed0.json"
    before = path.stat().st_mtime_ns
    assert command.main(argv) == 0
    assert path.stat().st_mtime_ns == before
    assert len(list((tmp_path / "tuning" / "runs").iterdir())) == 4


def test_another_network_may_be_named(tmp_path, capsys):
    argv = ["--methods", "base", "--trials", "1", "--seeds", "1", "--budget", "1"]
    argv += ["--train-images", "64", "--validation-images", "20", "--test-images", "20"]
    assert command.main([*argv, "--model", "vit", "--width", "0.25", "--out", str(tmp_path)]) == 0
    assert "mirrored; vit x0.25" in " ".join(capsys.readouterr().out.split())
    assert command.main(["--task", "ETTh2", "--model", "vit"]) == 2
    assert "--model 'vit' classifies images" in capsys.readouterr().err
    assert command.main([*argv, "--model", "nothing", "--out", str(tmp_path / "none")]) == 2
    assert "no such model" in capsys.readouterr().err


def test_forecasts_share_a_budget_too(tmp_path, capsys, monkeypatch):
    whole = command.load_series("airports", Path())
    short = dataclasses.replace(whole, values=whole.values[:3000], ends=(2000, 2500, 3000))
    monkeypatch.setattr(command, "load_series", lambda name, path: short)
    argv = [
        *("--task", "airports", "--methods", "base,late_25_quarter,random_50", "--trials", "1"),
        *("--seeds", "2", "--budget", "2", "--out", str(tmp_path)),
    ]
    assert command.main(argv) == 0
    assert "lowest validation error, of 1 tried" in " ".join(capsys.readouterr().out.split())
    record = read_record(tmp_path / "runs" / "late_25_quarter_seed0.json")
    assert "test_mse" not in read_record(next((tmp_path / "tuning/runs").iterdir()))["final"]
    assert [entry["ascended"] for entry in record["epochs"]] == pytest.approx([0, 0.5], abs=0.02)
    final = record["final"]
    assert final["gradients"] == pytest.approx(1.0625, abs=1e-3)
    errors = [entry["validation_mse"] for entry in record["epochs"]]
    assert final["best_epoch"] == np.argmin(errors) + 1
    assert (final["test_mse"] == final["last_test_mse"]) is (final["best_epoch"] == 2)
    # At random the share is nearly met, and the budget with it.
    random = read_record(tmp_path / "runs" / "random_50_seed0.json")
    assert len(random["epochs"]) == 1
    assert random["epochs"][0]["ascended"] == pytest.approx(0.5, abs=0.2)

    found = json.loads((tmp_path / "summary.json").read_text())["methods"]
    scores = {
        name: [-np.log(read_record(path)["final"]["test_mse"]) for path in sorted(paths)]
        for name in ("base", "random_50")
        for paths in [(tmp_path / "runs").glob(f"{name}_seed*.json")]
    }
    gained = np.subtract(scores["random_50"], scores["base"])
    assert found["random_50"]["minus_base"]["mean"] == pytest.approx(gained.mean())


def summary(task, **accuracies):
    """What a task's `summary.json` says, of accuracies by method and seed."""
    spread = lambda values: {"mean": float(np.mean(values)), "std": 0.0, "seeds": len(values)}
    methods = {
        name: {
            "gradients": spread([COSTS[name]]),
            "test_top1": spread(values),
            "scores": {str(seed): value for seed, value in enumerate(values)},
        }
        for name, values in accuracies.items()
    }
    for name, row in methods.items():
        if name != BASE:
            row["minus_base"] = report.gain(methods, name, BASE)
    return {"task": task, "budget": 40, "methods": methods}


def test_verdicts_from_fixed_results(tmp_path, capsys):
    base = np.array([0.50, 0.52, 0.51])
    tasks = {
        "clean": {
            BASE: base,
            "sam": base + np.array([0.001, -0.001, 0.0]),
            "late_25": base + 0.03,
            "every_4": base + 0.01,
            "late_25_quarter": base + np.array([0.001, 0.0, -0.001]),
            "stale_plus": base - 0.01,
            "stale_minus": base + np.array([0.01, 0.011, 0.009]),
        },
        "symmetric": {
            BASE: base - 0.1,
            "sam": base - 0.06,
            "early_25": base - 0.07,
            "late_25": base - 0.09,
        },
        "human": {BASE: base - 0.1, "sam": base - np.array([0.08, 0.081, 0.079])},
        "human_few": {"early_25": base - 0.02, "late_25": base},
        "vit": {"late_25": base, "every_4": base + 0.01},
        "ETTh2": {"early_25": base, "late_25": base, "every_4": base},
    }
    for task, found in tasks.items():
        (tmp_path / task).mkdir()
        content = summary(task, **{name: values.tolist() for name, values in found.items()})
        (tmp_path / task / "summary.json").write_text(json.dumps(content))
    folders = [str(tmp_path / task) for task in reversed(tasks)]
    assert budget_map.main([*folders, "--out", str(tmp_path / "map")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "map" / "figures" / "map.png").exists()
    verdicts = {}
    for line in text.split("## What was expected")[1].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and ": " in cells[2]:
            verdicts[cells[2]] = (cells[0], cells[4])
    assert verdicts["clean: late_25 - every_4"] == ("i", "holds")
    assert verdicts["symmetric: early_25 - late_25"] == ("ii", "holds")
    assert verdicts["human_few: early_25 - late_25"] == ("ii", "**fails**")
    assert verdicts["vit: late_25 - every_4"] == ("i", "**fails**")
    assert not any(where.startswith("ETTh2") for where in verdicts)
    assert verdicts["clean: late_25_quarter - sam"] == ("iii", "holds")
    assert verdicts["clean: stale_plus - stale_minus"] == ("iv", "**fails**")
    assert verdicts["clean: sam - base"] == ("vi", "not resolved")
    assert verdicts["human: sam - base"] == ("vi", "holds")
    # 4 points by random labels, 2 by people's.
    assert "| v   | SAM gains by people's wrong labels what it gains by random ones" in text
    assert "-2.00 ± 0.06 points" in text
    assert budget_map.main([folders[0], folders[0]]) == 2
    assert "another folder has the task" in capsys.readouterr().err
    assert budget_map.main([str(tmp_path)]) == 2
