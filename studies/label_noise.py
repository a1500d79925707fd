"""Labels that are drawn anew at random, for all methods in all stages.

    python -m supcon_jax.tools.study studies/label_noise.py

Hardware: 2 CPU cores. Time: twenty minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
Wrong labels hurt all three. SimCLR, which sees them in its linear stage alone, loses least: from a
fifth of wrong labels on it is ahead, by 7 to 13 points. SupCon falls a little faster than
cross-entropy, by less than five seeds can show with 20 images a class; with all images they are
level at 40 %, each with a rate of its own (studies/wins).
"""


def get_study(scale):
    return {
        "title": "Label noise",
        "stages": common.stages(scale),
        "shared": common.shared(scale),
        "grid": {
            "method": {
                "SupCon": {},
                "SimCLR": {"loss.name": "simclr"},
                "cross-entropy": common.cross_entropy(scale),
            },
            "label noise": {
                f"{share:g}": {
                    "data.label_noise": share,
                    "probe:data.label_noise": share,
                }
                for share in (0.0, 0.2, 0.4, 0.6)
            },
        },
        "seeds": common.seeds(scale),
        "metrics": ("evaluate:eval/top1", "evaluate:eval/ece"),
        "baseline": {"method": "cross-entropy"},
        "reading": READING,
    }
