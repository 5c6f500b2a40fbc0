"""A folder of images, a sub-folder a class: how image classifiers get their examples.

::

    DIR/train/cat/1.png, DIR/train/dog/2.jpg, ...    or, without splits,    DIR/cat/1.png, ...
    DIR/validation/cat/..., DIR/test/cat/...          where there are any

This is the layout that `datasets` calls an image folder. The names of the classes are those of the
sub-folders.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zo_offload.tasks.wording import listed, nearest, printable, quote, refuse

FOLDERS = {"train": ("train",), "dev": ("validation", "val", "valid", "dev"), "test": ("test",)}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Picture:
    """An image and its class.

    Attributes:
        path: Its file.
        right: The index of its class, alone.
    """

    path: Path
    right: tuple[int, ...]

    @property
    def where(self) -> str:
        """For a message."""
        return printable(str(self.path))

    @property
    def digest(self) -> str:
        """Of what the file holds."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            refuse(self.where, f"cannot be read: {error.strerror}", "check the file", error)


@dataclass(frozen=True)
class PictureFolder:
    """The splits of a folder; those that it does not have are parts of `train`.

    Attributes:
        data: The folder.
        words: Names of all classes, sorted.
    """

    data: str
    words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        folders = [self._folder(split) for split in FOLDERS]
        names = {each.name for folder in folders if folder for each in _classes(folder)}
        object.__setattr__(self, "words", tuple(sorted(names)))

    @property
    def name(self) -> str:
        """In messages."""
        return printable(self.data)

    @property
    def test_seed(self) -> None:
        """Test examples are drawn by the seed of the others."""

    @property
    def is_one_file(self) -> bool:
        """Whether every split is all there is."""
        return not any(self._named(split) for split in FOLDERS)

    def has(self, split: str) -> bool:
        """Whether the split has a folder of its own."""
        return self._named(split) is not None

    def items(self, split: str) -> list[Picture]:
        """Every image of a split, by class and name.

        Raises:
            TaskError: There is none, or a file that is none.
        """
        folder = self._folder(split)
        if folder is None:
            fault = f"no folder {listed(FOLDERS[split])}"
            refuse(self.name, fault, "make it, with a folder of images for each class in it")
        found = [
            Picture(path, (self.words.index(each.name),))
            for each in _classes(folder)
            for path in _images(each)
        ]
        if not found:
            refuse(printable(str(folder)), "no image", "expected a folder of images for each class")
        return found

    def _named(self, split: str) -> Path | None:
        base = Path(self.data)
        if not base.is_dir():
            refuse(self.name, "no such directory", "check --data: a folder of images by class")
        return next((base / name for name in FOLDERS[split] if (base / name).is_dir()), None)

    def _folder(self, split: str) -> Path | None:
        """Of a split; without splits all of it is `train`."""
        named = self._named(split)
        return Path(self.data) if named is None and split == "train" and self.is_one_file else named


def decoded(picture: Picture) -> Any:
    """The image in three colours, as Pillow has it.

    Raises:
        TaskError: It is damaged, or no image.
    """
    from PIL import Image

    try:
        with Image.open(picture.path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).replace(str(picture.path), "the file").split())
        refuse(picture.where, f"no image to be read: {reason}", "replace or remove it", error)


def in_the_models_order(
    pictures: Sequence[Picture], words: Sequence[str], names: Sequence[str], data: str
) -> list[Picture]:
    """The pictures with the model's indices for their classes.

    Args:
        pictures: With indices of `words`.
        words: Names of the folders.
        names: Of the model's classes; where it has none (LABEL_0, ...), folders are in order.
        data: The folder, in messages.
    """
    if are_made_up(names):
        if len(names) != len(words):
            fault = f"{len(words)} classes ({listed(words)}), and the model has {len(names)}"
            refuse(data, fault, "give a model with as many (num_labels in its config)")
        return list(pictures)
    for word in words:
        if word not in names:
            fault = f"the class {quote(word)} is none of the model's"
            mend = f"expected folders named as those: {listed(names)}{nearest(word, names)}"
            refuse(data, fault, mend)
    return [replace(one, right=(names.index(words[one.right[0]]),)) for one in pictures]


def are_made_up(names: Sequence[str]) -> bool:
    """Whether transformers has named the classes.

    >>> are_made_up(["LABEL_0", "LABEL_1"]), are_made_up(["cat", "dog"])
    (True, False)
    """
    return list(names) == [f"LABEL_{index}" for index in range(len(names))]


def _classes(folder: Path) -> Iterator[Path]:
    """Sub-folders, sorted; what lies beside them is no class's."""
    for each in _entries(folder):
        if not each.is_dir():
            mend = "expected folders of images, one for each class: move it into one"
            refuse(printable(str(each)), "a file beside the classes", mend)
        yield each


def _images(folder: Path) -> Iterator[Path]:
    for each in _entries(folder):
        if each.is_dir() or each.suffix.lower() not in SUFFIXES:
            mend = f"expected files that end in {', '.join(SUFFIXES)}"
            refuse(printable(str(each)), "no image by its name", mend)
        yield each


def _entries(folder: Path) -> list[Path]:
    """Sorted, without hidden ones."""
    return sorted(each for each in folder.iterdir() if not each.name.startswith("."))
