"""Training of adapters on the tiny Flux."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.nodes.helpers import encode, run, sample

SETTINGS = {
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "steps": 8,
    "learning_rate": 0.01,
    "rank": 4,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 1,
    "training_dtype": "fp32",
    "lora_dtype": "fp32",
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "existing_lora": "[None]",
}


def pictures(count=1):
    return {"samples": torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(7))}


def fixed_loss(model, latent, positive):
    """The loss at one level with one noise, of a model as sampling would use it."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    with torch.no_grad():
        data = comfy.lora_training._Data(model, latent["samples"], positive, 0)
        return sum(
            data.loss(0, torch.Generator().manual_seed(seed), torch.nn.functional.mse_loss).item() for seed in range(6)
        )


def train(all_nodes, tiny, count=1, **changes):
    """As in a prompt: in inference mode."""
    with torch.inference_mode():
        positive = encode(all_nodes, tiny[1], "a tree")
        return run(
            all_nodes,
            "TrainLoraNode",
            model=tiny[0],
            latents=pictures(count),
            positive=positive,
            **{**SETTINGS, **changes},
        )


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "OFT"])
def test_training_lowers_the_loss(all_nodes, tiny, algorithm):
    positive = encode(all_nodes, tiny[1], "a tree")
    before = fixed_loss(tiny[0], pictures(), positive)
    plain = sample(all_nodes, tiny[0], tiny[1])
    trained, lora, losses, steps = train(all_nodes, tiny, algorithm=algorithm, steps=12)
    assert steps == 12 and len(losses["loss"]) == 12
    assert fixed_loss(trained, pictures(), positive) < 0.9 * before
    changed = sample(all_nodes, trained, tiny[1])
    assert (changed - plain).abs().max() > 1e-2
    torch.testing.assert_close(sample(all_nodes, tiny[0], tiny[1]), plain)  # the model itself stays as it is
    loaded = run(all_nodes, "LoraModelLoader", model=tiny[0], lora=lora, strength_model=1.0)[0]
    torch.testing.assert_close(sample(all_nodes, loaded, tiny[1]), changed)


def test_checkpointing_and_accumulation_change_nothing(all_nodes, tiny):
    plain = train(all_nodes, tiny, count=2, steps=2, batch_size=2, optimizer="SGD")
    saving = train(all_nodes, tiny, count=2, steps=2, batch_size=2, optimizer="SGD", gradient_checkpointing=True)
    assert plain[2] == saving[2]
    for key, value in plain[1].items():
        torch.testing.assert_close(saving[1][key], value)
    several = train(all_nodes, tiny, steps=2, grad_accumulation_steps=3)
    assert len(several[2]["loss"]) == 6 and several[3] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "Adam", "loss_function": "L1"},
        {"optimizer": "RMSprop", "loss_function": "Huber"},
        {"optimizer": "SGD", "loss_function": "SmoothL1"},
        {"training_dtype": "bf16", "lora_dtype": "bf16"},
        {"training_dtype": "bf16", "algorithm": "OFT"},
        {"lora_dtype": "bf16", "algorithm": "LoKr"},
    ],
)
def test_every_choice_trains(all_nodes, tiny, changes):
    _, lora, losses, _ = train(all_nodes, tiny, steps=2, gradient_checkpointing=True, **changes)
    assert len(losses["loss"]) == 2
    kept = torch.bfloat16 if changes.get("lora_dtype") == "bf16" else torch.float32
    assert {value.dtype for key, value in lora.items() if not key.endswith("alpha")} == {kept}


def test_an_adapter_is_saved_and_gone_on_with(all_nodes, tiny, tiny_folder):
    _, lora, _, steps = train(all_nodes, tiny)
    run(all_nodes, "SaveLoRANode", lora=lora, prefix="loras/mine", steps=steps)
    file = next((tiny_folder / "output" / "loras").glob("mine_8_steps_*.safetensors"))
    again = tiny_folder / "models" / "loras" / file.name
    save_file(load_file(file), again)
    _, more, _, total = train(all_nodes, tiny, existing_lora=file.name, steps=1, learning_rate=1e-7)
    assert total == 9 and more.keys() == lora.keys()
    for key, value in lora.items():
        torch.testing.assert_close(more[key], value, rtol=0, atol=1e-6)
    # one with another trainer's names, for some of the weights
    _, more, _, total = train(all_nodes, tiny, existing_lora="tiny_flux_kohya.safetensors", steps=1, learning_rate=1e-7)
    before = load_file(tiny_folder / "models" / "loras" / "tiny_flux_kohya.safetensors")
    assert total == 1
    torch.testing.assert_close(
        more["diffusion_model.double_blocks.0.img_attn.qkv.lora_up.weight"],
        before["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"],
        rtol=0,
        atol=1e-6,
    )


def test_what_cannot_be_trained_is_named(all_nodes, tiny, tiny_folder):
    positive = encode(all_nodes, tiny[1], "a tree") * 2
    with pytest.raises(ValueError, match="2 conditionings for 3 pictures"):
        run(all_nodes, "TrainLoraNode", model=tiny[0], latents=pictures(3), positive=positive, **SETTINGS)
    with pytest.raises(ValueError, match="the loss is .* at step .*smaller learning_rate"):
        train(all_nodes, tiny, optimizer="SGD", learning_rate=1e30, steps=3)
    save_file({"other.lora_up.weight": torch.zeros(1, 1)}, tiny_folder / "models" / "loras" / "foreign.safetensors")
    with pytest.raises(ValueError, match="existing_lora has nothing for this model"):
        train(all_nodes, tiny, existing_lora="foreign.safetensors")


def test_the_seed_decides(all_nodes, tiny):
    first, same, other = (train(all_nodes, tiny, steps=1, seed=seed)[2] for seed in (5, 5, 6))
    assert first == same != other
