"""Cross-entropy on the digits: the baseline of configs/digits.py.

    python main.py --config=configs/cross_entropy_digits.py

The same encoder, the same images and views seen, a learning rate of its own.
Hardware: 2 CPU cores. Time: about a minute. Expected: see docs/results.md.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.loss.name = "cross_entropy"
    config.next_config = ""
    config.optimizer.learning_rate = 0.1
    return config
