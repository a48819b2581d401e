"""A course of operations on two layers of a cache at once."""

import copy
import pickle

import pytest
import torch

OPERATIONS = ["append"] * 6 + ["crop", "reorder", "repeat", "select", "copy", "reset", "offload"]


@pytest.fixture(scope="session")
def change_both():
    """Do one of `OPERATIONS` but "append" and "reset" to both: (operation, drawn, ours, theirs, rows) -> ours, rows."""

    def change(operation, drawn, ours, theirs, rows):
        if operation == "crop":
            removed = drawn.randrange(theirs.get_seq_length())
            ours.crop(-removed), theirs.crop(-removed)
        elif operation == "reorder":
            order = torch.randint(rows, (rows,))
            ours.reorder_cache(order), theirs.reorder_cache(order)
        elif operation == "repeat" and rows < 8:
            ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
            rows *= 2
        elif operation == "select":
            kept = torch.randperm(rows)[: max(1, rows // 2)]
            ours.batch_select_indices(kept), theirs.batch_select_indices(kept)
            rows = len(kept)
        elif operation == "copy":
            ours = copy.deepcopy(ours) if drawn.random() < 0.5 else pickle.loads(pickle.dumps(ours))
        elif operation == "offload":
            ours.offload(), ours.prefetch()
        return ours, rows

    return change


@pytest.fixture(scope="session")
def operations():
    """What a course is drawn from."""
    return OPERATIONS
