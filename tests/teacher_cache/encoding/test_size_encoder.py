"""Promises of size_encoder.py: what the whole encoder finds, from the sizes of the images alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.encoding.sample_encoder import SampleEncoder
from teacher_cache.encoding.size_encoder import SizeEncoder
from teacher_cache.models.checkpoint import load_config
from teacher_cache.models.processors import load_processor
from teacher_cache.schema.errors import SampleError
from teacher_cache.schema.samples import IMAGE_PLACEHOLDER, Message, Sample, make_sample
from tests.conftest import TinyFolder
from tests.support.tiny import LISTED, tiny_image, tiny_samples

SIZES = [(24, 16), (16, 40), (64, 8), (9, 90), (33, 33), (200, 100)]


def encoder_of(folder: Path) -> SampleEncoder:
    return SampleEncoder(load_processor(str(folder)), load_config(str(folder)))


def shown(*sizes: tuple[int, int]) -> Sample:
    """A question about images of these sizes."""
    text = "look" + "".join(f" {IMAGE_PLACEHOLDER} and" for _ in sizes)
    messages = [Message(role="user", text=text), Message(role="assistant", text="two.")]
    images = [tiny_image(number, *size) for number, size in enumerate(sizes)]
    return make_sample(f"shown-{sizes}", images, messages)


def found_by(encoder: SampleEncoder, sample: Sample, prompt: bool = False) -> dict[str, Any]:
    """All that an encoding is, pixels aside; or why there is none."""
    try:
        encoded = (encoder.encode_prompt if prompt else encoder.encode)(sample)
    except Exception as error:
        return {"error": f"{type(error).__name__} {error}"}
    inputs = {
        name: values.shape if name.startswith("pixel_") else values.tolist()
        for name, values in encoded.inputs.items()
    }
    dtypes = {name: values.dtype for name, values in encoded.inputs.items()}
    spans = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name in encoded.spans.__slots__
        for value in [getattr(encoded.spans, name)]
    }
    return {"inputs": inputs, "dtypes": dtypes, "spans": spans, "id": encoded.source_id}


@pytest.mark.parametrize("family", sorted(LISTED))
def test_every_family_is_encoded_alike_without_its_pixels(
    family: str, tiny_folder: TinyFolder
) -> None:
    encoder = encoder_of(tiny_folder(family))
    fast = SizeEncoder(encoder)
    samples = [*tiny_samples(5), *(shown(size) for size in SIZES), shown(*SIZES[:3])]
    outcomes = set[bool]()
    for sample in [*samples, *samples]:  # the second time, all sizes are known
        for prompt in (False, True):
            wanted = found_by(encoder, sample, prompt)
            assert found_by(fast, sample, prompt) == wanted
            outcomes.add("error" in wanted)
    assert False in outcomes
    assert encoder.processor is not fast.processor
    assert type(encoder.processor.image_processor).__name__ != "_OncePerSize"


def test_each_tuple_of_sizes_is_processed_once_and_no_image_is_decoded(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(llava)
    real, processed = encoder.processor.image_processor, list[object]()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def __call__(self, images: Any, **settings: Any) -> Any:
            processed.append(images)
            return real(images, **settings)

    encoder.processor.image_processor = Counting()
    samples = [shown(size) for size in SIZES for _ in range(2)] + [shown(*SIZES[:2])]
    fast = SizeEncoder(encoder)
    with monkeypatch.context() as patch:
        patch.setattr("PIL.PngImagePlugin.PngImageFile.load", None)
        for sample in samples:
            pixels = fast.encode(sample).inputs["pixel_values"]
            assert pixels.untyped_storage().nbytes() == pixels.element_size()
    assert len(processed) == len(SIZES) + 1
    encoder.encode(samples[0])
    assert len(processed) == len(SIZES) + 2


def test_damage_behind_the_header_of_an_image_is_left_to_the_whole_encoder(llava: Path) -> None:
    encoder, whole = encoder_of(llava), tiny_image(1, 200, 200)
    messages = shown((200, 200)).messages
    damaged = make_sample("damaged", [whole[: len(whole) // 2]], messages)
    SizeEncoder(encoder).encode(damaged)
    with pytest.raises(SampleError, match=r"'damaged': image 0 .* cannot be decoded"):
        encoder.encode(damaged)
