"""Carrying out a plan, so that a checkpoint is there as a whole or not at all."""
