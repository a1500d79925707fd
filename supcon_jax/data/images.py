"""Image files of any kind, made ready for TensorFlow to decode.

TensorFlow decodes plain JPEG and PNG files fastest, and as Pillow does. Of the others it
reads some differently (palettes with few bits, the EXIF tag, CMYK, animations) and some
not at all, so Pillow decodes them and hands them on as a BMP, which is pixels with a
header. The first bytes of a file say which it is.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO

# The EXIF tag that says how a camera was held.
ORIENTATION = 0x0112
# A file of a few kilobytes can claim any size; Pillow's limit for that.
MAX_PIXELS = 178_956_970
LFS_POINTER = b"version https://git-lfs"
JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
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
        data = start + file.read()
        sniff = _sniff_jpeg if start.startswith(JPEG) else _sniff_png
        orientation = sniff(data)
        if orientation is not None:
            return data, orientation
        file = io.BytesIO(data)
    file.seek(0)
    return _to_bmp(file), 1


def _sniff_jpeg(data: bytes) -> int | None:
    """The EXIF code of a JPEG that TensorFlow reads as Pillow does, None of another."""
    place, has_exif, components = 2, False, 3
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xFF:  # filling
            place += 1
            continue
        if marker == 0xDA:  # the pixels begin
            break
        if marker == 0xE1:
            has_exif = True  # or XMP, which may hold the tag too
        elif marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (
                int.from_bytes(data[place + n : place + n + 2]) for n in (5, 7)
            )
            _check_size(width, height)
            components = data[place + 9]
        place += 2 if marker in range(0xD0, 0xD9) else 2 + length
    if components not in (1, 3):
        return None
    return _read_orientation(data) if has_exif else 1


def _sniff_png(data: bytes) -> int | None:
    """1 for a PNG that TensorFlow reads as Pillow does, None for another."""
    width, height = (int.from_bytes(data[n : n + 4]) for n in (16, 20))
    _check_size(width, height)
    bits, kind = data[24:25], data[25:26]
    if bits == b"\x10":
        raise OSError(SIXTEEN_BITS)
    if bits != b"\x08" or kind == b"\x03":  # few bits, a palette
        return None
    place = len(PNG)
    while place + 8 <= len(data):
        if data[place + 4 : place + 8] in PNG_EXTRAS:
            return None
        place += 12 + int.from_bytes(data[place : place + 4])
    return 1


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise OSError(
            f"it has {width} x {height} pixels; allowed: {MAX_PIXELS:,} in all"
        )


def _read_orientation(data: bytes) -> int:
    """How a camera was held, 1 where the file does not say."""
    try:
        with _open(io.BytesIO(data)) as image:
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
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with _open(file) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise OSError(SIXTEEN_BITS)
            upright = ImageOps.exif_transpose(image)
            # Which colour is transparent does not matter without an alpha channel.
            upright.info.pop("transparency", None)
            pixels = io.BytesIO()
            upright.convert("RGB").save(pixels, "BMP")
    except UnidentifiedImageError:
        raise OSError("it is no image that can be read") from None
    except Exception as error:  # decoders raise many kinds
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(why) from None
    return pixels.getvalue()
