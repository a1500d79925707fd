"""Length of the linear stage, trained by SGD, against the solved probe.

    python -m supcon_jax.tools.study studies/linear_epochs.py

Hardware: 2 CPU cores. Time: ten minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
The solution of the linear stage has the best mean of the four, by less than five seeds can show
against 20 and 80 epochs of RMSProp (the paper's optimizer; it sees augmented images, the solution
plain ones). Five epochs are too few steps on 200 images; from 20 to 80 nothing changes that five
seeds could show (+0.5 ± 0.6).
"""


def get_study(scale):
    by_sgd = "configs/linear_digits.py:sgd" if scale == "small" else None
    lengths = (5.0, 20.0, 80.0) if scale == "small" else (10.0, 30.0, 90.0)
    trained = {"probe": by_sgd} if by_sgd else {}
    return {
        "title": "Epochs of the linear stage",
        "stages": common.stages(scale, evaluate=False),
        "shared": common.shared(scale, evaluate=False),
        "grid": {
            "linear stage": {
                **{
                    f"{epochs:g} epochs": {**trained, "probe:epochs": epochs}
                    for epochs in lengths
                },
                "solved": {"probe:probe.solver": "lbfgs"},
            }
        },
        "seeds": common.seeds(scale),
        "metrics": ("probe:eval/top1",),
        "baseline": {"linear stage": "solved"},
        "reading": READING,
    }
