"""``zo-offload train --find-lr``: which learning rate to train with, tried on the run's own task.

A rate is judged by short runs, because zeroth-order theory is local: ``slopes.py`` measures what it
needs (slope, its noise, curvature) and that says where to look, not what to take. ``sweep.py``
decides what is tried and what the tries say, as pure functions; ``trials.py`` takes the tries, all
from the same weights, which it never moves; ``report.py`` writes down what was found.
"""
