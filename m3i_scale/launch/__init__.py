"""Start a run: one description of hosts and ranks, one file per launcher.

Why a host is not in an attempt of `elastic`: `rendezvous.py` collects the reasons, `link.py` finds those of hosts that
cannot be used; a user reads them in `attempts.json`, at `without`.
"""
