"""The picture that models see: exact pixels for every mode, depth and orientation, and refusals."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from teacher_cache.encoding.pictures import (
    PictureTraits,
    picture_size,
    picture_traits,
    read_picture,
)

COLOURS = [(200, 10, 30), (0, 90, 250), (7, 8, 9), (255, 255, 0), (1, 128, 64), (90, 80, 70)]
RGB = np.array(COLOURS, dtype=np.uint8).reshape(2, 3, 3)
GREY = np.array([[0, 100, 255], [17, 128, 60]], dtype=np.uint8)
ALPHA = np.array([[0, 255, 128], [1, 254, 60]], dtype=np.uint8)


def saved(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **how)
    return stream.getvalue()


def seen(data: bytes) -> Any:
    picture = read_picture(data)
    assert picture.mode == "RGB"
    assert not picture.info, "metadata could make a processor turn it again"
    assert picture_size(data) == picture.size
    return np.asarray(picture)


def on_white(colour: Any, alpha: Any) -> Any:
    """Plain compositing in floating point; Pillow's differs by less than a level."""
    share = np.asarray(alpha, dtype=np.float64)[..., None] / 255
    return np.asarray(colour, dtype=np.float64) * share + 255 * (1 - share)


def png(depth: int, kind: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these packed rows; `chunks` stand before the pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    width = len(rows[0]) * 8 // depth // {0: 1, 2: 3, 3: 1}[kind]
    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(values: Any, sample_format: int, photometric: int = 1, bits: int = 16) -> bytes:
    """A little-endian TIFF of one band."""
    height, width = values.shape
    body = values.tobytes()
    if bits == 12:
        a, b = (int(value) for value in values.reshape(-1))
        body = bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
    }
    tags |= {279: len(body), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    table = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + table


TRANSPARENT = {
    "RGBA": Image.merge("RGBA", [*Image.fromarray(RGB).split(), Image.fromarray(ALPHA)]),
    "LA": Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]),
}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_is_composited_on_white(mode: str) -> None:
    image = TRANSPARENT[mode]
    colour = RGB if mode == "RGBA" else np.stack([GREY] * 3, axis=-1)
    found = seen(saved(image))
    assert np.abs(found - on_white(colour, ALPHA)).max() <= 1
    assert (found[0, 0] == 255).all()
    from transformers.image_transforms import convert_to_rgb

    assert (found == convert_to_rgb(image, return_numpy=True)).all()


def test_a_palette_with_alpha_values_or_a_transparent_index_is_composited_on_white() -> None:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([200, 0, 0, 0, 100, 0, 5, 6, 7])
    wanted = on_white([[[200, 0, 0], [0, 100, 0], [5, 6, 7]]], [[0, 255, 128]])
    found = seen(saved(image, transparency=b"\x00\xff\x80"))
    assert np.abs(found - wanted).max() <= 1
    found = seen(saved(image, transparency=1))
    assert found.tolist() == [[[200, 0, 0], [255, 255, 255], [5, 6, 7]]]
    found = seen(saved(image, "GIF", transparency=1))
    assert found[0, 1].tolist() == [255, 255, 255]


def test_a_transparent_colour_is_white() -> None:
    found = seen(saved(Image.fromarray(RGB), transparency=(200, 10, 30)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert (found.reshape(-1, 3)[1:] == RGB.reshape(-1, 3)[1:]).all()
    assert seen(saved(Image.fromarray(GREY), transparency=100))[..., 0].tolist() == [
        [0, 255, 255],
        [17, 128, 60],
    ]


@pytest.mark.parametrize(("depth", "row"), [(1, 0b01010101), (2, 0b00011011), (4, 0b00001111)])
def test_a_transparent_grey_of_few_bits_is_named_in_the_bits_of_the_file(
    depth: int, row: int
) -> None:
    clear = png(depth, 0, [bytes([row])], (b"tRNS", struct.pack(">H", 0)))
    plain = png(depth, 0, [bytes([row])])
    assert (seen(plain)[0, 0] == 0).all()
    assert (seen(clear) == 255)[seen(plain) == 0].all()
    assert (seen(clear) == seen(plain))[seen(plain) > 0].all()
    black = 2**depth - 1
    white = png(depth, 0, [bytes([255 - row])], (b"tRNS", struct.pack(">H", black)))
    assert (seen(white) != 0).any(axis=None)
    one = png(depth, 0, [bytes([row])], (b"tRNS", struct.pack(">H", 1)))
    is_one = seen(plain)[..., 0] == 255 // black
    assert (seen(one)[..., 0][is_one] == 255).all()


DEEP = np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)
SHALLOW = [0, 0, 1, 128, 255]


@pytest.mark.parametrize(
    "data",
    [
        saved(Image.fromarray(DEEP)),
        saved(Image.fromarray(DEEP), "TIFF"),
        saved(Image.fromarray(DEEP), "PPM"),
        b"P5 5 1 65535\n" + DEEP.astype(">u2").tobytes(),
        saved(Image.fromarray(DEEP), "JPEG2000", irreversible=False),
    ],
    ids=["png", "tiff", "pgm", "pgm-written", "jpeg2000"],
)
def test_sixteen_bits_are_mapped_by_their_range(data: bytes) -> None:
    assert seen(data)[0].tolist() == [[value] * 3 for value in SHALLOW]
    assert picture_traits(data).deep


def test_depth_and_direction_of_a_tiff_are_those_of_its_tags() -> None:
    assert seen(tiff(DEEP, 1, photometric=0))[0, :, 0].tolist() == [255 - v for v in SHALLOW]
    twelve = tiff(np.array([[4095, 2048]], dtype=np.uint16), 1, bits=12)
    assert seen(twelve)[0, :, 0].tolist() == [255, 128]


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    data = png(16, 0, [DEEP.astype(">u2").tobytes()], (b"tRNS", struct.pack(">H", 128)))
    assert seen(data)[0, :, 0].tolist() == [0, 255, 1, 128, 255]


def test_colours_of_sixteen_bits_keep_their_high_byte() -> None:
    data = png(16, 2, [struct.pack(">6H", 65535, 32768, 255, 0, 256, 65280)])
    assert seen(data)[0].tolist() == [[255, 128, 0], [0, 1, 255]]
    assert picture_traits(data) == PictureTraits(deep=True)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(9))
def test_every_orientation_is_applied_once(form: str, orientation: int) -> None:
    image = Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), dtype=np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(image, form, exif=exif)
    from transformers.image_utils import load_image

    wanted = np.asarray(load_image(Image.open(io.BytesIO(data))))
    assert (seen(data) == wanted).all()
    assert wanted.shape[:2] == ((24, 16) if orientation > 4 else (16, 24))
    assert picture_traits(data).turned == (2 <= orientation <= 8)
    assert picture_size(data, "convert-rgb") == read_picture(data, "convert-rgb").size
    again = ImageOps.exif_transpose(read_picture(data))
    assert (np.asarray(again) == wanted).all()


def test_a_palette_is_turned_too() -> None:
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([200, 0, 0, 0, 100, 0, 5, 6, 7])
    exif = Image.Exif()
    exif[0x0112] = 6
    found = seen(saved(image, transparency=1, exif=exif))
    assert found.tolist() == [[[200, 0, 0]], [[255, 255, 255]], [[5, 6, 7]]]


def test_damaged_exif_leaves_an_intact_picture_upright() -> None:
    data = saved(Image.fromarray(RGB), exif=b"Exif\0\0nothing of TIFF")
    assert (seen(data) == RGB).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_opaque_modes_are_as_pillow_converts_them(mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    data = saved(image, "JPEG" if mode in ("CMYK", "YCbCr") else "PNG")
    with Image.open(io.BytesIO(data)) as opened:
        assert (seen(data) == np.asarray(opened.convert("RGB"))).all()
    assert picture_traits(data) == PictureTraits()


FRAMES = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (tiff(np.zeros((1, 2), dtype=np.int16), 2), "signed or 32-bit"),
        (tiff(np.zeros((1, 2), dtype=np.int32), 2, bits=32), "signed or 32-bit"),
        (tiff(np.zeros((1, 2), dtype=np.float32), 3, bits=32), "mode F has no range"),
        (saved(FRAMES[0].convert("LAB"), "TIFF"), "mode LAB has no range or no conversion"),
        *(
            (saved(FRAMES[0], form, save_all=True, append_images=FRAMES[1:]), "2 frames or pages")
            for form in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
        ),
        (png(8, 2, [RGB[0].tobytes()], (b"cICP", bytes([9, 16, 0, 1]))), "high dynamic range"),
        (png(16, 2, [bytes(6)], (b"tRNS", bytes(6))), "transparent colour of 16 bits"),
    ],
)
def test_what_has_no_faithful_picture_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=f"no faithful 8-bit picture: .*{why}.*; save"):
        read_picture(data)
    with pytest.raises(ValueError, match=f"no faithful 8-bit picture: .*{why}.*; save"):
        picture_size(data)
    assert read_picture(data, "convert-rgb").mode == "RGB" if "LAB" not in why else True


def test_one_frame_and_the_first_of_a_photograph_are_taken() -> None:
    assert (seen(saved(FRAMES[0], "GIF", save_all=True)).shape) == (2, 3, 3)
    first = seen(saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]))
    assert (first == seen(saved(FRAMES[0], "MPO"))).all()
    assert (seen(png(8, 2, [RGB[0].tobytes()], (b"cICP", bytes([1, 13, 0, 1])))) == RGB[:1]).all()


def test_the_earlier_rule_is_pillows_conversion_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = TRANSPARENT["RGBA"]
    data = saved(image, exif=exif)
    assert (np.asarray(read_picture(data, "convert-rgb")) == RGB).all()
    assert picture_traits(data) == PictureTraits(turned=True, transparent=True)
    assert picture_traits(saved(Image.fromarray(RGB))) == PictureTraits()
    with pytest.raises(ValueError, match="cannot be read: UnidentifiedImageError"):
        picture_traits(b"nothing")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
def test_the_size_of_common_files_is_known_without_decoding_them(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(Image.fromarray(np.zeros((40, 30, 3), dtype=np.uint8)), form)

    def throwing(*_: object) -> None:
        raise AssertionError("the file was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", throwing)
    monkeypatch.setattr("PIL.Image.Image.convert", throwing)
    assert picture_size(data) == picture_size(data, "convert-rgb") == (30, 40)
    with pytest.raises(ValueError, match="decoded"):
        read_picture(data)


def test_the_size_of_what_is_no_picture_is_refused_as_the_picture_is() -> None:
    for data in (b"nothing", b""):
        with pytest.raises(ValueError, match="cannot be decoded: its format is unknown"):
            picture_size(data)
