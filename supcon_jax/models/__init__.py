"""Encoders and heads (Flax Linen)."""

from supcon_jax.models.heads import Classifier, ProjectionHead
from supcon_jax.models.resnet import ENCODERS, ResNet, create_encoder

__all__ = ["ENCODERS", "Classifier", "ProjectionHead", "ResNet", "create_encoder"]
