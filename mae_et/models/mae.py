"""The masked autoencoder: encode visible patches, predict the target of masked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mae_et.models.cross_decoder import CrossDecoder
from mae_et.models.decoder import Decoder
from mae_et.models.encoder import Encoder
from mae_et.models.masking import gather_tokens, split_by_noise
from mae_et.models.normalised import pixel_statistics
from mae_et.models.posembed import PositionKind, sincos_positions
from mae_et.models.targets import make_targets
from mae_et.sizes import DecoderKind, TargetKind, predicted_patches, target_values


class MAEOutput(NamedTuple):
    """Result of one forward pass.

    Attributes:
        loss: float32 scalar, mean squared error over predicted patches and their values.
        prediction, target: float32 [N, P, values], in the order of `predicted_ids`.
        visible_ids, masked_ids: int64 [N, V] and [N, M].
        predicted_ids: int64 [N, P], the first of `masked_ids`; all of them unless the model has a prediction ratio.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    visible_ids: Tensor
    masked_ids: Tensor
    predicted_ids: Tensor


class MaskedAutoencoder(nn.Module):
    """MAE (arXiv 2111.06377) with a choice of target, for any image size that the patch divides.

    Args:
        size: final (height, width) in px.
        patch_size: px.
        channels: of the images.
        width, depth, heads, mlp_ratio: of the encoder; the defaults are ViT-B.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        target: "hog" (MaskFeat's, without blocks), "pixel" or "norm_pixel".
        cell: HOG cell in px; None takes half a patch (2 px for 2-px patches).
        bins: HOG orientations.
        positions: kind of positions at grids other than the final one.
        mean, std: per channel, for pixels in [0, 1]; None takes ImageNet's for 3 channels, else 0.5 and 0.25.
        decoder: "mae" is `Decoder`, "crossmae" is `CrossDecoder`.
        prediction_ratio: share of all patches that training predicts (see `predicted_patches`); None predicts all
            that are masked.
        inter_block: of `CrossDecoder`.

    Raises:
        ValueError: unknown target or positions, a size that the patch or a patch that the cell does not divide, a
            mean or std that is not one number per channel, or a prediction ratio for MAE's decoder, whose masked
            patches attend to each other: to leave some out in training would change what the others are given.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        channels: int = 3,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        target: TargetKind = "hog",
        cell: int | None = None,
        bins: int = 9,
        positions: PositionKind = "from_final",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        decoder: DecoderKind = "mae",
        prediction_ratio: float | None = None,
        inter_block: bool = True,
    ):
        super().__init__()
        if prediction_ratio is not None and decoder == "mae":
            raise ValueError(f"prediction_ratio={prediction_ratio} needs the decoder crossmae, and this one is mae")
        self.prediction_ratio = prediction_ratio
        self.patch_size, self.channels, self.bins = patch_size, channels, bins
        self.target: TargetKind = target
        self.cell = cell
        if any(side % patch_size for side in size):
            raise ValueError(f"the patch of {patch_size} px does not divide the final size {size} px")
        outputs = target_values(target, patch_size, channels, cell, bins)
        self.encoder = Encoder(size, patch_size, channels, width, depth, heads, mlp_ratio, positions)
        shape = (outputs, decoder_width, decoder_depth, decoder_heads, mlp_ratio)
        self.decoder = Decoder(width, *shape) if decoder == "mae" else CrossDecoder(width, depth, *shape, inter_block)
        self._make_targets = make_targets
        self._decoder_positions: dict[tuple[int, int], Tensor] = {}
        mean, std = pixel_statistics(channels, mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """MAE's initialisation, from torch's global generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        projection = self.encoder.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.encoder.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)
        if isinstance(self.decoder, CrossDecoder):
            self.decoder.reset_level_weights()

    def normalise(self, images: Tensor) -> Tensor:
        """uint8, or float in [0, 1], [N, C, H, W] to the float32 input of the encoder.

        Raises:
            ValueError: another number of channels than the model's (one channel would broadcast unseen).
        """
        if images.shape[1] != self.channels:
            raise ValueError(
                f"images of {images.shape[1]} channels for a model of {self.channels}: convert them, "
                f"or build the model with channels={images.shape[1]}"
            )
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return (pixels - self.mean) / self.std

    def targets(self, images: Tensor) -> Tensor:
        """Targets of all patches, float32 [N, L, values], of uint8 or [0, 1] images [N, C, H, W]."""
        return self._make_targets(self.target, images, self.normalise(images), self.patch_size, self.cell, self.bins)

    def compile_targets(self) -> None:
        """Let torch compile the making of targets, one graph for all sizes.

        For GPUs, where HOG's 66 kernels each read and write the whole batch; a CPU takes longer for it.
        """
        self._make_targets = torch.compile(make_targets, dynamic=True, fullgraph=True)

    def decoder_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings [1, 1 + L, D] of the decoder for a grid, on the model's device."""
        known = self._decoder_positions.get(grid)
        if known is None or known.device != self.mean.device:
            encoder = self.encoder
            table = sincos_positions(grid, self.decoder.width, encoder.final_grid, encoder.positions)
            known = self._decoder_positions[grid] = table[None].to(self.mean.device)
        return known

    def forward(self, images: Tensor, noise: Tensor, visible: int, predict_all: bool = False) -> MAEOutput:
        """Loss and predictions of one batch.

        Visible patches have the lowest noise, those that a prediction ratio chooses the lowest of the rest: both are
        a function of the sample's own noise.

        Args:
            images: uint8, or float in [0, 1], [N, C, H, W]; the patch divides H and W.
            noise: [N, L], as of `mask_noise`; the patches with the lowest values stay visible.
            visible: how many do.
            predict_all: predict every masked patch, whatever the prediction ratio.

        Raises:
            ValueError: the noise does not match the patch grid, no patch is visible or none masked, or images do not
                fit the model.
        """
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        if noise.shape != (len(images), grid[0] * grid[1]):
            raise ValueError(f"noise of shape {tuple(noise.shape)} for {len(images)} images of {grid} patches")
        if not 0 < visible < noise.shape[1]:
            raise ValueError(
                f"{visible} of {noise.shape[1]} patches visible: at least one must be visible and one masked, "
                "so choose another mask ratio"
            )
        visible_ids, masked_ids = split_by_noise(noise, visible)
        ratio = None if predict_all else self.prediction_ratio
        predicted_ids = masked_ids[:, : predicted_patches(noise.shape[1], visible, ratio)]
        prediction = self.predict(self.normalise(images), visible_ids, predicted_ids, grid).float()
        target = gather_tokens(self.targets(images), predicted_ids)
        # Every sample has as many predicted patches, so the plain mean is MAE's sum(mask * loss) / sum(mask).
        loss = (prediction - target).square().mean()
        return MAEOutput(loss, prediction, target, visible_ids, masked_ids, predicted_ids)

    def predict(self, images: Tensor, visible_ids: Tensor, predicted_ids: Tensor, grid: tuple[int, int]) -> Tensor:
        """Predictions [N, P, values] of chosen patches of normalised images, in the number format of autocast."""
        positions = self.decoder_positions(grid)
        if isinstance(self.decoder, CrossDecoder):
            levels: list[Tensor] = []
            self.encoder(images, visible_ids, levels)
            return self.decoder(levels, positions, predicted_ids)
        return self.decoder(self.encoder(images, visible_ids), positions, visible_ids, predicted_ids)
