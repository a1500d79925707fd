"""SupCon on your own photos, one folder a class: docs/your_own_data.md.

    python main.py --config=configs/supcon_folder.py --config.data.root=DIR
    python main.py --config=configs/supcon_folder.py:multilabel --config.data.root=DIR

The second one reads `labels.csv`, several classes a photo (docs/data.md).
Image size, batch, epochs and the images to evaluate on are chosen by what the folder
holds, and said at the start. Hardware: one GPU, or a CPU for hundreds of photos. Time:
minutes; the progress line says how many. Ours; measured in docs/your_own_data.md.
"""

from configs import common

VARIANTS = {"": "folder", "multilabel": "multilabel"}


def get_config(variant: str = ""):
    config = common.get_config()
    config.batch_size = 0
    config.epochs = 0.0
    config.log_every = 20
    config.eval_every = config.checkpoint_every = 200
    config.next_config = common.with_variant("configs/linear_folder.py", variant)
    set_folder(config, variant)
    common.set_augmentation(config, "sim_augment", strength=0.5, blur=False)
    config.projection.hidden_dims = (128,)
    config.projection.batch_norm = True
    if not variant:  # one class a photo
        config.loss.cross_entropy_weight = 1.0
    # LARS leaves the collapse level in few epochs. The rate is not scaled: the batch is
    # chosen by the number of photos.
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 1.0
    config.optimizer.learning_rate_batch = 0
    config.optimizer.warmup_epochs = 5.0
    return config


def set_folder(config, variant: str = ""):
    """Data and encoder that all folder configs share."""
    config.data.name = common.choose(variant, VARIANTS)
    config.data.image_size = 0
    config.data.eval_resize = 0
    config.data.eval_split = "auto"
    config.data.skip_errors = True  # listed at the end
    config.encoder.name = "resnet18"
    config.encoder.dtype = "auto"
