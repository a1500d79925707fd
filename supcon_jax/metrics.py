"""Every metric that a run writes, one entry each: how it is shown, drawn and compared.

A new metric is an entry here, beside the code that computes it. Names are those of
metrics.jsonl. A metric without an entry is written all the same, and shown nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from supcon_jax.evaluation.corruption import CORRUPTIONS, SEVERITIES

# What a line of metrics.jsonl holds beside its metrics.
LINE_FIELDS = ("step", "epoch", "wall_s", "final")


class Metric(NamedTuple):
    """How a metric is shown.

    Attributes:
      text: label and value for people; a value in "%" is a share of 1.
      panel: of the curves in which it is drawn, "loss" or "accuracy"; "": in none.
      style: of its curve, as matplotlib writes it.
      on_progress: whether lines of progress show it.
      on_end: whether the lines of an evaluation and of the result show it.
      is_result: whether it is something that a run found, not its speed or its place.
      is_best_by: whether the checkpoint with its largest value is kept.
    """

    text: str
    panel: str = ""
    style: str = "-"
    on_progress: bool = False
    on_end: bool = False
    is_result: bool = True
    is_best_by: bool = False

    @property
    def is_share(self) -> bool:
        """Whether the value is a share of 1, told in percent."""
        return self.text.endswith("%}")


# In the order in which lines show them.
METRICS: dict[str, Metric] = {
    "train/loss": Metric("loss {:.4f}", "loss", on_progress=True),
    "train/collapse_loss": Metric("(collapse {:.4f})", "loss", "--", on_progress=True),
    "train/contrastive_top1": Metric(
        "contrastive top-1 {:.1%}", "accuracy", on_progress=True
    ),
    "train/top1": Metric("top-1 {:.1%}", "accuracy", on_progress=True),
    "train/cross_entropy_loss": Metric("cross-entropy {:.4f}", "loss"),
    "train/probe_loss": Metric("probe loss {:.4f}"),
    "train/probe_top1": Metric("probe top-1 {:.1%}", "accuracy"),
    "train/positive_cosine": Metric("cosine of positives {:.4f}"),
    "train/negative_cosine": Metric("cosine of negatives {:.4f}"),
    "train/alignment": Metric("alignment {:.4f}"),
    "train/uniformity": Metric("uniformity {:.4f}"),
    "train/no_positive_fraction": Metric("anchors without a positive {:.1%}"),
    "train/mean_positives": Metric("positives of an anchor {:.4g}"),
    "train/num_anchors": Metric("anchors {:,.0f}"),
    "optim/learning_rate": Metric("lr {:.3g}", on_progress=True, is_result=False),
    "optim/gradient_norm": Metric("gradient norm {:.3g}", is_result=False),
    "optim/skipped": Metric("skipped {:.0f}", is_result=False),
    "goodput/share": Metric("goodput {:.1%}", is_result=False),
    "goodput/start_s": Metric("starting {:.1f} s", is_result=False),
    "goodput/compile_s": Metric("compiling {:.1f} s", is_result=False),
    "goodput/input_s": Metric("waiting for input {:.1f} s", is_result=False),
    "goodput/eval_s": Metric("evaluating {:.1f} s", is_result=False),
    "goodput/save_s": Metric("saving {:.1f} s", is_result=False),
    "goodput/lost_s": Metric("lost to restarts {:.1f} s", is_result=False),
    "train/images_per_sec": Metric(
        "{:,.1f} images/s", on_progress=True, is_result=False
    ),
    "knn/top1": Metric(
        "kNN top-1 {:.2%}", "accuracy", "o-", on_end=True, is_best_by=True
    ),
    "knn/average_top1": Metric(
        "kNN top-1 of the average {:.2%}", "accuracy", "s-", on_end=True
    ),
    "knn/map": Metric("kNN mAP {:.2%}", "accuracy", "o-", on_end=True, is_best_by=True),
    "knn/average_map": Metric(
        "kNN mAP of the average {:.2%}", "accuracy", "s-", on_end=True
    ),
    "embedding/rankme": Metric("RankMe {:.1f}", on_end=True),
    "embedding/average_rankme": Metric("RankMe of the average {:.1f}"),
    "embedding/alignment": Metric("alignment {:.4f}"),
    "embedding/uniformity": Metric("uniformity {:.4f}"),
    "embedding/within_between": Metric("within / between variance {:.4f}"),
    "embedding/simplex_distance": Metric("distance to a simplex {:.4f}"),
    "embedding/norm_spread": Metric("spread of class norms {:.4f}"),
    "retrieval/test_recall_at_1": Metric("test: recall at 1 {:.2%}"),
    "retrieval/test_recall_at_2": Metric("test: recall at 2 {:.2%}"),
    "retrieval/test_recall_at_4": Metric("test: recall at 4 {:.2%}"),
    "retrieval/test_recall_at_8": Metric("test: recall at 8 {:.2%}"),
    "retrieval/test_r_precision": Metric("test: R-precision {:.2%}"),
    "retrieval/test_map_at_r": Metric("test: mAP at R {:.2%}"),
    "retrieval/train_recall_at_1": Metric("train: recall at 1 {:.2%}"),
    "retrieval/train_recall_at_2": Metric("train: recall at 2 {:.2%}"),
    "retrieval/train_recall_at_4": Metric("train: recall at 4 {:.2%}"),
    "retrieval/train_recall_at_8": Metric("train: recall at 8 {:.2%}"),
    "retrieval/train_r_precision": Metric("train: R-precision {:.2%}"),
    "retrieval/train_map_at_r": Metric("train: mAP at R {:.2%}"),
    "ood/knn_auroc": Metric("k-th neighbour: AUROC {:.2%}"),
    "ood/knn_fpr95": Metric("k-th neighbour: FPR at 95 % TPR {:.2%}"),
    "ood/knn_aupr": Metric("k-th neighbour: AUPR {:.2%}"),
    "ood/mahalanobis_auroc": Metric("Mahalanobis: AUROC {:.2%}"),
    "ood/mahalanobis_fpr95": Metric("Mahalanobis: FPR at 95 % TPR {:.2%}"),
    "ood/mahalanobis_aupr": Metric("Mahalanobis: AUPR {:.2%}"),
    "ood/softmax_auroc": Metric("largest softmax: AUROC {:.2%}"),
    "ood/softmax_fpr95": Metric("largest softmax: FPR at 95 % TPR {:.2%}"),
    "ood/softmax_aupr": Metric("largest softmax: AUPR {:.2%}"),
    "eval/top1": Metric("top-1 {:.2%}", "accuracy", "o-", on_end=True),
    "eval/top5": Metric("top-5 {:.2%}", on_end=True),
    "eval/map": Metric("mAP {:.2%}", "accuracy", "o-", on_end=True),
    "eval/loss": Metric("test loss {:.4f}", "loss", "o-"),
    "eval/mean_class_accuracy": Metric("mean per class {:.2%}"),
    "eval/ece": Metric("ECE {:.4f}", on_end=True),
    "eval/ece_adaptive": Metric("adaptive ECE {:.4f}"),
    "eval/ece_classwise": Metric("classwise ECE {:.4f}"),
    "eval/brier": Metric("Brier score {:.4f}"),
    "eval/temperature": Metric("temperature {:.3f}"),
    "eval/scaled_loss": Metric("test loss, scaled {:.4f}"),
    "eval/scaled_ece": Metric("ECE, scaled {:.4f}", on_end=True),
    "eval/scaled_ece_adaptive": Metric("adaptive ECE, scaled {:.4f}"),
    "eval/scaled_ece_classwise": Metric("classwise ECE, scaled {:.4f}"),
    "eval/scaled_brier": Metric("Brier score, scaled {:.4f}"),
    "probe/l2": Metric("L2 {:.2g}", on_end=True),
    "probe/validation_loss": Metric("loss of held-out training images {:.4f}"),
    "probe/iterations": Metric("iterations {:.0f}", is_result=False),
    "eval/num_examples": Metric("on {:,.0f} images", on_end=True),
    "robustness/clean_top1": Metric("clean top-1 {:.2%}", on_end=True),
    "robustness/clean_ece": Metric("clean ECE {:.4f}", on_end=True),
    "robustness/top1": Metric("corrupted top-1 {:.2%}", on_end=True),
    "robustness/ece": Metric("corrupted ECE {:.4f}", on_end=True),
    "robustness/mean_error": Metric("mean corruption error, not normalised {:.2%}"),
    "robustness/mce": Metric("mCE {:.1%}", on_end=True),
    "robustness/relative_mce": Metric("relative mCE {:.1%}", on_end=True),
    **{
        f"robustness/top1_severity_{severity}": Metric(
            f"top-1 at severity {severity} {{:.2%}}"
        )
        for severity in SEVERITIES
    },
    **{
        f"robustness/ece_severity_{severity}": Metric(
            f"ECE at severity {severity} {{:.4f}}"
        )
        for severity in SEVERITIES
    },
    **{
        f"robustness/top1_{corruption}": Metric(
            f"top-1 under {corruption.replace('_', ' ')} {{:.2%}}"
        )
        for corruption in CORRUPTIONS
    },
}


def label_and_value(name: str, value: float) -> tuple[str, str]:
    """A metric for a table: its label and its value, in percent where it is a share."""
    label, brace, form = METRICS[name].text.partition("{")
    return label.strip(" ()"), (brace + form).strip(")").format(value)


def best_metric(metrics: Mapping[str, float]) -> str | None:
    """The one of these metrics by which the best checkpoint is kept: the last `is_best_by`."""
    known = [n for n, metric in METRICS.items() if metric.is_best_by and n in metrics]
    return known[-1] if known else None


def is_share(name: str) -> bool:
    """Whether a metric is a share of 1; one without an entry is a number."""
    return name in METRICS and METRICS[name].is_share


def is_accuracy(name: str) -> bool:
    """Whether a metric is a share of evaluated images that are right: larger is better."""
    return (
        name in METRICS
        and METRICS[name].panel == "accuracy"
        and not name.startswith("train/")
    )


def is_result(name: str) -> bool:
    """Whether a field of a line of metrics.jsonl is something that the run found."""
    return name not in LINE_FIELDS and (name not in METRICS or METRICS[name].is_result)


def on_progress(metrics: dict[str, float]) -> list[str]:
    """The texts of a line of progress."""
    return [
        metric.text.format(metrics[name])
        for name, metric in METRICS.items()
        if metric.on_progress and name in metrics
    ]


def on_end(metrics: dict[str, float], headline: str = "top1") -> list[str]:
    """The texts of the line of an evaluation or of the result.

    Args:
      metrics: by their names.
      headline: what comes first, `eval/<headline>`, where there is such a metric.
    """
    first = f"eval/{headline}"
    shown = [n for n, metric in METRICS.items() if metric.on_end and n != first]
    return [
        METRICS[name].text.format(metrics[name])
        for name in (first, *shown)
        if name in metrics
    ]
