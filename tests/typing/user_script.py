"""What a user writes, for type checkers: every documented call. It is checked and never run."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import samax
import samax.flax
from samax import flatness

Params = dict[str, jax.Array]


def loss_fn(params: Params, batch: jax.Array) -> jax.Array:
    return jnp.mean((batch @ params["w"]) ** 2)


rate = optax.cosine_decay_schedule(0.1, 100)
params: Params = {"w": jnp.ones(3)}
batch = jnp.ones((8, 3))
mask = {"w": True}

methods = [
    samax.sam(0.05, eps=1e-12, mask=mask, track=True),
    samax.sam(rate, mask=samax.weights_only),
    samax.usam(rho=0.05),
    samax.asam(0.5, t0=0.01, scaled=samax.weights_only),
    samax.vasso(0.05, 0.4),
    samax.wsam(0.05, gamma=0.9),
    samax.gsam(rate, alpha=rate),
    samax.samar(0.05, rule=lambda weight, ratio: weight * ratio, bounds=(0.5, 2.0)),
    samax.samar(0.05, rule=samax.threshold_rule(1.1)),
    samax.trace_sam(0.01, sampling=samax.Sampling(samax.sphere, num_samples=4, antithetic=True)),
    samax.frob_sam(lam=0.01, sampling=samax.Sampling(samax.rademacher, 2)),
    samax.det_sam(sampling=samax.Sampling(samax.cube(0.1), key=jax.random.key(0))),
    samax.universal_sam(
        lambda t: t[1] - t[0] ** 2,
        lambda t: (t, t**2),
        samax.Sampling(samax.scaled_by_params(samax.scaled_by_layer(samax.gaussian)), 2),
        rho=0.1,
    ),
    samax.m_sharpness(samax.sam(0.05), 4),
    samax.sharpness_aware(samax.scale_to_norm(0.05), steps=2),
    samax.sharpness_aware(
        optax.chain(samax.gradient_ema(0.4), samax.normalize(), samax.scale_by_rho(rate)),
        samax.rule(lambda clean, perturbed: perturbed),
    ),
    samax.sharpness_aware(
        samax.perturb_only(optax.chain(optax.scale_by_adam(), samax.stochastic_rounding(0)), mask),
        samax.weighted(2.0),
    ),
    samax.sharpness_aware(samax.scale_by_abs_params(0.1), samax.surrogate_gap(0.2)),
    samax.sharpness_aware(optax.centralize(), samax.adaptive_weight()),
    samax.friendly_sam(0.05, sigma=1.0, decay=0.9),
    samax.stable_sam(0.05),
    samax.sagm(0.05, 0.001),
    samax.looksam(0.05, k=5, alpha=0.7),
    samax.occasionally(samax.sam(0.05), samax.from_step(100)),
    samax.occasionally(samax.sam(0.05), samax.until_step(100)),
    samax.occasionally(samax.sam(0.05), samax.every(2)),
    samax.occasionally(samax.sam(0.05), samax.at_random(rate, 0)),
    samax.occasionally(samax.sam(0.05), samax.where_steep(1000)),
    samax.occasionally(
        samax.sharpness_aware(
            optax.chain(samax.subtract_ema(1.0, 0.9), samax.scale_to_norm_less(0.05, 0.001)),
            samax.reuse_orthogonal(0.7),
        ),
        samax.every(2),
    ),
    samax.sharpness_aware(samax.scale_to_norm(0.05), samax.match_clean_norm()),
    samax.sam(0.5, mask=samax.normalization_only),
    samax.sharpness_aware(
        optax.chain(
            samax.random_perturbation(samax.scaled_by_filter(samax.gaussian, axis=0), key=1),
            samax.scale_by_rho(0.01),
        )
    ),
]
optimizers = [
    *(optax.chain(method, optax.sgd(0.1)) for method in methods),
    samax.decoupled_wsam(optax.adam(1e-3), 1e-3),
    samax.decoupled(samax.asam(0.5), optax.adam(rate), rate, weight=1.0),
    samax.alternating(optax.chain(samax.sam(0.05), optax.sgd(0.1))),
    samax.stale_sam(optax.sgd(0.1), rho=0.05),
    samax.msam(optax.sgd(0.1, momentum=0.9), rho=0.3),
    samax.one_gradient(optax.sgd(0.1), samax.scale_to_norm(0.05), source="update"),
    samax.nbar(optax.adamw(1e-4), learning_rate=1e-4, alpha=rate, groups=samax.lora_groups),
    samax.obar(optax.adamw(1e-4), learning_rate=1e-4, alpha=0.5, groups=samax.lora_groups),
    samax.das(
        optax.adamw(1e-4),
        learning_rate=rate,
        alpha=0.1,
        groups=samax.groups_by_path("(?P<group>x)"),
    ),
    samax.balanced(
        optax.sgd(0.1),
        lambda params_sq, grads_sq: params_sq.mean(axis=0) - params_sq,
        learning_rate=0.1,
        alpha=1.0,
        groups={"w": "a"},
    ),
    optax.chain(samax.cross_replica_mean("data"), samax.sam(), optax.sgd(0.1)),
]

for tx in optimizers:
    state = tx.init(params)
    value, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, value=value, value_fn=loss_fn, batch=batch)
    moved = optax.apply_updates(params, updates)

value, grads = samax.value_and_grad(loss_fn, samax.sam(0.05))(params, batch)
functional = samax.functional_grad_fn(
    lambda p: batch @ p["w"], lambda outputs: jnp.mean(outputs**2), batch @ params["w"]
)
updates, state = optimizers[0].update(grads, optimizers[0].init(params), params, grad_fn=functional)
(value, aux), grads = samax.value_and_grad(
    lambda p, x: (loss_fn(p, x), x), samax.gsam(0.05), has_aux=True
)(params, batch)
state = optimizers[-1].init(params)
evaluated = samax.eval_params(state, params)

model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.chain(samax.sam(0.05), optax.sgd(0.1)), wrt=nnx.Param)


def model_loss(model: nnx.Linear, x: jax.Array) -> jax.Array:
    return jnp.mean(model(x) ** 2)


value, direction = samax.flax.value_and_grad(model_loss, samax.sam(0.05))(model, batch)
value_fn = samax.flax.value_fn(model, model_loss, batch)
optimizer.update(model, direction, value=value, value_fn=value_fn)

balance: dict[str, jax.Array] = samax.balancedness(params, samax.lora_groups)
deviation = samax.norm_deviation(params, {"w": "a"})
covariance = samax.gradient_covariance(params, params, {"w": "a"})

batches = [batch]
worst: jax.Array = flatness.worst_case_sharpness(loss_fn, params, batches, rho=0.05)
per_batch = flatness.worst_case_m_sharpness(loss_fn, params, batches, rho=0.05)
average = flatness.average_case_sharpness(loss_fn, params, batches, rho=0.05)
product = flatness.hessian_operator(loss_fn, params, batches)
top: jax.Array = flatness.top_eigenpairs(product, params).values
trace: jax.Array = flatness.trace(product, params).value
line = flatness.loss_line(
    loss_fn, params, flatness.random_direction(0, params), jnp.linspace(-1, 1, 5), batches
)
