"""Embeddings of unit length before the projection head, or as they are.

    python -m supcon_jax.tools.study studies/normalization.py

The paper's text normalises them, and so does the official code on ImageNet; that for CIFAR
and the authors' PyTorch code do not.
Hardware: 2 CPU cores. Time: five minutes. Result: docs/studies.md.
"""

from studies import common


def get_study(scale):
    return {
        "title": "Normalised embeddings",
        "stages": common.stages(scale, evaluate=False),
        "shared": common.shared(scale, evaluate=False),
        "grid": {"all:encoder.normalize_embedding": (False, True)},
        "seeds": common.seeds(scale),
        "metrics": (
            "probe:eval/top1",
            "pretrain:knn/top1",
            "pretrain:embedding/rankme",
        ),
        "baseline": {"all:encoder.normalize_embedding": False},
        "reading": "At this scale it makes no difference that five seeds could show: the "
        "interval of the linear probe's reaches from -1.5 to +0.4 points.",
    }
