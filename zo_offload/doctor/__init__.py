"""What this machine has and what it does in a second, with the mend of what stands in the way.

``machine`` looks, ``rates`` measures, ``command`` puts both into rows and writes them down.
"""
