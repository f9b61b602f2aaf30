"""Chat templates for tokenizers that bring none: turns opened and ended in the tokens that they have for it.

A model that has not learnt to talk yet (Llama 3.1 or Gemma 2 before its instructions) has the tokens of its family's
turns and no template. In tokens that are not in the vocabulary turns would be spelt in letters, and no end be learnt.

In all of them a turn ends right after its end-of-turn token (a newline opens the next turn), and contents are stripped:
so the ids of a prompt followed by those of a response are the ids of the whole conversation.
"""

from __future__ import annotations

import json
from collections.abc import Collection

CHATML = (  # Qwen's, and that of the tokenizers that we train
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_3 = (  # a tool's turn is named ipython there
    "{% for message in messages %}"
    "{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}"
    "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
    "{% if role == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (  # knows a user and a model
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<start_of_turn>model\\n' }}"
    "{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<start_of_turn>user\\n' + message['content'] | trim + '<end_of_turn>' }}"
    "{% else %}{{ raise_exception('Gemma knows no turn of the role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<start_of_turn>model\\n' }}{% endif %}"
)
TEMPLATES = {  # the tokens that a template needs -> it; the first that can be spelt is taken
    ("<|im_start|>", "<|im_end|>"): CHATML,
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"): LLAMA_3,
    ("<start_of_turn>", "<end_of_turn>"): GEMMA,
}


def template_for(tokens: Collection[str], begin: str) -> str:
    """A template in the tokens that a tokenizer has for turns; empty if it has none of them.

    Args:
        tokens: its added tokens, each of which is one id wherever it is spelt.
        begin: what the tokenizer puts in front of every text, spelt out: a conversation begins with it, too.
    """
    found = next((template for needed, template in TEMPLATES.items() if set(needed) <= set(tokens)), "")
    return "{{ " + json.dumps(begin, ensure_ascii=False) + " }}" + found if found and begin else found
