"""What an optimizer found: how flat the loss is around some parameters.

`import samax` does not import it: use `from samax import flatness`. Its figures,
`samax.flatness.plots`, need Matplotlib and so an import of their own.
"""

from samax.flatness.landscape import filter_normalized, loss_line, loss_surface, random_direction
from samax.flatness.operators import gauss_newton_operator, hessian_operator, scaled_operator
from samax.flatness.perturbations import (
    Estimate,
    average_case_sharpness,
    worst_case_m_sharpness,
    worst_case_sharpness,
)
from samax.flatness.spectrum import (
    Eigenpairs,
    Spectrum,
    frobenius_norm,
    log_determinant,
    spectral_density,
    top_eigenpairs,
    trace,
)

# In reading order.
__all__ = [  # noqa: RUF022
    # Perturbations.
    "worst_case_sharpness",
    "average_case_sharpness",
    "worst_case_m_sharpness",
    "Estimate",
    # Curvature as operators.
    "hessian_operator",
    "gauss_newton_operator",
    "scaled_operator",
    # Spectra of operators.
    "top_eigenpairs",
    "trace",
    "frobenius_norm",
    "log_determinant",
    "spectral_density",
    "Eigenpairs",
    "Spectrum",
    # Landscapes.
    "filter_normalized",
    "random_direction",
    "loss_line",
    "loss_surface",
]
