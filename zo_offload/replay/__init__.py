"""Any step's weights again, of a base checkpoint and a journal: no data, no accelerator.

A journal's header says everything that decides bits, its records what every step added
(``docs/format.md``). So nothing of a run's JSON is asked for: ``setting.py`` reads the header
and lays the base out as the run did, ``chosen.py`` finds what moved, of which the header may hold
the digest alone. ``pieces.py`` brings the weights to the step, some millions at a time: each piece
is read once, takes all steps while it is in cache, and is written once. ``shards.py`` keeps what is
finished, so that a replay that was killed goes on, and ``command.py`` exports it as the run does.
"""
