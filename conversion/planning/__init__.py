"""Deciding on every file of a result before the first byte is written."""
