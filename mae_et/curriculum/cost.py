"""What one image costs at a bandwidth: the currency in which a curriculum's budget is spent.

A cost model is any callable `(Geometry) -> float`. Only ratios matter to the plan, so the unit is the model's own:
multiply-adds of a forward pass, pixels, or seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mae_et.curriculum.stage import as_size, format_size
from mae_et.sizes import predicted_patches

TRAINING_FLOPS_PER_MULTIPLY_ADD = 6
"""One forward and a backward of twice its cost, 2 FLOPs a multiply-add."""


@dataclass(frozen=True)
class Geometry:
    """What a cost model may look at: bandwidth in px (height, width), and how its patches are used."""

    bandwidth: tuple[int, int]
    tokens: int
    visible: int

    @property
    def masked(self) -> int:
        """Patches hidden from the encoder."""
        return self.tokens - self.visible


CostModel = Callable[[Geometry], float]


class AreaCost:
    """Pixels of the input, B^2: what the scripts of the EfficientTrain papers account with."""

    unit = "pixels"

    def __call__(self, geometry: Geometry) -> float:
        height, width = geometry.bandwidth
        return float(height * width)


@dataclass(frozen=True)
class MeasuredCost:
    """Seconds per image measured on a machine, by bandwidth.

    Attributes:
        seconds: {B: seconds per image}; B as one number (square) or (height, width).
    """

    seconds: Mapping[int | tuple[int, int], float]
    unit = "seconds"

    def __call__(self, geometry: Geometry) -> float:
        """Seconds per image.

        Raises:
            ValueError: there is no measurement for the bandwidth.
        """
        by_size = {as_size(size): seconds for size, seconds in self.seconds.items()}
        if geometry.bandwidth not in by_size:
            known = ", ".join(format_size(size) for size in by_size)
            raise ValueError(
                f"no measured cost for B={format_size(geometry.bandwidth)} px; the calibration holds {known}"
            )
        return by_size[geometry.bandwidth]


@dataclass(frozen=True)
class TransformerShape:
    """Size of a stack of transformer blocks, in plain numbers."""

    width: int
    depth: int
    mlp_ratio: float = 4.0

    def multiply_adds(self, tokens: int) -> int:
        """Multiply-adds of the blocks on one sequence: projections and MLP linear in it, attention quadratic."""
        linear = 4 * self.width**2 + 2 * self.width * int(self.width * self.mlp_ratio)
        attention = 2 * tokens * self.width
        return self.depth * tokens * (linear + attention)


@dataclass(frozen=True)
class CrossDecoderShape:
    """Size of a stack of cross-attention blocks, in plain numbers.

    Attributes:
        width, depth, mlp_ratio: of the blocks.
        inter_block: whether each block mixes the encoder's levels: its input and what each of its blocks gives.
    """

    width: int
    depth: int
    mlp_ratio: float = 4.0
    inter_block: bool = True

    def multiply_adds(self, queries: int, keys: int, encoder: TransformerShape) -> int:
        """Multiply-adds of the blocks for tokens that query, and those of the encoder that they attend to."""
        linear = 2 * self.width**2 + 2 * self.width * int(self.width * self.mlp_ratio)
        source = 2 * encoder.width * self.width + self.inter_block * (1 + encoder.depth) * encoder.width
        attention = 2 * queries * keys * self.width
        return self.depth * (queries * linear + keys * source + attention)


@dataclass(frozen=True)
class MAECost:
    """Multiply-adds of a masked autoencoder's forward pass on one image.

    Counted: patch embedding and encoder blocks on visible patches and the class token; MAE's decoder on all patches
    and the class token, or a cross-attention decoder on predicted patches, with keys and values of encoded ones;
    prediction head on predicted patches. Left out, as below 1 %: LayerNorm, biases, softmax, GELU and the making of
    the target.

    Attributes:
        encoder: encoder blocks.
        decoder: decoder blocks.
        patch_values: values in an input patch, C * p^2.
        target_values: values predicted per patch.
        prediction_ratio: share of all patches that is predicted; None predicts all that are masked.
    """

    encoder: TransformerShape
    decoder: TransformerShape | CrossDecoderShape
    patch_values: int
    target_values: int
    prediction_ratio: float | None = None
    unit = "multiply-adds"

    def __call__(self, geometry: Geometry) -> float:
        encoded = geometry.visible + 1
        predicted = predicted_patches(geometry.tokens, geometry.visible, self.prediction_ratio)
        if isinstance(self.decoder, CrossDecoderShape):
            decoder = self.decoder.multiply_adds(predicted, encoded, self.encoder)
        else:
            embedding = encoded * self.encoder.width * self.decoder.width
            decoder = embedding + self.decoder.multiply_adds(geometry.tokens + 1)
        return float(
            geometry.visible * self.patch_values * self.encoder.width
            + self.encoder.multiply_adds(encoded)
            + decoder
            + predicted * self.decoder.width * self.target_values
        )


@dataclass(frozen=True)
class CountedCost:
    """Multiply-adds of a network's forward pass, counted at each bandwidth.

    Attributes:
        counts: {(height, width) in px: multiply-adds of one image}.
    """

    counts: Mapping[tuple[int, int], float]
    unit = "multiply-adds"

    def __call__(self, geometry: Geometry) -> float:
        """Multiply-adds of one image.

        Raises:
            ValueError: they were not counted at this bandwidth.
        """
        if geometry.bandwidth not in self.counts:
            raise ValueError(f"multiply-adds were not counted at B={format_size(geometry.bandwidth)} px")
        return self.counts[geometry.bandwidth]
