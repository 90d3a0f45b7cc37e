"""A small convolutional network for the digits, quick on a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.layers import Classifier, batch_norm, conv, scale_channels


class SmallCNN(nnx.Module):
    """Four strided 3x3 convolutions with batch normalization and ReLU, then the classifier.

    The fourth makes the receptive field 31 pixels, the whole of a digit: with three, the network
    underfits.
    """

    def __init__(
        self,
        *,
        inner_conv: Callable[..., nnx.Module] = conv,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        num_classes: int,
        in_channels: int,
        width: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the network; `inner_conv` makes all convolutions but the first."""
        small, middle, large = (scale_channels(c, width) for c in (16, 32, 64))
        self.conv1 = conv(in_channels, small, stride=2, dtype=dtype, rngs=rngs)
        self.norm1 = batch_norm(small, dtype=dtype, rngs=rngs)
        self.conv2 = inner_conv(small, middle, stride=2, dtype=dtype, rngs=rngs)
        self.norm2 = batch_norm(middle, dtype=dtype, rngs=rngs)
        self.conv3 = inner_conv(middle, large, stride=2, dtype=dtype, rngs=rngs)
        self.norm3 = batch_norm(large, dtype=dtype, rngs=rngs)
        self.conv4 = inner_conv(large, large, stride=2, dtype=dtype, rngs=rngs)
        self.norm4 = batch_norm(large, dtype=dtype, rngs=rngs)
        self.classifier = Classifier(large, num_classes, linear=linear, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized ``(N, H, W, C)`` images to float32 logits."""
        features = nnx.relu(self.norm1(self.conv1(images)))
        features = nnx.relu(self.norm2(self.conv2(features)))
        features = nnx.relu(self.norm3(self.conv3(features)))
        features = nnx.relu(self.norm4(self.conv4(features)))
        return self.classifier(features)
