"""Every method lowers for platforms that are not at hand, to operations that these have."""

import re

import jax
import jax.export
import pytest

from tests.marks import slow_unless
from tests.methods import METHODS, SHAPES, batch_of, initial, train_step

# What JAX's own random bits are on a GPU.
KNOWN = {"cu_threefry2x32", "cu_threefry2x32_ffi"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", slow_unless(SHAPES, METHODS))
def test_a_step_lowers_to_no_call_that_the_platform_lacks(name, platform):
    tx, params = METHODS[name].optimizer(track=True), initial()
    state = jax.eval_shape(tx.init, params)

    def step(params, state, batch):
        return train_step(tx, params, state, batch)

    exported = jax.export.export(jax.jit(step), platforms=[platform])(params, state, batch_of())
    module = exported.mlir_module()
    assert "stablehlo.dot_general" in module  # the step is in it
    calls = set(re.findall(r"custom_call @(\w+)", module))
    assert calls <= (KNOWN if platform == "cuda" else set())


def test_a_call_that_is_the_cpu_s_alone_would_be_seen():
    def step(matrix):
        return jax.numpy.linalg.eigh(matrix)[1]

    exported = jax.export.export(jax.jit(step), platforms=["cpu"])(jax.numpy.eye(3))
    assert re.findall(r"custom_call @(\w+)", exported.mlir_module())
