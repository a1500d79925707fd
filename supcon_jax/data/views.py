"""What a view is made of: one description that host and step share.

A view is cropped, flipped, jittered, sent through a policy, made grey and blurred, in this
order. The step does all of this for whole images in memory; for others the host does some
of it and the step the rest (`host_part`, `step_part`).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CropSpec:
    """How the rectangle of a random crop is drawn.

    Up to `attempts` rectangles are drawn, and the first that lies within the image and
    keeps to the range of areas is taken. Host and step follow different official codes,
    so a run's crops depend on where they are made:

    | | in the step: `TORCHVISION_CROP` | on the host: `TENSORFLOW_CROP` |
    |---|---|---|
    | used for | whole images in memory | all others |
    | drawn | area uniform, aspect ratio log-uniform | aspect ratio uniform, then height |
    | corners | may lie between pixels | whole pixels |
    | least area | `crop_area[0]` | `crop_area[0]`, but never below `least_covered` |
    | no rectangle fits | largest central one of an allowed aspect ratio | whole image |

    The height is uniform over the whole pixels that the range of areas allows.

    Attributes:
      attempts: rectangles that are drawn before the fallback.
      aspect_ratios: least and largest width / height.
      least_covered: share of the image that a crop must cover whatever the area's range.
    """

    attempts: int
    aspect_ratios: tuple[float, float] = (3 / 4, 4 / 3)
    least_covered: float = 0.0


# torchvision's RandomResizedCrop, which the authors' PyTorch code for CIFAR uses. Corners
# between pixels are ours: a small image would otherwise have few different crops.
TORCHVISION_CROP = CropSpec(attempts=10)
# tf.image.sample_distorted_bounding_box as the authors' TensorFlow code calls it.
TENSORFLOW_CROP = CropSpec(attempts=100, least_covered=0.1)


# How brightness, contrast and saturation are jittered; `color.apply_jitter` has the
# formulas. torchvision's is that of the authors' PyTorch code, of MoCo and of the authors'
# TensorFlow code on CIFAR-10; on ImageNet the latter has TensorFlow's.
JITTER_KINDS = ("torchvision", "tensorflow")
# What a blur takes for the pixels outside the image: mid-grey as in the authors' TensorFlow
# code, or the nearest pixel of the image as in Pillow, which MoCo uses.
BLUR_BORDERS = ("grey", "edge")

# What may come after crop, flip and jitter; operations.py says what they are.
POLICIES = ("none", "auto_augment", "rand_augment", "trivial_augment")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done at random to a view; the defaults are crop and flip alone.

    Attributes:
      crop_area: least and largest share of the image's area in a crop; None: no crop.
      flip: mirror with probability 1/2.
      jitter_strength: s of the colour jitter; 0: none.
      jitter_probability: share of the views that are jittered.
      jitter_kind: a name in `JITTER_KINDS`.
      policy: a name in `POLICIES`.
      layers, magnitude: of RandAugment.
      grayscale_probability: share of the views that lose their colour.
      blur_probability: share of the views that are blurred.
      blur_border: a name in `BLUR_BORDERS`.
      extra: names in `augment.TRANSFORMS`, applied last and in this order.
    """

    crop_area: tuple[float, float] | None = (0.08, 1.0)
    flip: bool = True
    jitter_strength: float = 0.0
    jitter_probability: float = 0.8
    jitter_kind: str = "torchvision"
    policy: str = "none"
    layers: int = 2
    magnitude: float = 10.0
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_border: str = "grey"
    extra: tuple[str, ...] = ()

    @property
    def jitters(self) -> bool:
        """Whether any view is jittered."""
        return self.jitter_strength > 0 and self.jitter_probability > 0

    def host_part(self) -> Augmentation:
        """What the host does where it crops; jitter only if a policy comes after it."""
        return dataclasses.replace(
            self,
            jitter_strength=self.jitter_strength if self.policy != "none" else 0.0,
            grayscale_probability=0.0,
            blur_probability=0.0,
            extra=(),
        )

    def step_part(self, *, whole_images: bool) -> Augmentation:
        """What is left to the jitted step.

        Args:
          whole_images: whether the host sends whole images; if not, it has cropped and
            flipped them.
        """
        if whole_images:
            return self
        return dataclasses.replace(
            self,
            crop_area=None,
            flip=False,
            jitter_strength=self.jitter_strength if self.policy == "none" else 0.0,
            policy="none",
        )
