"""Which of several responses to a prompt are kept, which prompts stay so that easy ones do not drown hard ones, and who
won where. Pure functions of scores; randomness is handed in."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_llm.data.pairs import best_against_worst
from lightning_llm.evaluation.config import RULES


@dataclass(frozen=True)
class Candidate:
    """A response to a prompt, the model that it is of and what a judge made of it."""

    text: str
    model: str
    is_complete: bool
    score: float | None = None  # none: nobody has judged it

    @property
    def is_whole(self) -> bool:
        """The model has said something, and to its end."""
        return self.is_complete and bool(self.text.strip())


@dataclass(frozen=True)
class Group:
    """A prompt with all its candidates, and the places of those that are kept."""

    task: str
    candidates: tuple[Candidate, ...]
    kept: tuple[int, ...] = ()

    def share_right(self, right_from: float | None) -> float | None:
        """Share of the candidates that score at least `right_from`: 1 is the easiest; None where nobody has judged, or
        where no score is right (`right_from` is None)."""
        scores = [candidate.score for candidate in self.candidates]
        if right_from is None or any(score is None for score in scores):
            return None
        return sum(score is not None and score >= right_from for score in scores) / len(scores)


# ---- of one prompt ----


def choose(
    candidates: Sequence[Candidate], rule: str, *, count: int, minimum: float | None, chance: random.Random
) -> list[int]:
    """Places of the candidates that are kept, best first.

    best        the highest scores. Equal ones are drawn among, so that no model wins by its place in the committee
    threshold   all that reach the minimum, at most `count` of them, drawn
    first       as they were drawn from the models: a control without any judge
    random      any: the same, over the whole committee

    What was cut off or says nothing is never kept, and of equal texts only one.

    Args:
        count: how many at most.
        minimum: a score below it is not kept; of `first` and `random` nothing is asked.

    Raises:
        ValueError: a rule that is none, or one that needs scores where there are none.
    """
    if rule not in RULES:
        raise ValueError(f"rule is one of {', '.join(RULES)}, is {rule!r}")
    places = [place for place, candidate in enumerate(candidates) if candidate.is_whole]
    if rule != "first":
        chance.shuffle(places)
    if rule in ("best", "threshold"):
        scores = {place: _score(candidates[place]) for place in places}
        if minimum is not None:
            places = [place for place in places if scores[place] >= minimum]
        if rule == "best":
            places.sort(key=lambda place: -scores[place])  # stable: equal ones stay as they were drawn
    different = {}
    for place in places:
        different.setdefault(candidates[place].text, place)
    return list(different.values())[:count]


def choose_pair(candidates: Sequence[Candidate], rule: str, *, chance: random.Random) -> tuple[int, int] | None:
    """Places of a chosen and a rejected response; None where no two differ.

    best     the highest score against the lowest (`data/pairs.py`), of equal ones any
    random   any two of different text: a control without any judge
    """
    whole = [place for place, candidate in enumerate(candidates) if candidate.is_whole]
    said = [place for place, candidate in enumerate(candidates) if candidate.text.strip()]
    chance.shuffle(whole)
    chance.shuffle(said)
    if rule == "random":
        others = [place for place in whole if candidates[place].text != candidates[whole[0]].text]
        return (whole[0], others[0]) if others else None
    return best_against_worst([_score(candidate) for candidate in candidates], whole, said) if whole else None


def _score(candidate: Candidate) -> float:
    if candidate.score is None:
        raise ValueError("a response has no score; judge it, or choose by the rule first or random")
    return candidate.score


def count_dropped(candidates: Sequence[Candidate], minimum: float | None) -> dict[str, int]:
    """How many candidates are never kept: cut off, empty (nothing is said), or below the minimum (of the others)."""
    whole = [candidate for candidate in candidates if candidate.is_whole]
    return {
        "cut off": sum(not candidate.is_complete for candidate in candidates),
        "empty": sum(candidate.is_complete and not candidate.is_whole for candidate in candidates),
        "below": 0 if minimum is None else sum((candidate.score or 0.0) < minimum for candidate in whole),
    }


# ---- of all prompts ----


def difficulty_class(share_right: float, bins: int) -> int:
    """0 where no response is right, otherwise 1 (hardest) to `bins` (easiest) by the share of right ones."""
    return math.ceil(share_right * bins - 1e-9)


def even_counts(there: Mapping[int, int], total: int) -> dict[int, int]:
    """How many are taken of each class so that they are as equal as can be, `total` together: the small ones give all
    they have, the others share the rest (water filling)."""
    taken, left = {}, min(total, sum(there.values()))
    for number, (name, count) in enumerate(sorted(there.items(), key=lambda entry: (entry[1], entry[0]))):
        taken[name] = min(count, left // (len(there) - number))
        left -= taken[name]
    return taken


def keep_share(classes: Sequence[int], share: float, chance: random.Random, *, balance: bool) -> list[int]:
    """Places of the rows that stay, in their order: a share of all, drawn from all alike or from each class alike.

    Args:
        classes: of each row.
        share: of the rows, in (0, 1].
        balance: draw equally many of each class, as far as it has them.
    """
    total = round(share * len(classes))
    if not balance:
        return sorted(chance.sample(range(len(classes)), total))
    counts = even_counts(Counter(classes), total)
    places: dict[int, list[int]] = defaultdict(list)
    for place, name in enumerate(classes):
        places[name].append(place)
    return sorted(place for name, count in counts.items() for place in chance.sample(places[name], count))


# ---- who won where ----


def who_won(groups: Sequence[Group], models: Sequence[str], *, right_from: float | None, bins: int) -> dict[str, Any]:
    """The table of a selection, by model, by task and by difficulty.

    Args:
        right_from: the score from which a response is right. None: scores only rank the responses to a prompt, so what
            is said of right ones is None, and there are no classes of difficulty.

    Returns:
        models: samples, mean score, share right, share of the prompts where it is among the best (ties count for all),
            and where it alone is right; rows kept of it.
        tasks, difficulty: prompts, share right, rows kept and how many of each model.
    """
    return {
        "models": {model: _of_model(model, groups, right_from) for model in models},
        "tasks": _by(groups, models, right_from, lambda group: group.task),
        "difficulty": {}
        if right_from is None
        else _by(groups, models, right_from, lambda group: _difficulty(group, right_from, bins)),
    }


def _of_model(model: str, groups: Sequence[Group], right_from: float | None) -> dict[str, float | None]:
    own = [[c for c in group.candidates if c.model == model] for group in groups]
    every = [candidate for candidates in own for candidate in candidates]
    scores = [candidate.score for candidate in every if candidate.score is not None]
    judged = len(scores) == len(every)
    best = alone = 0
    for group, candidates in zip(groups, own, strict=True):
        if judged and candidates:
            best += max(map(_score, candidates)) == max(map(_score, group.candidates))
            if right_from is not None:
                alone += {c.model for c in group.candidates if _score(c) >= right_from} == {model}
    return {
        "samples": len(every),
        "complete": _mean([candidate.is_complete for candidate in every]),
        "score": _mean(scores) if judged else None,
        "right": None if right_from is None or not judged else _mean([score >= right_from for score in scores]),
        "best_or_tied": best / len(groups) if judged else None,
        "right_alone": None if right_from is None or not judged else alone / len(groups),
        "kept": _kept(groups, model),
    }


def _by(groups: Sequence[Group], models: Sequence[str], right_from: float | None, name_of: Any) -> dict[str, Any]:
    classes: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        classes[name_of(group)].append(group)
    table = {}
    for name, some in sorted(classes.items()):
        shares = [share for group in some if (share := group.share_right(right_from)) is not None]
        by_model = {model: _kept(some, model) for model in models}
        table[name] = {
            "prompts": len(some),
            "right": _mean(shares),
            "kept": sum(by_model.values()),
            "kept_of": by_model,
        }
    return table


def _difficulty(group: Group, right_from: float, bins: int) -> str:
    """`0 right`, `up to 1/4 right`, ... in an order that sorts."""
    share = group.share_right(right_from)
    if share is None:
        return "not judged"
    name = difficulty_class(share, bins)
    return "none right" if name == 0 else f"up to {name}/{bins} right"


def _kept(groups: Sequence[Group], model: str) -> int:
    return sum(group.candidates[place].model == model for group in groups for place in group.kept)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
