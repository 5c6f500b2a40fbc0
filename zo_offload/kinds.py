"""Kinds of model, by what their head says: the next token, a masked one, or the class of an image.

Everything that differs between them hangs on one of these words: what they are loaded as, which
tasks have a prompt for them, how an example goes through.
"""

from typing import Literal

Kind = Literal["causal", "masked", "image"]
CALLED: dict[Kind, str] = {
    "causal": "causal LM",
    "masked": "masked LM",
    "image": "image classifier",
}
LOADED_BY: dict[Kind, str] = {  # classes of transformers
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "image": "AutoModelForImageClassification",
}
HEADS: dict[Kind, tuple[str, ...]] = {  # ends of names of architectures
    "masked": ("ForMaskedLM",),
    "image": ("ForImageClassification",),
    "causal": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
}


def kind_of_architecture(name: str) -> Kind | None:
    """What a class of transformers is.

    >>> kind_of_architecture("RobertaForMaskedLM"), kind_of_architecture("RobertaModel")
    ('masked', None)
    """
    return next((kind for kind, ends in HEADS.items() if name.endswith(ends)), None)
