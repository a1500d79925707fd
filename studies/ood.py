"""Detection of classes that the training has not seen.

    python -m supcon_jax.tools.study studies/ood.py

Trained on five of the ten classes; the test images of the other five are foreign. The largest
softmax is that of the probe, and of cross-entropy's own classifier.
Hardware: 2 CPU cores. Time: ten minutes. Result: docs/studies.md.
"""

from studies import common

TOOL = ("supcon_jax.tools.embeddings", "{pretrain}", "--ood=other_classes")


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
        "reading": "Five digits are trained on, the five others are to be told from them. SupCon and "
        "cross-entropy, each with the better of two rates, are the same by all three scores; by the "
        "distance to the nearest training images SimCLR is far behind both. The distance to the "
        "nearest images is not better than the largest softmax for any of them.",
    }
