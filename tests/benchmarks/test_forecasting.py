"""Forecasting: the network, a step, resumption, the weights' changes, the report, the command."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
import pytest
from flax import nnx

from benchmarks.core.forecasting.experiment import best_epoch
from benchmarks.core.forecasting.task import Batches, Task
from benchmarks.core.methods import parse_method
from benchmarks.core.runs import Progress, complete
from benchmarks.data.series import Series
from benchmarks.forecasting import __main__ as command
from benchmarks.forecasting import methods, overview, report
from benchmarks.forecasting.experiment import Forecasting
from benchmarks.models.forecaster import Forecaster, InstanceNorm

CHANNELS, LOOK_BACK, HORIZON = 3, 8, 4


def make_series(times=120):
    rng = np.random.default_rng(0)
    values = np.sin(np.arange(times)[:, None] / (2 + np.arange(CHANNELS)))
    names = tuple("abc")
    values = values + 0.1 * rng.normal(size=values.shape)
    return Series("waves", names, values, (times // 2, 3 * times // 4, times))


def arguments(**changes):
    given = {"look_back": LOOK_BACK, "horizon": HORIZON, "stride": 1, "epochs": 3}
    return command.Configuration(**{**given, "patience": 2, "batch_size": 8, **changes})


def spec(text):
    return parse_method(text, methods.METHODS)


def make_task(**switches):
    given = {"attention": True, "revin": True, **switches}
    return Task(CHANNELS, LOOK_BACK, HORIZON, **given)


def perturbed(params):
    """Parameters in general position: no bias is zero, no scale one."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def test_instance_normalization_and_its_way_back():
    norm = InstanceNorm(CHANNELS)
    norm.scale[...], norm.shift[...] = jnp.array([1.0, 2.0, 0.5]), jnp.array([0.0, 1.0, -1.0])
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (2, CHANNELS, 50))
    normalized, statistics = norm.normalize(x)
    np.testing.assert_allclose(normalized.mean(-1), [[0, 1, -1]] * 2, atol=1e-5)
    np.testing.assert_allclose(normalized.std(-1), [[1, 2, 0.5]] * 2, rtol=1e-4)
    np.testing.assert_allclose(norm.undo(normalized, statistics), x, rtol=1e-5)


@pytest.mark.parametrize("batch", [(), (2,), (2, 5)])
def test_the_network_is_channel_attention_a_residual_and_one_dense_layer(batch):
    model = Forecaster(CHANNELS, LOOK_BACK, HORIZON, rngs=nnx.Rngs(0))
    nnx.update(model, perturbed(nnx.state(model)))
    x = jax.random.normal(jax.random.key(0), (*batch, CHANNELS, LOOK_BACK))
    z, statistics = model.norm.normalize(x)
    query, key, value = model.attention.query(z), model.attention.key(z), model.attention.value(z)
    weights = jax.nn.softmax(query @ jnp.swapaxes(key, -1, -2) / 4, axis=-1)
    assert weights.shape == (*batch, CHANNELS, CHANNELS)
    expected = model.norm.undo(model.head(z + weights @ value), statistics)
    assert expected.shape == (*batch, CHANNELS, HORIZON)
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_the_linear_network_and_that_without_normalization():
    x = jax.random.normal(jax.random.key(0), (2, CHANNELS, LOOK_BACK))
    model = Forecaster(CHANNELS, LOOK_BACK, HORIZON, attention=False, revin=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(x), model.head(x))
    assert len(jax.tree.leaves(nnx.state(model))) == 2


def test_the_published_size():
    shapes = nnx.eval_shape(lambda: Forecaster(7, 512, 96, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes)))
    assert count == 512 * 512 + 512 + 2 * (512 * 16 + 16) + 512 * 96 + 96 + 2 * 7


def test_windows_on_the_device_are_numpys_and_evaluation_counts_each_once():
    series = jnp.asarray(make_series().standardized())
    task = make_task()
    starts = np.array([[0, 7, 3], [50, 2, 11]])
    found = task.batch(Batches(series, jnp.asarray(starts)), 1)
    expected = np.stack([series[:, s : s + LOOK_BACK + HORIZON] for s in starts[1]])
    np.testing.assert_array_equal(found, expected)

    params, _ = task.init(0)
    # More than one batch, the last one filled up.
    starts = np.resize(np.arange(60), 131)
    rows = np.stack([series[:, s : s + LOOK_BACK + HORIZON] for s in starts])
    residuals = np.asarray(task.forecast(params, rows[..., :LOOK_BACK])) - rows[..., LOOK_BACK:]
    errors = task.evaluate(params, series, starts)
    assert errors["mse"] == pytest.approx(np.mean(residuals**2), rel=1e-5)
    assert errors["mae"] == pytest.approx(np.mean(np.abs(residuals)), rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sam", "sam_quarter"])
def test_a_training_step_is_the_one_written_out(tmp_path, name):
    rate, decay, rho = 2e-3, 0.5, 0.3
    own = "" if name == "adamw" else f":rho={rho}"
    row = spec(f"{name}:lr={rate}:decay={decay}{own}")
    run = Forecasting(make_series(), arguments(), tmp_path, tuning=False)
    state, _ = run.start((row, 0))
    task, params = run.task(row), state.train.params
    rows = jax.random.normal(jax.random.key(0), (8, CHANNELS, LOOK_BACK + HORIZON))

    def loss(params, rows):
        model = nnx.merge(task.graph, params)
        return jnp.mean((model(rows[..., :LOOK_BACK]) - rows[..., LOOK_BACK:]) ** 2)

    grads = jax.grad(loss)(params, rows)
    if name != "adamw":
        first = jax.grad(loss)(params, rows[:2] if name == "sam_quarter" else rows)
        norm = optax.tree.norm(first)
        moved = jax.tree.map(lambda w, g: w + rho * g / norm, params, first)
        grads = jax.grad(loss)(moved, rows)
    # The first step of Adam with decoupled decay, at the cosine's start.
    expected = jax.tree.map(
        lambda w, g: w - rate * (g / (jnp.abs(g) + 1e-8) + decay * w), params, grads
    )
    found = step(run.trainer(row), state.train, rows)
    for one, other, grad in zip(*map(jax.tree.leaves, (found, expected, grads)), strict=True):
        # Adam makes a unit of rounding where a gradient is zero, as that of the key's bias.
        seen = np.abs(grad) > 1e-5
        np.testing.assert_allclose(one[seen], other[seen], atol=1e-5)


def step(trainer, state, rows):
    count = rows.shape[0] * rows.shape[-1]
    series = jnp.swapaxes(rows, 0, 1).reshape(CHANNELS, count)
    starts = jnp.arange(rows.shape[0])[None] * rows.shape[-1]
    return trainer.step(state, Batches(series, starts), 0)[0].params


def test_settings_are_told_to_one_program_and_the_rate_is_a_cosine_with_restarts(tmp_path):
    run = Forecasting(make_series(), arguments(), tmp_path, tuning=False)
    one, other = spec("sam:lr=1e-3:rho=0.1"), spec("sam:lr=2e-3:rho=1")
    assert run.trainer(one) is run.trainer(other)
    assert run.trainer(spec("sam_every:k=3")) is not run.trainer(spec("sam_every:k=4"))
    state, _ = run.start((other, 0))
    found = optax.tree.get(state.train.opt_state, "hyperparams")
    assert {k: float(v) for k, v in found.items() if v is not None} == pytest.approx(
        {"lr": 2e-3, "decay": 0.0, "rho": 1.0}
    )
    steps = 2
    tx = methods.optimizer(spec("adam:lr=0.5"), steps_per_epoch=steps)
    params, opt_state = jnp.ones(1), tx.init(jnp.ones(1))
    sizes = []
    for _ in range(2 * methods.CYCLE * steps):
        updates, opt_state = tx.update(jnp.ones(1), opt_state, params)
        sizes.append(-float(updates[0]))
    cosine = 0.25 * (1 + np.cos(np.pi * np.arange(10) / 10))
    np.testing.assert_allclose(sizes, np.tile(cosine, 2), rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["linear", "sam_early", "sam_late", "sam_every", "looksam", "msam"]
)
def test_a_row_trains_at_the_gradients_it_says(tmp_path, name):
    run = Forecasting(make_series(), arguments(epochs=1), tmp_path, tuning=True)
    with Progress(10) as progress:
        record = complete(run, (spec(name), 0), progress)
    assert np.isfinite(record["final"]["validation_mse"])
    assert "test_mse" not in record["final"]  # tuning does not look
    # An epoch has six steps.
    expected = {"sam_early": 2, "sam_late": 1, "sam_every": 1.5, "looksam": 1 + 2 / 6}
    gradients = expected.get(name, methods.METHODS[name].gradients)
    assert record["final"]["gradients"] == pytest.approx(gradients)


def test_what_counts_is_the_unperturbed_point_and_the_best_epoch(tmp_path):
    run = Forecasting(make_series(), arguments(epochs=4), tmp_path, tuning=False)
    row = spec("stale_sam:rho=2")
    state, history = run.start((row, 0))
    errors = []
    for part in range(4):
        state = run.advance((row, 0), part, state, history, lambda share: None)
        task = run.task(row)
        windows, series = run.windows, run.series
        errors.append(task.evaluate(state.train.evaluated(), series, windows.validation)["mse"])
        outside = task.evaluate(state.train.params, series, windows.validation)["mse"]
        assert outside != pytest.approx(errors[-1], rel=1e-3)
    assert [entry["validation_mse"] for entry in history["epochs"]] == pytest.approx(errors)
    assert best_epoch(history) == np.argmin(errors) + 1
    kept = task.evaluate(state.best, series, windows.validation)["mse"]
    assert kept == pytest.approx(min(errors))


def test_a_run_ends_when_validation_has_not_improved_for_the_patience(tmp_path):
    run = Forecasting(make_series(), arguments(patience=2), tmp_path, tuning=False)
    epochs = [{"validation_mse": value} for value in (3.0, 1.0, 2.0, float("nan"))]
    ends = [run.ended((spec("adam"), 0), {"epochs": epochs[:n]}) for n in range(5)]
    assert ends == [False, False, False, False, True]
    assert not run.ended((spec("adam@2"), 0), {"epochs": epochs})
    assert len(run.parts((spec("adam@2"), 0))) == 6


class KilledError(Exception):
    pass


def test_a_killed_run_ends_with_the_numbers_it_would_have_had(tmp_path, monkeypatch):
    row, records = spec("sam"), []
    for folder, killed in (("whole", False), ("killed", True)):
        run = Forecasting(make_series(), arguments(epochs=4), tmp_path / folder, tuning=False)
        with Progress(10) as progress:
            if killed:
                advance = run.advance

                def stopping(run_, part, *rest, advance=advance):
                    if part == 2:
                        raise KilledError
                    return advance(run_, part, *rest)

                monkeypatch.setattr(run, "advance", stopping)
                with pytest.raises(KilledError):
                    complete(run, (row, 3), progress)
                run = Forecasting(
                    make_series(), arguments(epochs=4), tmp_path / folder, tuning=False
                )
            records.append(complete(run, (row, 3), progress))
    whole, resumed = records
    assert resumed["resumed_after_epochs"] == [2]
    assert whole["forecast"] == resumed["forecast"]
    for one, other in zip(whole["epochs"], resumed["epochs"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    timed = {"train_seconds": 0}
    assert {**whole["final"], **timed} == {**resumed["final"], **timed}


def record(method, seed, mse, **changes):
    config = {
        "data": "waves",
        "channels": 3,
        "look_back": 8,
        "horizon": 4,
        "stride": 2,
        "revin": True,
        "epochs": 100,
        "patience": 5,
        "batch_size": 32,
        "method": method,
        "hyperparameters": {"lr": 1e-3, "decay": 0.0},
        "seed": seed,
    }
    final = {
        "test_mse": mse,
        "test_mae": mse / 2,
        "validation_mse": mse,
        "train_seconds": 2.0 if method == "adam" else 5.0,
        "gradients": 2.0 if method == "sam" else 1.0,
        "epochs": 7,
        "best_epoch": 2,
    }
    return {
        "format": 1,
        "config": config,
        "versions": {"jax": "1"},
        "hardware": {"backend": "cpu", "device": "a CPU", "count": 2},
        "epochs": [
            {"train_loss": 1.0 / n, "validation_mse": 1.0 + 1 / n, "seconds": 1.0} for n in (1, 2)
        ],
        "forecast": {
            "channels": ["a"],
            "seen": [[0.0, 1.0]],
            "truth": [[1.0, 0.0]],
            "forecast": [[0.5, 0.5]],
        },
        "final": final,
        **changes,
    }


def flat(rise):
    return {
        "flatness": {
            "rounded": {"8": rise, "2": 2 * rise},
            "noise": {"0.1": rise / 2},
            "top_eigenvalue": 10 * rise,
            "residual": 0.0,
            "worst_case": 3 * rise,
        }
    }


def test_the_reports_numbers_from_fixed_records(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    made = {
        "adam": (1.0, 1.2),
        "adamw": (0.8, 0.9),
        "linear": (0.9, 0.9),
        "sam": (0.7, 0.9),
    }
    for method, errors in made.items():
        for seed, error in enumerate(errors):
            found = record(method, seed, error, **flat(0.01 if method == "sam" else 0.1))
            (runs / f"{method}_seed{seed}.json").write_text(json.dumps(found))
    text = report.write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["data"], summary["horizon"], summary["best_baseline"]) == ("waves", 4, "adamw")
    row = summary["methods"]["sam"]
    assert row["mse"]["runs"] == [0.7, 0.9]
    assert row["mse"]["mean"] == pytest.approx(0.8)
    assert row["mse"]["std"] == pytest.approx(0.2 / np.sqrt(2))
    assert row["mae"]["mean"] == pytest.approx(0.4)
    assert (row["gradients"], row["seconds"], row["relative_seconds"]) == (2, 5, 2.5)
    # -0.3 and -0.3 to Adam; -0.1 and 0 to AdamW.
    assert row["minus_adam"]["mean"] == pytest.approx(-0.3)
    assert row["minus_adam"]["standard_error"] == pytest.approx(0, abs=1e-12)
    assert row["minus_adam"]["percent"] == pytest.approx(-100 * 0.3 / 1.1)
    assert row["minus_best_baseline"]["mean"] == pytest.approx(-0.05)
    assert row["minus_best_baseline"]["standard_error"] == pytest.approx(0.05)
    assert "minus_best_baseline" not in summary["methods"]["adamw"]
    assert row["flatness"]["rounded"] == pytest.approx({"8": 0.01, "2": 0.02})
    assert "| minus adam " in text
    assert "| minus adamw, the best baseline " in text
    assert "-0.0500 ± 0.0500 (-5.9 %)" in text
    assert "| sam    | +1.00  | +2.00  | +0.50      | 0.1 ± 0        | 0.03 ± 0   |" in text
    figures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert figures == {"mse", "learning_curves", "validation_against_time", "forecasts"}


def test_published_figures_are_told_with_their_source():
    assert "0.381; without 0.509, from memory" in report._published(
        {"data": "ETTh1", "horizon": 96}
    )
    assert report._published({"data": "airports", "horizon": 96}) == ""


def test_tuned_settings_are_the_defaults_and_sams_go_to_its_kin(tmp_path, monkeypatch):
    chosen = {"sam": {"hyperparameters": {"lr": 2e-3, "rho": 0.7}}}
    (tmp_path / "waves.json").write_text(json.dumps({"methods": chosen}))
    monkeypatch.setattr(methods, "TUNED", tmp_path)
    methods.table.cache_clear()
    table = methods.table("waves")
    assert table["sam"].defaults == {"lr": 2e-3, "decay": 0.0, "rho": 0.7}
    assert table["gsam"].defaults["rho"] == 0.7
    assert table["usam"].defaults == methods.METHODS["usam"].defaults  # its rho is another thing
    assert table["sam_published"].defaults["lr"] == 1e-3
    methods.table.cache_clear()


@pytest.fixture
def small(tmp_path):
    series = make_series(400)
    rows = [
        f"{np.datetime64('2020-01-01') + i},{','.join(map(str, row))}"
        for i, row in enumerate(series.values)
    ]
    path = tmp_path / "waves.csv"
    path.write_text("\n".join(["date,a,b,c", *rows]))
    shape = ["--look-back", "16", "--horizon", "4", "--epochs", "2", "--batch-size", "8"]
    return SimpleNamespace(
        argv=["--data", str(path), *shape, "--out", str(tmp_path / "out")], out=tmp_path / "out"
    )


def test_all_data_sets_side_by_side(tmp_path, capsys):
    """From fixed records."""
    for data, sam in (("waves", (0.7, 0.9)), ("ETTh1", (0.5, 0.61))):
        (tmp_path / data / "runs").mkdir(parents=True)
        for method, errors in (("adam", (1.0, 1.2)), ("linear", (0.9, 1.0)), ("sam", sam)):
            for seed, error in enumerate(errors):
                found = record(method, seed, error)
                found["config"] |= {"data": data, "horizon": 96}
                path = tmp_path / data / "runs" / f"{method}_seed{seed}.json"
                path.write_text(json.dumps(found))
        report.write(tmp_path / data)
    folders = [str(tmp_path / "waves"), str(tmp_path / "ETTh1")]
    assert overview.main([*folders, "--out", str(tmp_path / "all")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "all" / "summary.md").read_text() in text
    assert (tmp_path / "all" / "figures" / "relative_mse.png").exists()
    first, second = (line for line in text.splitlines() if "| 96 " in line)
    assert "ETTh1" in first
    assert "0.381 (0.509)" in first
    assert "-0.3000 ± 0.0000 (-27.3 %)" in second
    assert "-0.1500 ± 0.0500 (-15.8 %)" in second
    words = " ".join(text.split())
    assert "more than two standard errors on 2 of them, and above it on 0" in words
    assert overview.main([str(tmp_path)]) == 2
    assert "has no summary.json" in capsys.readouterr().err
    assert overview.main([]) == 2


def test_the_command_end_to_end(small, capsys):
    argv = [*small.argv, "--methods", "adam,linear,sam:rho=0.3", "--seeds", "1", "--flatness"]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert "# Forecasting waves: 3 channels, look-back 16, horizon 4" in printed
    assert "| sam:rho=0.3 |" in printed
    assert "worst case" in printed
    summary = json.loads((small.out / "summary.json").read_text())
    assert set(summary["methods"]) == {"adam", "linear", "sam:rho=0.3"}
    # Repeated, nothing is trained again.
    path = small.out / "runs" / "adam_seed0.json"
    before = path.stat().st_mtime_ns
    assert command.main(argv) == 0
    assert path.stat().st_mtime_ns == before
    assert command.main([*argv, "--no-revin"]) == 2
    assert "revin=True there but False now" in capsys.readouterr().err


def test_tuning_gives_every_row_as_many_trials_and_keeps_what_it_found(small, capsys):
    argv = [*small.argv, "--methods", "adam,sam", "--seeds", "1", "--tune", "--trials", "2"]
    assert command.main(argv) == 0
    found = json.loads((small.out / "tuning" / "waves.json").read_text())
    assert found["evaluated_on"] == "validation"
    for name, searched in (("adam", {"lr"}), ("sam", {"lr", "rho"})):
        trials = found["methods"][name]["trials"]
        assert len(trials) == 2
        assert found["methods"][name]["error"] == min(trials.values())
        assert set(found["methods"][name]["hyperparameters"]) == searched
        first = next(iter(trials))
        assert "lr=0.001" in first
    made = json.loads((small.out / "runs" / "sam_seed0.json").read_text())
    chosen = found["methods"]["sam"]["hyperparameters"]
    assert {key: made["config"]["hyperparameters"][key] for key in chosen} == chosen
    # Repeated, no trial is made again; nor does it matter that a search was stopped at its start.
    storage = f"sqlite:///{small.out / 'tuning' / 'tuning.db'}"
    optuna.create_study(study_name="usam", storage=storage, direction="minimize")
    count = len(list((small.out / "tuning" / "runs").glob("*.json")))
    assert command.main(argv) == 0
    assert len(list((small.out / "tuning" / "runs").glob("*.json"))) == count


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "ETTh3"], "--data 'ETTh3' is unknown"),
        (["--data", "ETTh1"], "needs --path"),
        (["--horizon", "0"], "--horizon must be 1 or more, got 0"),
        (["--methods", "sgd"], "Unknown method 'sgd'; the methods are adam"),
        (["--methods", "sam:rho=-1"], "Method 'sam:rho=-1' cannot be built"),
        (["--methods", "adam:lr=0"], "lr must be above 0, got 0"),
        (["--methods", "adamw:decay=-1"], "decay must be at least 0, got -1"),
        (["--look-back", "396"], "too short"),
        (["--batch-size", "300"], "--batch-size 300 is more than the 221 windows"),
    ],
)
def test_bad_arguments(small, capsys, argv, message):
    assert command.main([*small.argv, *argv]) == 2
    assert message in capsys.readouterr().err
