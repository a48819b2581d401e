"""Rounding weights to a few bits by a library, and what its rounding is measured on."""
