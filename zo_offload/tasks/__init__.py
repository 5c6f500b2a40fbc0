"""Tasks for language models: data files, prompts, tokens, losses, order of examples, metrics.

By label words:

    examples = read_examples("train.tsv")
    prompt = Prompt("{sentence} It was", " terrible, great")
    encoded = encode(examples, prompt, tokenizer, max_length=model.config.max_position_embeddings)
    batch = collate([encoded[index] for index in batch_at(seed, step, batch_size, len(encoded))])
    losses = option_loss(model, batch, option_forward(model, batch))

By name, or by a file of one's own:

    spec = chosen_task("COPA")
    posed = [spec.pose(item) for item in draw(Source(spec, "COPA/"), "train", spec.counts, seed)]
    way = causal_way(spec.manner, tokenizer)
    encoded = way.encode(posed, max_length, truncate=False)
    loss = way.objective.loss(model, batch, way.objective.forward(model, way.collate(encoded)))
"""

from zo_offload.tasks.aims import OBJECTIVES, Aim, reward_objective
from zo_offload.tasks.chosen import chosen_task
from zo_offload.tasks.encode import Batch, Encoded, collate, encode, encode_rendered
from zo_offload.tasks.evaluate import (
    Evaluation,
    evaluate,
    evaluation_batches,
    evaluation_groups,
    score,
    summarize,
)
from zo_offload.tasks.generate import Decoding
from zo_offload.tasks.judge import Verdict, sum_up
from zo_offload.tasks.masked import mask_forward
from zo_offload.tasks.masked_suite import MASKED_TASKS
from zo_offload.tasks.objective import (
    answer_loss,
    answer_losses,
    hits,
    model_inputs,
    option_forward,
    option_loss,
    option_scores,
    predict,
)
from zo_offload.tasks.own import read_task
from zo_offload.tasks.prompt import Prompt
from zo_offload.tasks.reader import Example, read_examples, split_file
from zo_offload.tasks.rendered import Rendered
from zo_offload.tasks.sampler import batch_at, epoch_order, stratified_order
from zo_offload.tasks.scores import (
    METRICS,
    REWARDS,
    exact_match,
    exact_match_of,
    token_f1,
    token_f1_of,
)
from zo_offload.tasks.source import Source, draw, drawn
from zo_offload.tasks.spec import Counts, Item, Manner, TaskSpec
from zo_offload.tasks.suite import TASKS, known_task
from zo_offload.tasks.way import Way, causal_way, masked_way

__all__ = [
    "MASKED_TASKS",
    "METRICS",
    "OBJECTIVES",
    "REWARDS",
    "TASKS",
    "Aim",
    "Batch",
    "Counts",
    "Decoding",
    "Encoded",
    "Evaluation",
    "Example",
    "Item",
    "Manner",
    "Prompt",
    "Rendered",
    "Source",
    "TaskSpec",
    "Verdict",
    "Way",
    "answer_loss",
    "answer_losses",
    "batch_at",
    "causal_way",
    "chosen_task",
    "collate",
    "draw",
    "drawn",
    "encode",
    "encode_rendered",
    "epoch_order",
    "evaluate",
    "evaluation_batches",
    "evaluation_groups",
    "exact_match",
    "exact_match_of",
    "hits",
    "known_task",
    "mask_forward",
    "masked_way",
    "model_inputs",
    "option_forward",
    "option_loss",
    "option_scores",
    "predict",
    "read_examples",
    "read_task",
    "reward_objective",
    "score",
    "split_file",
    "stratified_order",
    "sum_up",
    "summarize",
    "token_f1",
    "token_f1_of",
]
