"""Classification by label words: data files, prompts, tokens, loss, order of examples, accuracy.

examples = read_examples("train.tsv")
prompt = Prompt("{sentence} It was", " terrible, great")
encoded = encode(examples, prompt, tokenizer, max_length=model.config.max_position_embeddings)
batch = collate([encoded[index] for index in batch_at(seed, step, batch_size, len(encoded))])
losses = option_loss(model, batch, option_forward(model, batch))
"""

from zo_offload.tasks.encode import Batch, Encoded, collate, encode
from zo_offload.tasks.evaluate import Evaluation, evaluate, evaluation_batches, score, summarize
from zo_offload.tasks.objective import (
    model_inputs,
    option_forward,
    option_loss,
    option_scores,
    predict,
)
from zo_offload.tasks.prompt import Prompt
from zo_offload.tasks.reader import Example, read_examples, split_file
from zo_offload.tasks.sampler import batch_at, epoch_order

__all__ = [
    "Batch",
    "Encoded",
    "Evaluation",
    "Example",
    "Prompt",
    "batch_at",
    "collate",
    "encode",
    "epoch_order",
    "evaluate",
    "evaluation_batches",
    "model_inputs",
    "option_forward",
    "option_loss",
    "option_scores",
    "predict",
    "read_examples",
    "score",
    "split_file",
    "summarize",
]
