"""The quick start's own model and task, made on the spot without a network.

`grammar` writes the text and the task, `pretrain` makes the model. Importing this is quick: the
libraries that build a model are imported when one is built.
"""

from zo_offload.embedded.grammar import LABELS, TEMPLATE

__all__ = ["LABELS", "TEMPLATE"]
