"""What a run of an image classifier is asked: a folder of images by class."""

import hashlib
import json
from dataclasses import fields

from zo_offload.errors import ConfigError
from zo_offload.run_asked import Asked, TaskOptions, chosen_counts, flag, warn_of_few
from zo_offload.tasks import Counts, draw
from zo_offload.tasks.pictures import Picture, PictureFolder

OF_TEXT = ("task", "template", "labels", "train", "dev", "max_new_tokens", "truncate", "shots")


def asked_of_pictures(options: TaskOptions, training: bool) -> Asked:
    """The images that options name.

    Raises:
        ConfigError: An option is for text, or there is no folder.
        TaskError: Something in the folder is wrong.
    """
    defaults = {each.name: each.default for each in fields(TaskOptions)}
    for name in OF_TEXT:
        if getattr(options, name) != defaults[name]:
            raise ConfigError(
                f"{flag(name)}: for text, and --model is an image classifier; leave it out"
            )
    if options.data is None:
        raise ConfigError("--data: missing; give a folder of images, a sub-folder for each class")
    folder = PictureFolder(options.data)
    counts = chosen_counts(Counts(), options)
    measured = "dev" if training else options.split or _measured(folder)
    seed = options.data_seed
    train: list[Picture] = draw(folder, "train", counts, seed) if training else []
    dev: list[Picture] = draw(folder, measured, counts, seed)[: options.dev_limit]
    digests = {}
    if training:
        warn_of_few(folder.words, counts.per_class, train)
        for name, part in (("train", train), ("dev", dev)):
            digests[f"examples of {name} (sha256)"] = _digest(folder, part)
    return Asked(train, dev, digests=digests, kind="image", words=folder.words)


def _measured(folder: PictureFolder) -> str:
    return "test" if folder.is_one_file or folder.has("test") else "dev"


def _digest(folder: PictureFolder, pictures: list[Picture]) -> str:
    """Of all that is learnt or measured; not of where it stood."""
    told = [[one.digest, folder.words[one.right[0]]] for one in pictures]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
