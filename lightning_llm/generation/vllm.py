"""The engine's interface over vLLM, for a model in a Hugging Face directory on a GPU.

Written after vLLM's documentation and tested against a fake of what is documented there. It has never been run with
vLLM itself, which takes a GPU and the extra `vllm`.

What differs from our own engine: randomness is vLLM's, so that a seed gives other samples (each response has a seed of
its own here as well, but kernels may depend on what runs beside it). Weights are those of the directory: there is no
`refresh`, so a policy that is being trained cannot be sampled from. No stop strings, no listener, no dual chunks.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import GREEDY, Sample, response_limits
from lightning_llm.settings import UserError


class VLLMSampler:
    """Samples from the model of a directory."""

    def __init__(self, directory: Path, *, context: int | None = None, dtype: str = "bfloat16"):
        """
        Args:
            directory: as `Transformer.save_pretrained` writes it.
            context: prompt and response have so many tokens at most; None: as the model's config.json says.
            dtype: of weights and products, float32 | bfloat16.

        Raises:
            UserError: vLLM is not installed.
        """
        try:
            vllm = importlib.import_module("vllm")  # an extra
        except ImportError as error:
            remedy = "pip install 'lightning-llm[vllm]' on a machine with a GPU, or leave engine at own"
            raise UserError("engine", f"vllm cannot be imported ({error})", remedy) from error
        self.context, self.parameters = context, vllm.SamplingParams
        self.llm: Any = vllm.LLM(
            model=str(directory),
            dtype=dtype,
            max_model_len=context,
            skip_tokenizer_init=True,  # ids in, ids out
            enable_prefix_caching=True,  # a prompt is computed once for all its samples
            logprobs_mode="processed_logprobs",  # in what was drawn from, after temperature and cuts
            generation_config="vllm",  # nothing that the directory says beside what is asked for
        )

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        samples: int = 1,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> list[Sample]:
        """`Sampler.sample`: responses to each prompt, all of the first prompt's, then the second's, and so on.

        Args:
            numbers: of each response, as there: a share of the responses is drawn as all of them would be.

        Raises:
            ValueError: as there.
        """
        limits = response_limits(prompts, samples, max_new_tokens, self.context)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(samples)]
        own = range(len(limits)) if numbers is None else numbers
        wanted = [
            self.parameters(**self.options(sampling, limit, stop_ids, seed_of(seed, number)))
            for number, limit in zip(own, limits, strict=True)
        ]
        if not requests:
            return []
        is_greedy = not sampling.temperature
        return [read(output, is_greedy=is_greedy) for output in self.llm.generate(requests, wanted, use_tqdm=False)]

    @staticmethod
    def options(sampling: Sampling, limit: int, stop_ids: Collection[int], seed: int) -> dict[str, Any]:
        """One request's, in vLLM's words."""
        return {
            "n": 1,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,  # 0: all
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": seed,
            "max_tokens": limit,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # what ends a response is in stop_ids
            "logprobs": 0,  # of the drawn token alone
            "detokenize": False,
        }


def seed_of(seed: int, number: int) -> int:
    """Of one response, of 63 bits, which is what torch's generators take."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def read(output: Any, *, is_greedy: bool) -> Sample:
    """A sample from what vLLM says of a request.

    Args:
        is_greedy: each token was certain, so that its log-probability is 0, as of our engine's; vLLM tells that of a
            softmax.
    """
    [response] = output.outputs
    ids = list(response.token_ids)
    if is_greedy:
        return Sample(ids, [0.0] * len(ids))
    return Sample(ids, [of_place[id].logprob for id, of_place in zip(ids, response.logprobs, strict=True)])
