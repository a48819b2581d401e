"""Looking at a checkpoint without stopping at the first fault: the command `inspect`."""
