"""Where weights rest, and how they move: tiers, the device's arena, the pipeline between them."""
