"""Answers and SQuAD's exact match and F1 from a model's start and end logits.

The normalisation is that of SQuAD's official evaluation script, the search for spans that of BERT's
(https://github.com/google-research/bert, `run_squad.py`).
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jaxrmils.data.dataset import DataError
from jaxrmils.data.squad import Squad


@dataclass(frozen=True, eq=False)
class SquadMetrics:
    """Scores of each question, so that two models can be compared question by question.

    Args:
        questions: int64 `[scored]`, which of `Squad.questions`.
        exact: bool `[scored]`, the prediction equals an accepted answer.
        f1: float64 `[scored]`, in [0, 1], the best overlap with an accepted answer.
    """

    questions: np.ndarray
    exact: np.ndarray
    f1: np.ndarray

    @property
    def exact_match(self) -> float:
        """Mean exact match in percent."""
        return 100.0 * float(self.exact.mean())

    @property
    def mean_f1(self) -> float:
        """Mean F1 in percent."""
        return 100.0 * float(self.f1.mean())


def squad_predictions(
    squad: Squad,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    windows: np.ndarray | None = None,
    n_best: int = 20,
    max_answer_length: int = 30,
) -> dict[str, str]:
    """The best answer to each question.

    Of the `n_best` starts and ends of every window, those pairs count that lie in the paragraph,
    in order, and are at most `max_answer_length` tokens long; the one with the largest sum of
    logits over all windows of a question wins, the first of equals.

    Args:
        squad: the questions.
        start_logits, end_logits: `[windows, length]`.
        windows: integers, which of `squad.dataset`'s windows the logits belong to (those of a
            split); all by default. Every question must come with all of its windows.
        n_best: starts and ends looked at in a window.
        max_answer_length: tokens of the longest answer.

    Returns:
        Question id to answer, "" where no pair counts.

    Raises:
        DataError: the shapes do not fit, logits are not finite, or a question misses a window.
    """
    windows = np.arange(len(squad.dataset)) if windows is None else np.asarray(windows)
    start_logits, end_logits = np.asarray(start_logits), np.asarray(end_logits)
    expected = (len(windows), squad.offsets.shape[1])
    if start_logits.shape != expected or end_logits.shape != expected:
        raise DataError(
            f"{squad.dataset.name}: start logits {start_logits.shape} and end logits "
            f"{end_logits.shape}; expected {expected}, a row for each window"
        )
    if not (np.isfinite(start_logits).all() and np.isfinite(end_logits).all()):
        raise DataError(f"{squad.dataset.name}: logits are NaN or infinite")
    _check_all_windows(squad, windows)
    best: dict[int, tuple[float, str]] = {}
    for row in np.argsort(windows, kind="stable"):
        window = windows[row]
        number = int(squad.question_of[window])
        score, (first, last) = _best_span(
            start_logits[row], end_logits[row], squad.offsets[window], n_best, max_answer_length
        )
        text = squad.questions[number].context[first:last]
        if number not in best or score > best[number][0]:
            best[number] = (score, text)
    return {squad.questions[number].id: text for number, (_, text) in best.items()}


def squad_metrics(squad: Squad, predictions: Mapping[str, str]) -> SquadMetrics:
    """Exact match and F1 of predicted answers.

    Args:
        squad: the questions.
        predictions: question id to answer; questions without one are not scored.

    Returns:
        Scores in the order of `squad.questions`.

    Raises:
        DataError: there is no prediction, or one for an unknown question.
    """
    unknown = set(predictions) - {question.id for question in squad.questions}
    if unknown or not predictions:
        raise DataError(
            f"{squad.dataset.name}: {len(predictions)} predictions, {len(unknown)} of them for "
            f"questions that are not there {sorted(unknown)[:3]}; expected ids of its questions"
        )
    scored = [n for n, question in enumerate(squad.questions) if question.id in predictions]
    exact, f1 = [], []
    for number in scored:
        question = squad.questions[number]
        answer = predictions[question.id]
        accepted = [text for text, _ in question.answers]
        exact.append(any(normalize_answer(answer) == normalize_answer(text) for text in accepted))
        f1.append(max(answer_f1(answer, text) for text in accepted))
    return SquadMetrics(np.array(scored, np.int64), np.array(exact, bool), np.array(f1, np.float64))


def normalize_answer(text: str) -> str:
    """An answer in small letters, without punctuation, articles and superfluous blanks.

    >>> normalize_answer("The  Eiffel-Tower, a tower.")
    'eiffeltower tower'
    """
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def answer_f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall of an answer's words, after normalisation, in [0, 1].

    >>> answer_f1("the old town hall", "town hall of Bern")
    0.5714285714285715
    """
    predicted, true = normalize_answer(prediction).split(), normalize_answer(truth).split()
    shared = sum((collections.Counter(predicted) & collections.Counter(true)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(true)
    return 2 * precision * recall / (precision + recall)


def _best_span(
    start: np.ndarray, end: np.ndarray, offsets: np.ndarray, n_best: int, max_answer_length: int
) -> tuple[float, tuple[int, int]]:
    """Score and characters of a window's best answer; minus infinity and (0, 0) if it has none."""
    starts = np.argsort(-start, kind="stable")[:n_best, None]
    ends = np.argsort(-end, kind="stable")[None, :n_best]
    length = ends - starts + 1
    in_context = (offsets[starts, 0] >= 0) & (offsets[ends, 0] >= 0)
    counts = in_context & (length >= 1) & (length <= max_answer_length)
    if not counts.any():
        return -np.inf, (0, 0)
    sums = np.where(counts, start[starts] + end[ends], -np.inf)
    row, column = np.unravel_index(int(np.argmax(sums)), sums.shape)
    span = offsets[starts[row, 0], 0], offsets[ends[0, column], 1]
    return float(sums[row, column]), (int(span[0]), int(span[1]))


def _check_all_windows(squad: Squad, windows: np.ndarray) -> None:
    if np.unique(windows).size != windows.size:
        raise DataError(f"{squad.dataset.name}: windows repeats an index; expected each one once")
    questions = np.unique(squad.question_of[windows])
    needed = np.flatnonzero(np.isin(squad.question_of, questions))
    missing = np.setdiff1d(needed, windows)
    if missing.size:
        question = squad.questions[squad.question_of[missing[0]]]
        raise DataError(
            f"{squad.dataset.name}: question {question.id} misses window {missing[0]}; a question "
            "is answered from all of its windows: keep them together, as splits by groups do"
        )
