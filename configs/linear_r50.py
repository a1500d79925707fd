"""Linear evaluation of configs/supcon_r50.py on ImageNet.

    python main.py --config=configs/linear_r50.py --config.data.dir=DIR
    python main.py --config=configs/linear_r50.py --config.data.dir=DIR \\
        --config.batch_size=8 --config.total_steps=3        # on a laptop's processor

Hardware: 128 TPU cores in the official script.
Time: not measured here. Expected: 78.7 % top-1 (Table 3), not measured here.
Source: google-research/supcon, scripts/configs.sh and hparams.py, 2022.
Known difference: BatchNorm stays in inference mode; the official job trains both
stages at once and keeps it in training mode.
"""

from configs import common, supcon_r50


def get_config():
    config = common.get_config()
    config.mode = "linear_eval"
    config.pretrained = "runs/supcon_r50"
    config.batch_size = 6144
    config.epochs = 90.0
    config.log_every = 100
    config.eval_every = 2085
    config.checkpoint_every = 2085
    supcon_r50.set_imagenet(config)
    config.data.views = 1
    config.encoder.name = "resnet50"
    config.encoder.dtype = "auto"
    config.encoder.normalize_embedding = True
    config.loss.label_smoothing = 0.05
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.05
    config.optimizer.schedule = "staircase"
    config.optimizer.decay_rate = 0.97
    config.optimizer.decay_epochs = 0.5
    config.optimizer.warmup_epochs = 12.0
    config.optimizer.weight_decay = 1e-6
    return config
