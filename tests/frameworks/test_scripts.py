"""Scripts in the structure of other projects' examples, and the lines that make them SAM.

The lines are those of the diffs in docs/frameworks.md, which are applied to the plain scripts here.
"""

import re
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
DIFFS = dict(re.findall(r"<!-- script: (\w+) -->\n\n```diff\n(.*?)```", PAGE, re.DOTALL))
STEPS = 6


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


def run(name, text):
    module = types.ModuleType(f"script_{name}")
    sys.modules[module.__name__] = module  # where Flax and Equinox look classes up
    try:
        exec(compile(text, f"{name}.py", "exec"), module.__dict__)
        losses, state = module.main(*digits(), STEPS)
        return losses, jax.device_get(jax.tree.leaves(state))
    finally:
        del sys.modules[module.__name__]


def test_each_script_has_its_diff():
    assert set(DIFFS) == {path.stem for path in SCRIPTS.glob("*.py")}


@pytest.mark.parametrize("name", sorted(set(DIFFS) - {"optax_sam"}))
def test_sam_is_one_change_and_rho_zero_none(name):
    """At rho = 0 the script is the plain one bit for bit: statistics and keys move once a step."""
    plain = run(name, (SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    chex.assert_trees_all_close(run(name, patched(name, rho=0.0)), plain, rtol=1e-6, atol=1e-7)
    losses, state = run(name, patched(name))
    assert losses[0] == pytest.approx(plain[0][0], rel=1e-6)
    assert losses[-1] < losses[0]
    assert max(np.max(np.abs(a - b)) for a, b in zip(state, plain[1], strict=True)) > 1e-4


def test_optaxs_own_sam_and_samax_give_the_same_training():
    name = "optax_sam"
    theirs = run(name, (SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    chex.assert_trees_all_close(run(name, patched(name)), theirs, rtol=1e-4, atol=1e-6)
