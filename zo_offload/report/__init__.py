"""``zo-offload report`` and ``zo-offload watch``: a run's directory, read and shown.

``found`` reads what is there, ``series`` and ``tables`` make numbers and words of it, ``charts``
draws, ``page`` puts them together; ``watch`` shows a run in a terminal. Nothing here writes to what
a run keeps, and everything that is read is taken for untrusted.
"""
