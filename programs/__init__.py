"""What the programs share: the model that ships, their version, text that is safe in a terminal."""
