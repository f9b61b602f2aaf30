"""Attention that reads a shared prompt once, against every row's own, in float64."""

import pytest
import torch

from lightning_llm.generation.cache import attend_step, hide_empty
from lightning_llm.generation.shared_prompt import SharedPrompt

ROWS = {  # each row's prompt
    "in order": [0, 0, 0, 1, 1, 1],
    "mixed, of unlike number": [2, 0, 1, 0, 0, 1, 0, 2],
    "one": [3, 3, 3, 3],
}
LENGTHS = {0: 5, 1: 8, 2: 6, 3: 7}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_the_same_sums(rows, softcap):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    prompts = {number: (draw(2, length, 4), draw(2, length, 4)) for number, length in LENGTHS.items()}
    lengths = [LENGTHS[number] + 1 + row % 4 for row, number in enumerate(rows)]
    keys, values = draw(len(rows), 2, max(lengths), 4), draw(len(rows), 2, max(lengths), 4)
    for row, number in enumerate(rows):
        for stored, prompt in zip((keys, values), prompts[number], strict=True):
            stored[row, :, : LENGTHS[number]] = prompt
    mask = hide_empty(torch.tensor(lengths), max(lengths), torch.float64)
    q = draw(len(rows), 2, 3, 4)
    shared = SharedPrompt.of_rows([(number, LENGTHS[number]) for number in rows], keys.device)
    assert shared.length == min(LENGTHS[number] for number in rows)
    expected = attend_step(q, keys, values, mask, 0.4, softcap)
    torch.testing.assert_close(shared.attend(q, keys, values, mask, 0.4, softcap), expected, rtol=0, atol=1e-5)


def test_rows_of_their_own_share_nothing():
    assert SharedPrompt.of_rows([(0, 4), (1, 4), (2, 4), (2, 4)], torch.device("cpu")) is None
    assert SharedPrompt.of_rows([], torch.device("cpu")) is None
