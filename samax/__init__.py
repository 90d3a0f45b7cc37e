"""Sharpness-aware training for JAX, as Optax gradient transformations."""

# The combinator, and the methods that are made with it.
from samax._core.combinator import SharpnessMetrics, sharpness_aware
from samax._methods.sam import sam, usam
from samax._methods.asam import asam, scale_by_abs_params
from samax._methods.vasso import gradient_ema, vasso
from samax._methods.wsam import decoupled, decoupled_wsam, wsam
from samax._methods.gsam import gsam, surrogate_gap
from samax._methods.samar import adaptive_weight, samar, threshold_rule
from samax._methods.friendly_sam import friendly_sam, subtract_ema
from samax._methods.stable_sam import match_clean_norm, stable_sam
from samax._methods.sagm import sagm, scale_to_norm_less
from samax._methods.random_perturbation import random_perturbation
from samax._methods.functional_sam import functional_grad_fn

# When the ascent is made, and what is reused where it is not.
from samax._core.occasionally import OccasionallyState, occasionally
from samax._core.policies import (
    Policy,
    at_random,
    every,
    from_step,
    until_step,
    where_steep,
)
from samax._methods.looksam import looksam, reuse_orthogonal

# Parts of an ascent, gradient -> perturbation, and of a descent, both gradients -> direction.
from samax._core.ascent import (
    normalize,
    perturb_only,
    scale_by_rho,
    scale_to_norm,
    stochastic_rounding,
)
from samax._core.masks import normalization_only, weights_only
from samax._core.descent import rule, weighted

# One gradient a step: the parameters outside are the perturbed ones.
from samax._core.one_gradient import OneGradientState, one_gradient
from samax._methods.stale_sam import stale_sam
from samax._methods.msam import msam

# In place of jax.value_and_grad; a step in two calls; groups of examples, and several devices.
from samax._core.value_and_grad import value_and_grad
from samax._core.alternating import AlternatingState, alternating
from samax._core.eval_params import eval_params
from samax._core.m_sharpness import m_sharpness
from samax._core.devices import cross_replica_mean

# The universal class, and its distributions.
from samax._universal.combinator import UniversalMetrics, universal_sam
from samax._universal.methods import det_sam, frob_sam, trace_sam
from samax._universal.averages import LogMeanExp
from samax._universal.sampling import Sampling
from samax.distributions import (
    cube,
    gaussian,
    rademacher,
    scaled_by_filter,
    scaled_by_layer,
    scaled_by_params,
    sphere,
)

# Norm balancing; which leaves are the cores of a group; what balance is measured by.
from samax._balance.balanced import balanced, das, nbar, obar
from samax._balance.groups import Stacked, groups_by_path, lora_groups
from samax._balance.measures import balancedness, gradient_covariance, norm_deviation


__all__ = [
    "AlternatingState",
    "LogMeanExp",
    "OccasionallyState",
    "OneGradientState",
    "Policy",
    "Sampling",
    "SharpnessMetrics",
    "Stacked",
    "UniversalMetrics",
    "adaptive_weight",
    "alternating",
    "asam",
    "at_random",
    "balanced",
    "balancedness",
    "cross_replica_mean",
    "cube",
    "das",
    "decoupled",
    "decoupled_wsam",
    "det_sam",
    "eval_params",
    "every",
    "friendly_sam",
    "frob_sam",
    "from_step",
    "functional_grad_fn",
    "gaussian",
    "gradient_covariance",
    "gradient_ema",
    "groups_by_path",
    "gsam",
    "looksam",
    "lora_groups",
    "m_sharpness",
    "match_clean_norm",
    "msam",
    "nbar",
    "norm_deviation",
    "normalization_only",
    "normalize",
    "obar",
    "occasionally",
    "one_gradient",
    "perturb_only",
    "rademacher",
    "random_perturbation",
    "reuse_orthogonal",
    "rule",
    "sagm",
    "sam",
    "samar",
    "scale_by_abs_params",
    "scale_by_rho",
    "scale_to_norm",
    "scale_to_norm_less",
    "scaled_by_filter",
    "scaled_by_layer",
    "scaled_by_params",
    "sharpness_aware",
    "sphere",
    "stable_sam",
    "stale_sam",
    "stochastic_rounding",
    "subtract_ema",
    "surrogate_gap",
    "threshold_rule",
    "trace_sam",
    "universal_sam",
    "until_step",
    "usam",
    "value_and_grad",
    "vasso",
    "weighted",
    "weights_only",
    "where_steep",
    "wsam",
]
