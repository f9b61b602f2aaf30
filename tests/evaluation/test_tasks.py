"""Questions in turn, responses with and without an end, and what is counted of them."""

import pytest

from lightning_llm.data.embedded import tasks as embedded
from lightning_llm.data.token_store import TokenStore, TokenStoreWriter
from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.evaluation.judges import Question, Response
from lightning_llm.evaluation.tasks import respond, sample_questions, task_metrics
from lightning_llm.generation.config import Sampling
from lightning_llm.generation.engine import generate
from lightning_llm.models import ModelConfig, Transformer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["reverse 123", "sort 321", "answer: 123"] * 3, 270)


@pytest.fixture(scope="module")
def stores(tokenizer, tmp_path_factory):
    """Three questions of each of two tasks, and one of a third in a store of its own."""
    folder = tmp_path_factory.mktemp("stores")
    found = {}
    for name, counts in {"embedded": {"reverse": 3, "sort": 3}, "mine": {"sum": 1}}.items():
        writer = TokenStoreWriter(folder / name, "questions", tokenizer.vocab_size)
        for task, count in counts.items():
            for question in embedded.questions("validation", task, count):
                prompt = [{"role": "user", "content": question["question"]}]
                ids = tokenizer.render(prompt, add_generation_prompt=True).ids
                writer.append(
                    [ids], [[False] * len(ids)], {"prompt": prompt, "answer": question["answer"], "task": task}
                )
        writer.close()
        found[name] = TokenStore.open(folder / name)
    return found


def test_tasks_take_turns(stores, tokenizer):
    questions = sample_questions(stores, 6)
    assert [question.task for question in questions] == ["reverse", "sort", "sum", "reverse", "sort", "reverse"]
    first = questions[0]
    assert first.answer == first.prompt.removeprefix("reverse ")[::-1]
    assert first.prompt in tokenizer.decode(first.prompt_ids)
    assert len(sample_questions(stores, 100)) == 7


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_responses_are_what_the_engine_generates_whatever_the_batch(stores, tokenizer, temperature, max_tokens):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = Transformer(config).eval()
    model.reset_parameters(1)
    questions = sample_questions(stores, 7)
    stop_ids = set(range(0, tokenizer.vocab_size, 8))  # so that a model with random weights ends some of its turns
    responses = respond(
        model,
        questions,
        decode=tokenizer.decode,
        stop_ids=stop_ids,
        max_new_tokens=6,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=3,
    )
    prompts = [question.prompt_ids for question in questions]
    generated = generate(model, prompts, max_new_tokens=6, stop_ids=stop_ids, sampling=Sampling(temperature), seed=3)
    assert [response.ids for response in responses] == generated
    assert {response.is_complete for response in responses} == {True, False}
    for response in responses:
        assert response.is_complete == (response.ids[-1] in stop_ids)
        assert response.text == tokenizer.decode([i for i in response.ids if i not in stop_ids])


def test_what_is_counted():
    questions = [Question(task, "", [], "7") for task in ("sum", "sum", "sort", "sort", "sort")]
    responses = [
        Response([], "answer: 7", True),
        Response([], "working: 3+4=7\nanswer: 7", True),
        Response([], "answer: 8", True),
        Response([], "working: 1\nanswer: 7", False),
        Response([], "answer: 7", True),
    ]
    assert task_metrics(questions, responses) == {
        "tasks/exact_match": 3 / 5,
        "tasks/sort": 1 / 3,
        "tasks/sum": 1.0,
        "responses/complete": 4 / 5,
        "responses/bare": 3 / 5,
        "responses/working": 2 / 5,
    }
