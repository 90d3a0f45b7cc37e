"""Scripts in the structure of other projects' examples, and the lines that make them SAM.

The lines are those of the diffs in docs/frameworks.md, which are applied to the plain scripts here.
"""

import contextlib
import re
import sys
import types
from pathlib import Path

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.marks import slow_unless

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"<!-- script: (\w+) -->\n\n```diff\n(.*?)```", PAGE, re.DOTALL))
STEPS = 6
FAST = ["nnx_mnist"]


def digits():
    """Blurred blobs, one place for each class: 32 images of 8 x 8 in ten classes."""
    labels = np.arange(32) % 10
    places = np.random.default_rng(0).uniform(1, 7, (10, 2))[labels]
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1)
    distance = np.square(grid[None] - places[:, None, None]).sum(-1)
    images = np.exp(-distance / 4) + 0.1 * np.random.default_rng(1).normal(size=distance.shape)
    return jnp.asarray(images[..., None], jnp.float32), jnp.asarray(labels)


def patched(name, rho=None):
    """The script with the diff's lines in the place of its own."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    lines = DIFFS[name].splitlines()
    code = [line for line in lines if "import" not in line]
    assert max(sum(line.startswith(sign) for line in code) for sign in "+-") <= 2
    imports = [line[1:] for line in lines if line.startswith("+import")]
    old = "\n".join(line[1:] for line in code if not line.startswith("+"))
    new = "\n".join(line[1:] for line in code if not line.startswith("-"))
    assert text.count(old) == 1, f"{name}: the lines of the diff are not those of the script"
    text = text.replace(old, new)
    if rho is not None:
        assert text.count("sam(0.05)") == 1
        text = text.replace("sam(0.05)", f"sam({rho})")
    return "\n".join([*imports, text])


@contextlib.contextmanager
def imported(name, text):
    module = types.ModuleType(f"script_{name}")
    sys.modules[module.__name__] = module  # where Flax and Equinox look classes up
    try:
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[module.__name__]


def run(name, text, steps=STEPS):
    with imported(name, text) as module:
        losses, state = module.main(*digits(), steps)
        return losses, jax.device_get(jax.tree.leaves(state))


def sam_written_out(loss_fn, params, rho=0.05):
    """The value and the auxiliary output at w, and the gradient at w + rho g / ||g||."""
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    squares = [np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(grads)]
    scale = float(rho / np.sqrt(sum(squares)))
    point = jax.tree.map(lambda w, g: w + scale * g, params, grads)
    return float(loss), aux, jax.grad(lambda w: loss_fn(w)[0])(point)


def momentum(params, direction, trace, rate=0.1, decay=0.9):
    """A step of SGD with momentum; the trace starts as None."""
    if trace is not None:
        direction = jax.tree.map(lambda d, m: d + decay * m, direction, trace)
    return jax.tree.map(lambda w, d: w - rate * d, params, direction), direction


def nnx_by_hand(script, images, labels, steps):
    """Functional: the model and its keys are split, and the perturbed pass's rest is dropped."""
    model, rngs = script.CNN(rngs=nnx.Rngs(0)), nnx.Rngs(dropout=1)
    model.train()
    graph, params, rest = nnx.split((model, rngs), nnx.Param, ...)
    losses, trace = [], None
    for _ in range(steps):

        def loss_fn(params, rest=rest):
            model, rngs = nnx.merge(graph, params, rest, copy=True)
            loss, _ = script.loss_fn(model, rngs, {"image": images, "label": labels})
            return loss, nnx.split((model, rngs), nnx.Param, ...)[2]

        loss, rest, direction = sam_written_out(loss_fn, params)
        params, trace = momentum(params, direction, trace)
        losses.append(loss)
    both = nnx.merge(graph, params, rest)
    return losses, nnx.to_pure_dict(nnx.state(both, nnx.Not(nnx.RngKey)))


def linen_by_hand(script, images, labels, steps):
    net = script.CNN()
    params, losses, trace = net.init(jax.random.key(0), images[:1])["params"], [], None

    def loss_fn(params):
        scores = jax.nn.log_softmax(net.apply({"params": params}, images))
        return -jnp.mean(scores[jnp.arange(len(labels)), labels]), None

    for _ in range(steps):
        loss, _, direction = sam_written_out(loss_fn, params)
        params, trace = momentum(params, direction, trace)
        losses.append(loss)
    return losses, params


def resnet_by_hand(script, images, labels, steps):
    variables = script.net.init(jax.random.key(0), images[:1], train=False)
    params, stats, losses, trace = variables["params"], variables["batch_stats"], [], None
    for _ in range(steps):
        loss_fn = lambda w, stats=stats: script.loss_and_stats(w, stats, images, labels)
        loss, stats, direction = sam_written_out(loss_fn, params)
        decayed = jax.tree.map(lambda d, w: d + 1e-4 * w, direction, params)
        params, trace = momentum(params, decayed, trace)
        losses.append(loss)
    return losses, {"params": params, "batch_stats": stats}


def equinox_by_hand(script, images, labels, steps):
    model = script.CNN(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    x, losses, trace = jnp.transpose(images, (0, 3, 1, 2)), [], None
    for _ in range(steps):
        loss_fn = lambda w: (script.loss(eqx.combine(w, static), x, labels), None)
        loss, _, direction = sam_written_out(loss_fn, params)
        params, trace = momentum(params, direction, trace)
        losses.append(loss)
    return losses, params


BY_HAND = {
    "nnx_mnist": nnx_by_hand,
    "linen_mnist": linen_by_hand,
    "optax_cifar10_resnet": resnet_by_hand,
    "equinox_mnist": equinox_by_hand,
}


def test_each_script_has_its_diff():
    assert set(DIFFS) == {path.stem for path in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("name", slow_unless(FAST, sorted(set(DIFFS) - {"optax_sam"})))
def test_sam_is_one_change_and_rho_zero_none(name):
    """At rho = 0 the script is the plain one bit for bit: statistics and keys move once a step."""
    plain = run(name, (SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    chex.assert_trees_all_close(run(name, patched(name, rho=0.0)), plain, rtol=1e-6, atol=1e-7)
    losses, state = run(name, patched(name))
    assert losses[0] == pytest.approx(plain[0][0], rel=1e-6)
    assert losses[-1] < losses[0]
    assert max(np.max(np.abs(a - b)) for a, b in zip(state, plain[1], strict=True)) > 1e-4


@pytest.mark.parametrize("name", slow_unless(FAST, sorted(BY_HAND)))
def test_the_patched_script_is_sam_written_out(name):
    """Three steps: also the statistics, the random counts and the dropout masks are the same."""
    # SGD in place of AdamW, whose first step is the gradient's sign, rounding included.
    sgd = lambda text: re.sub(r"optax.adamw\([^)]*\)", "optax.sgd(0.1, momentum=0.9)", text)
    losses, state = run(name, sgd(patched(name)), steps=3)
    with imported(name, (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")) as script:
        expected_losses, expected = BY_HAND[name](script, *digits(), 3)
    expected = jax.device_get(jax.tree.leaves(expected))
    chex.assert_trees_all_close(losses, expected_losses, rtol=1e-5)
    chex.assert_trees_all_close(state, expected, rtol=1e-5, atol=2e-6)


def test_optaxs_own_sam_and_samax_give_the_same_training():
    name = "optax_sam"
    theirs = run(name, (SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    chex.assert_trees_all_close(run(name, patched(name)), theirs, rtol=1e-4, atol=1e-6)
