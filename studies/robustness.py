"""Robustness and calibration under corruption: Figure 3 and Table 6 of the paper.

    python -m supcon_jax.tools.study studies/robustness.py
    python -m supcon_jax.tools.study studies/robustness.py --scale=full --config.data.dir=DIR

At full scale ImageNet-C is expected in the study's folder, as OUT/corrupted; at small scale
the study makes its corrupted digits itself.
Hardware: 2 CPU cores. Time: fifteen minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
Corrupted digits, each seed with its own choice of six settings for every method: SupCon, both losses
together and cross-entropy cannot be told apart at any severity (-0.4 ± 3.0 and -0.1 ± 3.5 over all;
the paper has SupCon ahead by a point), and SimCLR is 7.6 ± 2.4 behind. SupCon's ECE grows from 0.04
to 0.19 with the severity, that of both losses together from 0.02 to 0.12. Cross-entropy's is 0.20 to
0.23 throughout, since label smoothing makes it unsure of itself also where it is right: what is told
of calibration depends on that choice, as in studies/wins.py.
"""


def get_study(scale):
    stages = common.stages(scale)
    stages["robustness"] = (
        f"configs/robustness_{'digits' if scale == 'small' else 'r50'}.py"
    )
    shared = common.shared(scale)
    shared["robustness:robustness.data"] = "{out}/corrupted"
    if scale == "small":
        shared["robustness:data.samples_per_class"] = 0
    methods = {
        "SupCon": {},
        "SimCLR": {"loss.name": "simclr"},
        "cross-entropy": common.cross_entropy(scale),
    }
    if scale == "small":  # at full scale the paper's recipes, as they are
        tuned = common.tuned_methods(scale)
        methods["SimCLR"] |= {"tune": tuned["SupCon"]["tune"]}
        methods |= tuned
    tool = ("supcon_jax.tools.corrupt", "--config=configs/digits.py")
    return {
        "title": "Robustness and calibration under corruption",
        "stages": stages,
        "shared": shared,
        "prepare": ((*tool, "--out={out}/corrupted"),) if scale == "small" else (),
        "grid": {"method": methods},
        "tune_by": "evaluate:eval/top1",
        "seeds": common.seeds(scale),
        "metrics": (
            "robustness:robustness/top1",
            "robustness:robustness/clean_top1",
            *(f"robustness:robustness/top1_severity_{s}" for s in range(1, 6)),
            "robustness:robustness/clean_ece",
            *(f"robustness:robustness/ece_severity_{s}" for s in range(1, 6)),
        ),
        "baseline": {"method": "cross-entropy"},
        "paper": {
            "source": "Table 6, ResNet-50 on ImageNet-C, mean over the severities",
            "values": {"SupCon": 46.75, "cross-entropy": 45.79},
        },
        "reading": READING,
    }
