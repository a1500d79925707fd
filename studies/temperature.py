"""Temperature of the loss: Figure 4 (d) of the paper.

    python -m supcon_jax.tools.study studies/temperature.py

Hardware: 2 CPU cores. Time: ten minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
The paper's trend: 0.1 is best, 0.2 cannot be told from it, and both ends lose (-10.2 ± 2.3 at 0.02,
-7.1 ± 2.2 at 1). One learning rate for all: the gradient grows as the temperature falls
(`loss.scale` is 'none'), so a part of the loss at 0.02 may be steps that are too large.
"""


def get_study(scale):
    return {
        "title": "Temperature of the loss",
        "stages": common.stages(scale, evaluate=False),
        "shared": common.shared(scale, evaluate=False),
        "grid": {"loss.temperature": (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
        "seeds": common.seeds(scale),
        "metrics": ("probe:eval/top1", "pretrain:knn/top1"),
        "baseline": {"loss.temperature": 0.1},
        "paper": {"source": "Figure 4 (d): 0.1 is best, values are only drawn"},
        "reading": READING,
    }
