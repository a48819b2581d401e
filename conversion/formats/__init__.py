"""What checkpoints can be: names, shapes and configurations of every format; a new format is one new file here."""
