"""Heads on the embedding: the projection for contrastive losses, the classifier."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

CLASSIFIER_INITS = {
    "glorot": nn.initializers.glorot_uniform(),
    "zeros": nn.initializers.zeros,
}


def l2_normalize(x: jax.Array, *, epsilon: float = 1e-12) -> jax.Array:
    """Scales the last axis to unit length: `x / sqrt(max(sum(x^2), epsilon))`.

    The maximum keeps value and gradient finite where a row is all zeros.
    """
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, epsilon))


class ProjectionHead(nn.Module):
    """Maps embeddings `[N, D_E]` to projections `[N, output_dim]`, not normalised.

    The loss normalises. With no hidden layer this is the single linear layer of the
    paper's ImageNet recipes; kernels start at N(0, 0.01^2), as in the official code.

    Attributes:
      hidden_dims: widths of the hidden layers (ReLU after each).
      output_dim: dimension D of the projection; 0: there is no head, and the embedding is
        what the loss compares.
      batch_norm: BatchNorm after every hidden layer (SimCLR recipe).
      normalize_embedding: scale the embedding to unit length first (SupCon recipe).
      bias: of the last layer (the authors' PyTorch code; the official code has none).
      axis_name: see `ResNet`.
    """

    hidden_dims: Sequence[int] = ()
    output_dim: int = 128
    batch_norm: bool = False
    normalize_embedding: bool = False
    bias: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, embeddings: jax.Array, *, train: bool) -> jax.Array:
        """Projections `[N, output_dim]`; with `train` BatchNorm uses these N."""
        x = l2_normalize(embeddings) if self.normalize_embedding else embeddings
        kernel_init = nn.initializers.normal(0.01)
        for index, width in enumerate(self.hidden_dims, start=1):
            x = nn.Dense(
                width,
                use_bias=not self.batch_norm,
                kernel_init=kernel_init,
                name=f"dense{index}",
            )(x)
            if self.batch_norm:
                x = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    epsilon=1e-5,
                    axis_name=self.axis_name,
                    name=f"batch_norm{index}",
                )(x)
            x = nn.relu(x)
        if not self.output_dim:
            return x
        return nn.Dense(
            self.output_dim,
            use_bias=self.bias,
            kernel_init=kernel_init,
            name="dense_out",
        )(x)


class EncoderWithProjection(nn.Module):
    """An encoder and the projection head on it, as one: images to projections.

    Attributes:
      encoder: images to embeddings.
      head: embeddings to projections.
    """

    encoder: nn.Module
    head: nn.Module

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Projections `[N, D]`, not normalised."""
        return self.head(self.encoder(images, train=train), train=train)


class Classifier(nn.Module):
    """One linear layer from embeddings `[N, D_E]` to logits `[N, num_classes]`.

    Attributes:
      num_classes: number of classes C.
      init_name: key of `CLASSIFIER_INITS` for the kernel; the bias starts at zero.
      normalize_embedding: scale the embedding to unit length first.
    """

    num_classes: int
    init_name: str = "glorot"
    normalize_embedding: bool = False

    @nn.compact
    def __call__(self, embeddings: jax.Array, *, train: bool) -> jax.Array:
        """Logits `[N, num_classes]`."""
        del train  # the same in training and in evaluation
        x = l2_normalize(embeddings) if self.normalize_embedding else embeddings
        return nn.Dense(
            self.num_classes,
            kernel_init=CLASSIFIER_INITS[self.init_name],
            name="dense_out",
        )(x)
