"""Number of views of every image, at the same number of images and of views a step.

    python -m supcon_jax.tools.study studies/views.py

Hardware: 2 CPU cores. Time: fifteen minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
With labels neither more views of the same images nor other images in the place of views change top-1
by more than five seeds can show, at one learning rate for all. By kNN one view is ahead of two, by
0.9 ± 0.8 with the same images and 1.0 ± 0.8 with twice as many. Without labels one view has no
positives at all.
"""


def get_study(scale):
    total = 128 if scale == "small" else 12288
    same_images = {str(v): {"data.views": v} for v in (1, 2, 4)}
    same_views = {
        f"{v}, as many views a step": {
            "data.views": v,
            "batch_size": total // v,
            "optimizer.learning_rate_batch": 256 * 2 // v,  # the rate of two views
        }
        for v in (1, 4)
    }
    return {
        "title": "Views of every image",
        "stages": common.stages(scale, evaluate=False),
        "shared": common.shared(scale, evaluate=False),
        "grid": {"views": same_images | same_views},
        "seeds": common.seeds(scale),
        "metrics": ("probe:eval/top1", "pretrain:knn/top1"),
        "baseline": {"views": "2"},
        "reading": READING,
    }
