"""Measuring trained models: against a dense Hessian, from the command line, and its report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from benchmarks.cifar import __main__ as cifar
from benchmarks.core.records import read_record, read_records, write_record
from benchmarks.sharpness import __main__ as sharpness
from benchmarks.sharpness import experiment
from benchmarks.sharpness import report as sharpness_report
from benchmarks.sharpness.measures import Budget, Model, measure

TRAINING = ["--train-images=64", "--test-images=32", "--width=0.25", "--batch-size=32"]
BUDGET = ["--examples=32", "--products=5", "--samples=2"]


def logistic_regression():
    """Two batches of a problem of 12 parameters, near its minimum."""
    key, label_key = jax.random.split(jax.random.key(0))
    inputs = jax.random.normal(key, (16, 4))
    labels = jax.random.randint(label_key, (16,), 0, 3)

    def loss_fn(params, batch):
        x, y = batch
        return -jax.nn.log_softmax(x @ params["w"])[jnp.arange(len(y)), y].mean()

    batches = [(inputs[:8], labels[:8]), (inputs[8:], labels[8:])]
    params = {"w": 0.1 * jax.random.normal(label_key, (4, 3))}
    return Model(loss_fn, params, batches), lambda p: loss_fn(p, (inputs, labels))


@pytest.mark.slow
def test_the_measures_are_those_of_the_dense_hessian():
    model, whole = logistic_regression()
    budget = Budget(examples=16, products=12, samples=30)
    found = dict(measure(model, budget, jax.random.key(1)))
    assert list(found) == list(budget.gradients())

    flat, unravel = ravel_pytree(model.params)
    dense = jax.hessian(lambda v: whole(unravel(v)))(flat)
    values = np.sort(np.linalg.eigvalsh(dense))[::-1]
    np.testing.assert_allclose(found["top_eigenvalues"]["values"], values[:5], rtol=1e-4)
    scaled = np.abs(flat)[:, None] * dense * np.abs(flat)
    top = np.linalg.eigvalsh(scaled).max()
    np.testing.assert_allclose(found["adaptive_top_eigenvalue"]["value"], top, rtol=1e-4)
    for name, truth in (("trace", values.sum()), ("frobenius_norm", np.linalg.norm(values))):
        error = found[name]["standard_error"]
        assert 0 < error < 0.25 * truth
        assert abs(found[name]["value"] - truth) < 4 * error
    density = found["density"]
    np.testing.assert_allclose(np.sum(density["weights"]), 1, rtol=1e-4)
    assert max(density["nodes"]) <= values[0] * (1 + 1e-4)

    loss = float(whole(model.params))
    np.testing.assert_allclose(found["loss"]["value"], loss, rtol=1e-5)
    for line in ("random", "top_eigenvector"):
        np.testing.assert_allclose(found["landscape"][line][10], loss, rtol=1e-5)
    # A convex loss: at worst more than on average, and most when every batch has its own way up.
    assert found["m_sharpness"]["value"] > found["worst_case"]["value"] > 0
    assert found["average_case"]["value"] < found["worst_case"]["value"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch, with label noise."""
    out = tmp_path_factory.mktemp("trained")
    command = [*TRAINING, "--methods=sgd", "--seeds=1", "--epochs=1", "--label-noise=0.25"]
    assert cifar.main([*command, "--out", str(out)]) == 0
    return out


def test_a_trained_model_is_measured_once(trained, monkeypatch, capsys):
    def measured(model, budget, key):
        loss = np.mean([jax.jit(model.loss_fn)(model.params, batch) for batch in model.batches])
        made = made_record("sgd", 0, 3.0)["measures"]
        made["loss"] = {"value": float(loss), "grad_norm": 1.0}
        return iter([(name, made[name]) for name in budget.gradients()])

    monkeypatch.setattr(experiment, "measure", measured)
    assert sharpness.main([str(trained), *BUDGET]) == 0
    assert "adaptive worst case" in capsys.readouterr().out
    record = read_record(trained / "sharpness" / "runs" / "sgd_seed0.json")
    assert record["examples"] == 32
    assert record["gradients"]["top_eigenvalues"] == 10
    # The same images, labels, model and mode as the training's own evaluation.
    expected = read_record(trained / "runs" / "sgd_seed0.json")["epochs"][-1]["train_eval_loss"]
    np.testing.assert_allclose(record["measures"]["loss"]["value"], expected, rtol=1e-5)
    for name in ("summary.md", "summary.json", "results.csv", "measures.png", "spectrum.png"):
        assert (trained / "sharpness" / name).stat().st_size > 0

    monkeypatch.setattr(experiment, "measure", None)
    assert sharpness.main([str(trained), *BUDGET]) == 0
    assert sharpness.main([str(trained), *BUDGET[1:], "--examples=64"]) == 2
    assert "examples=32 there but 64 now" in capsys.readouterr().err


def test_misuse_is_one_line(trained, tmp_path, capsys):
    for command, message in (
        ([str(tmp_path)], "holds no record"),
        ([str(trained), "--products=4"], "--products must be 5 or more, got 4."),
    ):
        assert sharpness.main(command) == 2
        assert message in capsys.readouterr().err
    for path, record in read_records(trained).items():
        record["config"]["data_crc32"] += 1
        write_record(tmp_path / "others" / "runs" / path.name, record)
        record["config"]["data_crc32"] -= 1
        write_record(tmp_path / "without" / "runs" / path.name, record)
    assert sharpness.main([str(tmp_path / "others")]) == 2
    assert "was trained on other images" in capsys.readouterr().err
    assert sharpness.main([str(tmp_path / "without"), *BUDGET]) == 2
    assert "recorded without its trained model" in capsys.readouterr().err


def made_record(method, seed, top):
    def estimate(value):
        return {"value": value, "standard_error": 0.1}

    distances = [-1.0, 0.0, 1.0]
    return {
        "format": 1,
        "config": {
            "dataset": "digits",
            "model": "cnn",
            "width": 1.0,
            "train_images": 100,
            "test_images": 50,
            "epochs": 3,
            "batch_size": 32,
            "label_noise": 0.0,
            "label_smoothing": 0.0,
            "method": method,
            "epoch_factor": 1,
            "hyperparameters": {},
            "seed": seed,
        },
        "versions": {"jax": "0"},
        "hardware": {"backend": "cpu", "device": "a CPU", "count": 2},
        "parameters": 1000,
        "examples": 64,
        "gradients": {"loss": 1.0, "top_eigenvalues": 40.0},
        "final": {"test_top1": 0.5},
        "measures": {
            "loss": {"value": 0.1, "grad_norm": 0.2},
            "top_eigenvalues": {"values": [top, 4.0, 3.0, 2.0, 1.0], "residuals": [1e-3] * 5},
            "adaptive_top_eigenvalue": {"value": 1.0, "residual": 1e-3},
            "trace": estimate(50.0),
            "frobenius_norm": estimate(12.0),
            "density": {"nodes": [0.0, top], "weights": [0.9, 0.1]},
            "worst_case": {"value": 0.3},
            "adaptive_worst_case": {"value": 0.4},
            "m_sharpness": {"value": 0.5},
            "average_case": estimate(0.1),
            "landscape": {
                "distances": distances,
                "random": [0.2, 0.1, 0.2],
                "top_eigenvector": [0.3, 0.1, 0.3],
            },
        },
    }


def test_the_report_says_whose_top_eigenvalue_is_smaller(tmp_path):
    for seed, ratio in enumerate((0.5, 0.25, 1.5)):
        write_record(tmp_path / "runs" / f"sgd{seed}.json", made_record("sgd", seed, 10.0 + seed))
        sam = made_record("sam", seed, ratio * (10 + seed))
        write_record(tmp_path / "runs" / f"sam{seed}.json", sam)
    text = sharpness_report.write(tmp_path)
    assert "`sam` 0.50, 0.25, 1.50 (smaller in 2 of 3)." in text
    assert "| sgd    | 11.0 ± 1.0     | 11.0 ± 1.0  | 50.0 ± 0.0 |" in text
    assert "| top eigenvalues | 40        |" in text
    assert "a top eigenvalue is 0.0004 of it" in " ".join(text.split())  # 0.001 / 2.75
    assert (tmp_path / "results.csv").read_text().count("\n") == 7


def test_a_report_without_sgd_compares_nothing(tmp_path):
    write_record(tmp_path / "runs" / "sam0.json", made_record("sam", 0, 3.0))
    assert "seed by seed" not in sharpness_report.write(tmp_path)
