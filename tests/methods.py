"""One row a method, as a whole optimizer with schedules and seeds: what every method must do."""

import optax

import samax

RATE = 0.05
RADIUS = optax.linear_schedule(0.1, 0.05, 20)
MASK = {"lora_a": True, "lora_b": True, "bias": False}


def base():
    return optax.sgd(optax.linear_schedule(RATE, 0.0, 100), momentum=0.9)


def chained(transformation):
    return optax.chain(transformation, base())


def balancing(method):
    return method(base(), learning_rate=RATE, alpha=RADIUS, groups=samax.lora_groups, track=True)


# Each builds its optimizer anew: building must not run JAX.
METHODS = {
    "sam": lambda: chained(samax.sam(RADIUS, track=True)),
    "sam, a number": lambda: chained(samax.sam(0.1)),
    "sam, masked": lambda: chained(samax.sam(RADIUS, mask=MASK)),
    "usam": lambda: chained(samax.usam(RADIUS, track=True)),
    "asam": lambda: chained(samax.asam(RADIUS, scaled=samax.weights_only, track=True)),
    "vasso": lambda: chained(samax.vasso(RADIUS, 0.3, track=True)),
    "wsam": lambda: chained(samax.wsam(RADIUS, track=True)),
    "decoupled_wsam": lambda: samax.decoupled_wsam(base(), RATE, rho=RADIUS, track=True),
    "gsam": lambda: chained(samax.gsam(RADIUS, RADIUS, track=True)),
    "samar": lambda: chained(samax.samar(RADIUS, track=True)),
    "trace_sam": lambda: chained(samax.trace_sam(RADIUS, track=True)),
    "frob_sam": lambda: chained(samax.frob_sam(RADIUS, track=True)),
    "det_sam": lambda: chained(samax.det_sam(RADIUS, track=True)),
    "nbar": lambda: balancing(samax.nbar),
    "obar": lambda: balancing(samax.obar),
    "das": lambda: balancing(samax.das),
    "several steps": lambda: chained(
        samax.sharpness_aware(samax.scale_to_norm(RADIUS), steps=3, track=True)
    ),
    "rule": lambda: chained(
        samax.sharpness_aware(samax.scale_to_norm(RADIUS), samax.weighted(RADIUS))
    ),
    "stochastic rounding": lambda: chained(
        samax.sharpness_aware(
            optax.chain(samax.scale_to_norm(RADIUS), samax.stochastic_rounding(0))
        )
    ),
    "m_sharpness": lambda: chained(samax.m_sharpness(samax.sam(RADIUS, track=True), 2)),
    "friendly_sam": lambda: chained(samax.friendly_sam(RADIUS, track=True)),
    "stable_sam": lambda: chained(samax.stable_sam(RADIUS, track=True)),
    "sagm": lambda: chained(samax.sagm(RADIUS, RADIUS, track=True)),
    "looksam": lambda: chained(samax.looksam(RADIUS, 2, track=True)),
    "at random": lambda: chained(
        samax.occasionally(samax.vasso(RADIUS, track=True), samax.at_random(RADIUS, 0))
    ),
    "where steep": lambda: chained(
        samax.occasionally(samax.gsam(RADIUS, track=True), samax.where_steep(10))
    ),
    "stale_sam": lambda: samax.stale_sam(base(), RADIUS),
    "msam": lambda: samax.msam(base(), RADIUS, mask=MASK),
    "one_gradient": lambda: samax.one_gradient(
        base(), samax.scale_to_norm(RADIUS), source="update", decay_perturbed=True
    ),
    "alternating": lambda: samax.alternating(chained(samax.gsam(RADIUS, track=True))),
}
