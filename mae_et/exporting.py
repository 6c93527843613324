"""A checkpoint, opened and written for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from mae_et.config import ClassifierConfig, LabelledDataConfig
from mae_et.config.kept import names_of, read_kept
from mae_et.exchange.backbone import Backbone, choose_backbone
from mae_et.exchange.export import Exported, ExportError, ExportFacts, ExportForm, export
from mae_et.exchange.matching import load_weights
from mae_et.exchange.weights import Weights, WeightsError, open_weights
from mae_et.models.vit import Pooling
from mae_et.supervised import CLASSES_FILE

DENSE = ("detect", "segment")  # runs whose network has no head of its own
CROP_FRACTION = 0.875  # MAE's 224 of 256 px


def export_checkpoint(
    checkpoint: str,
    form: ExportForm,
    folder: str | None = None,
    pooling: Pooling | None = None,
    heads: int | None = None,
    say: Callable[[str], None] = print,
) -> Exported:
    """Write the network of a checkpoint, its head included where it has one, and compare what was written with it.

    Args:
        checkpoint: whatever `open_weights` takes.
        form: "timm", "hf" or "onnx".
        folder: where to; None is `exports/<name>-<form>`.
        pooling: of a ViT without a head; None takes the class token, or the mean where there is none.
        heads: attention heads, where no tensor tells them.
        say: where announcements go.

    Raises:
        WeightsError, ConfigError: the checkpoint cannot be opened.
        ExportError: the form cannot hold the network (none holds locality), or what was written differs from it.
    """
    weights = open_weights(checkpoint, heads)
    backbone = choose_backbone(ClassifierConfig(arguments=weights.arguments), LabelledDataConfig(), weights)
    if backbone.has_locality:
        raise ExportError(
            f"{checkpoint} has a convolution in its feed-forward layers (model.locality), which no ViT of timm or of "
            "transformers has and no reader of ONNX files here expects; its checkpoints are opened by mae_et itself"
        )
    classes = class_names(weights)
    chosen = settle_pooling(weights, backbone, pooling)
    net = backbone.build(len(classes), chosen or "mean")
    say(load_weights(net, weights, fresh=(), norm_to_fc_norm=True).text())
    facts = ExportFacts(
        shape=backbone.shape,
        pooling=chosen,
        classes=classes,
        mean=backbone.mean,
        std=backbone.std,
        crop_fraction=crop_fraction(weights),
        source=asdict(weights.origin),
        model=backbone.model,
        arguments=dict(backbone.arguments),
        size=backbone.size,
    )
    target = folder or f"exports/{Path(checkpoint).name}-{form}"
    exported = export(net.eval(), facts, form, Path(target))
    say(f"{exported.folder}: {', '.join(str(file) for file in exported.files)}")
    say(f"opened again: features differ by at most {exported.difference:.1e}")
    return exported


def class_names(weights: Weights) -> tuple[str, ...]:
    """Names of a head's classes, () without a head: those that the run kept, else numbers."""
    if (weights.origin.config or {}).get("task") in DENSE:
        return ()  # they are of its head for boxes or pixels, which stays behind
    if weights.origin.kind == "run":
        kept = Path(weights.origin.path).parent.parent / CLASSES_FILE
        if kept.exists():
            return read_kept(kept, names_of)
    head = weights.tensors.get("head.weight") if weights.shape is not None else None
    return () if head is None else tuple(str(number) for number in range(len(head)))


def crop_fraction(weights: Weights) -> float:
    """Share of the resized image that the centre crop keeps in the run's own evaluation.

    Raises:
        WeightsError: the run's configuration has no such share there.
    """
    evaluation = (weights.origin.config or {}).get("evaluation")
    share = evaluation.get("crop_fraction") if isinstance(evaluation, dict) else None
    if share is None:
        return CROP_FRACTION
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise WeightsError(
            f"{weights.origin.path}: the config.yaml of its run is damaged (evaluation.crop_fraction is {share!r})"
        )
    return float(share)


def settle_pooling(weights: Weights, backbone: Backbone, wanted: Pooling | None) -> Pooling | None:
    """How a ViT's tokens are pooled: as its tensors say, else as wanted, else by the class token; None for others.

    Raises:
        WeightsError: the tensors say otherwise than wanted.
    """
    if backbone.shape is None:
        return None
    trained = "mean" if "fc_norm.weight" in weights.tensors else None
    if trained and wanted and wanted != trained:
        raise WeightsError(f"{weights.origin.path} was trained with mean pooling; it cannot be exported with {wanted}")
    return trained or wanted or ("cls" if backbone.shape.class_token else "mean")
