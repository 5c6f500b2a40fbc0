"""What moves: one file a mode, behind the interface in ``trainable.py``; ``choose.py`` picks one.

``full`` moves every parameter, or those that are chosen by name, layer or turn; the modes beside it
leave the base as it is. What a mode decides reaches the parts below as a :class:`Moving`.
"""
