"""The files of a checkpoint, whatever its format: why one can't be read, links, weights a tensor at a time."""
