"""Number of positives: Table 5 of the paper (Table 3 of its first version).

    python -m supcon_jax.tools.study studies/positives.py

`loss.positives_cap` counts the positives besides the anchor's own other view, the paper
counts that view too.
Hardware: 2 CPU cores. Time: ten minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
The paper's trend (9 points from one positive to all of them) is not seen on 200 digits: 3 and 5
positives have the best means, 0.6 points (± 0.9 and ± 0.5) above one, and all of them are no better
than one (-0.4 ± 1.3, by kNN -1.0 ± 0.8). A likely reason: the cap also takes the other images of the
class out of the denominator, so labels help with one positive too; SimCLR, which leaves them in,
has 90.4 (studies/losses.py).
"""


def get_study(scale):
    caps = {"1": 0, "3": 2, "5": 4, "7": 6, "9": 8, "all": -1}
    return {
        "title": "Number of positives",
        "stages": common.stages(scale, evaluate=False),
        "shared": common.shared(scale, evaluate=False),
        "grid": {
            "positives": {
                name: {"loss.positives_cap": cap} for name, cap in caps.items()
            }
        },
        "seeds": common.seeds(scale),
        "metrics": ("probe:eval/top1", "pretrain:knn/top1"),
        "baseline": {"positives": "1"},
        "paper": {
            "source": "Table 5, ResNet-50, 350 epochs",
            "values": {
                "1": 69.3,
                "3": 76.6,
                "5": 78.0,
                "7": 78.4,
                "9": 78.3,
                "all": 78.5,
            },
        },
        "reading": READING,
    }
