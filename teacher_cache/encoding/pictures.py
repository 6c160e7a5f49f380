"""Reads an image file as the 8-bit RGB picture that models see. One rule, one function.

Promise of the rule `upright-on-white`: the orientation that the file names is applied, transparency
of every mode is composited on white, and samples deeper than 8 bits are mapped by the range of
their depth, never clipped. The picture carries no metadata, so that no processor turns it again.
ValueError for what has no faithful 8-bit picture: numbers without a range, high dynamic range,
colour spaces without a conversion, several frames or pages. docs/families.md has the table.
Colour profiles and gamma are ignored, as transformers ignores them.

The rule `convert-rgb` is that of caches that were built before this one: Pillow's conversion alone.
"""

import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from teacher_cache.schema.options import PICTURE_RULE, PictureRule

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_CONVERTIBLE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_PNG_BITS = 24
"""Where a PNG file has the bits of its samples."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_PQ, _HLG = 16, 18
"""Transfer functions of high dynamic range, as PNG's cICP and AVIF's nclx number them."""
_AVIF_HEADER = 4096
_SIZE_IN_HEADER = frozenset({"BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "WEBP"})
"""Formats whose header has the size of the decoded picture, before it is turned upright."""
_SIDEWAYS = frozenset({5, 6, 7, 8})
"""Orientations that exchange width and height."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTraits:
    """What of a file the rule `convert-rgb` gets wrong and the rule of today converts."""

    turned: bool = False
    """It names another orientation than upright."""
    transparent: bool = False
    """It has an alpha channel or transparent colours."""
    deep: bool = False
    """Its samples are deeper than 8 bits."""


def read_picture(data: bytes, rule: PictureRule = PICTURE_RULE) -> Image.Image:
    """The picture of a file's bytes, in mode RGB; ValueError where there is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            refused = None if rule == "convert-rgb" else _why_unfaithful(image, data)
            if refused is None:
                image.load()  # turns a TIFF upright
                if rule == "upright-on-white":
                    return _upright_on_white(image, data)
                return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        # Pillow prints the address of the stream; a reason is stored and must be the same again.
        unknown = isinstance(error, UnidentifiedImageError)
        why = "its format is unknown" if unknown else str(error)
        raise ValueError(f"cannot be decoded: {why}; replace the file") from error
    raise ValueError(f"has no faithful 8-bit picture: {refused}")


def picture_size(data: bytes, rule: PictureRule = PICTURE_RULE) -> tuple[int, int]:
    """Width and height of `read_picture(data, rule)`, from the header in the common formats.

    Damage behind the header is not noticed there. ValueError as `read_picture`.
    """
    with suppress(Exception), Image.open(io.BytesIO(data)) as image:
        if image.format in _SIZE_IN_HEADER:
            width, height = image.size
            if rule == "convert-rgb":
                return width, height
            if _why_unfaithful(image, data) is None:
                sideways = _named_orientation(image, data) in _SIDEWAYS
                return (height, width) if sideways else (width, height)
    return read_picture(data, rule).size


def picture_traits(data: bytes) -> PictureTraits:
    """What a file has that needs a conversion; reads its header, and pixels where it must.

    ValueError for a file that Pillow does not know.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = _named_orientation(image, data) in _TURNS
            return PictureTraits(
                turned=turned, transparent=image.has_transparency_data, deep=_bits(image, data) > 8
            )
    except Exception as error:
        raise ValueError(f"cannot be read: {type(error).__name__}; replace the file") from error


def _why_unfaithful(image: Image.Image, data: bytes) -> str | None:
    """What keeps a file from an 8-bit picture, and the remedy; None where nothing does."""
    count: int = getattr(image, "n_frames", 1)
    if count > 1 and image.format not in ("MPO", "PSD"):  # theirs belong to one picture
        return f"it has {count} frames or pages; save the one that is meant"
    transfer = None
    if image.format == "PNG" and (at := data.find(b"cICP", 0, data.find(b"IDAT"))) > 0:
        transfer = data[at + 5]
    elif image.format == "AVIF" and (at := data.find(b"nclx", 0, _AVIF_HEADER)) > 0:
        transfer = int.from_bytes(data[at + 6 : at + 8], "big")
    if transfer in (_PQ, _HLG):
        return "it has a high dynamic range (PQ or HLG); save it in standard range"
    if image.mode == "I" and image.format != "PPM":
        return "it has signed or 32-bit samples without a range; save it as 8-bit RGB"
    if image.mode == "RGB" and "transparency" in image.info and _bits(image, data) > 8:
        return "it has a transparent colour of 16 bits; save it with an alpha channel"
    if image.mode not in (*_DEEP, *_CONVERTIBLE) and not image.has_transparency_data:
        return f"its mode {image.mode} has no range or no conversion; save it as 8-bit RGB"
    return None


def _upright_on_white(image: Image.Image, data: bytes) -> Image.Image:
    picture = _eight_bits(image) if image.mode in _DEEP else image
    if picture.has_transparency_data:
        picture = _on_white(picture, _bits(image, data))
    picture = picture.convert("RGB")
    picture.info.clear()
    turn = _TURNS.get(_orientation(image))
    return picture if turn is None else picture.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The orientation that EXIF or XMP name; 1, upright, where they cannot be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF of an intact picture: SyntaxError, struct.error, ...
        return 1


def _named_orientation(image: Image.Image, data: bytes) -> int:
    """`_orientation` of a file that is open and not decoded."""
    # A PNG may name its orientation behind the pixels; most name none.
    marks = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
    if image.format == "PNG" and not any(mark in data for mark in marks):
        return 1
    return _orientation(image)


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a sample in the file, as far as PNG, TIFF or Pillow's mode tell."""
    if image.format == "PNG":
        return data[_PNG_BITS]
    tags: Any = getattr(image, "tag_v2", None) or {}
    return max(tags.get(_TIFF_BITS, (16 if image.mode in _DEEP else 8,)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Map 0 ... the greatest sample of the file's depth to 0 ... 255, rounded to the nearest."""
    tags: Any = getattr(image, "tag_v2", None) or {}
    # PNG has 16 bits; Pillow scales the samples of PPM and JPEG 2000 to 16.
    greatest = 2 ** max(tags.get(_TIFF_BITS, (16,))) - 1
    samples = np.asarray(image).astype(np.uint32)
    grey = ((samples * 510 + greatest) // (2 * greatest)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    reduced = Image.fromarray(grey)
    if (clear := image.info.get("transparency")) is not None:
        reduced.putalpha(Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8)))
    return reduced


def _on_white(image: Image.Image, bits: int) -> Image.Image:
    """Composite a picture of any mode with transparency on white."""
    clear = image.info.get("transparency")
    if image.mode == "L" and bits < 8 and clear is not None:
        # PNG names the sample of the file; Pillow has scaled samples to 8 bits.
        image = image.copy()
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)
