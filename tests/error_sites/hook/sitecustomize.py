"""Notes where each error of the package is made, while ``ZO_ERROR_SITES`` names a file.

Python imports a module of this name when it starts, from ``PYTHONPATH``: so it is there in pytest's
workers, in the server that programs are forked from, and in whatever a launcher starts. The product
knows nothing of it. A line is ``[["file.py", line], ...], message]``, the innermost frame first;
lines are appended whole, by any number of processes.
"""

import atexit
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

NOTES = os.environ.get("ZO_ERROR_SITES")


def note_errors(notes: str) -> None:
    import zo_offload
    from zo_offload.errors import ZOError

    package = str(Path(zo_offload.__file__).parent) + os.sep
    # Opened once: a process that is out of files, or is nobody's, makes errors too.
    notes_fd = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def noted(self: ZOError, *args: Any) -> None:
        Exception.__init__(self, *args)
        sites, frame = [], sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(package):
                sites.append([name.removeprefix(package), frame.f_lineno])
            frame = frame.f_back
        late.append(json.dumps([sites, " ".join(map(str, args))]) + "\n")
        write()

    late: list[str] = []

    def write() -> None:
        with suppress(OSError):  # tests limit the size of files: then a note waits for the next
            os.write(notes_fd, "".join(late).encode())
            late.clear()

    ZOError.__init__ = noted
    atexit.register(write)


if NOTES:
    note_errors(NOTES)
