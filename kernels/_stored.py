"""What every container of a packed weight tells about itself, and how it is taken apart and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from torch import Tensor


class Stored:
    """Mixin of frozen dataclasses with d_out and d_in that hold a weight in tensors and a few settings."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are stored, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def settings(self) -> dict[str, Any]:
        """All fields that are no tensor, as JSON can hold them: numbers, texts, lists and None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if not isinstance(value, Tensor)}

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Self:
        """The container with these `tensors` and `settings`.

        Raises: ValueError, KeyError or TypeError if they do not fit.
        """
        lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        return cls(**{**settings, **lists, **tensors})

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors, padding included."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """8 * stored_bytes / (d_out * d_in)."""
        return 8 * self.stored_bytes / (self.d_out * self.d_in)
