"""How much memory a model takes, and how many devices that is: what `inspect` says of a context and a batch."""
