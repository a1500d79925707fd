"""Few labels, many images: pretraining with and without the images that have no label.

    python -m supcon_jax.tools.study studies/semi_supervised.py

The probe has the labelled images alone.
Hardware: 2 CPU cores. Time: fifteen minutes. Result: docs/studies.md.
"""

from studies import common

READING = """
Images without a label do not help here: SupCon on the labelled images alone is ahead by 5.8 points,
and cannot be told from cross-entropy on them (+0.8 ± 2.6). The cells see about as many images each,
those with the unlabelled ones in larger batches. A likely reason: in the loss each image without a
label is a class of its own, so it is pushed away from all others of its class, and 1,247 of 1,297
images have none.
"""


def get_study(scale):
    few = 5 if scale == "small" else 13
    shared = {"all:data.split_seed": "{seed}", "probe:data.samples_per_class": few}
    if scale == "small":
        shared |= {"batch_size": 128, "total_steps": 400}
        shared |= {"eval_every": 0, "checkpoint_every": 0, "probe:batch_size": 50}
    alone = {"data.samples_per_class": few}
    if scale == "small":
        alone |= {"batch_size": 50, "total_steps": 1000}
    hidden = {"data.labelled_per_class": few}
    return {
        "title": "Few labels, many images",
        "stages": common.stages(scale),
        "shared": shared,
        "grid": {
            "pretraining": {
                "SupCon, labelled images alone": alone,
                "cross-entropy, labelled images alone": {
                    **common.cross_entropy(scale),
                    **alone,
                },
                "SupCon, all images": hidden,
                "SimCLR, all images": {**hidden, "loss.name": "simclr"},
            }
        },
        "seeds": common.seeds(scale),
        "metrics": ("evaluate:eval/top1",),
        "baseline": {"pretraining": "SupCon, labelled images alone"},
        "reading": READING,
    }
