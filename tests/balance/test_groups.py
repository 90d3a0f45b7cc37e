"""Which leaves form a group."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import samax
from samax._balance.groups import Group, find_groups

A, B = jnp.ones((4, 2)), jnp.zeros((2, 4))


def cores(params, groups=samax.lora_groups):
    """The paths' last keys of each group."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return {
        (samax.Stacked(group.name) if group.stacked else group.name): group.members(paths)
        for group in find_groups(groups, params)
    }


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ({"lora_a": A, "lora_b": B}, ["lora_a", "lora_b"]),  # flax.nnx.LoRA
        ({"kernel": A, "lora": {"lora_a": A, "lora_b": B}}, ["lora_a", "lora_b"]),  # LoRALinear
        ({"kernel": A, "kernel_lora_a": A, "kernel_lora_b": B}, ["kernel_lora_a", "kernel_lora_b"]),
        ({"w": A, "w_lora_a": A, "w_lora_b": B}, ["w_lora_a", "w_lora_b"]),  # qwix, tunix
        ({"lora_kernel_a": A, "lora_kernel_b": B}, ["lora_kernel_a", "lora_kernel_b"]),  # Keras 3
        ({"w": A, "lora": {"a": A, "b": B}}, ["a", "b"]),  # gemma
        ({"lora_A": {"weight": A}, "lora_B": {"weight": B}}, ["lora_A", "lora_B"]),  # PEFT
        ({"lora_a": A, "lora_g": A, "lora_b": B}, ["lora_a", "lora_b", "lora_g"]),  # FLoRA
    ],
)
def test_lora_layouts(layer, names):
    params = {"first": {"query": layer, "bias": A}, "second": {"query": layer}}
    found = cores(params)
    assert len(found) == 2
    for paths in found.values():
        assert len(paths) == len(names)
        assert all(name in path for name, path in zip(names, paths, strict=True))


def test_two_adapters_of_one_layer_are_two_groups():
    layer = {"kernel_lora_a": A, "kernel_lora_b": B, "w_lora_a": A, "w_lora_b": B}
    assert len(cores(layer)) == 2


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = (nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.second(self.first(x))


def test_paths_are_the_same_in_init_and_update_under_nnx():
    """`nnx.Optimizer` passes variables to `init` and arrays to `update`."""
    model = Adapted(nnx.Rngs(0))
    tx = samax.obar(
        optax.sgd(0.1), learning_rate=0.1, alpha=0.5, groups=samax.lora_groups, track=True
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    before = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    grads = nnx.grad(
        lambda m: jnp.sum(m(jnp.ones((3, 4))) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(model)
    optimizer.update(model, grads)
    assert sorted(optimizer.opt_state.rates) == ["first/lora/lora_*", "second/lora/lora_*"]
    after = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    # B is zero at the start, so A has no gradient: oBAR alone moves it, towards B.
    a_before, a_after = (tree["first"]["lora"]["lora_a"] for tree in (before, after))
    np.testing.assert_allclose(a_after, (1 - 0.1 * 0.5) * a_before, rtol=1e-6)


def test_equinox_modules_and_dataclasses():
    class Layer(eqx.Module):
        lora_a: jax.Array
        lora_b: jax.Array

    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["lora_a", "lora_b"], meta_fields=[]
    )
    @dataclasses.dataclass
    class Plain:
        lora_a: jax.Array
        lora_b: jax.Array

    assert len(cores([Layer(A, B), Plain(A, B)])) == 2


def test_groups_by_path():
    params = {"block1": {"core0": A, "core1": A, "bias": B}, "block2": {"core0": A, "core1": A}}
    found = cores(params, samax.groups_by_path(r"(?P<group>block\d)/core"))
    assert found == {
        "block1": ["['block1']['core0']", "['block1']['core1']"],
        "block2": ["['block2']['core0']", "['block2']['core1']"],
    }


def test_labels_by_hand():
    params = {"x": A, "y": B, "rest": [A, None]}
    assert cores(params, {"x": 0, "y": 0, "rest": [None, None]}) == {"0": ["['x']", "['y']"]}


class TestErrors:
    def test_no_pair(self):
        with pytest.raises(ValueError, match=r"No leaf is a LoRA factor.*paths are: dense/kernel"):
            samax.lora_groups({"dense": {"kernel": A}})
        with pytest.raises(ValueError, match=r"No leaf is a path with.*dense/kernel"):
            samax.groups_by_path(r"(?P<group>core)")({"dense": {"kernel": A}})

    def test_a_lone_core(self):
        with pytest.raises(ValueError, match=r"these are alone: first/lora_a\..*first/lora_\*"):
            samax.lora_groups({"first": {"lora_a": A}, "second": {"lora_a": A, "lora_b": B}})
        with pytest.raises(ValueError, match="one core alone in the group 0"):
            cores({"x": A, "y": B}, {"x": 0, "y": None})

    def test_patterns(self):
        with pytest.raises(ValueError, match="must name the part"):
            samax.groups_by_path("core")
        with pytest.raises(ValueError, match="not a regular expression"):
            samax.groups_by_path("(")

    def test_labels(self):
        with pytest.raises(ValueError, match="every label is None"):
            cores({"x": A}, {"x": None})
        with pytest.raises(ValueError, match="groups must be a pytree of labels"):
            cores({"x": A}, {"z": "a"})


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (3, 4, 2)])
def test_squared_norms(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    one = Group("x", (0,), stacked=False)
    np.testing.assert_allclose(one.squared_norms([x])[0], np.sum(np.square(x)), rtol=1e-5)
    if shape:
        layers = Group("x", (0,), stacked=True)
        each = np.square(x).reshape(shape[0], -1).sum(1)
        np.testing.assert_allclose(layers.squared_norms([x])[0], each, rtol=1e-5)
