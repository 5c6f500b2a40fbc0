"""Adapted models, recognised without importing ``peft``."""

import sys


def is_peft_model(model: object) -> bool:
    """Whether it is one, which is not so where nobody has imported ``peft``."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)
