"""The training step: what enters it, what leaves it, and that its two loops agree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samax
from benchmarks.core.classification.task import Classification, Recipe
from benchmarks.core.methods import METHODS, parse_method, parse_methods

CLASSES = 6
COUNT = 40
RECIPE = Recipe(batch_size=16, mean=(0.5,), std=(0.25,), label_smoothing=0.1)


class Model(nnx.Module):
    """The least that has a convolution and batch statistics."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), strides=3, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.linear = nnx.Linear(4 * 4 * 4, CLASSES, rngs=rngs)

    def __call__(self, images):
        features = nnx.relu(self.norm(self.conv(images)))
        return self.linear(features.reshape(len(images), -1))


def build_model(seed):
    return Model(nnx.Rngs(seed))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 12, 12, 1), dtype=np.uint8)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, COUNT, dtype=np.int32))


TASK = Classification(build_model, RECIPE)


def trainer(method=None, scan=False):
    method = optax.identity() if method is None else method
    return TASK.trainer(optax.chain(method, optax.sgd(0.1, momentum=0.9)), scan)


def one_epoch(a_trainer, data, key=0):
    epoch = TASK.epoch(*data, jax.random.key(key))
    return a_trainer.train(a_trainer.init(0), epoch, len(data[0]) // RECIPE.batch_size)


@pytest.fixture(scope="module")
def sgd_epoch(data):
    return one_epoch(trainer(), data)


@pytest.fixture(scope="module")
def sam_epoch(data):
    return one_epoch(trainer(samax.sam(0.05, track=True)), data)


def test_the_scanned_epoch_is_the_dispatched_one(data, sam_epoch):
    scanned = one_epoch(trainer(samax.sam(0.05, track=True), scan=True), data)
    assert sam_epoch[1].keys() == scanned[1].keys()
    chex.assert_trees_all_close(sam_epoch, scanned, rtol=2e-4, atol=2e-5)


def test_two_programs_without_a_branch_are_the_policys_one(data):
    every = samax.occasionally(samax.sam(0.2, track=True), samax.every(2))
    a_trainer, steps = trainer(every), COUNT // RECIPE.batch_size
    ascend = [step % 2 == 0 for step in range(steps)]
    epoch = TASK.epoch(*data, jax.random.key(0))
    programs = a_trainer.compile(a_trainer.init(0), epoch, steps, ascend)
    assert set(programs) == {True, False}
    assert not any("conditional" in program.as_text() for program in programs.values())
    found = a_trainer.train(a_trainer.init(0), epoch, steps, ascend=ascend)
    chex.assert_trees_all_close(found, one_epoch(trainer(every), data), rtol=1e-4, atol=1e-5)
    norms = found[1]["perturbation_norm"]
    np.testing.assert_array_equal(norms > 0, ascend)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.ascends])
def test_the_steps_that_ascend_are_the_policys(name):
    steps = 10
    spec, tx = parse_method(f"{name}:rho=0.1"), optimizer(name, steps)
    ascends = spec.method.ascends(spec.hyperparameters, steps, 0)
    params = {"core_0": jnp.array([1.0, -2.0]), "core_1": jnp.array([3.0, 1.0])}
    state, seen = tx.init(params), []
    for _ in range(steps):
        _, state = tx.update(
            params, state, params, value=0.0, value_fn=lambda p: optax.tree.norm(p) ** 2 / 2
        )
        seen.append(bool(optax.tree.get(state, "perturbation_norm") > 0))
    assert 0 < sum(ascends) < steps
    assert len(seen) == len(ascends)
    if name != "sam_random":  # whose policy draws other numbers than the host
        assert seen == ascends.tolist()
        long = spec.method.ascends(spec.hyperparameters, 10_000, 0)
        assert spec.gradients == pytest.approx(1 + long.mean())


def test_an_epoch_is_a_function_of_its_key(data, sgd_epoch):
    a_trainer = trainer()
    again, other = one_epoch(a_trainer, data), one_epoch(a_trainer, data, key=1)
    chex.assert_trees_all_equal(sgd_epoch, again)
    assert not np.array_equal(sgd_epoch[1]["train_loss"], other[1]["train_loss"])


def test_every_step_of_whole_batches_is_reported(sgd_epoch, sam_epoch):
    assert set(sgd_epoch[1]) == {"train_loss", "train_top1"}
    assert {"clean_loss", "perturbed_loss", "grad_cosine"} < set(sam_epoch[1])
    for values in sam_epoch[1].values():
        assert values.shape == (COUNT // RECIPE.batch_size,)
    np.testing.assert_array_equal(sam_epoch[1]["clean_loss"], sam_epoch[1]["train_loss"])
    np.testing.assert_allclose(sam_epoch[1]["perturbation_norm"], 0.05, rtol=1e-5)


def test_the_perturbed_pass_leaves_no_batch_statistics(data):
    one_batch = tuple(array[: RECIPE.batch_size] for array in data)
    base, _ = one_epoch(trainer(), one_batch)
    sam, _ = one_epoch(trainer(samax.sam(0.5)), one_batch)
    chex.assert_trees_all_close(base.model_state, sam.model_state, rtol=1e-5, atol=1e-7)
    params = zip(jax.tree.leaves(base.params), jax.tree.leaves(sam.params), strict=True)
    assert any(not np.allclose(one, other, atol=1e-4) for one, other in params)


def test_evaluation_counts_every_image_once(data):
    images, labels = (jnp.concatenate([array] * 8) for array in data)  # more than one batch
    found = TASK.evaluate(trainer().init(0), images, labels)

    model = build_model(0)
    model.eval()
    logits = model((images / 255 - 0.5) / 0.25)
    ranks = np.argsort(-np.asarray(logits), axis=1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["top1"] == pytest.approx(np.mean(ranks[:, 0] == np.asarray(labels)))
    assert found["top5"] == pytest.approx(
        np.mean((ranks[:, :5] == np.asarray(labels)[:, None]).any(1))
    )
    correct = ranks[:, 0] == np.asarray(labels)
    assert found["top1_halves"] == pytest.approx([correct[::2].mean(), correct[1::2].mean()])
    confidence = np.asarray(jax.nn.softmax(logits)).max(1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert found["ece"] == pytest.approx(error, rel=1e-3)
    assert error > 0.02


def test_compilation_is_timed_once(data):
    a_trainer = trainer()
    state = a_trainer.init(0)
    epoch = TASK.epoch(*data, jax.random.key(0))
    program = a_trainer.compile(state, epoch, 2)[None]
    seconds = a_trainer.compile_seconds
    assert seconds > 0
    assert a_trainer.compile(state, epoch, 2)[None] is program
    assert a_trainer.compile_seconds == seconds


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_and_updates(name):
    tx = optimizer(name)
    params = {"core_0": jnp.array([1.0, -2.0]), "core_1": jnp.array([3.0, 1.0])}

    def loss(params):
        return jnp.sum((params["core_0"] * params["core_1"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params, value=value, value_fn=loss)
    sgd = jax.tree.map(lambda g: -0.1 * g, grads)
    different = jax.tree.map(lambda u, s: not np.allclose(u, s, rtol=1e-4), updates, sgd)
    assert all(jax.tree.leaves(different)) == (name not in ("sgd", "sam_late"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def optimizer(text, steps=10):
    spec, groups = parse_method(text), {"core_0": "group", "core_1": "group"}
    base = optax.sgd(0.1, momentum=0.9)  # whose first step is that without; MSAM needs it
    return spec.optimizer(base, learning_rate=0.1, steps=steps, groups=groups)


def test_a_balancing_method_wraps_the_base_with_an_alpha_that_decays_to_nothing():
    params = {"core_0": jnp.array([1.0, -2.0]), "core_1": jnp.array([3.0, 1.0])}
    grads = {"core_0": jnp.array([0.5, 0.1]), "core_1": jnp.array([0.1, -0.2])}
    groups = {"core_0": "group", "core_1": "group"}
    alpha = optax.linear_schedule(0.3, 0.0, 2)
    base = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9))
    expected = samax.das(base, learning_rate=0.1, alpha=alpha, groups=groups, norm_power=1.0)
    spec = parse_method("das:alpha=0.3:norm_power=1")
    found = spec.optimizer(base, learning_rate=0.1, steps=2, groups=groups)
    found_state, expected_state = found.init(params), expected.init(params)
    for step in range(3):
        alone, _ = base.update(grads, found_state.optimizer, params)
        updates, found_state = found.update(grads, found_state, params)
        wanted, expected_state = expected.update(grads, expected_state, params)
        np.testing.assert_array_equal(updates["core_0"], wanted["core_0"])
        assert np.array_equal(updates["core_0"], alone["core_0"]) == (step == 2)


def test_a_balancing_method_without_cores_says_so():
    with pytest.raises(ValueError, match="Method 'das' cannot be built: it balances the cores"):
        parse_method("das").optimizer(optax.sgd(0.1), learning_rate=0.1, steps=1, groups=None)


def test_a_method_is_read_with_its_settings_and_factor():
    spec = parse_method("vasso:theta=0.2:rho=0.1@3")
    assert spec.name == "vasso"
    assert spec.hyperparameters == {"rho": 0.1, "theta": 0.2}
    assert spec.epoch_factor == 3
    assert [spec.label for spec in parse_methods(["sgd", "sgd@2 ", "sam:rho=0.1"])] == [
        "sgd",
        "sgd@2",
        "sam:rho=0.1",
    ]


def test_a_sampling_method_costs_its_samples_and_one_gradient():
    spec = parse_method("frob_sam:num_samples=4")
    assert spec.hyperparameters == {"rho": 0.005, "lam": 0.005, "num_samples": 4}
    assert spec.gradients == 5
    assert parse_method("frob_sam").gradients == 3
    assert parse_method("sam").gradients == 2
    assert np.isfinite(optimizer("frob_sam:num_samples=4").init(jnp.ones(2))[0].count)
    assert optimizer("trace_sam:num_samples=4:batch_size=2:antithetic=1:key=3:lam=0.5")
    with pytest.raises(ValueError, match=r"'det_sam:num_samples=4:batch_size=3'.*must divide"):
        optimizer("det_sam:num_samples=4:batch_size=3")


def test_random_perturbations_differ_by_seed():
    a_trainer = trainer(samax.trace_sam())
    keys = [optax.tree.get(a_trainer.init(seed).opt_state, "rng_key") for seed in (0, 0, 1)]
    np.testing.assert_array_equal(keys[0], keys[1])
    assert not np.array_equal(keys[0], keys[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adam", "Unknown method 'adam'; the methods are sgd, sam, usam"),
        ("sam:rho", "'rho' must be key=number"),
        ("sgd@0", "'@0' must be"),
        ("sgd@x", "'@x' must be"),
        (None, "at least one method"),
        ("sam,sgd,sam", "none twice"),
    ],
)
def test_a_bad_method_is_one_clear_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_methods(text.split(",") if text else [])


@pytest.mark.parametrize("text", ["sam:radius=0.1", "sam:rho=-1", "das:rho=1", "das:alpha=-1"])
def test_a_bad_setting_names_the_method(text):
    with pytest.raises(ValueError, match=f"Method '{text}"):
        optimizer(text)
