"""Every recipe follows the trajectory of its authors' code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import samax
from tests.golden_problems import base_optimizer, golden_cases, largest_error

pytestmark = pytest.mark.usefixtures("x64")
TOLERANCE = 1e-9


@pytest.mark.parametrize(("case", "problem"), golden_cases("sam"))
def test_sam(case, problem):
    hyper = case["hyper"]
    sam = samax.sam(hyper["rho"], eps=hyper["eps"])
    tx = optax.chain(sam, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("usam"))
def test_usam(case, problem):
    tx = optax.chain(samax.usam(case["hyper"]["rho"]), base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("asam"))
def test_asam(case, problem):
    hyper = case["hyper"]
    scaled = hyper.get("scaled_params", "all")
    mask = None if scaled == "all" else samax.weights_only
    if mask is not None:
        marks = mask(dict.fromkeys(problem["init"], 0.0))
        assert [name for name, marked in marks.items() if marked] == scaled
    asam = samax.asam(hyper["rho"], t0=hyper.get("eta", 0.0), scaled=mask, eps=hyper["eps"])
    tx = optax.chain(asam, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("vasso"))
def test_vasso(case, problem):
    hyper = case["hyper"]
    vasso = samax.vasso(hyper["rho"], hyper["theta"], eps=hyper["eps"])
    tx = optax.chain(vasso, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("gsam"))
def test_gsam(case, problem):
    hyper = case["hyper"]
    rho, rate = hyper["rho"], None
    if "aux_per_step" in case:
        radii = jnp.array([step["rho"] for step in case["aux_per_step"]])
        rates = jnp.array([step["lr"] for step in case["aux_per_step"]])
        rho, rate = (lambda step: radii[step]), (lambda step: rates[step])
    gsam = samax.gsam(rho, hyper["alpha"], eps=hyper["eps"])
    tx = optax.chain(gsam, base_optimizer(case["base_optimizer"], rate))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("wsam"))
def test_wsam(case, problem):
    hyper, config = case["hyper"], case["base_optimizer"]
    assert hyper["decouple"]
    assert hyper["max_norm"] is None
    odds = hyper["gamma"] / (1 - hyper["gamma"])
    optimizer, rate = base_optimizer(config), config["lr"]
    plain_sgd = config["name"] == "sgd" and not config["momentum"]
    if hyper["adaptive"]:
        asam = samax.asam(hyper["rho"], t0=0.0, eps=hyper["eps"])
        tx = samax.decoupled(asam, optimizer, rate, odds)
    else:
        tx = samax.decoupled_wsam(
            optimizer, rate, rho=hyper["rho"], gamma=hyper["gamma"], eps=hyper["eps"]
        )
    assert largest_error(case, problem, tx) < TOLERANCE
    if not hyper["adaptive"]:
        coupled = samax.wsam(hyper["rho"], hyper["gamma"], eps=hyper["eps"])
        error = largest_error(case, problem, optax.chain(coupled, optimizer))
        # The two forms are one for plain SGD, and only for it.
        assert (error < TOLERANCE) == plain_sgd


def balancing_options(case, problem):
    """Learning rate, strength and groups of a norm-balancing case: all leaves are one group."""
    hyper, alpha = case["hyper"], case["hyper"]["alpha"]
    if hyper["schedule"] != "constant":
        strengths = jnp.array([step["alpha"] for step in case["aux_per_step"]])
        alpha = lambda step: strengths[step]
    groups = dict.fromkeys(problem["init"], "all")
    return {"learning_rate": case["base_optimizer"]["lr"], "alpha": alpha, "groups": groups}


@pytest.mark.parametrize(("case", "problem"), golden_cases("nbar", "obar", "das", "das_tnn"))
def test_norm_balancing(case, problem):
    options = balancing_options(case, problem)
    method = case["id"].split("_")[0]
    if method == "das":
        options |= {"norm_power": case["hyper"]["norm_power"], "eps": case["hyper"]["eps"]}
    wrap = {"nbar": samax.nbar, "obar": samax.obar, "das": samax.das}[method]
    tx = wrap(base_optimizer(case["base_optimizer"]), **options)
    assert largest_error(case, problem, tx) < TOLERANCE


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


@pytest.mark.parametrize("unroll", [None, 1])
@pytest.mark.parametrize(("case", "problem"), golden_cases("isam", "frosam"))
def test_universal_class(case, problem, unroll):
    hyper = case["hyper"]
    method = {"trace": samax.trace_sam, "det": samax.det_sam, None: samax.frob_sam}
    method = method[hyper.get("setting")]
    sampling = samax.Sampling(
        recorded_distribution(case, problem), hyper["n_samples"], unroll=unroll
    )
    universal = method(hyper["rho"], lam=hyper["lam"], sampling=sampling)
    tx = optax.chain(universal, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("stale"))
def test_stale_sam(case, problem):
    hyper = case["hyper"]
    base = base_optimizer(case["base_optimizer"])
    tx = samax.stale_sam(base, hyper["rho"], eps=hyper["eps"])
    assert largest_error(case, problem, tx) < TOLERANCE


def decay_after_the_step(strength):
    """`w <- (w + u) (1 - strength)`, the AdamW of MSAM's authors."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda u, w: u - strength * (w + u), updates, params)
    )


@pytest.mark.parametrize(("case", "problem"), golden_cases("msam"))
def test_msam(case, problem):
    hyper, config = case["hyper"], case["base_optimizer"]
    if config["name"] == "sgd":
        # With the momentum 0 too, whose buffer is the gradient.
        step = optax.sgd(config["lr"], momentum=config["momentum"])
        base = optax.chain(optax.add_decayed_weights(config["weight_decay"]), step)
    else:
        base = base_optimizer(config | {"name": "adam", "weight_decay": 0.0})
        base = optax.chain(base, decay_after_the_step(config["lr"] * config["weight_decay"]))
    perturbed = hyper["weight_decay_at"] == "perturbed"
    tx = samax.msam(base, hyper["rho"], decay_perturbed=perturbed, eps=hyper["eps"])
    assert largest_error(case, problem, tx) < TOLERANCE
    if perturbed and config["weight_decay"]:
        tx = samax.msam(base, hyper["rho"], eps=hyper["eps"])
        assert largest_error(case, problem, tx) > 1e-5


@pytest.mark.parametrize(("case", "problem"), golden_cases("friendlysam"))
def test_friendly_sam(case, problem):
    hyper = case["hyper"]
    friendly = samax.friendly_sam(hyper["rho"], hyper["sigma"], hyper["lmbda"], eps=hyper["eps"])
    tx = optax.chain(friendly, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("stablesam"))
def test_stable_sam(case, problem):
    hyper = case["hyper"]
    if hyper["normalized"]:
        stable = samax.stable_sam(hyper["rho"], eps=hyper["eps_perturb"])
    else:
        rule = samax.match_clean_norm(hyper["eps_scale"])
        stable = samax.sharpness_aware(samax.scale_by_rho(hyper["rho"]), rule)
    tx = optax.chain(stable, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("sagm"))
def test_sagm(case, problem):
    hyper = case["hyper"]
    eps = hyper.get("eps", 1e-12)
    sagm = samax.sagm(hyper["rho"], hyper["alpha"], eps=eps)
    if hyper["adaptive"]:
        scale = samax.scale_by_abs_params()
        ascent = samax.scale_to_norm_less(hyper["rho"], hyper["alpha"], eps)
        sagm = samax.sharpness_aware(optax.chain(scale, ascent, scale), samax.weighted(0.5))
    tx = optax.chain(sagm, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("looksam_global"))
def test_looksam(case, problem):
    hyper = case["hyper"]
    looksam = samax.looksam(hyper["rho"], hyper["k"], hyper["alpha"], eps=hyper["eps_perturb"])
    tx = optax.chain(looksam, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE


@pytest.mark.parametrize(("case", "problem"), golden_cases("aesam"))
def test_where_steep(case, problem):
    hyper = case["hyper"]
    policy = samax.where_steep(
        hyper["total_steps"],
        decay=hyper["decay"],
        lambda1=hyper["lambda1"],
        lambda2=hyper["lambda2"],
    )
    aesam = samax.occasionally(samax.sam(hyper["rho"]), policy)
    tx = optax.chain(aesam, base_optimizer(case["base_optimizer"]))
    assert largest_error(case, problem, tx) < TOLERANCE
