"""Every config key, once, with its meaning and default.

A config file starts from `get_config()` and sets what differs. Unknown keys and
values are refused. Steps and batches are global: they do not depend on the number of
devices.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults; locked, so that a misspelt key is an error."""
    config = ConfigDict()

    config.mode = "pretrain"  # "pretrain" | "linear_eval"
    config.seed = 0  # of initialisation, example order and augmentation
    config.batch_size = 256  # global, in images (each gives data.views views)
    config.epochs = 100.0  # length of the run
    config.total_steps = 0  # length in steps instead; 0: from epochs
    config.log_every = 100  # steps between progress lines
    config.eval_every = 0  # steps between evaluations; 0: only at the end
    config.checkpoint_every = 0  # steps between checkpoints; 0: only at the end
    config.keep_checkpoints = 2  # newest ones kept, beside the best by kNN
    config.pretrained = ""  # linear_eval: workdir of the pretraining run, or "random"
    config.next_config = ""  # config named in the next command at the end of a run
    config.compilation_cache = True  # keep compiled programs in the user's cache

    config.data = ConfigDict()
    config.data.name = "digits"  # "digits" | "arrays" | any TFDS image data set
    config.data.dir = ""  # TFDS data directory; "": TFDS's default, downloading
    config.data.root = ""  # "arrays": path of the .npz file
    config.data.train_split = "train"
    config.data.eval_split = "test"
    config.data.image_size = 32  # side in pixels
    config.data.eval_resize = 32  # evaluation: short side before the central crop
    config.data.views = 2  # augmented views of every image
    config.data.mean = (0.5, 0.5, 0.5)  # subtracted from pixels in [0, 1]
    config.data.std = (0.5, 0.5, 0.5)  # divides them then

    config.augment = ConfigDict()
    config.augment.crop_area = (0.2, 1.0)  # share of the area of a random crop
    config.augment.flip = True  # mirror at random
    config.augment.jitter_strength = 0.5  # s of colour jitter; 0: none
    config.augment.jitter_probability = 0.8  # share of views that are jittered
    config.augment.grayscale_probability = 0.2  # share of views without colour

    config.encoder = ConfigDict()
    config.encoder.name = "resnet50"  # resnet8, 18, 34, 50, 101, 152, 200
    config.encoder.width = 1.0  # multiplies every channel count
    config.encoder.stem = "imagenet"  # "imagenet" (7x7 and pool) | "cifar" (3x3)
    config.encoder.dtype = "float32"  # of convolutions; "auto": bfloat16 off the CPU
    config.encoder.normalize_embedding = False  # unit length before any head

    config.projection = ConfigDict()  # the head of contrastive losses
    config.projection.hidden_dims = (2048,)  # (): one linear layer
    config.projection.output_dim = 128
    config.projection.batch_norm = False  # after every hidden layer

    config.classifier = ConfigDict()  # the head of cross-entropy and linear_eval
    config.classifier.init = "glorot"  # of its kernel: "glorot" | "zeros"

    config.loss = ConfigDict()
    config.loss.name = "supcon"  # "supcon" | "simclr" | "cross_entropy"
    config.loss.temperature = 0.1
    config.loss.contrast_mode = "all"  # anchors: "all" views | "one"
    config.loss.summation = "outside"  # "outside" (L_out, Eq. 2) | "inside" (L_in)
    config.loss.denominator = "all"  # "all" | "one_positive" | "only_negatives"
    config.loss.positives_cap = -1  # positives kept beside the own views; -1: all
    config.loss.scale = "none"  # "none" | "temperature" | a factor such as "1.43"
    config.loss.label_smoothing = 0.0  # of cross-entropy

    config.optimizer = ConfigDict()
    config.optimizer.name = "lars"  # "lars" | "momentum" | "nesterov" | "rmsprop"
    config.optimizer.learning_rate = 0.3  # peak, for learning_rate_batch images
    config.optimizer.learning_rate_batch = 256  # scaled linearly; 0: not scaled
    config.optimizer.schedule = "cosine"  # or "constant", "staircase", "piecewise"
    config.optimizer.warmup_epochs = 10.0  # linear from 0
    config.optimizer.decay_rate = 0.97  # staircase, piecewise: factor
    config.optimizer.decay_epochs = 0.5  # staircase: length of a stair
    config.optimizer.boundaries_epochs = (60.0, 75.0, 90.0)  # piecewise, after warm-up
    config.optimizer.weight_decay = 1e-4
    config.optimizer.momentum = 0.9
    config.optimizer.trust_coefficient = 0.001  # lars
    config.optimizer.rmsprop_decay = 0.9
    config.optimizer.rmsprop_epsilon = 1e-3
    config.optimizer.exclude = ("batch_norm",)  # paths without decay and trust ratio

    config.knn = ConfigDict()  # online evaluation of the embeddings
    config.knn.bank = 50_000  # training images to compare with; 0: no kNN
    config.knn.k = 20  # neighbours
    config.knn.temperature = 0.07  # of their weights

    return config.lock()


def choose(variant: str, values: dict):
    """The value of a config's variant, as in `--config=file.py:variant`."""
    if variant not in values:
        known = ", ".join(repr(name) for name in values if name)
        raise ValueError(f"unknown variant {variant!r}; available: {known}")
    return values[variant]
