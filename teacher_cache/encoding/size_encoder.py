"""Encodes samples from the sizes of their images alone, without the pixels.

Text, tokens, views and positions are those of the whole encoder, because it is the same code: only
the image processor is replaced. It runs once for each tuple of image sizes, on blank images, and
its tensors of pixels are replaced by zeros that take no memory. Right for processors that tile
and resize by size, as those of all supported families do.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from teacher_cache.encoding.pictures import picture_size
from teacher_cache.encoding.sample_encoder import SampleEncoder

_MOST_SIZES = 2**14
"""Tuples of image sizes that are remembered, about 2 KiB each."""


class SizeEncoder(SampleEncoder):
    """Another encoder without its pixels; damage behind the header of an image is not noticed."""

    def __init__(self, encoder: SampleEncoder) -> None:
        vars(self).update(vars(encoder))
        self.processor = copy.copy(encoder.processor)
        self.processor.image_processor = _OncePerSize(encoder.processor.image_processor)

    def read_picture(self, data: bytes) -> Image.Image:
        """A picture of the same size."""
        return Image.new("RGB", picture_size(data, self.pictures))


class _OncePerSize:
    """An image processor whose outputs are remembered by the sizes of the images."""

    def __init__(self, image_processor: Any) -> None:
        self._real = image_processor
        self._known: dict[tuple[tuple[int, int], ...], Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, images: Sequence[Any], **settings: Any) -> Any:
        sizes = tuple(image.size for image in _flat(images))
        found = self._known.get(sizes)
        if found is None:
            found = self._real(images, **settings)
            for name, values in found.items():
                if name.startswith("pixel_"):
                    found[name] = torch.zeros((), dtype=values.dtype).expand(values.shape)
            if len(self._known) >= _MOST_SIZES:
                self._known.clear()
            self._known[sizes] = found
        return type(found)(dict(found))  # processors remove entries


def _flat(images: Sequence[Any]) -> list[Any]:
    return [one for each in images for one in (each if isinstance(each, list) else [each])]
