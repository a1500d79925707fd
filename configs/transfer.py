"""Transfer of an ImageNet encoder by fine-tuning: the protocol of the paper's Table 4.

    python main.py --config=configs/transfer.py:food101 --config.data.dir=DIR
    python main.py --config=configs/transfer.py:aircraft --config.data.root=DIR

A variant is a dataset; without one: CIFAR-10. The encoder is runs/supcon_r50's, or
--config.pretrained's; DIR is a TFDS directory, and for `:birdsnap` and `:aircraft`, which
TFDS lacks, a folder with `train/` and `test/`. A frozen encoder's probe:
--config.mode=linear_eval. Hardware: an accelerator. Time: not measured.
Expected: Table 4 (docs/transfer.md), not measured here.

Source: SimCLR, arXiv 2002.05709, appendix B.8, which the paper follows. Learning rate and
weight decay are searched for every dataset there, and what was found is not stated: those
here are the middle of the grid (docs/transfer.md). The schedule is not stated either: ours.
"""

from configs import common

STEPS, BATCH_SIZE = 20_000, 256
# data.name, training split, its images, evaluation split, metric
DATASETS = {
    "food101": ("food101", "train", 75_750, "validation", "top1"),
    "cifar10": ("cifar10", "train", 50_000, "test", "top1"),
    "cifar100": ("cifar100", "train", 50_000, "test", "top1"),
    "birdsnap": ("folder", "train", 47_386, "test", "top1"),
    "sun397": ("sun397/standard-part1-120k", "train", 19_850, "test", "top1"),
    "cars196": ("cars196", "train", 8_144, "test", "top1"),
    "aircraft": ("folder", "train", 6_667, "test", "mean_class_accuracy"),
    "dtd": ("dtd", "train+validation", 3_760, "test", "top1"),
    "oxford_iiit_pet": (
        *("oxford_iiit_pet", "train", 3_680, "test", "mean_class_accuracy"),
    ),
    "caltech101": ("caltech101", "train", 3_060, "test", "mean_class_accuracy"),
    "oxford_flowers102": (
        *("oxford_flowers102", "train+validation", 2_040, "test"),
        "mean_class_accuracy",
    ),
}


def get_config(variant: str = ""):
    config = common.get_config()
    name, train_split, images, eval_split, metric = common.choose(
        variant, {"": DATASETS["cifar10"]} | DATASETS
    )
    common.set_imagenet(config, "resnet50", "identity", batch_size=BATCH_SIZE)
    config.mode = "finetune"
    config.pretrained = "runs/supcon_r50"
    config.eval_metric = metric
    config.total_steps = STEPS
    config.eval_every = config.checkpoint_every = 2_000
    config.data.name = name
    config.data.train_split = train_split
    config.data.eval_split = eval_split
    config.data.views = 1
    # Of SimCLR: max(1 - 10 / s, 0.9), with s steps an epoch.
    config.encoder.batch_norm_momentum = max(1 - 10 * BATCH_SIZE / images, 0.9)
    config.loss.name = "cross_entropy"
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 10**-2.5
    config.optimizer.learning_rate_batch = 0
    config.optimizer.weight_decay = 10**-4.5 / config.optimizer.learning_rate
    config.optimizer.warmup_epochs = 0.0
    config.knn.bank = 0
    return config
