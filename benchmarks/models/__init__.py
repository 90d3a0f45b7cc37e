"""Image classifiers in Flax NNX, by name."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.models.cnn import SmallCNN
from benchmarks.models.resnet import PadShortcut, ProjectionShortcut, ResNet
from benchmarks.models.tensorized import CORE_GROUPS, TensorizedConv, TensorizedLinear
from benchmarks.models.vit import VisionTransformer
from benchmarks.models.wide_resnet import WideResNet

__all__ = ["CORE_GROUPS", "MODELS", "TENSORIZED", "build", "parameter_count"]

# The CIFAR ResNets take option A's shortcuts, as He et al. do on CIFAR; the wider ones option B's.
_cifar_resnet = partial(ResNet, channels=(16, 32, 64), shortcut=PadShortcut)
_wide_stem_resnet = partial(ResNet, channels=(64, 128, 256, 512), shortcut=ProjectionShortcut)


# Rank 15 is that of the published Tensor-Ring ResNet-32 of 0.20 M parameters. The others have about
# as many: a ring's core is rank times as large as a factor matrix, so CP of rank 15 * 15 has the
# same number; 17 is the Tensor-Train rank that comes closest to it.
_RANKS = {"tr": 15, "tt": 17, "cp": 225}
_DENSE: dict[str, Callable[..., nnx.Module]] = {
    "cnn": SmallCNN,
    "resnet20": partial(_cifar_resnet, blocks=(3, 3, 3)),
    "resnet32": partial(_cifar_resnet, blocks=(5, 5, 5)),
}

TENSORIZED: dict[str, Callable[..., nnx.Module]] = {
    f"{format}-{name}": partial(
        network,
        # The first convolution stays dense: from 3 channels, a ring would be larger.
        inner_conv=partial(TensorizedConv, format=format, rank=rank),
        linear=partial(TensorizedLinear, format=format, rank=rank),
    )
    for format, rank in _RANKS.items()
    for name, network in _DENSE.items()
}
"""The models that have cores, which `CORE_GROUPS` finds."""

MODELS: dict[str, Callable[..., nnx.Module]] = {
    **_DENSE,
    "resnet18": partial(_wide_stem_resnet, blocks=(2, 2, 2, 2)),
    "resnet34": partial(_wide_stem_resnet, blocks=(3, 4, 6, 3)),
    "wrn28-10": partial(WideResNet, depth=28, widening=10),
    "wrn34-10": partial(WideResNet, depth=34, widening=10),
    "vit": VisionTransformer,
    **TENSORIZED,
}


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Builds a classifier that maps normalized NHWC images to float32 logits.

    Args:
        name: A key of ``MODELS``.
        num_classes: The number of logits.
        in_channels: The images' channels.
        width: Multiplies the channels of every layer, to multiples of 4.
        dtype: The compute dtype. Parameters, batch statistics and logits are float32 in any case.
        rngs: The random streams of the initialization.

    Returns:
        The model in training mode; ``model.eval()`` makes it use its running batch statistics.

    Raises:
        ValueError: If ``name`` is unknown, or ``width`` is not positive.
    """
    if name not in MODELS:
        raise ValueError(f"name={name!r}: no such model; choose one of {', '.join(MODELS)}")
    if not width > 0:
        raise ValueError(f"width={width}: pass a positive multiplier of the channel numbers")
    return MODELS[name](
        num_classes=num_classes, in_channels=in_channels, width=width, dtype=dtype, rngs=rngs
    )


def parameter_count(model: nnx.Module) -> int:
    """Counts the trainable numbers of a model, concrete or from ``nnx.eval_shape``."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
