"""Length of pretraining: Figure 4 (c) of the paper.

    python -m supcon_jax.tools.study studies/epochs.py

Hardware: 2 CPU cores. Time: twenty minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
SupCon needs fewer epochs here: it is 13.0 points ahead after 25, 3.6 after 50, and cannot be told
from cross-entropy after 100 and 200. It, too, gains with every doubling (5.8, 1.6 and 0.8 points),
and less each time. A part of the lead is its second stage, which is solved whatever the length;
and one rate for all (0.1) is low for both, which costs cross-entropy more
(studies/hyperparameters.py).
"""


def get_study(scale):
    lengths = (25.0, 50.0, 100.0, 200.0)
    if scale == "full":
        lengths = (100.0, 200.0, 350.0, 700.0, 1400.0)
    return {
        "title": "Epochs of pretraining",
        "stages": common.stages(scale),
        "shared": common.shared(scale) | {"total_steps": 0},
        "grid": {
            "method": {"SupCon": {}, "cross-entropy": common.cross_entropy(scale)},
            "epochs": lengths,
        },
        "seeds": common.seeds(scale),
        "metrics": ("evaluate:eval/top1",),
        "baseline": {"method": "cross-entropy"},
        "paper": {"source": "Figure 4 (c): 200 epochs are likely sufficient"},
        "reading": READING,
    }
