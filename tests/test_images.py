"""Image files of every kind, against Pillow, file by file."""

import functools
import io
import struct
import tracemalloc
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from supcon_jax.data import images
from supcon_jax.data.host_views import central_crop, decode
from supcon_jax.data.sources import FileSource

SIZE = (31, 18)  # odd, so that rows are padded


def picture(size=SIZE):
    """A smooth picture, so that lossy formats change little."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * np.stack([x, y, 1 - x], axis=-1)).astype(np.uint8))


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animation(kind, **options):
    frames = [picture(), ImageOps.invert(picture()), picture().rotate(90)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def with_transparency():
    image = picture().quantize(16)
    return saved(image, "PNG", transparency=bytes(range(0, 160, 10)))


def clear():
    image = picture().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    return image


def by_hand(bits, kind, rows, *chunks):
    """A PNG of rows of bytes; `chunks` come before the pixels."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = struct.pack(">IIBBBBB", SIZE[0], SIZE[1], bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return images.PNG + b"".join(chunk(*part) for part in parts)


def rows(length):
    return np.random.default_rng(0).integers(0, 256, (SIZE[1], length), np.uint8)


def bmp_of_sixteen_bits():
    """Three colours in 16 bits, which are 8 bits a value or less."""
    width, height = SIZE
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, 0, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    pixels = np.arange(height * (width + 1), dtype="<u2") * 100  # rows are padded
    size = 14 + len(info) + len(masks)
    start = struct.pack("<2sIHHI", b"BM", size + pixels.nbytes, 0, 0, size)
    return start + info + masks + pixels.tobytes()


FILES = {
    "bmp of 16 bits": bmp_of_sixteen_bits,
    "jpeg": lambda: saved(picture(), "JPEG", quality=95),
    "jpeg, progressive": lambda: saved(picture(), "JPEG", progressive=True),
    "jpeg, grey": lambda: saved(picture().convert("L"), "JPEG"),
    "jpeg, cmyk": lambda: saved(picture().convert("CMYK"), "JPEG"),
    "jpeg, rgb": lambda: saved(picture(), "JPEG", keep_rgb=True),
    "png": lambda: saved(picture(), "PNG"),
    "png, grey": lambda: saved(picture().convert("L"), "PNG"),
    "png, 1 bit": lambda: saved(picture().convert("1"), "PNG"),
    "png, grey with 2 bits": lambda: by_hand(2, 0, rows(8)),
    "png, grey with 4 bits": lambda: by_hand(4, 0, rows(16)),
    "png, grey with alpha": lambda: saved(clear().convert("LA"), "PNG"),
    "png, alpha": lambda: saved(clear(), "PNG"),
    "png, palette": lambda: saved(picture().quantize(200), "PNG"),
    "png, palette of 16": lambda: saved(picture().quantize(16), "PNG", bits=4),
    "png, palette of 2": lambda: saved(picture().quantize(2), "PNG", bits=1),
    "png, palette with alpha": with_transparency,
    "png, one colour is clear": lambda: saved(
        picture(), "PNG", transparency=(0, 0, 255)
    ),
    "png, gamma": lambda: by_hand(8, 2, rows(93), (b"gAMA", struct.pack(">I", 100000))),
    "png, animated": lambda: animation("PNG"),
    "webp": lambda: saved(picture(), "WEBP"),
    "webp, lossless": lambda: saved(picture(), "WEBP", lossless=True),
    "webp, alpha": lambda: saved(clear(), "WEBP", lossless=True),
    "webp, animated": lambda: animation("WEBP", lossless=True),
    "bmp": lambda: saved(picture(), "BMP"),
    "bmp, 1 bit": lambda: saved(picture().convert("1"), "BMP"),
    "bmp, grey": lambda: saved(picture().convert("L"), "BMP"),
    "bmp, palette": lambda: saved(picture().quantize(99), "BMP"),
    "bmp, alpha": lambda: saved(clear(), "BMP"),
    "gif": lambda: saved(picture(), "GIF"),
    "gif, grey": lambda: saved(picture().convert("L"), "GIF"),
    "gif, animated": lambda: animation("GIF"),
    "tiff": lambda: saved(picture(), "TIFF"),
    "tiff, lzw": lambda: saved(picture(), "TIFF", compression="tiff_lzw"),
    "tiff, jpeg": lambda: saved(picture(), "TIFF", compression="jpeg"),
    "tiff, 1 bit": lambda: saved(picture().convert("1"), "TIFF"),
    "tiff, grey": lambda: saved(picture().convert("L"), "TIFF"),
    "tiff, grey with alpha": lambda: saved(clear().convert("LA"), "TIFF"),
    "tiff, palette": lambda: saved(picture().quantize(99), "TIFF"),
    "tiff, alpha": lambda: saved(clear(), "TIFF"),
    "tiff, cmyk": lambda: saved(picture().convert("CMYK"), "TIFF"),
    "tiff, pages": lambda: animation("TIFF"),
}


def shown(data):
    """What Pillow shows."""
    with Image.open(io.BytesIO(data)) as image:
        image = ImageOps.exif_transpose(image)
        image.info.pop("transparency", None)
        return np.asarray(image.convert("RGB")).astype(int)


def read(data, path):
    path.write_bytes(data)
    source = FileSource(np.asarray([str(path)]), np.zeros(1, np.int32), ("a",))
    example = source.read(0)
    return decode(tf.constant(example.image), tf.constant(example.orientation)).numpy()


def assert_as_shown(data, path):
    got, expected = read(data, path), shown(data)
    assert got.shape == expected.shape and got.dtype == np.uint8
    error = np.abs(got - expected)
    # TensorFlow asks libjpeg for its faster transform, which rounds more coarsely.
    loose = data.startswith(images.JPEG)
    assert error.mean() < 2 and error.max() <= 8 if loose else error.max() == 0


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_read_as_pillow_reads_it(kind, tmp_path):
    data = FILES[kind]()
    assert_as_shown(data, tmp_path / f"image.{kind.split(',')[0]}")
    # The suffix says nothing.
    assert_as_shown(data, tmp_path / "image.jpg")
    np.testing.assert_array_equal(images.decode(io.BytesIO(data)), shown(data))
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(images.decode(image), shown(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "late JPEG", "PNG", "WEBP", "TIFF"])
def test_photographs_are_turned_upright_whatever_the_container(
    kind, orientation, tmp_path
):
    tag = Image.Exif()
    tag[images.ORIENTATION] = orientation
    late = kind.startswith("late ")
    options = {"quality": 90} if late or kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    data = saved(picture(), kind.removeprefix("late "), exif=tag, **options)
    if late:  # after comments of 130 KB
        comment = b"\xff\xfe" + struct.pack(">H", 65002) + b"c" * 65000
        data = data[:2] + 2 * comment + data[2:]
    assert_as_shown(data, tmp_path / "image")
    turned = orientation >= 5
    height, width = read(data, tmp_path / "image").shape[:2]
    assert (width, height) == (SIZE[::-1] if turned else SIZE)
    np.testing.assert_array_equal(images.decode(io.BytesIO(data)), shown(data))


def test_the_tag_after_the_pixels_of_a_png_and_in_xmp(tmp_path):
    tag = Image.Exif()
    tag[images.ORIENTATION] = 6
    end = saved(picture(), "PNG")
    exif = tag.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    assert_as_shown(end[:-12] + chunk + end[-12:], tmp_path / "image")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    data = saved(picture(), "JPEG", xmp=xmp)
    assert_as_shown(data, tmp_path / "image")
    assert read(data, tmp_path / "image").shape[:2] == SIZE


def test_plain_jpeg_and_png_files_are_left_to_tensorflow():
    """Byte for byte: it is the fast way, and the one of earlier versions."""
    for kind in ("jpeg", "jpeg, grey", "png", "png, grey", "png, alpha"):
        data = FILES[kind]()
        assert images.for_tensorflow(io.BytesIO(data)) == (data, 1)


def deep_tiff(channels, photometric):
    """A TIFF of 16 bits a value in several channels, which Pillow does not write."""
    width, height = SIZE
    size = width * height * channels * 2
    tags = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: channels}
    tags |= {278: height, 279: size}
    if photometric == 2 and channels == 4:
        tags[338] = 2  # the fourth is alpha
    count = len(tags) + 1
    bits = 8 + size + 2 + 12 * count + 4
    entries = {
        tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()
    }
    entries[258] = struct.pack("<HHII", 258, 3, channels, bits)
    return b"".join(
        [
            struct.pack("<2sHI", b"II", 42, 8 + size),
            np.full(size // 2, 4095, "<u2").tobytes(),  # white, of 12 bits
            struct.pack("<H", count),
            *(entries[tag] for tag in sorted(entries)),
            struct.pack("<I", 0),
            struct.pack(f"<{channels}H", *[16] * channels),
        ]
    )


GREY = np.arange(18 * 31, dtype=np.uint16).reshape(18, 31) * 7
REFUSED = {
    "png of 16 bits": (saved(Image.fromarray(GREY), "PNG"), "16 bits"),
    "png of 16 bits in colour": (by_hand(16, 2, rows(6 * 31)), "16 bits"),
    "png of 16 bits with alpha": (by_hand(16, 6, rows(8 * 31)), "16 bits"),
    "tiff of 16 bits": (saved(Image.fromarray(GREY), "TIFF"), "16 bits"),
    "tiff of 16 bits in colour": (deep_tiff(3, 2), "16 bits"),
    "tiff of 16 bits with alpha": (deep_tiff(4, 2), "16 bits"),
    "tiff of 16 bits in cmyk": (deep_tiff(4, 5), "16 bits"),
    "tiff of 32 bits": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "16"),
    "tiff of floats": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "16"),
    "text": (b"not an image", "no image"),
    "empty": (b"", "empty"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "bomb": (
        by_hand(8, 0, [])[:16]
        + struct.pack(">II", 30000, 30000)
        + by_hand(8, 0, [])[24:],
        "30000 x 30000 pixels",
    ),
    "webp that ends early": (FILES["webp"]()[:60], ""),
    "tiff that ends early": (FILES["tiff, lzw"]()[:99], ""),
    "gif that ends early": (FILES["gif"]()[:40], ""),
    "bmp that ends early": (FILES["bmp"]()[:99], ""),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shown_is_refused_in_one_line(kind):
    data, reason = REFUSED[kind]
    with pytest.raises(OSError) as error:
        images.for_tensorflow(io.BytesIO(data))
    assert reason in str(error.value)
    assert str(error.value) and "\n" not in str(error.value)
    with pytest.raises(OSError) as without_tensorflow:
        images.decode(io.BytesIO(data))
    assert str(without_tensorflow.value) == str(error.value)
    if "16" in reason:
        with pytest.raises(OSError, match="16 bits"):
            images.decode(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    "height, width, image_size, resize",
    [
        (8, 8, 8, 8),
        (50, 70, 32, 36),
        (301, 200, 32, 41),
        (20, 31, 32, 32),
        (17, 9, 8, 8),
        (33, 33, 32, 37),
    ],
)
def test_the_crop_without_tensorflow_is_that_of_evaluation(
    height, width, image_size, resize
):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    options = {"image_size": image_size, "resize": resize}
    expected = [central_crop(tf.constant(x), None, **options)[0] for x in image]
    np.testing.assert_array_equal(images.central_crop(image, **options), expected)
    # A compiler may fuse a product and a sum, which moves a value over a half.
    compiled = jax.jit(functools.partial(images.central_crop, xp=jnp, **options))
    error = np.abs(np.asarray(compiled(image), int) - np.asarray(expected, int))
    assert error.max() <= 1 and np.mean(error > 0) < 0.01


STRIPS = {
    "gif": {},
    "png": {},
    "webp": {"lossless": True},
    "tiff": {},
}


@pytest.mark.parametrize("kind", STRIPS)
def test_of_an_animation_the_first_frame_alone_is_read(kind, tmp_path):
    """Memory does not grow with the number of frames or pages."""
    rng = np.random.default_rng(0)
    noise = [
        Image.fromarray(rng.integers(0, 256, (300, 300), np.uint8)) for _ in range(40)
    ]
    path = tmp_path / f"long.{kind}"
    noise[0].save(path, kind, save_all=True, append_images=noise[1:], **STRIPS[kind])
    source = FileSource(np.asarray([str(path)]), np.zeros(1, np.int32), ("a",))
    source.read(0)
    tracemalloc.start()
    source.read(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2e6 and peak < 1e6
