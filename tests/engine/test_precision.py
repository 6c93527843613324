"""Number formats, and the attention that goes with them."""

from __future__ import annotations

import copy

import pytest
import torch

from mae_et.engine.precision import Precision, choose_attention, fast_bf16
from mae_et.models.mae import MaskedAutoencoder
from mae_et.models.masking import mask_noise

CPU = torch.device("cpu")


def test_auto_is_bf16_where_the_processor_has_it():
    expected = "bf16" if fast_bf16(CPU) else "fp32"
    assert Precision.choose("auto", CPU).name == expected
    assert Precision.choose("fp16", CPU).name == "fp16"


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_products_are_computed_in_the_chosen_type(name, dtype):
    precision = Precision.choose(name, CPU)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert (precision.scaler() is not None) == (name == "fp16")


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_the_choice_of_attention_changes_rounding_only(name):
    torch.manual_seed(0)
    fused = MaskedAutoencoder(
        (32, 32), 8, width=48, depth=2, heads=3, decoder_width=32, decoder_depth=1, decoder_heads=2
    )
    chosen, precision = copy.deepcopy(fused), Precision.choose(name, CPU)
    choose_attention(chosen, precision)
    flags = {module.fused_attn for module in chosen.modules() if hasattr(module, "fused_attn")}
    assert flags == {name == "fp32"}
    images, noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), mask_noise(torch.arange(4), 16)
    with precision.autocast():
        losses = [model(images, noise, 4).loss.item() for model in (fused, chosen)]
    # bf16 keeps 8 bits of a product: 0.4 % each, averaged over hundreds of outputs.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if name == "fp32" else 5e-3)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_a_few_steps_lower_the_loss_in_every_type(name):
    from mae_et.engine.optim import adam_settings, build_optimizer, decay_groups, set_learning_rate
    from mae_et.engine.state import TrainState
    from mae_et.engine.step import apply_update

    torch.manual_seed(0)
    model = MaskedAutoencoder(
        (16, 16), 4, width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2
    )
    precision = Precision.choose(name, CPU)
    optimizer = build_optimizer(decay_groups(model, 0.05), adam_settings(0.05, (0.9, 0.95)))
    scaler = precision.scaler()
    state = TrainState(model, model, optimizer, precision, CPU, scaler)
    images, noise = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), mask_noise(torch.arange(8), 16)
    losses = []
    for _ in range(30):
        set_learning_rate(optimizer, 3e-3)
        with precision.autocast():
            loss = model(images, noise, 4).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        apply_update(state, norm)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
