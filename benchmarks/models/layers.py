"""The layers that all the networks share, with the papers' initialization and padding."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

# Kaiming normal by fan-out, as the ResNet and Wide ResNet authors' code.
kaiming_normal = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def scale_channels(channels: int, width: float) -> int:
    """Multiplies a number of channels, to the nearest multiple of 4 and at least 4."""
    return max(4, 4 * round(channels * width / 4))


def conv(
    in_features: int,
    out_features: int,
    size: int = 3,
    stride: int = 1,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution without bias, padded by ``size // 2`` on every side at any stride."""
    return nnx.Conv(
        in_features,
        out_features,
        kernel_size=(size, size),
        strides=stride,
        # Not 'SAME': that pads one side only at stride 2, unlike the published networks.
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kaiming_normal,
        rngs=rngs,
    )


def batch_norm(features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch normalization; statistics and parameters stay float32 whatever ``dtype`` is."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


def stages(
    block: Callable[[int, int, int], nnx.Module],
    features: int,
    channels: Sequence[int],
    counts: Sequence[int],
) -> nnx.Sequential:
    """Blocks from so many features to each stage's channels; all stages but the first halve."""
    layers = []
    for stage, (out_features, count) in enumerate(zip(channels, counts, strict=True)):
        for index in range(count):
            layers.append(block(features, out_features, 2 if stage > 0 and index == 0 else 1))
            features = out_features
    return nnx.Sequential(*layers)


class Classifier(nnx.Module):
    """Global average pooling and a linear layer: float32 logits."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        rngs: nnx.Rngs,
    ):
        """Builds the linear layer; ``linear`` is called as ``nnx.Linear`` is."""
        self.linear = linear(in_features, num_classes, rngs=rngs)

    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps ``(N, H, W, C)`` features to ``(N, num_classes)`` logits."""
        return self.linear(jnp.mean(features.astype(jnp.float32), axis=(1, 2)))
