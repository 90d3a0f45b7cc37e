"""A small vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.layers import Classifier, scale_channels

PATCH, DEPTH, HEADS, SIZE = 8, 4, 4, 32


class Block(nnx.Module):
    """Attention and a network of two layers, each after a normalization and beside an identity."""

    def __init__(self, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Builds the layers."""
        self.norm1 = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, features, dtype=dtype, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.widen = nnx.Linear(features, 2 * features, dtype=dtype, rngs=rngs)
        self.narrow = nnx.Linear(2 * features, features, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ``(N, tokens, features)`` to the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.narrow(nnx.gelu(self.widen(self.norm2(tokens))))


class VisionTransformer(nnx.Module):
    """Patches of 8 x 8 pixels, four blocks of four heads, the mean over all tokens.

    Images are 32 x 32; the features are 64 times `width`.
    """

    def __init__(
        self, *, num_classes: int, in_channels: int, width: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        """Builds the network."""
        features = scale_channels(64, width)
        patch = (PATCH, PATCH)
        self.embed = nnx.Conv(
            in_channels, features, patch, strides=PATCH, padding="VALID", dtype=dtype, rngs=rngs
        )
        places = (SIZE // PATCH, SIZE // PATCH, features)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), places))
        self.blocks = nnx.List(Block(features, dtype=dtype, rngs=rngs) for _ in range(DEPTH))
        self.norm = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.classifier = Classifier(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps normalized ``(N, 32, 32, C)`` images to float32 logits."""
        patches = self.embed(images) + self.places
        tokens = patches.reshape(len(images), -1, patches.shape[-1])
        for block in self.blocks:
            tokens = block(tokens)
        return self.classifier(self.norm(tokens).reshape(patches.shape))
