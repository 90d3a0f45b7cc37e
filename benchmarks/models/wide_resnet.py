"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.layers import Classifier, batch_norm, conv, scale_channels, stages


class PreActivationBlock(nnx.Module):
    """Normalization and ReLU before each of two 3x3 convolutions, and a shortcut around them."""

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Builds the block; a changed number of channels makes the shortcut a 1x1 convolution."""
        self.norm1 = batch_norm(in_features, dtype=dtype, rngs=rngs)
        self.conv1 = conv(in_features, out_features, stride=stride, dtype=dtype, rngs=rngs)
        self.norm2 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_features, out_features, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None
            if in_features == out_features
            else conv(in_features, out_features, size=1, stride=stride, dtype=dtype, rngs=rngs)
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Adds the residual to the inputs, or to their projection after the first activation."""
        activated = nnx.relu(self.norm1(inputs))
        features = nnx.relu(self.norm2(self.conv1(activated)))
        return self.conv2(features) + (
            inputs if self.shortcut is None else self.shortcut(activated)
        )


class WideResNet(nnx.Module):
    """A 3x3 stem, three stages of pre-activation blocks, and the classifier."""

    def __init__(
        self,
        *,
        depth: int,
        widening: int,
        num_classes: int,
        in_channels: int,
        width: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Builds WRN-``depth``-``widening``; the depth is 6 n + 4 for n blocks a stage.

        The widening multiplies the channels 16, 32, 64 of the stages and not the stem's 16, the
        width all of them.
        """
        features = scale_channels(16, width)
        self.conv = conv(in_channels, features, dtype=dtype, rngs=rngs)
        block = partial(PreActivationBlock, dtype=dtype, rngs=rngs)
        scaled = [scale_channels(number * widening, width) for number in (16, 32, 64)]
        self.blocks = stages(block, features, scaled, 3 * [(depth - 4) // 6])
        self.norm = batch_norm(scaled[-1], dtype=dtype, rngs=rngs)
        self.classifier = Classifier(scaled[-1], num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized ``(N, H, W, C)`` images to float32 logits."""
        return self.classifier(nnx.relu(self.norm(self.blocks(self.conv(images)))))
