"""Start a run: one description of hosts and ranks, one file per launcher.

To find out why a host is not in an attempt of `elastic`: `rendezvous.py` collects the reasons; `link.py` determines why
a host is unusable. Users read the reasons in `attempts.json`, at `without`.
"""
