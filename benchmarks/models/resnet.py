"""Residual networks for 32x32 images (He et al. 2016, arXiv 1512.03385)."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.layers import Classifier, batch_norm, conv, scale_channels, stages


class PadShortcut(nnx.Module):
    """Option A of the paper: every second pixel, new channels zero. No parameters."""

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Stores the stride and the channels to add."""
        del dtype, rngs  # nothing to initialize
        self.stride = stride
        self.added = out_features - in_features

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Subsamples, then pads the channels on both sides."""
        before = self.added // 2
        strided = inputs[:, :: self.stride, :: self.stride]
        return jnp.pad(strided, ((0, 0), (0, 0), (0, 0), (before, self.added - before)))


class ProjectionShortcut(nnx.Module):
    """Option B of the paper: a 1x1 convolution and batch normalization."""

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Builds the projection."""
        self.conv = conv(in_features, out_features, size=1, stride=stride, dtype=dtype, rngs=rngs)
        self.norm = batch_norm(out_features, dtype=dtype, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Projects the inputs to the block's output shape."""
        return self.norm(self.conv(inputs))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut around them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        shortcut: Callable[..., nnx.Module],
        conv: Callable[..., nnx.Module],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the block; ``shortcut`` is used only where the shape changes."""
        self.conv1 = conv(in_features, out_features, stride=stride, dtype=dtype, rngs=rngs)
        self.norm1 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out_features, out_features, dtype=dtype, rngs=rngs)
        self.norm2 = batch_norm(out_features, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None
            if stride == 1 and in_features == out_features
            else shortcut(in_features, out_features, stride, dtype=dtype, rngs=rngs)
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Adds the residual to the shortcut."""
        features = nnx.relu(self.norm1(self.conv1(inputs)))
        features = self.norm2(self.conv2(features))
        return nnx.relu(features + (inputs if self.shortcut is None else self.shortcut(inputs)))


class ResNet(nnx.Module):
    """A 3x3 stem without pooling, stages of basic blocks, and the classifier."""

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        channels: Sequence[int],
        shortcut: Callable[..., nnx.Module],
        inner_conv: Callable[..., nnx.Module] = conv,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        num_classes: int,
        in_channels: int,
        width: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the network from the blocks and the channels, at width 1, of each stage."""
        features = scale_channels(channels[0], width)
        self.conv = conv(in_channels, features, dtype=dtype, rngs=rngs)
        self.norm = batch_norm(features, dtype=dtype, rngs=rngs)
        block = partial(BasicBlock, shortcut=shortcut, conv=inner_conv, dtype=dtype, rngs=rngs)
        scaled = [scale_channels(number, width) for number in channels]
        self.blocks = stages(block, features, scaled, blocks)
        self.classifier = Classifier(scaled[-1], num_classes, linear=linear, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized ``(N, H, W, C)`` images to float32 logits."""
        return self.classifier(self.blocks(nnx.relu(self.norm(self.conv(images)))))
