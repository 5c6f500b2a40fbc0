"""Libraries leave the terminal to us; our own warnings are a line each, as errors are."""

import logging
import os
import warnings

import click

from zo_offload import launched
from zo_offload.wording import one_line

NOISE_OF_LIBRARIES = (
    "Setting accelerator to CPU",  # there is none, and the summary says where the weights were
    "Attempting to get learning rate",  # DeepSpeed's schedulers, of themselves
)


def quiet() -> None:
    """Leave the terminal to us: libraries report warnings only, and draw no bars of their own."""
    quiet_deepspeed()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft's
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def quiet_deepspeed() -> None:
    """The same of DeepSpeed alone, before it is imported; and our own warnings a line each."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")  # for when its logger is made,
    deepspeed = logging.getLogger("DeepSpeed")  # and for when it has been
    deepspeed.setLevel(logging.WARNING)
    deepspeed.addFilter(_is_ours_to_show)
    ours = logging.getLogger("zo_offload")
    if not any(isinstance(handler, _OneLineWarnings) for handler in ours.handlers):
        # The first rank's are every rank's.
        level = logging.ERROR if launched.rank() else logging.WARNING
        ours.addHandler(_OneLineWarnings(level))


class _OneLineWarnings(logging.Handler):
    """Our own warnings, in the style of our errors."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"Warning: {one_line(record.getMessage())}", err=True)


def _is_ours_to_show(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE_OF_LIBRARIES)
