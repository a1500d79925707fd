"""Every config key, once, with its meaning and default.

A config file starts from `get_config()` and sets what differs. Unknown keys and
values are refused. Steps and batches are global: they do not depend on the number of
devices.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults; locked, so that a misspelt key is an error."""
    config = ConfigDict()

    # "pretrain" | "linear_eval" | "finetune" | "evaluate" | "robustness"
    config.mode = "pretrain"
    config.seed = 0  # of initialisation, example order and augmentation
    # What 0 and "auto" leave to a folder of images: docs/your_own_data.md
    config.batch_size = (
        256  # global, in images (each gives data.views views); 0: chosen
    )
    config.microbatch_size = 0  # images that the encoder takes at a time; 0: all
    config.epochs = 100.0  # length of the run; 0: chosen
    config.total_steps = 0  # length in steps instead; 0: from epochs
    config.log_every = 100  # steps between progress lines
    config.eval_every = 0  # steps between evaluations; 0: only at the end
    config.checkpoint_every = 0  # steps between checkpoints; 0: only at the end
    # Steps whose trace goes to <workdir>/profile: "10:15", or a count, "5"; "": none
    config.profile_steps = ""
    config.keep_checkpoints = 2  # newest ones kept, beside the best by kNN
    # What a classifier's result is told by: "top1" | "mean_class_accuracy"
    config.eval_metric = "top1"
    # linear_eval, finetune: workdir of the pretraining run, or "random"; evaluate,
    # robustness: of a run with a classifier
    config.pretrained = ""
    # "embedding", the encoder's output | "projection", the head's: what linear_eval and
    # the metrics of embeddings take of the pretraining run
    config.representation = "embedding"
    # Named in the next command at the end of a run: a config, or "supcon_jax.tools.predict"
    config.next_config = ""
    config.compilation_cache = True  # keep compiled programs in the user's cache
    # Beside metrics.jsonl: "tensorboard" | "wandb" | "trackio", any number of them
    config.writers = ("tensorboard",)
    config.project = "supcon_jax"  # where a tracker files the run

    config.hosts = ConfigDict()  # the processes of a job, or the only one
    config.hosts.watchdog_minutes = 10.0  # without a step: ends, with stacks; 0: never

    config.data = ConfigDict()
    # "digits" | "two_digits" | "arrays" | "folder" | "multilabel" | "corrupted" |
    # "synthetic" | a TFDS name, "cifar10:3.0.2", "a/config"
    config.data.name = "digits"
    config.data.dir = ""  # TFDS data directory; "": TFDS's default, downloading
    config.data.root = ""  # "arrays": path of the .npz file; others: of the folder
    config.data.image_key = "image"  # TFDS: name of the feature that is the image
    config.data.label_key = "label"  # TFDS: of the one that is the class; "": no labels
    config.data.train_split = "train"
    # "auto": the validation or test split that there is, or a fifth of train held out
    config.data.eval_split = "test"
    config.data.classes = ()  # only these, numbered anew from 0; (): all
    config.data.validation_fraction = 0.0  # evaluate on this share of train instead
    config.data.fraction = 1.0  # train on this share of the training images
    config.data.samples_per_class = 0  # train on so many images of a class; 0: all
    # Semi-supervised: all images are kept, and most of their labels hidden (docs/data.md)
    config.data.labelled_fraction = 1.0  # share of the training labels that is kept
    config.data.labelled_per_class = 0  # labels of each class that are kept; 0: all
    config.data.label_noise = 0.0  # share of training labels drawn anew from all
    config.data.split_seed = 0  # of the keys above, whatever the run's seed
    config.data.classes_per_batch = 0  # P classes x batch_size / P images; 0: shuffled
    # TFDS records: read blocks of megabytes in so many lanes, 64 for example (docs/data.md)
    config.data.lanes = 0  # 0: single records in a permutation of all
    config.data.keep_gib = 4.0  # lanes: of a host's share, kept in memory once read
    config.data.skip_errors = False  # go on without images that cannot be decoded
    config.data.fake = False  # noise instead of data: the speed of the device alone
    config.data.image_size = 32  # side in pixels; 0: chosen
    # Evaluation: short side before the central crop; 0: chosen
    config.data.eval_resize = 32
    config.data.views = 2  # augmented views of every image
    config.data.mean = (0.5, 0.5, 0.5)  # subtracted from pixels in [0, 1]
    config.data.std = (0.5, 0.5, 0.5)  # divides them then

    config.augment = ConfigDict()
    config.augment.crop_area = (0.2, 1.0)  # share of the area of a random crop
    config.augment.flip = True  # mirror at random
    # What follows happens in this order, after crop and flip.
    config.augment.jitter_strength = 0.5  # s of colour jitter; 0: none
    config.augment.jitter_probability = 0.8  # share of views that are jittered
    # "torchvision": brightness is scaled | "tensorflow": it is added to (docs/data.md)
    config.augment.jitter_kind = "torchvision"
    # "none" | "auto_augment" | "rand_augment" | "trivial_augment"
    config.augment.policy = "none"
    config.augment.rand_augment_layers = 2  # operations a view
    config.augment.rand_augment_magnitude = 10.0  # of each, 0 to 10
    config.augment.grayscale_probability = 0.2  # share of views without colour
    config.augment.blur_probability = 0.0  # share of views that are blurred
    config.augment.blur_border = "grey"  # outside the image: "grey" | "edge", repeated
    config.augment.extra = ()  # in the step, last: "cutout"
    config.augment.mixup_alpha = 0.0  # cross-entropy: of Beta(alpha, alpha); 0: none
    config.augment.cutmix_alpha = 0.0  # likewise; both: each image draws one of them

    config.encoder = ConfigDict()
    # resnet8, 18, 34, 50, 101, 152, 200; wrn16_4, 16_8, 22_8, 28_2, 28_10, 40_2, 40_4
    config.encoder.name = "resnet50"
    config.encoder.width = 1.0  # multiplies every channel count
    config.encoder.stem = "imagenet"  # "imagenet" (7x7 and pool) | "cifar" (3x3)
    config.encoder.dtype = "float32"  # of convolutions; "auto": bfloat16 off the CPU
    config.encoder.normalize_embedding = False  # unit length before any head
    config.encoder.batch_norm_devices = (
        0  # that share statistics; 0: all, 1: each alone
    )
    # Share of BatchNorm's running statistics that a step keeps
    config.encoder.batch_norm_momentum = 0.9
    # ResNets: "official", the paper's code | "torchvision", that and timm: where the
    # max-pool pads, and the first shortcut of ResNet-18 and -34 (docs/weights.md)
    config.encoder.convention = "official"
    # Vision Transformers: the embedding is a token's; False: the mean of the patches
    config.encoder.class_token = True
    # Vision Transformers: share of the images that skip the last block; 0: none
    config.encoder.stochastic_depth = 0.0
    # Start from these weights: a .safetensors or .pth file, or a workdir; linear_eval,
    # finetune: instead of `pretrained`
    config.encoder.init_from = ""
    config.encoder.remat = False  # compute blocks twice: less memory, a third more time

    # The head of contrastive losses; linear_eval takes that of `pretrained`, if any
    config.projection = ConfigDict()
    config.projection.hidden_dims = (2048,)  # (): one linear layer
    config.projection.output_dim = 128  # 0: no head, the loss compares embeddings
    config.projection.batch_norm = False  # after every hidden layer
    config.projection.bias = False  # of the last layer

    config.classifier = ConfigDict()  # the head of cross-entropy, on whatever encoder
    config.classifier.init = "glorot"  # of its kernel: "glorot" | "zeros"
    # Unequal classes: tau of tau log(share of the class), added to the logits in the loss
    config.classifier.logit_adjustment = 0.0

    config.finetune = ConfigDict()  # of the encoder of `pretrained`, with cross-entropy
    config.finetune.stages = 0  # train so many stages, counted from the last; 0: all
    config.finetune.layer_decay = 1.0  # rate of a stage over that of the one after it

    config.probe = ConfigDict()  # a linear classifier on the embedding
    config.probe.learning_rate = 0.0  # pretrain, beside the loss: of Adam; 0: no probe
    # linear_eval: "sgd", `optimizer` on augmented images | "lbfgs", the solution on
    # features of plain images, in seconds and with nothing to tune (docs/evaluation.md)
    config.probe.solver = "sgd"

    # An average of encoder and projection that makes the keys of the views after the
    # first, which is the anchor (MoCo).
    config.momentum_encoder = ConfigDict()
    config.momentum_encoder.decay = 0.0  # of the average, each step; 0: none
    config.momentum_encoder.queue_size = 0  # newest keys kept; 0: those of this step

    # An average of the encoder over the steps, saved and evaluated beside it.
    config.encoder_average = ConfigDict()
    config.encoder_average.decay = 0.0  # each step, 0.999 for example; 0: no average
    config.encoder_average.use = False  # linear_eval: the average of `pretrained`

    config.loss = ConfigDict()
    config.loss.name = "supcon"  # "supcon" | "simclr" | "cross_entropy"
    config.loss.temperature = 0.1
    config.loss.contrast_mode = "all"  # anchors: "all" views | "one"
    config.loss.summation = "outside"  # "outside" (L_out, Eq. 2) | "inside" (L_in)
    config.loss.denominator = "all"  # "all" | "one_positive" | "only_negatives"
    config.loss.positives_cap = -1  # positives kept beside the own views; -1: all
    config.loss.scale = "none"  # "none" | "temperature" | a factor such as "1.43"
    # How alike labels of several classes are: "any" shared | "jaccard" | "inner" product.
    config.loss.label_similarity = "jaccard"
    config.loss.hard_negative_beta = 0.0  # more weight for hard negatives, e.g. 0.5
    config.loss.label_smoothing = 0.0  # of cross-entropy
    # Of a classifier's cross-entropy beside a contrastive loss, through the encoder; 0: none
    config.loss.cross_entropy_weight = 0.0

    config.optimizer = ConfigDict()
    # "lars" | "momentum" | "nesterov" | "rmsprop" | "adamw"
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.3  # peak, for learning_rate_batch images
    config.optimizer.learning_rate_batch = 256  # scaled linearly; 0: not scaled
    config.optimizer.schedule = "cosine"  # or "constant", "staircase", "piecewise"
    config.optimizer.warmup_epochs = 10.0  # linear, from warmup_start
    config.optimizer.warmup_start = 0.0  # share of the peak at step 0
    config.optimizer.cosine_end = 0.0  # share of the peak at the last step
    config.optimizer.decay_rate = 0.97  # staircase, piecewise: factor
    config.optimizer.decay_epochs = 0.5  # staircase: length of a stair
    config.optimizer.boundaries_epochs = (60.0, 75.0, 90.0)  # piecewise, after warm-up
    config.optimizer.weight_decay = 1e-4
    config.optimizer.momentum = 0.9
    config.optimizer.trust_coefficient = 0.001  # lars
    config.optimizer.rmsprop_decay = 0.9
    config.optimizer.rmsprop_epsilon = 1e-3
    config.optimizer.adam_b1 = 0.9  # decay of the mean gradient
    config.optimizer.adam_b2 = 0.999  # decay of the mean square
    config.optimizer.adam_epsilon = 1e-8  # beside its root
    config.optimizer.exclude = ("batch_norm",)  # paths without decay and trust ratio

    config.health = ConfigDict()  # when a run is not well
    # Loss or gradient not finite: "stop", or "skip" the update and go on
    config.health.on_nonfinite = "stop"
    config.health.max_skipped = 10  # updates skipped in a row before it stops
    # A state is not saved whose loss has risen by more than this many times the loss at
    # the last save (or 1, if that is more), or whose parameters' norm has grown by more
    # than this factor; 0: not looked at
    config.health.loss_rise = 3.0
    config.health.norm_growth = 10.0

    config.knn = ConfigDict()  # online evaluation of the embeddings
    config.knn.bank = 50_000  # training images to compare with; 0: no kNN
    config.knn.k = 20  # neighbours; ours, the cited paper has 200 (evaluation/knn.py)
    config.knn.temperature = 0.07  # of their weights

    config.robustness = ConfigDict()  # of the mode; data.* are the images without it
    # Corrupted versions of them: a folder (ImageNet-C, CIFAR-10-C, what tools.corrupt made)
    # or a TFDS name, "cifar10_corrupted" (docs/evaluation.md)
    config.robustness.data = ""
    # Whose errors mCE divides by: "none" | "alexnet" (ImageNet-C at 224 pixels alone) | the
    # workdir of another robustness run on the same images
    config.robustness.reference = "none"

    return config.lock()


# Name -> jitter probability, policy, grayscale and blur probability.
AUGMENTATIONS = {
    "identity": (0.0, "none", 0.0, 0.0),
    "auto_augment": (0.0, "auto_augment", 0.0, 0.0),
    "rand_augment": (0.0, "rand_augment", 0.0, 0.0),
    "trivial_augment": (0.0, "trivial_augment", 0.0, 0.0),
    "sim_augment": (0.8, "none", 0.2, 0.5),
    "stacked_rand_augment": (0.8, "rand_augment", 0.2, 0.5),
}


def augmentation(name: str, *, strength: float = 1.0, blur: bool = True) -> dict:
    """The keys of one of the paper's augmentations, or TrivialAugment, after crop and flip.

    Args:
      name: a key of `AUGMENTATIONS`.
      strength: of the colour jitter; 1 for ImageNet, 0.5 for CIFAR.
      blur: whether views are blurred where the augmentation has it; not on CIFAR.

    Source: Khosla et al., arXiv 2004.11362, section 4.4; google-research/supcon,
    preprocessing.py.
    """
    jitter, policy, grayscale, blurred = choose(name, AUGMENTATIONS)
    return {
        "augment.jitter_probability": jitter,
        "augment.jitter_strength": strength if jitter else 0.0,
        "augment.policy": policy,
        "augment.grayscale_probability": grayscale,
        "augment.blur_probability": blurred if blur else 0.0,
    }


def set_augmentation(config, name: str, *, strength: float = 1.0, blur: bool = True):
    """Sets one of the paper's augmentations; see `augmentation`."""
    changes = augmentation(name, strength=strength, blur=blur)
    config.update_from_flattened_dict(changes)


def set_imagenet(config, encoder: str, augmentation: str, *, batch_size: int):
    """Data, encoder and batch of the ImageNet configs.

    Where the augmentation jitters colours, it does so as TensorFlow does: the official
    code asks for torchvision's jitter on CIFAR-10 alone.

    Args:
      config: the config to change.
      encoder: a ResNet's name.
      augmentation: a key of `AUGMENTATIONS`.
      batch_size: images; the run evaluates and saves every ten epochs of them.
    """
    config.batch_size = batch_size
    config.eval_every = config.checkpoint_every = 10 * 1_281_167 // batch_size
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.augment.crop_area = (0.08, 1.0)
    set_augmentation(config, augmentation)
    config.augment.jitter_kind = "tensorflow"
    config.encoder.name = encoder
    config.encoder.dtype = "auto"


def set_official_supcon(config):
    """Head, loss and schedule of the official SupCon scripts for ImageNet."""
    config.encoder.normalize_embedding = True
    config.projection.hidden_dims = ()
    config.loss.temperature = 0.1
    config.loss.scale = "temperature"
    config.optimizer.name = "lars"
    config.optimizer.warmup_epochs = 12.0


def set_official_cross_entropy(config):
    """Loss and optimizer of the official cross-entropy scripts for ImageNet."""
    config.data.views = 1
    config.loss.name = "cross_entropy"
    config.loss.label_smoothing = 0.05
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate = 0.1
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 1e-4


def set_linear(config, pretrained: str):
    """Stage 2 on the encoder in `runs/<pretrained>`; its BatchNorm stays as trained."""
    config.mode = "linear_eval"
    config.pretrained = f"runs/{pretrained}"
    config.data.views = 1


def set_official_linear(config):
    """Stage 2 of the official SupCon scripts for ImageNet."""
    config.epochs = 90.0
    config.encoder.normalize_embedding = True
    config.loss.label_smoothing = 0.05
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "staircase"
    config.optimizer.decay_rate = 0.97
    config.optimizer.decay_epochs = 0.5
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 1e-6


def set_moco(config, *, batch_size: int):
    """ImageNet and SGD as MoCo v2 has them, with crops and flips, both stages.

    Jitter and blur, where a config turns them on, are torchvision's and Pillow's.

    Source: github.com/facebookresearch/moco, main_moco.py and main_lincls.py.
    """
    set_imagenet(config, "resnet50", "identity", batch_size=batch_size)
    config.augment.jitter_kind = "torchvision"
    config.augment.blur_border = "edge"
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.optimizer.name = "momentum"
    config.optimizer.warmup_epochs = 0.0


# Classes -> mean and standard deviation of the training pixels, as in the authors'
# PyTorch code. The official code has those of CIFAR-10 for pixels in [-1, 1].
CIFAR_STATISTICS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def set_cifar(config, classes: int):
    """CIFAR-10 or CIFAR-100, with the augmentation of both official codes."""
    config.data.name = f"cifar{classes}"
    config.data.image_size = 32
    config.data.eval_resize = 32
    config.data.mean, config.data.std = CIFAR_STATISTICS[classes]
    config.augment.crop_area = (0.2, 1.0)
    set_augmentation(config, "sim_augment", strength=0.5, blur=False)


def set_small_cifar(config):
    """What a CPU trains on CIFAR in minutes; ours.

    Crops and flips alone: what docs/results.md was measured with.
    """
    config.batch_size = 256
    config.epochs = 8.0
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 390
    set_augmentation(config, "identity")
    config.encoder.name = "resnet8"
    # At 32 pixels the strided stem leaves 8x8 maps: a sixteenth of the work.
    config.encoder.stem = "imagenet"
    config.optimizer.warmup_epochs = 0.5
    config.knn.bank = 5_000


def set_gpu_cifar(config):
    """What one GPU trains on CIFAR in some minutes, both methods; ours.

    ResNet-18, AutoAugment and a cutout in the step, two views of each image for
    cross-entropy as well. Weak augmentation is where SupCon falls behind
    cross-entropy with small networks (docs/results.md). 256 images a step, because
    4,500 steps of 1,024 left both methods near 90 % (docs/results.md): 300 epochs are
    then as many steps as the authors' 1,000 epochs of 1,024.
    """
    config.batch_size = 256
    config.epochs = 300.0
    config.log_every = 200
    # A kNN evaluation takes as long as twenty epochs of an H100.
    config.eval_every = config.checkpoint_every = 19_500  # 100 epochs
    set_augmentation(config, "auto_augment")
    config.augment.extra = ("cutout",)
    config.encoder.name = "resnet18"
    config.encoder.stem = "cifar"
    config.encoder.dtype = "auto"
    config.encoder_average.decay = 0.999  # of the last 5 epochs
    config.optimizer.name = "nesterov"
    config.optimizer.learning_rate_batch = 1024
    config.optimizer.warmup_epochs = 10.0
    config.knn.bank = 10_000


def set_pytorch_cifar(config, *, learning_rate: float):
    """Encoder, batch and optimizer of stage 1 in the authors' PyTorch code.

    Source: github.com/HobbitLong/SupContrast at 66a8fe5, main_supcon.py, main_ce.py.
    """
    config.batch_size = 1024
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 980
    config.encoder.name = "resnet50"
    config.encoder.stem = "cifar"
    config.encoder.batch_norm_devices = 1  # DataParallel: each GPU alone
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = learning_rate
    config.optimizer.learning_rate_batch = 1024
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.warmup_start = 0.01 / learning_rate
    config.optimizer.cosine_end = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.exclude = ()


def set_official_cifar(config, *, batch_size: int):
    """Encoder, batch and optimizer of the official CIFAR-10 scripts, both stages.

    Source: google-research/supcon, scripts/*_cifar10_resnet50.sh, 2022.
    """
    config.batch_size = batch_size
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 20 * 50_000 // batch_size
    config.encoder.name = "resnet50"
    config.encoder.stem = "cifar"
    config.encoder.dtype = "auto"
    config.optimizer.name = "momentum"


def base_temperature_scale(temperature: float) -> str:
    """The factor temperature / 0.07 of the PyTorch code and the official one of 2020."""
    return repr(temperature / 0.07)


def set_evaluate(config, stem: str, variant: str):
    """Evaluation of the classifier that a linear config, given here, trains."""
    config.mode = "evaluate"
    config.pretrained = f"runs/{run_name(stem, variant)}"
    config.next_config = ""
    config.probe.solver = "sgd"  # the default: no classifier is made here


def set_robustness(config, stem: str, variant: str, *, data: str):
    """Robustness of the classifier that a linear config, given here, trains."""
    set_evaluate(config, stem, variant)
    config.mode = "robustness"
    config.robustness.data = data


def with_variant(file: str, variant: str) -> str:
    """How `--config` names a config's variant; the default needs no name."""
    return f"{file}:{variant}" if variant else file


def run_name(stem: str, variant: str) -> str:
    """The folder below runs/ that main.py gives to a config's variant."""
    return f"{stem}_{variant}" if variant else stem


def choose(variant: str, values: dict):
    """The value of a config's variant, as in `--config=file.py:variant`."""
    if variant not in values:
        known = ", ".join(repr(name) for name in values if name)
        raise ValueError(f"unknown variant {variant!r}; available: {known}")
    return values[variant]
