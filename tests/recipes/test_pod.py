"""docs/pod.md: its script on eight devices of one process, and of two; killed and gone on."""

import inspect
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import optax
import pytest

import samax

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "pod.md"
HEAD = """
import os, sys
os.environ["XLA_FLAGS"] = ""
import jax
jax.config.update("jax_platforms", "cpu")
count, place, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 8 // count)
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, place)
assert len(jax.devices()) == 8
"""
TAIL = """
from jax.experimental.multihost_utils import process_allgather
params, values = train(sys.argv[4], shapes, start, step, steps=int(sys.argv[5]))
whole = process_allgather(params, tiled=True)
total = float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(whole)))
print("values", *(value.hex() for value in values), "total", total.hex())
"""


def blocks():
    text = PAGE.read_text(encoding="utf-8").partition("## One gradient")[0]
    found = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return "\n".join(found).replace('params, values = train("checkpoints', "# train(")


def run(folder, processes, steps):
    script = folder.parent / "pod.py"
    script.write_text(HEAD + blocks() + TAIL, encoding="utf-8")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, script, f"{processes}", f"{place}", address, folder, f"{steps}"],
            cwd=PAGE.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(processes)
    ]
    found = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * processes, found
    printed = {out.splitlines()[-1] for out, _ in found}
    assert len(printed) == 1  # all processes saw the same
    words = printed.pop().split()
    values, total = words[1:-2], words[-1]
    return [float.fromhex(value) for value in values], float.fromhex(total)


def test_two_processes_compute_what_one_does_and_go_on_bit_for_bit(tmp_path):
    values, total = run(tmp_path / "one", 1, 10)
    assert len(values) == 10
    assert values[-1] < values[0]
    several, total_of_several = run(tmp_path / "two", 2, 10)
    assert several == pytest.approx(values, rel=1e-5)
    assert total_of_several == pytest.approx(total, rel=1e-5)
    first, _ = run(tmp_path / "again", 2, 5)
    rest, total_again = run(tmp_path / "again", 2, 10)
    assert first + rest == several
    assert total_again == total_of_several


def test_a_perturbation_for_each_slice_is_m_sharpness_and_one_gradient_crosses(
    tmp_path, monkeypatch
):
    if not hasattr(jax, "shard_map"):
        pytest.skip("an axis alone cannot be manual in this version of JAX")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if "train(" not in code or "def train" in code:
            exec(code.replace('params, values = train("checkpoints', "# train("), namespace)
    params, batch = namespace["init"](), namespace["batch_of"](0)
    base, step = namespace["between"], jax.jit(namespace["slice_step"])
    compiled = step.lower(params, base.init(params), batch).compile()
    found, _ = step(params, base.init(params), batch)
    alone = optax.chain(samax.m_sharpness(samax.sam(0.05), namespace["slices"]), optax.adamw(1e-2))
    loss_fn, local = namespace["loss_fn"], jax.device_get(batch)

    @jax.jit
    def expected(params, batch):
        grads = jax.grad(loss_fn)(params, batch)
        extra = {"value_fn": loss_fn, "batch": batch}
        updates, _ = alone.update(grads, alone.init(params), params, **extra)
        return optax.apply_updates(params, updates)

    chex.assert_trees_all_close(found, expected(params, local), rtol=1e-5, atol=1e-6)
    # Groups of one device of each slice: the sums between slices, of which there is one.
    between = re.findall(r"all-reduce\(.*replica_groups=\{\{0,2\},\{1,3\}\}", compiled.as_text())
    assert len(between) == 1


def test_the_state_is_placed_by_the_benchmarks_own_code():
    programs = pytest.importorskip("benchmarks.scaling.programs", exc_type=ImportError)
    source = textwrap.dedent(inspect.getsource(programs.placed_state))
    assert source in PAGE.read_text(encoding="utf-8")
