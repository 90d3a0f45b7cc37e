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

# Loss landscapes.
from samax.flatness.landscape import filter_normalized, loss_line, loss_surface, random_direction

# Measures.
from samax._balance.measures import balancedness, gradient_covariance, norm_deviation

# Methods.
from samax._methods.sam import asam, decoupled_wsam, gsam, sam, samar, usam, vasso, wsam

# Curvature as operators; samax.flatness.spectrum, imported by who asks for it, measures them.
from samax.flatness.operators import gauss_newton_operator, hessian_operator, scaled_operator

# Several devices, and groups of examples on one.
from samax._core.devices import cross_replica_mean, m_sharpness

# Distributions of perturbations, for the universal class.
from samax.distributions import (
    cube,
    gaussian,
    rademacher,
    scaled_by_layer,
    scaled_by_params,
    sphere,
)

# Measures of sharpness.
from samax.flatness.perturbations import (
    Estimate,
    average_case_sharpness,
    worst_case_m_sharpness,
    worst_case_sharpness,
)

# The combinator that methods are made of.
from samax._core.combinator import SharpnessMetrics, sharpness_aware

# The universal class.
from samax._universal.averages import LogMeanExp
from samax._universal.combinator import UniversalMetrics, universal_sam
from samax._universal.methods import det_sam, frob_sam, trace_sam
from samax._universal.sampling import Sampling

__all__ = [
    "AlternatingState",
    "Estimate",
    "LogMeanExp",
    "Sampling",
    "SharpnessMetrics",
    "Stacked",
    "UniversalMetrics",
    "adaptive_weight",
    "alternating",
    "asam",
    "average_case_sharpness",
    "balanced",
    "balancedness",
    "cross_replica_mean",
    "cube",
    "das",
    "decoupled",
    "decoupled_wsam",
    "det_sam",
    "eval_params",
    "filter_normalized",
    "frob_sam",
    "gauss_newton_operator",
    "gaussian",
    "gradient_covariance",
    "gradient_ema",
    "groups_by_path",
    "gsam",
    "hessian_operator",
    "lora_groups",
    "loss_line",
    "loss_surface",
    "m_sharpness",
    "nbar",
    "norm_deviation",
    "normalize",
    "obar",
    "perturb_only",
    "rademacher",
    "random_direction",
    "sam",
    "samar",
    "scale_by_abs_params",
    "scale_by_rho",
    "scaled_by_layer",
    "scaled_by_params",
    "scaled_operator",
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
    "worst_case_m_sharpness",
    "worst_case_sharpness",
    "wsam",
]
