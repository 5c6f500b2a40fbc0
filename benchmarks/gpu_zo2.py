"""ZO2's published code as a contestant: a process of its own, with transformers of its own.

Nothing of it is here: the folder that holds its package ``zo2`` is given by whoever has it, and so
is one of packages that it wants in other versions than ours (transformers 4.51, as its requirements
have it). Its host memory is as it makes it, not page-locked; it is not tuned.

Wang et al. (2025), arXiv 2503.12668.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from programs import Program, python, serve, started

LEFT_OUT = "no --zo2 FOLDER"


@contextmanager
def zo2_of(folder: Path | None, site: Path | None, asked: dict[str, Any]) -> Iterator[Program]:
    """The process, with a model; it is asked ``step`` and ``held``.

    Args:
        folder: Holds the package ``zo2``.
        site: Holds packages that come before ours; None where ours do.
        asked: Of its model: a configuration's values, device, rows and length of the batch.

    Raises:
        RuntimeError: It cannot be used; the message says why.
    """
    if folder is None:
        raise RuntimeError(LEFT_OUT)
    if not (folder / "zo2" / "__init__.py").is_file():
        raise RuntimeError(f"--zo2 {folder}: no package zo2 in it")
    paths = [str(path.absolute()) for path in (site, folder) if path is not None]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with started([python("gpu_zo2.py")], [variables]) as (program,):
        answer = program.ask("begin", **asked)
        if "failed" in answer:
            raise RuntimeError(f"--zo2 {folder}: {answer['failed']}")
        yield program


class _Model:
    """What answers."""

    def begin(self, values: dict[str, Any], device: str, rows: int, length: int) -> dict[str, str]:
        """Import it, and make a model; what stands in the way is the answer."""
        try:
            self._make(values, device)
        except Exception as error:  # whatever an unknown package raises is told
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        self.batch(device, rows, length, values["vocab_size"])
        return {}

    def _make(self, values: dict[str, Any], device: str) -> None:
        from zo2.config.mezo_sgd import MeZOSGDConfig  # type: ignore[reportMissingImports]
        from zo2.model.huggingface.opt.mezo_sgd import zo2  # type: ignore[reportMissingImports]

        import torch  # isort: skip
        from transformers import OPTConfig  # isort: skip

        config = OPTConfig(**values, tie_word_embeddings=False)  # as its own benchmark has it
        settings = MeZOSGDConfig(lr=1e-7, weight_decay=0.0, eps=1e-3, working_device=device)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            model = zo2.OPTForCausalLM(config)
        model = model.to_empty(device="cpu")
        torch.set_default_dtype(torch.float32)
        for parameter in model.parameters():
            _fill(parameter)
        model.eval()  # without dropout, as ours
        model.zo_init(settings)
        self._model = model

    def batch(self, device: str, rows: int, length: int, vocabulary: int) -> None:
        """Another one from now on."""
        import torch

        tokens = torch.randint(5, vocabulary, (rows, length), device=device)
        self._batch = {"input_ids": tokens, "labels": tokens}

    def step(self) -> dict[str, float]:
        """Take one; seconds by its own clock."""
        began = time.perf_counter()
        self._model.zo_train()
        self._model(**self._batch)  # which ends by synchronizing
        return {"seconds": time.perf_counter() - began}

    def held(self) -> dict[str, int | None]:
        """Most bytes so far, of tensors on the device."""
        import torch

        cuda = self._batch["input_ids"].device.type == "cuda"
        return {"device": torch.cuda.max_memory_allocated() if cuda else None}


def _fill(parameter: Any) -> None:
    """Random values, made quickly: rows of a matrix are each a step further along one line."""
    import torch

    with torch.no_grad():
        count = sum(parameter.shape) - (parameter.ndim - 1)
        line = (0.02 * torch.randn(count)).to(parameter.dtype)
        parameter.copy_(line.as_strided(tuple(parameter.shape), (1,) * parameter.ndim))


if __name__ == "__main__":
    model = _Model()
    serve(
        sys.argv[1],
        {"begin": model.begin, "batch": model.batch, "step": model.step, "held": model.held},
    )
