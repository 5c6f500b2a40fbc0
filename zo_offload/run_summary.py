"""What is said of a run that has ended."""

from typing import TYPE_CHECKING

from zo_offload.wording import as_bytes, as_loss

if TYPE_CHECKING:
    from zo_offload.run import Summary


def summary_lines(summary: "Summary", directory: str) -> list[str]:
    """What a run found, and where its files lie."""
    noise, sent = summary.noise_over_signal, summary.rank_bytes_per_step
    equal = summary.equal_share
    rows = {
        summary.metric: f"{summary.accuracy_before:.4f} -> {summary.accuracy_after:.4f}",
        "dev loss": f"{as_loss(summary.loss_before)} -> {as_loss(summary.loss_after)}"
        + verdict(summary.loss_before, summary.loss_after),
        "model": f"{summary.model_parameters:,} parameters, {as_bytes(summary.model_bytes)}",
        "weights on the device": f"{as_bytes(summary.peak_device_bytes)} at the peak",
        "weights on the host": as_bytes(summary.host_bytes),
        "sent between ranks": "not measured" if sent is None else f"{sent} bytes a step",
        "noise over signal": "not measured" if noise is None else f"{noise:.2g}",
        "equal losses": "not counted" if equal is None else f"{100 * equal:.3g} % of the probes",
        "journal": summary.journal,
    }
    if summary.first_order:
        head = {name: rows[name] for name in (summary.metric, "dev loss", "model")}
        held = f"{as_bytes(summary.peak_device_bytes)} with gradients and moments"
        rows = head | {"weights in memory": held}
    rows |= {
        "model directory": f"{directory.rstrip('/')}/model",
        "metrics": f"{directory.rstrip('/')}/metrics.csv",
        "curve": f"{directory.rstrip('/')}/curve.png",
    }
    if summary.skipped_steps:
        rows["skipped steps"] = f"{summary.skipped_steps}: their losses were not finite or too high"
    if summary.rollbacks:
        rows["roll backs"] = f"{summary.rollbacks}: a smaller learning rate is worth a try"
    if summary.eps_warning is not None:
        rows["eps"] = summary.eps_warning
    return [f"  {name:<23}{value}" for name, value in rows.items()]


def verdict(before: float | None, after: float | None) -> str:
    """What is said of a loss on the dev set that training did not lower.

    Example:
        >>> verdict(0.8328, 0.83279), verdict(0.83, 1.07), verdict(0.83, 0.71)
        (': unchanged; try a larger rate', ': worse; try a smaller rate', '')
    """
    if before is None or after is None:
        return ""
    if abs(after - before) < 1e-4 * abs(before):
        return ": unchanged; try a larger rate"
    return ": worse; try a smaller rate" if not after < before else ""
