"""What a run will need and how long a step takes, from a model's shapes alone.

``shapes`` knows models by name, ``layout`` divides one into units, ``budget`` rests them in tiers,
``rates`` turns bytes and FLOPs into seconds, ``search`` decides what is left open, ``advice`` says
what would help, ``report`` writes it all down. Nothing here allocates weights.
"""
