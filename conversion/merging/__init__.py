"""Adapters of peft joined to their base, a layer at a time."""
