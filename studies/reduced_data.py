"""Training images of each class.

    python -m supcon_jax.tools.study studies/reduced_data.py

Hardware: 2 CPU cores. Time: half an hour. Result: docs/studies.md.
"""

from studies import common

READING = """
With one setting for each (a rate of 0.1), SupCon is ahead by 1.6 points with 50 images a class and
by 1.2 with 100, and cannot be told from cross-entropy with 5 to 20; its ECE is the larger with few
images and the smaller with many. The steps are 300 throughout, so 50 and 100 images a class are 38
and 19 epochs: a part of the lead may be the short training (studies/epochs.py). Where both were
tuned (studies/wins.py), it is not surely ahead with 20.
"""


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
        "reading": READING,
    }
