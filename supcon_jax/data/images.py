"""Image files of any kind: made ready for TensorFlow to decode, or decoded without it.

TensorFlow decodes plain JPEG and PNG files fastest, and as Pillow does. Of the others it
reads some differently (palettes with few bits, the EXIF tag, CMYK, animations) and some
not at all, so Pillow decodes them and hands them on as a BMP, which is pixels with a
header. The first bytes of a file say which it is.

A finished model needs a few photos and no TensorFlow: `decode` and `central_crop` give
what evaluation sees.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import numpy as np

T = TypeVar("T")

# The EXIF tag that says how a camera was held.
ORIENTATION = 0x0112
# The TIFF tag that says how many bits each channel's values have.
BITS_PER_SAMPLE = 258
# A file of a few kilobytes can claim any size; Pillow's limit for that.
MAX_PIXELS = 178_956_970
# Many threads wait for the disk, but each that decodes holds an image's pixels twice.
DECODERS = threading.Semaphore(os.cpu_count() or 1)
LFS_POINTER = b"version https://git-lfs"
JPEG, PNG, RIFF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF"
# PNG chunks that may hold the EXIF tag or say that there is more than plain pixels.
PNG_EXTRAS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt", b"tRNS", b"acTL")
SIXTEEN_BITS = (
    "its values have 16 bits or more, and nothing says which of them is white; convert "
    "it to 8 bits by the range that it uses"
)


def for_tensorflow(file: BinaryIO) -> tuple[bytes, int]:
    """Bytes that TensorFlow decodes to what Pillow shows, and how to turn them upright.

    The image is the first frame, turned upright as its EXIF tag says and converted to
    RGB (an alpha channel is dropped): Pillow's
    `ImageOps.exif_transpose(image).convert("RGB")`.

    Args:
      file: an image file, at its beginning.

    Returns:
      A JPEG, PNG or BMP file, and an EXIF code 1..8.

    Raises:
      OSError: the file is no image, or one that cannot be shown with 8 bits.
    """
    start = file.read(len(LFS_POINTER))
    if not start:
        raise OSError("the file is empty")
    if start == LFS_POINTER:
        raise OSError("it is a pointer of git-lfs; run `git lfs pull`")
    orientation = None
    if start.startswith((JPEG, PNG)):
        sniff = _sniff_jpeg if start.startswith(JPEG) else _sniff_png
        orientation = sniff(file)
    file.seek(0)
    if orientation is not None:
        return file.read(), orientation
    return _to_bmp(_one_frame(file) if start.startswith(RIFF) else file), 1


def read_size(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height by an image file's header; None where it has none."""
    try:
        with _open(file) as image:
            return image.size
    except Exception:  # decoders raise many kinds; decoding will say what is wrong
        return None


def _sniff_jpeg(file: BinaryIO) -> int | None:
    """The EXIF code of a JPEG that TensorFlow reads as Pillow does, None of another."""
    place, has_exif, components = 2, False, 3
    while len(segment := _bytes_at(file, place, 10)) == 10 and segment[0] == 0xFF:
        marker, length = segment[1], int.from_bytes(segment[2:4])
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == 0xDA:  # the pixels begin
            break
        if marker == 0xE1:
            has_exif = True  # or XMP, which may hold the tag too
        elif marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(segment[n : n + 2]) for n in (5, 7))
            _check_size(width, height)
            components = segment[9]
        place += 2 if marker in range(0xD0, 0xD9) else 2 + length
    if components not in (1, 3):
        return None
    return _read_orientation(file) if has_exif else 1


def _sniff_png(file: BinaryIO) -> int | None:
    """1 for a PNG that TensorFlow reads as Pillow does, None for another."""
    header = _bytes_at(file, 16, 10)
    _check_size(int.from_bytes(header[:4]), int.from_bytes(header[4:8]))
    bits, kind = header[8:9], header[9:10]
    if bits == b"\x10":
        raise OSError(SIXTEEN_BITS)
    if bits != b"\x08" or kind == b"\x03":  # few bits, a palette
        return None
    place = len(PNG)
    while len(chunk := _bytes_at(file, place, 8)) == 8:
        if chunk[4:] in PNG_EXTRAS:
            return None
        place += 12 + int.from_bytes(chunk[:4])
    return 1


def _one_frame(file: BinaryIO) -> BinaryIO:
    """A WebP file without the frames after its first; Pillow would read them all."""
    chunks, has_frame, place = [], False, 12
    while len(header := _bytes_at(file, place, 8)) == 8:
        length = int.from_bytes(header[4:], "little")
        length += length % 2
        if header[:4] != b"ANMF" or not has_frame:
            chunks.append(header + file.read(length))
        has_frame |= header[:4] == b"ANMF"
        place += 8 + length
    body = b"WEBP" + b"".join(chunks)
    return io.BytesIO(RIFF + len(body).to_bytes(4, "little") + body)


def _bytes_at(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise OSError(
            f"it has {width} x {height} pixels; allowed: {MAX_PIXELS:,} in all"
        )


def _read_orientation(file: BinaryIO) -> int:
    """How a camera was held, 1 where the file does not say."""
    file.seek(0)
    try:
        # Pillow closes what it opened by name, not a file that it was given.
        with _open(file) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:
        return 1  # if the file is broken, decoding it will say so
    return orientation if orientation in range(1, 9) else 1


def _open(file: BinaryIO) -> Any:
    from PIL import Image

    # All formats are known before any thread asks: `open` alone may miss those that
    # another thread is just loading.
    Image.init()
    return Image.open(file)


def _to_bmp(file: BinaryIO) -> bytes:
    """The first frame of a file as Pillow shows it, as a BMP.

    Raises:
      OSError: it cannot be read.
    """

    def save(image: Any) -> bytes:
        pixels = io.BytesIO()
        image.save(pixels, "BMP")
        return pixels.getvalue()

    return _show(file, save)


def _show(file: BinaryIO, use: Callable[[Any], T]) -> T:
    """What `use` makes of the first frame of a file, upright and in RGB.

    Raises:
      OSError: it cannot be read.
    """
    from PIL import UnidentifiedImageError

    try:
        with DECODERS, _open(file) as image:
            _refuse_deep(image)
            return use(_upright(image))
    except UnidentifiedImageError:
        raise OSError("it is no image that can be read") from None
    except Exception as error:  # decoders raise many kinds
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(why) from None


def _refuse_deep(image: Any) -> None:
    """Refuses a Pillow image whose file has more than 8 bits a value.

    Only grey ones have a mode of their own. Of colours Pillow keeps the high bytes, and
    then the file's tags or the way in which it is still to be read tell; a copy of the
    image has neither.

    Raises:
      OSError: it has more.
    """
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 8)
    # "RGB;16B" is one; "BGR;16" is not, three colours in 16 bits.
    ways = str([tile[-1] for tile in getattr(image, "tile", ())])
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise OSError(SIXTEEN_BITS)
    if np.max(bits) > 8 or re.search(";16[BLN]", ways):
        raise OSError(SIXTEEN_BITS)


def _upright(image: Any) -> Any:
    """A Pillow image as it is shown, in RGB; the one given is changed."""
    from PIL import ImageOps

    # In place, and not converted where it is RGB: a photo has many megabytes.
    ImageOps.exif_transpose(image, in_place=True)
    # Which colour is transparent does not matter without an alpha channel.
    image.info.pop("transparency", None)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(image: Any) -> np.ndarray:
    """RGB `[H, W, 3]` uint8 of an image, as Pillow shows it; without TensorFlow.

    Args:
      image: a file at its beginning, or a Pillow image.

    Raises:
      OSError: it cannot be read; the same files are refused as by `for_tensorflow`.
    """
    if hasattr(image, "getexif"):
        _refuse_deep(image)
        return np.asarray(_upright(image.copy()))
    content, _ = for_tensorflow(image)
    return _show(io.BytesIO(content), np.array)


def central_crop(image: Any, *, image_size: int, resize: int, xp: Any = np) -> Any:
    """The evaluation crop `[..., S, S, 3]` of images `[..., H, W, 3]`, all uint8.

    The short side is resized to `resize`, bilinear without antialiasing and with pixel
    centres at halves, and the centre is cut out: what `host_views.central_crop` does with
    TensorFlow. Only the pixels of the crop are computed.

    Args:
      image: of one size, which may be unknown until the program runs (`xp=jax.numpy`).
      image_size: side S.
      resize: short side before the crop, at least S.
      xp: numpy or jax.numpy.
    """
    sides = [xp.asarray(side, xp.float32) for side in image.shape[-3:-1]]
    short = xp.minimum(*sides)
    for axis, side in zip((-3, -2), sides, strict=True):
        target = xp.round(side * resize / short)
        first = xp.floor((target - image_size) / 2)
        centre = first + xp.arange(image_size, dtype=xp.float32) + xp.float32(0.5)
        place = centre * (side / target) - xp.float32(0.5)
        low = xp.floor(place)
        share = (place - low)[:, None, None] if axis == -3 else (place - low)[:, None]
        before, after = (
            xp.take(image, xp.clip(low + step, 0, side - 1).astype(xp.int32), axis=axis)
            for step in (0, 1)
        )
        before, after = before.astype(xp.float32), after.astype(xp.float32)
        image = before + (after - before) * share
    # Between the values of pixels: rounding cannot leave 0 to 255.
    return (image + xp.float32(0.5)).astype(xp.uint8)
