"""A checkpoint on the Hub: what belongs to it, its card, the upload."""
