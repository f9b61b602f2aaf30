"""Workers driven call by call: order, ratios, refusals; and that every library computes the same loss."""

import pytest

pytestmark = pytest.mark.usefixtures("benchmarks")
CALLS = 2


def settings(folder):
    import workload

    return {
        "model": workload.save_model(folder / "model", seed=0),
        "reference": workload.save_model(folder / "reference", seed=1),
        "learning_rate": 1e-4,
        "beta": 0.1,
        "products": [(64, 32, 16)],
    }


def require(*peers):
    from peers.environments import lacks

    for peer in peers:
        if reason := lacks(peer):
            pytest.skip(reason)


def losses(measurement):
    return {name: [call["loss"] for call in calls] for name, calls in measurement.calls.items()}


def test_our_bare_loop_and_lightnings_take_the_same_steps(tmp_path):
    import workload
    from interleave import Task, interleaved

    documents = {"documents": workload.mixed_documents(CALLS, documents=2)}
    tasks = {"bare": Task("ours", "pretrain"), "lightning": Task("ours", "pretrain_with_lightning")}
    found = interleaved(tasks, settings(tmp_path) | documents, tmp_path, calls=CALLS, warm_up=0)
    assert losses(found)["bare"] == pytest.approx(losses(found)["lightning"], abs=1e-6)
    for worker in tasks:
        figures = found.figures(worker)
        assert figures["cpu_seconds"]["median"] > 0
        assert figures["peak_bytes"] > 6.5e6 * 4 * 4  # weights, gradients, two moments, in float32
        assert figures["versions"]["torch"]


def test_a_worker_that_fails_says_why(tmp_path):
    from interleave import Refused, Task, interleaved

    with pytest.raises(Refused, match="KeyError: 'products'"):
        interleaved({"limit": Task("ours", "limit")}, {}, tmp_path, calls=1)


def test_ratios_pair_neighbouring_calls():
    from interleave import Measurement

    seconds = {"ours": [1.0, 10.0, 100.0], "peer": [2.0, 30.0, 400.0]}
    calls = {name: [{"cpu": cpu, "wall": cpu, "peak": 6 * cpu} for cpu in times] for name, times in seconds.items()}
    found = Measurement({name: {} for name in calls}, {}, calls)
    assert found.ratios("ours", "peer") == {"median": 3.0, "lower_quartile": 2.5, "upper_quartile": 3.5}
    assert found.memory_share("ours", "peer") == 0.25


def test_unequal_losses_are_refused():
    from interleave import Measurement, Refused, require_equal_losses

    found = Measurement({}, {"ours": [{"loss": 9.0}], "peer": [{"loss": 9.00005}], "limit": [{}]}, {})
    assert require_equal_losses(found) == {"ours": 9.0, "peer": 9.00005}
    found.warm_up["peer"] = [{"loss": 9.0002}]
    with pytest.raises(Refused, match="differ"):
        require_equal_losses(found)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("rows", ["full_rows", "mixed_documents"])
def test_pre_training_losses_are_the_peers(rows, tmp_path):
    import workload
    from interleave import Task, interleaved

    require("litgpt", "transformers")
    tasks = {"ours": Task("ours", "pretrain"), "transformers": Task("in_transformers", "pretrain", "transformers")}
    if rows == "full_rows":  # LitGPT neither pads nor masks
        tasks["litgpt"] = Task("in_litgpt", "pretrain", "litgpt")
    documents = {"documents": getattr(workload, rows)(CALLS, 2)}
    found = losses(interleaved(tasks, settings(tmp_path) | documents, tmp_path, calls=CALLS, warm_up=0))
    for peer in tasks:
        assert found[peer] == pytest.approx(found["ours"], abs=1e-4)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize(("job", "precomputed"), [("sft", False), ("dpo", False), ("dpo", True), ("reward", False)])
def test_post_training_losses_are_trls(job, precomputed, tmp_path):
    import workload
    from interleave import Task, interleaved

    require("transformers")
    kind = "conversations" if job == "sft" else "pairs"
    rows = {kind: getattr(workload, kind)(CALLS, 2)}
    tasks = {"ours": Task("ours", job), "trl": Task("in_trl", job, "transformers")}
    given = settings(tmp_path) | rows | {"precomputed": precomputed}
    if job == "reward":
        given["model"] = workload.save_reward_model(tmp_path / "reward_model", seed=0)
    found = losses(interleaved(tasks, given, tmp_path, calls=CALLS, warm_up=0))
    assert found["trl"] == pytest.approx(found["ours"], abs=1e-4)
