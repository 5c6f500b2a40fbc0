"""Kill, tear, fill, corrupt: whatever happens, nothing that was saved is lost.

::

    make faults                     all of it, within an hour on two cores; the last line is JSON
    python -m pytest tests/faults   the short form of each part, seconds

    calls.py      every call on files, numbered
    mishaps.py    what can happen at one: kills and faults, a table of kinds
    power.py      a power cut: what was synced is there, and any part of the rest
    jobs.py       commands to disturb, a table: tiers, ranks, snapshots, checkpoints, convert
    programs.py   what the disturbed processes run
    trials.py     disturb a job, give it again until it ends, compare the ends
    parsers.py    what reads bytes of others, a table, and what it may answer
    fuzz.py       bytes for them: mutated ones of their own, and sealed again where they are sealed
    soak.py       20,000 steps in constant memory, with as many files and threads as at first
    corpus/       inputs that were answered wrongly once; each is a test

A trial is lost when the same command, given again, does not end in the weights, journal, metrics
and accuracies of a run that nobody disturbed; when a process hangs; or when one that ends by itself
does not say why in one line. Every trial is a function of its seed, which is in its name.
"""
