"""Train an image classifier with forward passes only: python vision.py OUTPUT_DIR.

The images are made here: noise, with a square in the middle, red (class 0) or blue (class 1).
"""

import sys

import torch
from transformers import ViTConfig, ViTForImageClassification

import zo_offload


def make_images(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Pixels and labels, as a data set of examples."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.5 * torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % 2
    pixels[labels == 0, 0, 4:12, 4:12] += 1
    pixels[labels == 1, 2, 4:12, 4:12] += 1
    return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]


def accuracy(engine, images: list[dict[str, torch.Tensor]]) -> float:
    """The share of images whose class has the largest logit."""
    pixels = torch.stack([image["pixel_values"] for image in images])
    labels = torch.stack([image["labels"] for image in images])
    with torch.no_grad():
        found = engine(pixel_values=pixels.to(engine.device)).logits.argmax(dim=-1)
    return (found.cpu() == labels).float().mean().item()


if len(sys.argv) != 2:
    sys.exit(__doc__)
torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.05, id2label={0: "red", 1: "blue"},
    )
)  # fmt: skip
config = {
    "train_batch_size": 32,
    "optimizer": {"type": "ZO", "params": {"lr": 3e-3}},
    "zeroth_order": {"eps": 1e-3, "probes": 4, "offload_param": {"device": "cpu"}},
}
test = make_images(200, seed=1)
engine, _, loader, _ = zo_offload.initialize(
    model=model, config=config, training_data=make_images(320, seed=0)
)
print(f"accuracy before: {accuracy(engine, test):.3f}")
for epoch in range(6):
    for batch in loader:
        batch = {name: value.to(engine.device) for name, value in batch.items()}
        out = engine(**batch)
        engine.backward(out.loss)
        engine.step()
    print(f"epoch {epoch}: accuracy {accuracy(engine, test):.3f}")
engine.save_pretrained(sys.argv[1])
engine.destroy()
