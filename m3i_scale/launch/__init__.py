"""Start a run: one description of hosts and ranks, one file per launcher.

Why a host is not in an attempt of `elastic`: `elastic/link.py` determines the reason, `elastic/rendezvous.py` collects
it, and users read it in `attempts.json` at `left_out`.
"""
