"""Wrappers of a finished model that trade time for memory."""
