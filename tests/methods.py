"""One row a method, and one problem that all run on: what every test takes its methods from."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import samax

RATE = 0.05
RADIUS = optax.linear_schedule(0.1, 0.0, 16)
MASK = {"lora_a": True, "lora_b": True, "bias": False}


def sgd():
    """The base optimizer: with a state, and with a schedule."""
    return optax.sgd(optax.linear_schedule(RATE, 0.0, 100), momentum=0.9)


@dataclasses.dataclass(frozen=True)
class Method:
    """How tests build a method, what it is checked against, and what does not hold for it.

    Attributes:
      recipe: Of rho, what stands before the base optimizer; of the base optimizer and rho, where
        the method `wraps` it. The rho of the balancing methods is their alpha.
      options: Further arguments of the recipe.
      golden: The files of `tests/golden` whose trajectories it follows.
      reference: The test that compares it with a version in NumPy.
      normalized: Whether its perturbation has the norm rho, whatever the gradient's.
      of_vector: Whether it is a function of the vector of all parameters, whatever their tree.
      one_call: Whether it evaluates one perturbed gradient, as `alternating` needs.
      calls: How often `update` is called for one step.
      tracks: Whether it takes `track`.
      except_for: What the others do and it does not, each with the reason.
    """

    recipe: Callable[..., Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wraps: bool = False
    golden: tuple[str, ...] = ()
    reference: str | None = None
    normalized: bool = False
    of_vector: bool = False
    one_call: bool = False
    calls: int = 1
    tracks: bool = True
    except_for: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def before(self, rho=RADIUS, **options):
        """What stands before the base optimizer."""
        return self.recipe(rho, **self.options, **options)

    def optimizer(self, rho=RADIUS, base=sgd, track=False):
        """The whole optimizer, built anew by each call: building must not run JAX."""
        options = {"track": track} if self.tracks else {}
        if self.wraps:
            return self.recipe(base(), rho, **self.options, **options)
        return optax.chain(self.before(rho, **options), base())


def balancing(method):
    return lambda optimizer, alpha, **options: method(
        optimizer, learning_rate=RATE, alpha=alpha, groups=samax.lora_groups, **options
    )


def several_steps(rho, **options):
    return samax.sharpness_aware(samax.scale_to_norm(rho), steps=3, **options)


def weighted(rho, **options):
    return samax.sharpness_aware(
        samax.scale_to_norm(rho), samax.weighted(optax.constant_schedule(0.7)), **options
    )


def rounded(rho, **options):
    ascent = optax.chain(samax.scale_to_norm(rho), samax.stochastic_rounding(0))
    return samax.sharpness_aware(ascent, **options)


def random_perturbation(rho, **options):
    ascent = optax.chain(samax.random_perturbation(samax.gaussian), samax.scale_by_rho(rho))
    return samax.sharpness_aware(ascent, **options)


def at_random(rho, **options):
    return samax.occasionally(samax.vasso(rho, **options), samax.at_random(RADIUS, 0))


def where_steep(rho, **options):
    return samax.occasionally(samax.gsam(rho, **options), samax.where_steep(10))


def in_groups(rho, **options):
    return samax.m_sharpness(samax.sam(rho, **options), 2)


def in_two_calls(optimizer, rho, **options):
    return samax.alternating(optax.chain(samax.gsam(rho, **options), optimizer))


def decoupled_wsam(optimizer, rho, **options):
    return samax.decoupled_wsam(optimizer, RATE, rho=rho, gamma=0.7, **options)


def one_gradient(optimizer, rho):
    ascent = samax.scale_to_norm(rho)
    return samax.one_gradient(optimizer, ascent, source="update", decay_perturbed=True)


COND = {
    "eager at zero": "it evaluates within a `cond`, compiled where the base optimizer is not",
    "finite metrics": "what a plain step does not evaluate is tracked as NaN",
}
SAMPLED = {
    "low precision": "its samples are drawn in the parameters' dtype",
    "zero gradient": "the gradients at its samples are not zero",
}
STORED = {"zero rho": "the sum of parameters and update is stored, and rounded"}

METHODS = {
    "sam": Method(samax.sam, golden=("sam",), normalized=True, of_vector=True, one_call=True),
    "sam, masked": Method(samax.sam, {"mask": MASK}, normalized=True, one_call=True),
    "usam": Method(samax.usam, golden=("usam",), of_vector=True, one_call=True),
    "asam": Method(samax.asam, golden=("asam",), normalized=True, of_vector=True, one_call=True),
    "asam, weights": Method(
        samax.asam, {"scaled": samax.weights_only}, normalized=True, one_call=True
    ),
    "vasso": Method(
        samax.vasso,
        {"theta": 0.4},
        golden=("vasso",),
        normalized=True,
        of_vector=True,
        one_call=True,
    ),
    "wsam": Method(
        samax.wsam, reference="test_coupled_wsam", normalized=True, of_vector=True, one_call=True
    ),
    "decoupled_wsam": Method(decoupled_wsam, wraps=True, golden=("wsam",)),
    "gsam": Method(
        samax.gsam,
        {"alpha": optax.constant_schedule(0.4)},
        golden=("gsam",),
        normalized=True,
        of_vector=True,
        one_call=True,
    ),
    "samar": Method(
        samax.samar, reference="test_samar", normalized=True, of_vector=True, one_call=True
    ),
    "samar, raw": Method(
        samax.samar, {"smoothing": 0.0, "gamma": 0.01}, normalized=True, one_call=True
    ),
    "friendly_sam": Method(
        samax.friendly_sam,
        golden=("friendlysam",),
        normalized=True,
        of_vector=True,
        one_call=True,
    ),
    "stable_sam": Method(
        samax.stable_sam,
        golden=("stablesam",),
        normalized=True,
        of_vector=True,
        one_call=True,
    ),
    "sagm": Method(
        samax.sagm,
        {"alpha": optax.constant_schedule(0.0)},
        golden=("sagm",),
        normalized=True,
        of_vector=True,
        one_call=True,
    ),
    "looksam": Method(
        samax.looksam, {"k": 2}, golden=("looksam_global",), of_vector=True, except_for=COND
    ),
    "at random": Method(at_random, except_for=COND),
    "where steep": Method(where_steep, golden=("aesam",), except_for=COND),
    "stale_sam": Method(
        samax.stale_sam, wraps=True, tracks=False, golden=("stale",), except_for=STORED
    ),
    "msam": Method(
        samax.msam,
        {"mask": MASK},
        wraps=True,
        tracks=False,
        golden=("msam",),
        except_for=STORED,
    ),
    "one_gradient": Method(one_gradient, wraps=True, tracks=False, except_for=STORED),
    "trace_sam": Method(samax.trace_sam, golden=("isam",), except_for=SAMPLED),
    "det_sam": Method(samax.det_sam, golden=("isam",), except_for=SAMPLED),
    "frob_sam": Method(samax.frob_sam, golden=("frosam",), except_for=SAMPLED),
    "nbar": Method(balancing(samax.nbar), wraps=True, golden=("nbar",)),
    "obar": Method(balancing(samax.obar), wraps=True, golden=("obar",)),
    "das": Method(balancing(samax.das), wraps=True, golden=("das", "das_tnn")),
    "several steps": Method(several_steps, normalized=True),
    "weighted": Method(weighted, normalized=True, one_call=True),
    "stochastic_rounding": Method(
        rounded, except_for={"low precision": "it rounds at random, by the parameters' dtype"}
    ),
    "random_perturbation": Method(random_perturbation, except_for=SAMPLED),
    "m_sharpness": Method(
        in_groups, except_for={"zero rho": "the mean over the groups is rounded"}
    ),
    "alternating": Method(in_two_calls, wraps=True, calls=2, except_for=STORED),
}

# One of each shape, where all would take long and are alike.
SHAPES = ["sam", "samar", "looksam", "stale_sam", "trace_sam", "nbar", "alternating", "m_sharpness"]


def points_of(tx, grads, state, params, **extra):
    """Where `tx` evaluates the gradient, outside of `jit`, and the state after it."""
    points = []
    _, state = tx.update(grads, state, params, grad_fn=lambda p: points.append(p) or p, **extra)
    return points, state


def where(**wanted):
    """The names of the methods whose attributes are these."""
    return [
        name
        for name, method in METHODS.items()
        if all(getattr(method, key) == value for key, value in wanted.items())
    ]


def initial(dtype=float, seed=1):
    """Two LoRA factors and a bias, in JAX's default precision unless told."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "lora_a": (0.5 * jax.random.normal(a, (4, 8))).astype(dtype),
        "lora_b": (0.5 * jax.random.normal(b, (8, 4))).astype(dtype),
        "bias": (0.1 * jnp.arange(4.0)).astype(dtype),
    }


def batch_of(step=0):
    inputs = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (8, 4))
    return inputs, jnp.sin(inputs).sum(axis=1)


def loss_fn(params, batch):
    inputs, targets = (array.astype(params["bias"].dtype) for array in batch)
    hidden = jnp.tanh(inputs @ params["lora_a"])
    return jnp.mean(((hidden @ params["lora_b"] + params["bias"]).mean(axis=1) - targets) ** 2)


def train_step(tx, params, state, batch, loss=loss_fn):
    """One call of `update`, with all that any method can use."""
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params, value=value, value_fn=loss, batch=batch)
    return optax.apply_updates(params, updates), state
