"""Encoders and heads (Flax Linen)."""

from supcon_jax.models.convolution import CONVENTIONS
from supcon_jax.models.encoders import ENCODERS, STEMS, create_encoder, part_of
from supcon_jax.models.heads import (
    Classifier,
    EncoderWithProjection,
    ProjectionHead,
)
from supcon_jax.models.resnet import ResNet
from supcon_jax.models.vit import VisionTransformer
from supcon_jax.models.wide_resnet import WideResNet

__all__ = [
    "CONVENTIONS",
    "ENCODERS",
    "STEMS",
    "Classifier",
    "EncoderWithProjection",
    "ProjectionHead",
    "ResNet",
    "VisionTransformer",
    "WideResNet",
    "create_encoder",
    "part_of",
]
