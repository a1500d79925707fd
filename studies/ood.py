"""Detection of classes that the training has not seen.

    python -m supcon_jax.tools.study studies/ood.py

Trained on five of the ten classes; the test images of the other five are foreign. The largest
softmax is that of the probe, and of cross-entropy's own classifier.
Hardware: 2 CPU cores. Time: ten minutes. Result: docs/studies.md.
"""

from studies import common

TOOL = ("supcon_jax.tools.embeddings", "{pretrain}", "--ood=other_classes")

READING = """
Five digits are trained on, the five others are to be told from them. SupCon and cross-entropy, each
seed with the better of two rates, cannot be told apart by any of the three scores (-0.8 ± 3.5 by the
k-th neighbour, -0.7 ± 3.2 by Mahalanobis, +1.9 ± 5.0 by the largest softmax). SimCLR is behind both by
the distances, by 22.1 ± 10.6 of cross-entropy by the k-th neighbour; by the largest softmax five seeds
do not show it (-4.7 ± 6.6).
"""


def get_study(scale):
    stages = common.stages(scale)
    stages["ood"] = (*TOOL, "--representation=embedding", "--classifier={probe}")
    alone = common.cross_entropy(scale, ood=(*TOOL, "--representation=embedding"))
    seen = tuple(range(5 if scale == "small" else 500))
    return {
        "title": "Detection of classes that were not trained on",
        "stages": stages,
        "shared": common.shared(scale) | {"all:data.classes": seen},
        "grid": {
            "method": {
                "SupCon": {},
                "SimCLR": {"loss.name": "simclr"},
                "cross-entropy": alone,
            }
        },
        "tune": common.tune_rate(scale),
        "tune_by": "evaluate:eval/top1",
        "seeds": common.seeds(scale),
        "metrics": (
            "ood:embedding.ood/knn_auroc",
            "ood:embedding.ood/mahalanobis_auroc",
            "ood:embedding.ood/softmax_auroc",
            "ood:embedding.ood/knn_fpr95",
            "ood:embedding.ood/softmax_fpr95",
        ),
        "baseline": {"method": "cross-entropy"},
        "reading": READING,
    }
