"""Sharpness-aware training for JAX, as Optax gradient transformations."""

# One update in two calls, for frameworks that pass gradients alone.
from samax._core.alternating import AlternatingState, alternating, eval_params

# Ascent parts: gradient -> perturbation.
from samax._core.ascent import (
    gradient_ema,
    normalize,
    perturb_only,
    scale_by_abs_params,
    scale_by_rho,
    stochastic_rounding,
    weights_only,
)

# Norm balancing.
from samax._balance.balanced import balanced, das, nbar, obar

# Descent parts: clean and perturbed gradient -> direction.
from samax._core.descent import (
    adaptive_weight,
    decoupled,
    surrogate_gap,
    threshold_rule,
    weighted,
)

# Which leaves are the cores of a group.
from samax._balance.groups import Stacked, groups_by_path, lora_groups

# Measures.
from samax._balance.measures import balancedness, gradient_covariance, norm_deviation

# Methods.
from samax._methods.sam import asam, decoupled_wsam, gsam, sam, samar, usam, vasso, wsam

# Several devices, and groups of examples on one.
from samax._core.devices import cross_replica_mean, m_sharpness

# Measures mu for the universal class.
from samax.distributions import (
    cube,
    gaussian,
    rademacher,
    scaled_by_layer,
    scaled_by_params,
    sphere,
)

# The combinator that methods are made of.
from samax._core.combinator import SharpnessMetrics, sharpness_aware

# The universal class.
from samax._universal.combinator import LogMeanExp, UniversalMetrics, universal_sam
from samax._universal.methods import det_sam, frob_sam, trace_sam

__all__ = [
    "AlternatingState",
    "LogMeanExp",
    "SharpnessMetrics",
    "Stacked",
    "UniversalMetrics",
    "adaptive_weight",
    "alternating",
    "asam",
    "balanced",
    "balancedness",
    "cross_replica_mean",
    "cube",
    "das",
    "decoupled",
    "decoupled_wsam",
    "det_sam",
    "eval_params",
    "frob_sam",
    "gaussian",
    "gradient_covariance",
    "gradient_ema",
    "groups_by_path",
    "gsam",
    "lora_groups",
    "m_sharpness",
    "nbar",
    "norm_deviation",
    "normalize",
    "obar",
    "perturb_only",
    "rademacher",
    "sam",
    "samar",
    "scale_by_abs_params",
    "scale_by_rho",
    "scaled_by_layer",
    "scaled_by_params",
    "sharpness_aware",
    "sphere",
    "stochastic_rounding",
    "surrogate_gap",
    "threshold_rule",
    "trace_sam",
    "universal_sam",
    "usam",
    "vasso",
    "weighted",
    "weights_only",
    "wsam",
]
