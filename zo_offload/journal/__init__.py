"""The append-only record of a run: base checkpoint + journal = any later checkpoint, bit for bit.

A zeroth-order update is a few scalars on directions that a counter can make again, so the journal
is all that a run has to save. The header holds everything that changes bits; then comes one record
a step, written whole *before* its update is applied: what the weights carry is never ahead of what
the journal knows.

Why a format of our own, and not JSON lines or SQLite: floats keep their exact bits, a torn tail is
told from damage inside, a million steps load in seconds, and fifty lines in any language read it
(``docs/format.md``). Nothing is believed before its length is bounded and its CRC is right.
"""

from zo_offload.journal.journal import Journal
from zo_offload.journal.record import Flags, Probe, Record
from zo_offload.journal.records import Records, Term

__all__ = ["Flags", "Journal", "Probe", "Record", "Records", "Term"]
