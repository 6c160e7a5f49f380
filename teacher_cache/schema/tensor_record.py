"""Defines what dataclasses of tensors share: names, a content digest, a move to another device."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from teacher_cache.schema.fingerprint import digest_tensors

_T = TypeVar("_T")


class TensorRecord:
    """Base of dataclasses of tensors and of other such records; a field is None where absent."""

    __slots__ = ()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        known: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}  # pyright: ignore[reportArgumentType]
        return {name: value for name, value in known.items() if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls: type[_T], tensors: Mapping[str, Tensor]) -> _T:
        """The inverse of `tensors`; KeyError where a tensor that every record has is missing."""
        names = [each.name for each in fields(cls) if each.default is not None]  # pyright: ignore[reportArgumentType]
        return cls(**({name: tensors[name] for name in names} | dict(tensors)))

    @property
    def digest(self) -> str:
        """Content digest of the tensors."""
        return digest_tensors(self.tensors().items())

    def to(self: _T, device: torch.device | str) -> _T:
        """The same record with all its tensors on a device."""
        whole: Any = self
        found = {each.name: getattr(self, each.name) for each in fields(whole)}
        there = {n: v.to(device) for n, v in found.items() if isinstance(v, Tensor | TensorRecord)}
        return replace(whole, **there)
