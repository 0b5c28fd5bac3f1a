"""What a builder hands back: the engine's file, and what it learned about the layers on the way."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

QDQ_BITS, FLOAT_BITS = 8, 32


class LayerDamage(BaseModel):
    """One layer: 1 - mean cosine when it alone is rounded to the fewer bits, and the bits it got in the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    damage: float
    bits: int

    @property
    def is_float(self) -> bool:
        """Whether it was not rounded at all."""
        return self.bits > QDQ_BITS


class CurvePoint(BaseModel):
    """Mean cosine to the original, and the low end of its interval, with the worst `num_kept` layers not rounded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_kept: int
    cosine: float
    low: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """By node what rounding each layer does, nothing where that was not asked; and the cosine against layers kept."""

    damages: dict[str, LayerDamage]
    curve: tuple[CurvePoint, ...]


class InputRange(BaseModel):
    """The input of a linear layer on the calibration texts: its histogram, and the range it is quantised over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: str
    low: float
    high: float
    limit: float  # the bins of `counts` are equal and go from -limit to limit
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """The name of the engine's main file, and the account of its layers where the builder made one."""

    file: str
    damages: tuple[LayerDamage, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    ranges: tuple[InputRange, ...] = ()
