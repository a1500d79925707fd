"""SupCon against cross-entropy on photos, with weak and with strong augmentation.

    python -m supcon_jax.tools.study studies/wins_cifar10.py --config.data.dir=DIR
    python -m supcon_jax.tools.study studies/wins_cifar10.py --scale=full
        --config.data.dir=DIR

studies/wins.py has the other regimes, on digits. Every method tries four settings in each
regime: two learning rates, two values of what is its own. At small scale 100 images a class
of CIFAR-10 and the strided small encoder, 470 steps; at full scale all images and the
recipes for one GPU.
Hardware: 2 CPU cores. Time: an hour. Result: docs/studies.md.
"""

from configs import common as recipes
from studies import common

READING = """
With crops and flips cross-entropy is ahead of SupCon by 2.9 ± 0.6 points and of both losses together
by 0.7 ± 0.4. SupCon's ECE is half of its there, and twice of its after both are scaled by a
temperature. With AutoAugment and cutout three seeds cannot tell them apart (-0.2 ± 3.2), nor whether
the augmentation costs cross-entropy more (2.7 ± 3.7). Every method took the larger of its two rates,
so larger ones may be better, and one seed chose for all, so the intervals do not include the choice.
The cutout of this run was 15 pixels wide, not 16.
"""
STAGES = {
    "pretrain": "configs/supcon_cifar10.py",
    "probe": "configs/linear_cifar10.py",
    "evaluate": "configs/evaluate_cifar10.py",
}
FEW_PHOTOS = {
    "all:data.samples_per_class": 100,
    "evaluate:data.samples_per_class": 0,
    "all:data.split_seed": "{seed}",
    "batch_size": 64,
    "total_steps": 470,
    "optimizer.warmup_epochs": 3.0,
    "knn.bank": 0,
}


def get_study(scale):
    variant = "" if scale == "small" else ":gpu"
    # LARS for SupCon, Nesterov's momentum for cross-entropy, as in their recipes.
    rates, baseline_rates = ((2.0, 8.0), (0.1, 0.3))
    if scale == "full":
        rates, baseline_rates = ((0.25, 0.5), (0.4, 0.8))

    def tuned(key, values, rates=rates):
        return {"tune": {"optimizer.learning_rate": rates, key: values}}

    def augmented(name, *extra):
        changes = recipes.augmentation(name, strength=0.5, blur=False)
        return changes | {"augment.extra": extra}

    return {
        "title": "SupCon and cross-entropy on photos",
        "stages": {name: config + variant for name, config in STAGES.items()},
        "shared": {
            "eval_every": 0,
            "checkpoint_every": 0 if scale == "small" else 19_500,
            **(FEW_PHOTOS if scale == "small" else {}),
        },
        "grid": {
            "augmentation": {
                "crop and flip": augmented("identity"),
                "AutoAugment and cutout": augmented("auto_augment", "cutout"),
            },
            "method": {
                "cross-entropy": {
                    "pretrain": f"configs/cross_entropy_cifar10.py{variant}",
                    "probe": None,
                    **tuned("loss.label_smoothing", (0.0, 0.1), baseline_rates),
                },
                "SupCon": tuned("loss.temperature", (0.1, 0.3)),
                "SupCon and cross-entropy": {
                    "probe": None,
                    **tuned("loss.cross_entropy_weight", (0.3, 1.0)),
                },
            },
        },
        "seeds": 3,
        "tune_seeds": 1,
        "metrics": common.METRICS,
        "baseline": {"method": "cross-entropy"},
        "along": "augmentation",
        "reading": READING,
    }
