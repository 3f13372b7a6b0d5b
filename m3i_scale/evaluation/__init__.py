"""Evaluation of frozen features: kNN, linear probe, zero-shot, retrieval."""


class NotMeasuredError(Exception):
    """Missing requirement of a metric or picture; the message is the reason for users."""
