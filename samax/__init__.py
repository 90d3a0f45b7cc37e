"""Sharpness-aware training for JAX, as Optax gradient transformations."""

# Ascent parts: gradient -> perturbation.
from samax.ascent import (
    gradient_ema,
    normalize,
    perturb_only,
    scale_by_abs_params,
    scale_by_rho,
    stochastic_rounding,
    weights_only,
)

# Norm balancing.
from samax.balance import balanced, das, nbar, obar

# Descent parts: clean and perturbed gradient -> direction.
from samax.descent import (
    adaptive_weight,
    decoupled,
    surrogate_gap,
    threshold_rule,
    weighted,
)

# Which leaves are the cores of a group.
from samax.groups import Stacked, groups_by_path, lora_groups

# Measures.
from samax.measures import balancedness, gradient_covariance, norm_deviation

# Methods.
from samax.methods import asam, decoupled_wsam, gsam, sam, samar, usam, vasso, wsam

# The combinator that methods are made of.
from samax.sharpness_aware import SharpnessMetrics, sharpness_aware

__all__ = [
    "SharpnessMetrics",
    "Stacked",
    "adaptive_weight",
    "asam",
    "balanced",
    "balancedness",
    "das",
    "decoupled",
    "decoupled_wsam",
    "gradient_covariance",
    "gradient_ema",
    "groups_by_path",
    "gsam",
    "lora_groups",
    "nbar",
    "norm_deviation",
    "normalize",
    "obar",
    "perturb_only",
    "sam",
    "samar",
    "scale_by_abs_params",
    "scale_by_rho",
    "sharpness_aware",
    "stochastic_rounding",
    "surrogate_gap",
    "threshold_rule",
    "usam",
    "vasso",
    "weighted",
    "weights_only",
    "wsam",
]
