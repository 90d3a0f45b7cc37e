"""Networks for 224 x 224 images of 1,000 classes: ResNet-50 and ViT-B/16."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.layers import Classifier, batch_norm, conv, stages
from benchmarks.models.llama import stacked

CLASSES = 1000


class Bottleneck(nnx.Module):
    """A 3x3 convolution between two of 1x1, the last one four times as wide, and a shortcut."""

    def __init__(
        self, in_features: int, out_features: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        """Builds the block, whose stride is that of the 3x3 convolution."""
        layer: Any = functools.partial(conv, dtype=dtype, rngs=rngs)
        norm: Any = functools.partial(batch_norm, dtype=dtype, rngs=rngs)
        narrow = out_features // 4
        self.conv1, self.norm1 = layer(in_features, narrow, size=1), norm(narrow)
        self.conv2, self.norm2 = layer(narrow, narrow, stride=stride), norm(narrow)
        self.conv3, self.norm3 = layer(narrow, out_features, size=1), norm(out_features)
        self.shortcut = (
            None
            if in_features == out_features
            else nnx.Sequential(
                layer(in_features, out_features, size=1, stride=stride), norm(out_features)
            )
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Adds the residual to the shortcut."""
        features = nnx.relu(self.norm1(self.conv1(inputs)))
        features = nnx.relu(self.norm2(self.conv2(features)))
        features = self.norm3(self.conv3(features))
        return nnx.relu(features + (inputs if self.shortcut is None else self.shortcut(inputs)))


class ResNet50(nnx.Module):
    """He et al. 2016, arXiv 1512.03385, with the strides at the 3x3 convolutions."""

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """Builds the network of 25.6 million parameters."""
        self.conv = conv(3, 64, size=7, stride=2, dtype=dtype, rngs=rngs)
        self.norm = batch_norm(64, dtype=dtype, rngs=rngs)
        block = functools.partial(Bottleneck, dtype=dtype, rngs=rngs)
        self.blocks = stages(block, 64, (256, 512, 1024, 2048), (3, 4, 6, 3))
        self.classifier = Classifier(2048, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized ``(N, 224, 224, 3)`` images to float32 logits."""
        features = nnx.relu(self.norm(self.conv(images)))
        features = nnx.max_pool(features, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        return self.classifier(self.blocks(features))


class EncoderBlock(nnx.Module):
    """Attention and a network of two layers, each after a normalization and beside an identity."""

    def __init__(self, *, dtype: Any, rngs: nnx.Rngs):
        """Builds the layers."""
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm1, self.norm2 = nnx.LayerNorm(768, **options), nnx.LayerNorm(768, **options)
        self.attention = nnx.MultiHeadAttention(12, 768, decode=False, **options)
        self.widen, self.narrow = nnx.Linear(768, 3072, **options), nnx.Linear(3072, 768, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ``(N, tokens, 768)`` to the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.narrow(nnx.gelu(self.widen(self.norm2(tokens))))


class VisionTransformerB(nnx.Module):
    """ViT-B/16 (Dosovitskiy et al. 2021, arXiv 2010.11929) with the mean over all tokens.

    Its blocks are stacked along a leading axis, scanned, and computed again for their gradients.
    """

    def __init__(self, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        """Builds the network of 86 million parameters."""
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.Conv(3, 768, (16, 16), strides=16, padding="VALID", **options)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (14, 14, 768)))
        self.blocks = stacked(functools.partial(EncoderBlock, dtype=dtype), 12, rngs)
        self.norm = nnx.LayerNorm(768, **options)
        self.classifier = Classifier(768, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized ``(N, 224, 224, 3)`` images to float32 logits."""
        patches = self.embed(images) + self.places.astype(images.dtype)
        graph, layers = nnx.split(self.blocks)

        @jax.checkpoint
        def block(tokens: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(tokens), None

        tokens, _ = jax.lax.scan(block, patches.reshape(len(images), -1, 768), layers)
        return self.classifier(self.norm(tokens).reshape(patches.shape))
