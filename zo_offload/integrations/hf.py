"""Loading and recognising Hugging Face models and tokenizers, every fault in one line."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from zo_offload.converted import is_converted, read_converted, refuse_unfinished
from zo_offload.errors import ModelError, StoreError
from zo_offload.integrations.hub import check_reached
from zo_offload.integrations.model_kind import kind_of
from zo_offload.integrations.pickled import SAFE, UnpicklingError, unread
from zo_offload.integrations.quantized import refuse_quantized
from zo_offload.integrations.skeleton import skeleton
from zo_offload.integrations.spill import spilled
from zo_offload.kinds import CALLED, LOADED_BY, Kind
from zo_offload.trainable.peft import base_of, load_adapter

LONGEST_REASON = 300
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # their files


def load_causal_lm(name: str | Path, spill: Sequence[str | Path] = ()) -> Any:
    """A causal LM: :func:`load_model`, whatever the configuration says of its kind."""
    return load_model(name, spill, "causal")


def load_model(
    name: str | Path,
    spill: Sequence[str | Path] = (),
    kind: Kind | None = None,
    dtype: Any = None,
) -> Any:
    """A model from a local directory or a model id, in its checkpoint's dtype.

    Code that a checkpoint brings along is never run, and no weight is ever made up. Its values are
    views of files: the checkpoint's own, and unlinked ones of what loading makes anew. A directory
    that ``zo-offload convert`` made gives a model whose units have no values in memory; one with an
    adapter of ``peft``, a ``PeftModel`` on the base that it names.

    Args:
        name: Directory or id.
        spill: Folders for unlinked files, before those for temporary ones and by the checkpoint.
        kind: What to load it as (default: as its configuration says).
        dtype: Of torch, instead of the checkpoint's; not of a converted model.

    Raises:
        ModelError: It cannot be found, fetched, read, is of an unknown type, is quantized, or
            lacks weights.
        StoreError: It was converted, and is damaged; or no folder has room for the unlinked files.
    """
    import transformers

    base = base_of(name)
    if base is not None:
        return load_adapter(load_model(base, spill, kind, dtype), name)
    config = _load(transformers.AutoConfig, name, "model")
    kind = kind or kind_of(name)
    if is_converted(name):
        return skeleton(read_converted(Path(name).absolute()), config, kind)
    refuse_unfinished(Path(name))
    refuse_quantized(name, config)
    with spilled([*map(Path, spill), *_spare_folders(Path(name))]):
        model, found = _load(
            getattr(transformers, LOADED_BY[kind]),
            name,
            "model",
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused here, where they can be named
        )
    for key, held, expected in sorted(found["mismatched_keys"]):
        raise ModelError(
            f"{name}: config.json and weights do not belong together: {key} is {list(held)}, "
            f"config.json makes it {list(expected)}"
            "; copy both from the same model"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} "
            f"({missing[0]}, ...), which would be random; is it a {CALLED[kind]}, and whole?"
        )
    return model


def _spare_folders(path: Path) -> list[Path]:
    """For temporary files, and beside the checkpoint."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [path if path.is_dir() else Path(HF_HUB_CACHE)]
    with suppress(FileNotFoundError):  # there is none
        folders.insert(0, Path(gettempdir()))
    return folders


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        ModelError: As for the model, or it has no padding token to borrow.
    """
    tokenizer = _tokenizer(name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{name}: the tokenizer has neither a padding nor an end token; set pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str | Path) -> Any:
    """What makes an image classifier's input, as beside the model.

    Raises:
        ModelError: As for the model.
    """
    from transformers import AutoImageProcessor

    return _load(AutoImageProcessor, base_of(name) or name, "image processor")


def class_names(name: str | Path) -> list[str]:
    """Of an image classifier, in order.

    Raises:
        ModelError: As for the model, or it takes no images of three colours.
    """
    from transformers import AutoConfig

    config = _load(AutoConfig, base_of(name) or name, "configuration")
    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        raise ModelError(f"{name}: takes images of {channels} channels; expected 3 (RGB)")
    return [config.id2label[index] for index in range(config.num_labels)]


def save_tokenizer(name: str | Path, directory: Path) -> bool:
    """Write the tokenizer beside a model elsewhere; False where a directory has none.

    Raises:
        ModelError: There is one, and it cannot be loaded.
    """
    if not _has_tokenizer(name):
        return False
    _tokenizer(name).save_pretrained(str(directory))
    return True


def save_processor(name: str | Path, directory: Path) -> None:
    """Write what makes a model's input beside it, as a run exports it; nothing where there is none.

    Raises:
        ModelError: There is one, and it cannot be loaded.
    """
    if kind_of(name) == "image":
        load_image_processor(name).save_pretrained(str(directory))
    elif _has_tokenizer(base_of(name) or name):
        load_tokenizer(name).save_pretrained(str(directory))


def _has_tokenizer(name: str | Path) -> bool:
    """Whether a directory holds its files; an id may."""
    path = Path(name)
    return not path.is_dir() or any(each for kind in TOKENIZERS for each in path.glob(kind))


def _tokenizer(name: str | Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, base_of(name) or name, "tokenizer")
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_tokens)):  # made up
        raise ModelError(f"{name}: no tokenizer there; copy its files (tokenizer.json, ...)")
    return tokenizer


def limits(name: str | Path, kind: Kind = "causal") -> tuple[int | None, int | None]:
    """Most tokens that the model takes, and rows of its embedding; None where it does not say.

    Raises:
        ModelError: As for the model.
    """
    from transformers import AutoConfig

    config = _load(AutoConfig, base_of(name) or name, "configuration").get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if kind == "masked" and longest is not None:
        longest -= _positions_of_padding(config)
    return longest, getattr(config, "vocab_size", None)


def _positions_of_padding(config: Any) -> int:
    """RoBERTa's first positions, up to its padding's, are no token's."""
    import torch
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    for path, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if path.endswith("position_embeddings") and padding is not None:
            return padding + 1
    return 0


def _load(auto_class: Any, name: str | Path, what: str, **options: Any) -> Any:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise ModelError(
            f"{name}: the model must be a directory in Hugging Face's layout, found a file"
            "; name the directory it is in"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{name}: no config.json in this directory; is it a Hugging Face model?")
    if not path.is_dir() and (path.is_absolute() or str(name).count("/") > 1):  # no model id
        raise ModelError(f"{name}: no such directory; check the path, or give a model id")
    check_reached(name)
    try:
        return auto_class.from_pretrained(str(name), trust_remote_code=False, **options)
    except StoreError:
        raise
    except UnpicklingError as error:
        raise ModelError(f"{name}: {unread(error)}; {SAFE}") from error
    except Exception as error:  # the loaders raise whatever the layers below them raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
        if not path.is_dir():
            raise ModelError(
                f"{name}: no such local directory, and the {what} could not be fetched "
                f"(no network, or no such id): {reason}"
                "; check the name, or give a directory"
            ) from error
        raise ModelError(
            f"{name}: the {what} could not be loaded: {reason}; mend or fetch its files again"
        ) from error
