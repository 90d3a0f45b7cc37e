"""The golden trajectories, made with the authors' code, and the problems that they run on."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import samax


def golden_cases(*methods):
    """Parameters for `pytest.mark.parametrize`: the golden cases of some methods.

    Each is a pair of the case and the problem it runs on, as the JSON files under `tests/golden`
    hold them.
    """
    folder = Path(__file__).parent / "golden"
    files = [json.loads((folder / f"golden_{method}.json").read_text()) for method in methods]
    return [
        pytest.param(case, file["problems"][case["problem"]], id=case["id"])
        for file in files
        for case in file["cases"]
    ]


def golden_loss(problem):
    """The loss of a golden problem as a function of its dict of parameters."""
    data = {name: jnp.asarray(value) for name, value in problem["data"].items()}

    def mlp(p):
        hidden = jnp.tanh(data["x"] @ p["fc1.weight"].T + p["fc1.bias"])
        logits = hidden @ p["fc2.weight"].T + p["fc2.bias"]
        labels = data["labels"]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(labels.size), labels])

    def mf(p):
        return 0.5 * jnp.sum((p["X"] @ p["Y"].T - data["M"]) ** 2)

    def cp(p):
        reconstruction = jnp.einsum("ir,jr,kr->ijk", p["A"], p["B"], p["C"])
        return 0.5 * jnp.sum((reconstruction - data["T"]) ** 2)

    def tucker(p):
        factors = p["U1"], p["U2"], p["U3"]
        reconstruction = jnp.einsum("abc,ia,jb,kc->ijk", p["G"], *factors)
        return 0.5 * jnp.sum((reconstruction - data["T"]) ** 2)

    return {"mlp": mlp, "mf": mf, "cp": cp, "tucker": tucker}[problem["kind"]]


def base_optimizer(config, learning_rate=None):
    """The base optimizer of a golden case, in torch's conventions (coupled weight decay)."""
    rate = config["lr"] if learning_rate is None else learning_rate
    if config["name"] == "adam":
        step = optax.adam(rate, b1=config["b1"], b2=config["b2"], eps=config["eps"])
    else:
        step = optax.sgd(rate, momentum=config["momentum"] or None)
    return optax.chain(optax.add_decayed_weights(config["weight_decay"]), step)


def largest_error(case, problem, tx):
    """The largest deviation of 10 steps of `tx` from a case, over all parameters and losses."""
    loss = golden_loss(problem)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=loss)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(value) for name, value in problem["init"].items()}
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
    state = tx.init(params)
    error = 0.0
    for expected in case["trajectory"]:
        clean = params
        if "perturbed" in expected:  # the parameters outside, at one gradient a step
            clean = samax.eval_params(state, params)
            error = max(error, _distance(params, expected["perturbed"]))
        error = max(error, _distance(clean, expected["params"]))
        error = max(error, abs(float(loss(clean)) - expected["loss"]))
        params, state = step(params, state)
    return error


def _distance(params, expected):
    return max(
        float(jnp.max(jnp.abs(params[name] - jnp.asarray(value))))
        for name, value in expected.items()
    )
