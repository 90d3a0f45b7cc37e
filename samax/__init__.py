"""Sharpness-aware training for JAX, as Optax gradient transformations."""
