"""Kills writers of a store, each at an instant of its own, and looks at what is left.

    python -m offload.kills FOLDER ROUNDS

One process imports everything and forks the writers: a kill costs milliseconds. The last line is
JSON: what was found after each kill, and what a writer saw that ran into a limit on file sizes.
"""

import json
import os
import random
import resource
import signal
import sys
from pathlib import Path

from offload.common import SIZES, content, created, opened, steps, write
from zo_offload.errors import StoreError
from zo_offload.offload.aio import PAGE


def writer(places: list[Path], first: int, out: int) -> None:
    """Write for ever, with several writes under way; say which have landed."""
    store = opened(places)
    step = first
    while True:
        under_way = [(i, store.write(i, *content(i, step), step)) for i in SIZES]
        for index, future in under_way:
            future.result()
            os.write(out, f"{index} {step}\n".encode())
        if step % 3 == 0:
            store.sync()
        step += 1


def killed(places: list[Path], first: int, num_lines: int) -> dict[int, int]:
    """The step of each unit that is known to have landed before the kill."""
    reader, out = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            writer(places, first, out)
        finally:
            os._exit(1)
    os.close(out)
    landed: dict[int, int] = {}
    with os.fdopen(reader) as lines:
        for number, line in enumerate(lines, 1):
            index, step = map(int, line.split())
            landed[index] = step
            if number == num_lines:
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    return landed


def limited(places: list[Path]) -> str:
    """What a writer is told where the system limits the size of files."""
    reader, out = os.pipe()
    child = os.fork()
    if not child:
        try:
            with opened(places) as store:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5 * PAGE, 5 * PAGE))
                for step in range(1, 9):
                    write(store, 0, step)
        except StoreError as error:
            os.write(out, str(error).encode())
        finally:
            os._exit(0)
    os.close(out)
    os.waitpid(child, 0)
    with os.fdopen(reader) as said:
        return said.read()


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    chance = random.Random(5)
    places = created(folder / "killed", 2)
    found = []
    first = 1
    for _ in range(rounds):
        landed = killed(places, first, chance.randint(1, 40))
        with opened(places) as store:
            held = {i: v.step for i in SIZES if (v := store.version(i))}
            if not store.missing:
                assert steps(store) == held  # the bytes are of that step
            found.append({"landed": landed, "held": held, "torn": len(store.torn)})
        first = max([0, *held.values()]) + 1
    said = limited(created(folder / "limited"))
    print(json.dumps({"rounds": found, "limited": said}))


if __name__ == "__main__":
    main()
