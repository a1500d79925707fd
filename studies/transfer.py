"""Transfer to other classes: Table 4 of the paper.

    python -m supcon_jax.tools.study studies/transfer.py
    python -m supcon_jax.tools.study studies/transfer.py --scale=full --config.data.dir=DIR

At small scale the encoder is trained on five digits, and five images of each of the other five
train a classifier on it, frozen. At full scale it is fine-tuned on the paper's datasets.
Hardware: 2 CPU cores. Time: ten minutes. Result: docs/studies.md.
"""

from studies import common

# Table 4, ResNet-50, of the datasets that configs/transfer.py reads from one data.dir.
PAPER = {
    "food101": (87.23, 87.38, 88.20),
    "cifar10": (97.42, 96.50, 97.70),
    "cifar100": (84.27, 84.93, 85.90),
    "cars196": (91.69, 89.57, 91.30),
    "dtd": (74.60, 76.86, 73.20),
    "oxford_iiit_pet": (93.47, 92.35, 89.20),
    "caltech101": (91.04, 92.34, 92.10),
    "oxford_flowers102": (96.0, 96.93, 97.00),
}
METHODS = ("SupCon", "cross-entropy", "SimCLR")

READING = """
From five digits to the five others, 5 images each, the encoder frozen: SupCon and cross-entropy
cannot be told apart (+0.7 ± 6.4); the paper, which fine-tunes, has them on par on average. SimCLR,
which saw no labels, is ahead of both by 10 points. A likely reason: where only five classes have to
be told apart, what tells other digits apart need not be kept. All are ahead of an encoder that was
not trained.
"""


def get_study(scale):
    stages = common.stages(scale, evaluate=False)
    methods = {
        "SupCon": {},
        "cross-entropy": {"pretrain": "configs/cross_entropy_digits.py"},
        "SimCLR": {"loss.name": "simclr"},
    }
    if scale == "full":
        methods["cross-entropy"] = {"pretrain": "configs/cross_entropy_r50.py"}
        methods["SimCLR"] = {"pretrain": "configs/simclr_r50.py"}
        return {
            "title": "Transfer",
            "stages": {
                "pretrain": stages["pretrain"],
                "finetune": "configs/transfer.py:food101",
            },
            "grid": {
                "method": methods,
                "dataset": {
                    name: {"finetune": f"configs/transfer.py:{name}"} for name in PAPER
                },
            },
            "seeds": 3,
            "metrics": ("finetune:eval/top1", "finetune:eval/mean_class_accuracy"),
            "baseline": {"method": "cross-entropy"},
            "paper": {
                "source": "Table 4, ResNet-50; mean per class for pets, Caltech, flowers",
                "values": {
                    f"{method}, {name}": values[number]
                    for name, values in PAPER.items()
                    for number, method in enumerate(METHODS)
                },
            },
        }
    shared = common.shared(scale, evaluate=False) | {
        "data.classes": (0, 1, 2, 3, 4),
        "data.samples_per_class": 0,
        "probe:data.classes": (5, 6, 7, 8, 9),
        "probe:data.samples_per_class": 5,
        "probe:batch_size": 25,
    }
    return {
        "title": "Transfer to other classes",
        "stages": stages,
        "shared": shared,
        "grid": {
            "pretraining": methods
            | {"none": {"pretrain": None, "probe:pretrained": "random"}}
        },
        "seeds": common.seeds(scale),
        "metrics": ("probe:eval/top1",),
        "baseline": {"pretraining": "cross-entropy"},
        "reading": READING,
    }
