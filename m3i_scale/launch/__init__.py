"""Start a run: one description of hosts and ranks, one file per launcher.

To find out why a host is not in an attempt of `elastic`: `rendezvous.py` collects the reasons, and `link.py` determines
those of unusable hosts. Users read them in `attempts.json`, at `without`.
"""
