"""Checkpoints whose weights are codes of another library's kernels: refused before one is read."""

from pathlib import Path
from typing import Any

from zo_offload.errors import ModelError

KEYS = ("quantization_config", "compression_config")  # the second one is older


def refuse_quantized(name: str | Path, config: Any) -> None:
    """Look at what a model's configuration says of its weights.

    Raises:
        ModelError: They are, with the wire that takes as many bytes.
    """
    for part in (config, config.get_text_config()):
        for key in KEYS:
            found = getattr(part, key, None)
            if found:
                options = found if isinstance(found, dict) else found.to_dict()
                method, wire = _quantization(options)
                raise ModelError(
                    f"{name}: its weights are quantized already ({method}), and can neither be "
                    "trained nor packed anew; load the original weights, and write "
                    f'"wire": "{wire}" to have them packed here'
                )


def _quantization(options: dict[str, Any]) -> tuple[str, str]:
    """The method's name, and the wire that is most like it."""
    loads = {bits for bits in (4, 8) if options.get(f"load_in_{bits}bit")}
    method = str(options.get("quant_method") or ("bitsandbytes" if loads else "unknown method"))
    method = method.rpartition(".")[2].lower()  # it may be a member of an enumeration
    if "fp8" in method:
        return method, "fp8_e4m3"
    if options.get("bnb_4bit_quant_type") == "nf4" and 8 not in loads:
        return method, "nf4"
    return method, "int8" if 8 in loads or options.get("bits") == 8 else "int4"
