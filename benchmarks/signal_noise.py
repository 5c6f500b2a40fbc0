"""Where a forward says most: signal, noise and curvature of each kind of parameter.

A zeroth-order step along z with covariance S, on a batch of B examples, lowers the loss at best by
``a^2 / (2 (a + c / B) h)``: a = g' S g of the mean gradient, c = tr(S C) of single examples' about
it, h = tr(S H) of the Hessian (here its Gauss-Newton part, which is all of it where the loss is
least). This measures the three by autograd, on a small pretrained OPT tuned until its loss is
``--loss``, with S the identity on some parameters and zero elsewhere; once with batches drawn at
random, once with both classes in proportion, which takes the difference between classes out of c.

    python benchmarks/signal_noise.py [--acceptance DIR] [--loss 0.6] [--examples 768]

The last line is JSON: ``{"merit": {KIND: {"shuffled": ..., "stratified": ...}}}``.
"""

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_data import data, model
from rich.console import Console
from rich.table import Table

from zo_offload.tasks import Encoded, batch_at, collate, option_forward, option_scores

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "acceptance"
BATCH = 16
KINDS = {
    "all": r".",
    "embeddings": r"embed",
    "vectors": r"bias|norm",
    "queries, keys, values": r"[qkv]_proj\.weight",
    "out_proj": r"out_proj\.weight",
    "up projections (fc1)": r"fc1\.weight",
    "down projections (fc2)": r"fc2\.weight",
    "down projections, last half": r"layers\.[23]\.fc2\.weight",
}


@dataclass
class Moments:
    """Sums over examples, of one tensor, elementwise.

    Attributes:
        by_class: Of gradients, of each class.
        squares: Of gradients squared.
        curvature: Of the Gauss-Newton matrix's diagonal.
    """

    by_class: list[torch.Tensor]
    squares: torch.Tensor
    curvature: torch.Tensor


def tuned(folder: Path, loss: float) -> Any:
    """The model, moved by plain gradient descent until its smoothed loss is so low."""
    net, rows, smooth = model(folder), data(folder), 2.0
    for step in range(5000):
        batch = collate([rows.train[i] for i in batch_at(7, step, 32, len(rows.train))])
        found = (
            -option_scores(batch, option_forward(net, batch))
            .gather(1, batch["targets"][:, None])
            .mean()
        )
        if (smooth := 0.95 * smooth + 0.05 * float(found)) < loss:
            return net
        net.zero_grad()
        found.backward()
        length = float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm())
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 1e-3 * min(1.0, 1.0 / length) * parameter.grad
    raise SystemExit(f"--loss: {loss} was not reached in 5,000 steps; it is {smooth:.3f}")


def measured(net: Any, examples: list[Encoded]) -> tuple[dict[str, Moments], list[int]]:
    """Moments by parameter name, and how many examples each class has."""
    named = dict(net.named_parameters())
    found = {
        name: Moments(
            [torch.zeros_like(p) for _ in range(2)], torch.zeros_like(p), torch.zeros_like(p)
        )
        for name, p in named.items()
    }
    counts = [0, 0]
    for example in examples:
        batch = collate([example])
        scores = option_scores(batch, option_forward(net, batch))[0]
        right = example.target
        share = float(scores[right].exp())
        slopes = torch.autograd.grad(scores[right] - scores[1 - right], list(named.values()))
        counts[right] += 1
        for moments, slope in zip(found.values(), slopes, strict=True):
            moments.by_class[right].add_(slope, alpha=share - 1)
            moments.squares.addcmul_(slope, slope, value=(share - 1) ** 2)
            moments.curvature.addcmul_(slope, slope, value=share * (1 - share))
    return found, counts


def merit(found: dict[str, Moments], counts: list[int], pattern: str) -> dict[str, float]:
    """a, c shuffled and stratified, h, and what they say of a step."""
    total = sum(counts)
    signal = noise = between = curvature = 0.0
    for name, moments in found.items():
        if not re.search(pattern, name):
            continue
        mean = torch.stack(moments.by_class).sum(0) / total
        spread = float((moments.squares / total - mean * mean).sum())
        means = [each / count for each, count in zip(moments.by_class, counts, strict=True)]
        signal += float(mean.square().sum()) - spread / total
        between += float(((means[0] - means[1]) / 2).square().sum()) - spread / total
        noise += spread
        curvature += float(moments.curvature.sum()) / total
    told = {"a": signal, "c": noise, "c within": noise - between, "h": curvature}
    for name, c in (("shuffled", noise), ("stratified", noise - between)):
        told[name] = max(signal, 0.0) ** 2 / ((signal + c / BATCH) * curvature)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    folder = Path(os.environ.get("ZO_ACCEPTANCE", DEFAULT_FOLDER))
    parser.add_argument("--acceptance", type=Path, default=folder)
    parser.add_argument("--loss", type=float, default=0.6)
    parser.add_argument("--examples", type=int, default=768)
    options = parser.parse_args()
    if not (options.acceptance / "opt-mini").is_dir():
        parser.error(f"{options.acceptance}: no opt-mini there; name the folder: --acceptance DIR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    net = tuned(options.acceptance, options.loss)
    found, counts = measured(net, data(options.acceptance).train[: options.examples])
    rows = {kind: merit(found, counts, pattern) for kind, pattern in KINDS.items()}
    table = Table("kind", *next(iter(rows.values())))
    for kind, row in rows.items():
        table.add_row(kind, *(f"{value:.3g}" for value in row.values()))
    Console(width=110).print(table)
    merits = {kind: {k: row[k] for k in ("shuffled", "stratified")} for kind, row in rows.items()}
    print(json.dumps({"merit": merits}))


if __name__ == "__main__":
    main()
