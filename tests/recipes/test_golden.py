"""Every method follows the trajectory of its authors' code, or of an independent version."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import samax
from tests.golden_problems import base_optimizer, golden_cases, largest_error
from tests.marks import first_fast
from tests.methods import METHODS
from tests.recipes import test_reference

TOLERANCE = 1e-9
FAST = 2  # cases of each file; the others are slow tests


def before(transformation):
    """Builds the optimizer of a case whose method, of its settings, stands before the base."""
    return lambda case, problem: optax.chain(
        transformation(case["hyper"]), base_optimizer(case["base_optimizer"])
    )


def asam(case, problem):
    hyper = case["hyper"]
    scaled = hyper.get("scaled_params", "all")
    mask = None if scaled == "all" else samax.weights_only
    if mask is not None:
        marks = mask(dict.fromkeys(problem["init"], 0.0))
        assert [name for name, marked in marks.items() if marked] == scaled
    method = samax.asam(hyper["rho"], t0=hyper.get("eta", 0.0), scaled=mask, eps=hyper["eps"])
    return optax.chain(method, base_optimizer(case["base_optimizer"]))


def gsam(case, problem):
    hyper = case["hyper"]
    rho, rate = hyper["rho"], None
    if "aux_per_step" in case:
        radii = jnp.array([step["rho"] for step in case["aux_per_step"]])
        rates = jnp.array([step["lr"] for step in case["aux_per_step"]])
        rho, rate = (lambda step: radii[step]), (lambda step: rates[step])
    method = samax.gsam(rho, hyper["alpha"], eps=hyper["eps"])
    return optax.chain(method, base_optimizer(case["base_optimizer"], rate))


def decoupled_wsam(case, problem):
    hyper, config = case["hyper"], case["base_optimizer"]
    assert hyper["decouple"]
    assert hyper["max_norm"] is None
    rho, gamma, eps = hyper["rho"], hyper["gamma"], hyper["eps"]
    optimizer, rate = base_optimizer(config), config["lr"]
    if hyper["adaptive"]:
        ascent = samax.asam(rho, t0=0.0, eps=eps)
        return samax.decoupled(ascent, optimizer, rate, gamma / (1 - gamma))
    return samax.decoupled_wsam(optimizer, rate, rho=rho, gamma=gamma, eps=eps)


def balancing(method, *names):
    def build(case, problem):
        hyper = case["hyper"]
        options = {name: hyper[name] for name in names} | {"alpha": hyper["alpha"]}
        if hyper["schedule"] != "constant":
            strengths = jnp.array([step["alpha"] for step in case["aux_per_step"]])
            options["alpha"] = lambda step: strengths[step]
        config, groups = case["base_optimizer"], dict.fromkeys(problem["init"], "all")
        base = base_optimizer(config)
        return method(base, learning_rate=config["lr"], groups=groups, **options)

    return build


def recorded_distribution(case, problem):
    """The distribution that returns the recorded samples, whatever the keys, in their order."""
    # Over again at the end, where `largest_error` makes one step that it does not look at.
    samples = itertools.cycle(sample for step in case["noise"] for sample in step)
    shapes = {
        name: jax.ShapeDtypeStruct(np.shape(value), jnp.float64)
        for name, value in problem["init"].items()
    }

    def distribution(key, params):
        del params
        draw = lambda _: {name: np.asarray(value) for name, value in next(samples).items()}
        return io_callback(draw, shapes, jax.random.key_data(key), ordered=True)

    return distribution


def universal(case, problem, unroll=None):
    hyper = case["hyper"]
    methods = {"trace": samax.trace_sam, "det": samax.det_sam, None: samax.frob_sam}
    sampling = samax.Sampling(
        recorded_distribution(case, problem), hyper["n_samples"], unroll=unroll
    )
    method = methods[hyper.get("setting")](hyper["rho"], lam=hyper["lam"], sampling=sampling)
    return optax.chain(method, base_optimizer(case["base_optimizer"]))


def decay_after_the_step(strength):
    """`w <- (w + u) (1 - strength)`, the AdamW of MSAM's authors."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, w: u - strength * (w + u), updates, params)
    )


def msam(case, problem, at=None):
    hyper, config = case["hyper"], case["base_optimizer"]
    if config["name"] == "sgd":
        # With the momentum 0 too, whose buffer is the gradient.
        step = optax.sgd(config["lr"], momentum=config["momentum"])
        base = optax.chain(optax.add_decayed_weights(config["weight_decay"]), step)
    else:
        base = base_optimizer(config | {"name": "adam", "weight_decay": 0.0})
        base = optax.chain(base, decay_after_the_step(config["lr"] * config["weight_decay"]))
    perturbed = (at or hyper["weight_decay_at"]) == "perturbed"
    return samax.msam(base, hyper["rho"], decay_perturbed=perturbed, eps=hyper["eps"])


def stale_sam(case, problem):
    base = base_optimizer(case["base_optimizer"])
    return samax.stale_sam(base, case["hyper"]["rho"], eps=case["hyper"]["eps"])


def stable_sam(hyper):
    if hyper["normalized"]:
        return samax.stable_sam(hyper["rho"], eps=hyper["eps_perturb"])
    rule = samax.match_clean_norm(hyper["eps_scale"])
    return samax.sharpness_aware(samax.scale_by_rho(hyper["rho"]), rule)


def sagm(hyper):
    rho, alpha, eps = hyper["rho"], hyper["alpha"], hyper.get("eps", 1e-12)
    if not hyper["adaptive"]:
        return samax.sagm(rho, alpha, eps=eps)
    scale = samax.scale_by_abs_params()
    ascent = optax.chain(scale, samax.scale_to_norm_less(rho, alpha, eps), scale)
    return samax.sharpness_aware(ascent, samax.weighted(0.5))


def where_steep(hyper):
    options = {name: hyper[name] for name in ("decay", "lambda1", "lambda2")}
    policy = samax.where_steep(hyper["total_steps"], **options)
    return samax.occasionally(samax.sam(hyper["rho"]), policy)


# How each file's settings are written with samax.
BUILDERS = {
    "sam": before(lambda h: samax.sam(h["rho"], eps=h["eps"])),
    "usam": before(lambda h: samax.usam(h["rho"])),
    "asam": asam,
    "vasso": before(lambda h: samax.vasso(h["rho"], h["theta"], eps=h["eps"])),
    "gsam": gsam,
    "wsam": decoupled_wsam,
    "friendlysam": before(
        lambda h: samax.friendly_sam(h["rho"], h["sigma"], h["lmbda"], eps=h["eps"])
    ),
    "stablesam": before(stable_sam),
    "sagm": before(sagm),
    "looksam_global": before(
        lambda h: samax.looksam(h["rho"], h["k"], h["alpha"], eps=h["eps_perturb"])
    ),
    "aesam": before(where_steep),
    "stale": stale_sam,
    "msam": msam,
    "isam": universal,
    "frosam": universal,
    "nbar": balancing(samax.nbar),
    "obar": balancing(samax.obar),
    "das": balancing(samax.das, "norm_power", "eps"),
    "das_tnn": balancing(samax.das, "norm_power", "eps"),
}
FILES = sorted({file for method in METHODS.values() for file in method.golden})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("file", "case", "problem"),
    [
        pytest.param(file, *values.values, id=values.id, marks=values.marks)
        for file in FILES
        for values in first_fast(golden_cases(file), FAST)
    ],
)
def test_the_trajectory(file, case, problem):
    assert largest_error(case, problem, BUILDERS[file](case, problem)) < TOLERANCE


def test_every_method_is_checked_against_something():
    """A golden file or a version in NumPy; and no file lies there unused."""
    recipes = {name for name in METHODS if name in samax.__all__}
    parts = {"alternating", "m_sharpness", "one_gradient", "weighted"}
    parts |= {"random_perturbation", "stochastic_rounding"}
    unchecked = {n for n in recipes if not (METHODS[n].golden or METHODS[n].reference)}
    assert unchecked == parts
    for method in METHODS.values():
        assert method.reference is None or callable(getattr(test_reference, method.reference))
    folder = Path(__file__).parents[1] / "golden"
    used = {file.stem.removeprefix("golden_") for file in folder.glob("golden_*.json")}
    assert used == {*FILES, "functionalsam"}  # a `grad_fn`, with a test of its own


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "problem"), first_fast(golden_cases("isam", "frosam"), 1))
def test_the_universal_class_in_a_loop(case, problem):
    assert largest_error(case, problem, universal(case, problem, unroll=1)) < TOLERANCE


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "problem"), golden_cases("wsam"))
def test_the_two_forms_of_wsam_are_one_for_plain_sgd_alone(case, problem):
    hyper, config = case["hyper"], case["base_optimizer"]
    if not hyper["adaptive"]:
        coupled = samax.wsam(hyper["rho"], hyper["gamma"], eps=hyper["eps"])
        error = largest_error(case, problem, optax.chain(coupled, base_optimizer(config)))
        plain_sgd = config["name"] == "sgd" and not config["momentum"]
        assert (error < TOLERANCE) == plain_sgd


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "problem"), golden_cases("msam"))
def test_msam_decays_at_the_perturbed_point_only_where_told(case, problem):
    if case["hyper"]["weight_decay_at"] == "perturbed" and case["base_optimizer"]["weight_decay"]:
        assert largest_error(case, problem, msam(case, problem, at="unperturbed")) > 1e-5
