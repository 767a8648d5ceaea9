import numpy as np
import pytest

from dtrain.data.collate import collate
from dtrain.data.rows import Row


def row(tokens, targets, lengths):
    return Row(np.array(tokens, np.int32), np.array(targets, bool), np.array(lengths, np.int32))


# Two documents of 3 and 2 tokens in one row, and a short row of one document.
PACKED = row([11, 12, 13, 21, 22], [0, 1, 1, 0, 1], [3, 2])
SHORT = row([31, 32, 33], [0, 0, 1], [3])


def test_a_packed_and_a_short_row():
    batch = collate([PACKED, SHORT], [7, 4], pad_id=9)
    assert batch.inputs["tokens"].tolist() == [[11, 12, 13, 21, 22], [31, 32, 33, 9, 9]]
    assert batch.inputs["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]
    # 12 is predicted at flat 0, 13 at 1, 22 at 3; 33 is at column 2 of row 1, so at flat 5 + 1.
    assert batch.inputs["target_index"].tolist() == [0, 1, 3, 6]
    assert batch.inputs["target_ids"].tolist() == [12, 13, 22, 33]
    assert (batch.num_targets, batch.num_tokens, batch.sample_ids) == (4, 8, (7, 4))
    assert all(str(tensor.dtype) == "torch.int64" for tensor in batch.inputs.values())


def test_padding_to_a_given_length():
    batch = collate([SHORT], [0], pad_id=9, pad_to=5)
    assert batch.inputs["tokens"].tolist() == [[31, 32, 33, 9, 9]]
    assert batch.inputs["positions"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["target_index"].tolist() == [1]
    with pytest.raises(AssertionError, match="does not fit"):
        collate([PACKED], [0], pad_id=9, pad_to=4)


def test_nothing_to_do():
    batch = collate([], [], pad_id=9)
    assert batch.inputs["tokens"].tolist() == [[9, 9]]
    assert batch.inputs["positions"].tolist() == [[0, 1]]
    assert batch.inputs["target_index"].tolist() == batch.inputs["target_ids"].tolist() == []
    assert (batch.num_targets, batch.num_tokens, batch.sample_ids) == (0, 0, ())


def test_a_batch_owns_its_memory():
    source = row([1, 2], [0, 1], [2])
    batch = collate([source], [0], pad_id=0)
    batch.inputs["tokens"][0, 0] = 5
    assert source.tokens.tolist() == [1, 2]
