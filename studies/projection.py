"""Projection head, and which output is used: sections 3.1 and 4.4 of the paper.

    python -m supcon_jax.tools.study studies/projection.py

Hardware: 2 CPU cores. Time: fifteen minutes. Result: docs/studies.md.
"""

from studies import common


def get_study(scale):
    width = 128 if scale == "small" else 2048
    heads = {
        "none": {"projection.hidden_dims": (), "projection.output_dim": 0},
        "linear": {"projection.hidden_dims": ()},
        "MLP": {"projection.hidden_dims": (width,)},
        "two hidden layers": {"projection.hidden_dims": (width, width)},
    }
    outputs = {"embedding": {}, "projection": {"probe:representation": "projection"}}
    return {
        "title": "Projection head, and the output that is used",
        "stages": common.stages(scale, evaluate=False),
        "shared": common.shared(scale, evaluate=False),
        "grid": {
            "head and output": {
                f"{head}, {output}": {**heads[head], **outputs[output]}
                for head in heads
                for output in outputs
                if (head, output) != ("none", "projection")
            }
        },
        "seeds": common.seeds(scale),
        "metrics": (
            "probe:eval/top1",
            "pretrain:knn/top1",
            "pretrain:embedding/rankme",
        ),
        "baseline": {"head and output": "MLP, embedding"},
    }
