"""Training images of each class.

    python -m supcon_jax.tools.study studies/reduced_data.py

Hardware: 2 CPU cores. Time: half an hour. Result: docs/studies.md.
"""

from studies import common


def get_study(scale):
    counts = (5, 10, 20, 50, 100) if scale == "small" else (13, 128, 640)
    return {
        "title": "Training images of each class",
        "stages": common.stages(scale),
        "shared": common.shared(scale),
        "grid": {
            "method": {"SupCon": {}, "cross-entropy": common.cross_entropy(scale)},
            "images of a class": {
                str(count): {
                    "data.samples_per_class": count,
                    "probe:data.samples_per_class": count,
                    **({"batch_size": min(64, 10 * count)} if scale == "small" else {}),
                }
                for count in counts
            },
        },
        "seeds": common.seeds(scale),
        "metrics": ("evaluate:eval/top1", "evaluate:eval/ece"),
        "baseline": {"method": "cross-entropy"},
    }
