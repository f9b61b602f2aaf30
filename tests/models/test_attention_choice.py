"""Which backend is taken, and what is refused."""

import pytest
import torch

from lightning_llm.models.attention import Segments, attention
from lightning_llm.settings import UserError


def test_an_unknown_backend_is_refused():
    q, k = torch.randn(6, 2, 4), torch.randn(6, 1, 4)
    with pytest.raises(UserError, match="'flesh' is not a backend"):
        attention(q, k, k, Segments([6], [-1]), backend="flesh")
