"""Gradients of a decoder made of micro-batches, how their work is counted, and the command."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.data.webnlg import pack
from benchmarks.decoder_memory import __main__ as command
from benchmarks.decoder_memory.experiment import (
    OPTIMIZERS,
    make_step,
    measure,
    random_rows,
    value_and_grad_of_parts,
)
from benchmarks.models import llama
from benchmarks.models.llama import Llama, LlamaConfig
from benchmarks.models.lora import DecoderTask

pytestmark = pytest.mark.skipif(
    not hasattr(optax, "microbatching"), reason="this version of Optax has no microbatching"
)

CONFIG = LlamaConfig(12, 16, 2, 2, 1, 24)
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)


def decoder(remat=False):
    return Llama(CONFIG, remat=remat, rngs=nnx.Rngs(0))


def uneven_rows():
    """Four rows with 1, 2, 3 and 4 tokens to learn: means of micro-batches are not the mean."""
    return pack([([1] * (6 - n), [2 + n] * n) for n in (1, 2, 3, 4)], 6)[0]


@pytest.fixture(scope="module")
def task():
    return DecoderTask(decoder(), rank=2, alpha=4)


def moved(task):
    """Adapters of which B is not zero either."""
    return jax.tree.map(lambda x: x + 0.1, task.init(0)[0])


def whole(task, rows):
    """The loss that `DecoderTask` has of the batch, and its gradient."""
    loss = lambda params: task.loss(params, ((), task.batch((task.frozen, rows), 0)))[0]
    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize(("parts", "remat"), [(1, False), (2, False), (4, True)])
def test_the_gradient_of_micro_batches_is_the_batchs(task, parts, remat):
    rows, params = uneven_rows(), moved(task)
    own = DecoderTask(decoder(remat), rank=2, alpha=4)
    found = jax.jit(value_and_grad_of_parts(own, own.frozen, rows, parts))(params)
    assert_close(found, whole(task, rows)(params))


def test_a_mean_of_means_is_another_gradient(task):
    """What the weights by tokens are for."""
    rows, params = uneven_rows(), moved(task)
    halves = (jax.tree.map(lambda x, i=i: x[i : i + 2], rows) for i in (0, 2))
    each = [whole(task, half)(params) for half in halves]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *each)
    expected = whole(task, rows)(params)
    away = optax.tree.norm(optax.tree.sub(mean[1], expected[1]))
    assert away > 0.05 * optax.tree.norm(expected[1])


def test_a_step_of_sam_is_that_on_the_whole_batch(task):
    """The perturbation from the whole batch, and the gradient there of the whole batch."""
    rows, start = uneven_rows(), moved(task)
    value_and_grad = whole(task, rows)
    _, grads = value_and_grad(start)
    rho = 0.05 / optax.tree.norm(grads)
    point = jax.tree.map(lambda w, g: w + rho * g, start, grads)
    adamw = optax.adamw(1e-3)
    updates, _ = adamw.update(value_and_grad(point)[1], adamw.init(start), start)
    expected = optax.apply_updates(start, updates)
    tx = OPTIMIZERS["sam"]()
    for parts in (1, 4):
        step = jax.jit(make_step(task, tx, parts))
        (params, _), _ = step((start, tx.init(start)), task.frozen, rows)
        chex.assert_trees_all_close(params, expected, rtol=1e-4, atol=1e-5)
    plain, _ = adamw.update(grads, adamw.init(start), start)
    other = optax.apply_updates(start, plain)
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), other, params))) > 1e-4
    )


def test_micro_batches_change_the_memory_and_not_the_work():
    rows = random_rows(8, 32, CONFIG.vocab_size)
    found = {
        (name, *case): measure(name, decoder(case[1]), rows, case[0], rank=2)
        for name in OPTIMIZERS
        for case in ((1, False), (8, False), (1, True))
    }
    for name in OPTIMIZERS:
        kept, parts = found[name, 1, False], found[name, 8, False]
        assert parts["temp_bytes"] < 0.5 * kept["temp_bytes"]
        assert parts["flops"] == pytest.approx(kept["flops"], rel=0.01)
        assert found[name, 1, True]["flops"] > 1.2 * kept["flops"]
    for case in ((1, False), (8, False), (1, True)):
        assert found["sam", *case]["flops"] == 2 * found["adamw", *case]["flops"]


def test_the_command_leaves_a_table_and_tells_bad_input(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(llama, "read", lambda path: (CONFIG, None, None))
    monkeypatch.setattr(llama, "load", lambda config, tensors, remat: decoder(remat))
    argv = ["--model", "tiny.gguf", "--batch-size", "4", "--length", "8", "--out", str(tmp_path)]
    assert command.main([*argv, "--parts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| checkpoint | micro-batches |" in printed
    record = json.loads((tmp_path / "results.json").read_text())
    assert len(record["programs"]) == 4
    assert np.all([row["temp_bytes"] > 0 for row in record["programs"]])
    assert command.main([*argv, "--parts", "3"]) == 2
    assert "--parts '3': each must divide --batch-size 4" in capsys.readouterr().err
