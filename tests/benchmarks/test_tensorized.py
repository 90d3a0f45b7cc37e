"""The noise-level comparison from its command line, its combined report, and its timing."""

import json

import pytest

from benchmarks.cifar import __main__ as cifar
from benchmarks.core import command
from benchmarks.core.records import FORMAT, read_record, write_record
from benchmarks.core.training import Trainer
from benchmarks.tensorized import __main__ as tensorized
from benchmarks.tensorized import report as tensorized_report

TINY = ["--train-images=64", "--test-images=40", "--width=0.25", "--batch-size=32", "--seeds=1"]


def arguments(out, *more):
    return [*TINY, "--epochs=1", "--label-noise=0.5,0", "--methods=sgd,das", "--out", out, *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was stopped within the second noise level, and continued."""
    out = tmp_path_factory.mktemp("finished")
    patch, calls = pytest.MonkeyPatch(), []
    train = Trainer.train

    def counted(self, *args):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, *args)

    with patch.context() as context:
        context.setattr(Trainer, "train", counted)
        stopped = tensorized.main(arguments(str(out)))
        continued = tensorized.main(arguments(str(out)))
    return out, (stopped, continued), calls


@pytest.mark.slow
def test_a_stopped_comparison_continues_where_it_was(finished):
    out, status, calls = finished
    assert status == (130, 0)
    assert len(calls) == 4 + 1  # the stopped one again, and no other
    assert {path.name for path in out.glob("noise*/runs/*")} == {"sgd_seed0.json", "das_seed0.json"}
    assert len(list(out.glob("noise*/runs/*"))) == 4


@pytest.mark.slow
def test_noise_levels_share_their_programs(finished):
    _, _, calls = finished
    assert calls[0] is calls[2]  # sgd at both levels
    assert calls[1] is calls[3]


@pytest.mark.slow
def test_each_level_has_its_report_and_all_have_one(finished):
    out, _, _ = finished
    for name in ("noise0/summary.md", "noise50/summary.md", "summary.md", "summary.csv"):
        assert (out / name).stat().st_size > 0
    assert (out / "accuracy.png").stat().st_size > 0
    rows = json.loads((out / "summary.json").read_text())
    assert [(row["label_noise"], row["method"]) for row in rows] == [
        (0.0, "sgd"),
        (0.0, "das"),
        (0.5, "sgd"),
        (0.5, "das"),
    ]


@pytest.mark.slow
def test_a_record_has_the_norm_deviation_of_every_layer(finished):
    out, _, _ = finished
    record = read_record(out / "noise50" / "runs" / "das_seed0.json")
    assert record["config"]["label_noise"] == 0.5
    deviation = record["norm_deviation"]
    assert len(deviation["start"]) == 4
    assert deviation["start"].keys() == deviation["end"].keys()
    assert deviation["start"] != deviation["end"]
    sgd = read_record(out / "noise50" / "runs" / "sgd_seed0.json")["norm_deviation"]
    assert sgd["start"] == deviation["start"]
    assert sgd["end"] != deviation["end"]


def make_record(method, seed, noise, accuracy, **config):
    final = dict.fromkeys(("test_top1", "last10_test_top1", "last10_train_eval_top1"), accuracy)
    final |= {"test_top5": 1.0, "generalization_gap": 0.0}
    return {
        "format": FORMAT,
        "config": {
            "dataset": "cifar10-jpeg",
            "model": "tr-cnn",
            "width": 1.0,
            "train_images": 10,
            "test_images": 10,
            "epochs": 1,
            "batch_size": 5,
            "label_noise": noise,
            "label_smoothing": 0.0,
            "method": method,
            "epoch_factor": 1,
            "seed": seed,
            **config,
        },
        "versions": {"jax": "1", "flax": "2", "optax": "3"},
        "hardware": {"backend": "cpu", "device": "a processor", "count": 2},
        "parameters": 12345,
        "epochs": [{"test_top1": accuracy, "compute_seconds": 1.0}],
        "norm_deviation": {"start": {}, "end": {"a": 1.0 + seed, "b": 3.0 + seed}},
        "final": final,
    }


def made_anew(folders):
    return command.report(tensorized_report.write, "benchmarks.tensorized.report", folders)


@pytest.fixture
def folder(tmp_path):
    for noise, level in ((0.0, "noise0"), (0.4, "noise40")):
        for seed in (0, 1):
            for method, accuracy in (("sgd", 0.5 - noise / 2), ("das", 0.51 + 0.02 * seed)):
                record = make_record(method, seed, noise, accuracy)
                write_record(tmp_path / level / "runs" / f"{method}{seed}.json", record)
    return tmp_path


def test_the_table_has_a_row_a_method_and_a_column_a_level(folder):
    assert made_anew([str(folder)]) == 0
    lines = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# CIFAR-10 (JPEG): tr-cnn x1 (12,345 parameters)"
    assert "| method | 0 % wrong labels | 40 % wrong labels |" in lines
    assert "| sgd    | 50.00 ± 0.00     | 30.00 ± 0.00      |" in lines
    assert "| das    | 52.00 ± 1.41     | 52.00 ± 1.41      |" in lines
    assert "| das    | +2.00 ± 1.00     | +22.00 ± 1.00     |" in lines
    assert "| das    | 2.5 ± 0.71       | 2.5 ± 0.71        |" in lines
    csv = (folder / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert csv[0].startswith("label_noise,method,seeds,last10_test_top1_mean")
    assert len(csv) == 1 + 4


def test_levels_that_differ_in_more_than_noise_are_refused(folder, capsys):
    record = make_record("sgd", 0, 0.6, 0.3, epochs=7)
    write_record(folder / "noise60" / "runs" / "sgd.json", record)
    assert made_anew([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "epochs=7 there but 1 now" in error or "epochs=1 there but 7 now" in error


def test_an_empty_folder_is_named(tmp_path, capsys):
    assert made_anew([str(tmp_path)]) == 2
    assert "holds no noise*/runs/*.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--label-noise", "0,2"], "--label-noise '0.0,2.0' must be shares in [0, 1)"),
        (["--label-noise", "0,0"], "none twice"),
        (["--model", "cnn"], "Method 'das' cannot be built: it balances the cores"),
        (["--methods", "das:beta=1"], "Method 'das:beta=1' cannot be built"),
    ],
)
def test_misuse_is_one_line(tmp_path, capsys, more, message):
    assert tensorized.main(arguments(str(tmp_path), *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_balancing_method_on_a_dense_model_is_found_before_training(tmp_path, capsys):
    command = [*TINY, "--epochs=1", "--methods=sgd,das", "--model=cnn", "--out", str(tmp_path)]
    assert cifar.main(command) == 2
    assert "choose a tensorized model" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*"))
